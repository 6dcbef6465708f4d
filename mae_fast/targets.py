"""What hidden tokens are asked for where a clip's pixels do not tell: classes that a frozen
tokenizer gives patches, or features of the encoder's own running average (V-JEPA's targets)."""

import copy
import hashlib
import importlib

import torch
from torch import Tensor, nn

from mae_fast.errors import ConfigError

ENCODER = ("patch_embed", "blocks", "norm", "cls_token", "pos_embed")  # and pos_embed_...


class Tokenizer:
    """A frozen module, in eval mode and in fp32: module(clips [B, C, T, H, W], fp32 in [0, 1]) ->
    the class of each patch, integers [B, t, h, w] from 0 on. No part of a model's state."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module.eval().requires_grad_(False)

    @classmethod
    def find(cls, entry: str) -> "Tokenizer":
        """What `package.module:callable` gives, called without arguments. ConfigError where there
        is none, or no module."""
        name, _, attribute = entry.partition(":")
        try:
            made = importlib.import_module(name)
            for part in attribute.split("."):
                made = getattr(made, part)
            made = made()
        except Exception as e:  # whatever a stranger's code raises
            said = " ".join(str(e).split())
            raise ConfigError(f"model.tokenizer {entry}: {type(e).__name__}: {said}") from e
        if not isinstance(made, nn.Module):
            raise ConfigError(f"model.tokenizer {entry} must give a module, got {type(made)}")
        return cls(made)

    @torch.no_grad()
    def __call__(self, clips: Tensor, grid: tuple[int, int, int], vocabulary: int) -> Tensor:
        """Classes [B, L] in the order of patches. ValueError where they do not fit; on a CPU also
        for a class that is not in the vocabulary, which a GPU finds as it takes the loss."""
        with torch.autocast(clips.device.type, enabled=False):
            ids = self.module(clips)
        expected = (len(clips), *grid)
        if ids.shape != expected or ids.is_floating_point():
            raise ValueError(
                f"a tokenizer must give integers {list(expected)}, got {ids.dtype} "
                f"{list(ids.shape)}"
            )
        if ids.device.type == "cpu" and ids.numel():
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= vocabulary:
                raise ValueError(
                    f"a tokenizer gives classes {low} to {high}, model.vocabulary is {vocabulary}"
                )
        return ids.flatten(1).long()

    def digest(self) -> str:
        """Of its weights: another tokenizer of the same name is told by it."""
        digest = hashlib.sha256()
        for name, value in sorted(self.module.state_dict().items()):
            value = value.detach().cpu().contiguous()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            if value.numel():
                digest.update(value.reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]


def copy_of_encoder(model: nn.Module) -> nn.Module:
    """A copy of the encoder under its own names, which takes no gradient."""
    found = nn.Module()
    for name, child in model.named_children():
        if name in ENCODER:
            found.add_module(name, copy.deepcopy(child))
    for name, p in model.named_parameters(recurse=False):
        if name.startswith(ENCODER):
            found.register_parameter(name, copy.deepcopy(p))
    return found.requires_grad_(False)


@torch.no_grad()
def follow(model: nn.Module, momentum: float, norm: Tensor) -> None:
    """Move the averaged encoder after an update: momentum of itself, the rest of the encoder.

    Not after an update whose gradients' norm is not finite: it changed nothing. Never waits.
    """
    new = norm.isfinite() * (1 - momentum)
    encoder = dict(model.named_parameters())
    for name, p in model.target_encoder.named_parameters():
        p.lerp_(encoder[name], new.to(p.dtype))
