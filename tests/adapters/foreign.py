"""A model as other people have it, written from the specification: what accelerate is tried on."""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import mae_fast
from mae_fast.adapters import own
from mae_fast.bench.baselines import OfficialMAE
from mae_fast.config import ModelConfig


class MaskedAutoencoderViT(OfficialMAE):
    """The official MAE-ST under all of its names: submodules, settings, forward's arguments."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__(cfg)
        self.sep_pos_embed, self.cls_embed = cfg.sep_pos_embed, cfg.cls_embed
        self.norm_pix_loss, self.pred_t_dim = cfg.norm_pix_loss, cfg.pred_t_dim
        self.t_pred_patch_size = self.pred_t_patch
        self.patch_embed.input_size = cfg.grid
        self.patch_embed.frames = cfg.num_frames
        self.patch_embed.img_size = (cfg.img_size, cfg.img_size)
        for block in (*self.blocks, *self.decoder_blocks):
            block.attn.num_heads = block.attn.heads
            block.attn.proj_drop, block.drop_path = nn.Dropout(0.0), nn.Identity()
            block.mlp.act = nn.GELU()

    def forward(self, imgs: Tensor, mask_ratio: float = 0.75) -> tuple[Tensor, Tensor, Tensor]:
        return super().forward(imgs, mask_ratio)


class Parallel(nn.Module):
    """The parts of a block, put together otherwise."""

    def __init__(self, block):
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)

    def forward(self, x):
        return x + self.attn(self.norm1(x)) + self.mlp(self.norm2(x))


def make(cfg: ModelConfig, dtype: torch.dtype = torch.float32) -> MaskedAutoencoderViT:
    """The model with values that no part of it can hide."""
    torch.manual_seed(0)
    model = MaskedAutoencoderViT(cfg).to(dtype)
    for p in model.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    return model


def clips(cfg: ModelConfig, n: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    """Float clips [n, 3, T, H, W]."""
    generator = torch.Generator().manual_seed(1)
    size = (n, 3, cfg.num_frames, cfg.img_size, cfg.img_size)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)


def run(model: nn.Module, *args, seed: int = 3, **kwargs):
    """((loss, pred, mask), gradients by name) of one step from a seed."""
    model.zero_grad()
    torch.manual_seed(seed)
    out = model(*args, **kwargs)
    out[0].backward()
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return tuple(t.detach() for t in out), grads


def relative(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs| in fp64."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm())


def worst(ours, theirs) -> dict[str, float]:
    """The greatest relative differences of two `run`s: of loss, pred and the gradients.

    A key bias has no gradient but rounding: a constant added to every key changes no softmax.
    """
    (ours, our_grads), (theirs, their_grads) = ours, theirs
    assert torch.equal(ours[2], theirs[2]) and our_grads.keys() == their_grads.keys()
    names = [n for n in their_grads if not n.endswith("attn.k.bias")]
    grads = max(relative(our_grads[n], their_grads[n]) for n in names)
    return {
        "loss": relative(ours[0], theirs[0]),
        "pred": relative(ours[1], theirs[1]),
        "gradients": grads,
    }


def assert_close(ours, theirs, limit: float = 2e-5) -> None:
    """Two `run`s agree to `limit`, relatively."""
    differences = worst(ours, theirs)
    assert max(differences.values()) < limit, differences


def process(rank: int, cfg: ModelConfig, store: str) -> None:
    """One of two gloo processes: steps of SGD in a wrapper, with and without the one line."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for how in ("ddp", "ddp_then_accelerate", "fsdp2", "fsdp2_blocks", "fsdp1"):
        without, with_it = (_losses(rank, how, cfg, line) for line in (False, True))
        torch.testing.assert_close(with_it, without, rtol=1e-5, atol=0, msg=how)
        assert len(set(with_it)) == len(without)
    dist.destroy_process_group()


def _losses(rank: int, how: str, cfg: ModelConfig, line: bool) -> list[float]:
    model = make(cfg)
    if line and how != "ddp_then_accelerate":
        mae_fast.accelerate(model)
    if how == "fsdp2_blocks":
        for block in (*model.blocks, *model.decoder_blocks):
            _shard(block)
            assert own.why_itself(block) is None  # it is fused, between its hooks
    if how == "fsdp1":
        blocks = ModuleWrapPolicy({type(model.blocks[0])})
        on = dict(device_id=torch.device("cpu"), use_orig_params=True)
        wrapped = FullyShardedDataParallel(model, auto_wrap_policy=blocks, **on)
    elif how.startswith("fsdp2"):
        wrapped = _shard(model)
    else:
        wrapped = nn.parallel.DistributedDataParallel(model)
    if line and how == "ddp_then_accelerate":
        mae_fast.accelerate(wrapped.module)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=1e-2)
    video = clips(cfg, 4)[2 * rank : 2 * rank + 2]
    losses = []
    for step in range(20 if how == "fsdp2_blocks" else 3):
        torch.manual_seed(10 * step + rank)
        loss = wrapped(video, mask_ratio=0.7)[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _shard(module: nn.Module) -> nn.Module:
    return fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
