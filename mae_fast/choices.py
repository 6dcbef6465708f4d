"""What a run chooses by its settings and its machine, and says where it is not as asked."""

import logging

import torch

from mae_fast import graph, memory
from mae_fast.config import Config
from mae_fast.distributed import World

log = logging.getLogger("mae_fast")


def cuda_graph(cfg: Config, world: World, apart: bool) -> bool:
    """Whether the step is to be CUDA graphs, and can be. `apart`: each rank has a part of the
    weights."""
    how, device = cfg.train.cuda_graph, world.device
    reason = graph.why_not(device)
    if not reason and apart:
        reason = "what parted weights need of other processes is not captured"
    if not reason and how == "auto" and world.size > 1:
        reason = f'with {world.size} processes it is untried on GPUs; "on" tries it'
    if cfg.model.target == "tokens":
        reason = reason or "the tokenizer may do what a capture does not permit"
    if reason and (how == "on" or (how == "auto" and device.type == "cuda")):
        log.warning("train.cuda_graph is not used: %s", reason)
    return how != "off" and not reason


def keep(cfg: Config, device: torch.device) -> bool:
    """Whether a GPU holds norms and activations too (memory.py); else they are made again in
    backward."""
    if device.type != "cuda":
        return False
    clips = cfg.train.batch_size * cfg.data.repeat_aug * cfg.mask.per_clip
    has = torch.cuda.get_device_properties(device).total_memory
    p = 2 if cfg.train.precision == "bf16" else 4
    return memory.keeps(cfg.model, clips, cfg.mask.ratio, p, has)
