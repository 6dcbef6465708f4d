"""One adapter a family of models: which parts it has, whether they fit, how its forward is fused.

An adapter is a module:
    FAMILY       its name
    SOURCE       whose model it is, in a line
    PARTS        names of modules and parameters by which the family is recognised
    CHANNEL_DIM  where a clip [B, ..., H, W] has its channels
    WRITTEN      attributes of the model that its forward writes (none: may be left out)
    check(model) -> list[Finding]: each part, compared with what the fused forward computes; a part
        with `own` is a module that `forward` calls as it is. It is made again whenever anything
        about the model has changed (a hook, an attribute, a module, training)
    sample(model, dtype) -> the arguments of a call with one clip of noise, by which both forwards
        are compared where there is no batch yet: under torch.compile, in nn.DataParallel
    forward(model, pixels, ...) -> what the model's own forward gives for the same arguments,
        through mae_fast.forward. Parameters are read from the modules at every call. `pixels` says
        how a uint8 clip is read (None: there are none). Raises Unfused for a call that is left to
        the model's own forward.
"""

import operator
from types import ModuleType

from torch import Tensor, nn

from mae_fast.adapters import (
    mae_st,
    mae_st_classifier,
    slowfast,
    transformers,
    transformers_classifier,
    transformers_encoder,
    videomae,
    videomae_classifier,
    videomae_v2,
)
from mae_fast.adapters.parts import Finding

FAMILIES: dict[str, ModuleType] = {
    adapter.FAMILY: adapter
    for adapter in (
        *(mae_st, slowfast, videomae, videomae_v2, transformers, transformers_encoder),
        *(mae_st_classifier, videomae_classifier, transformers_classifier),
    )
}


def find(model: nn.Module) -> tuple[ModuleType | None, list[Finding]]:
    """(the adapter whose parts the model has, what it finds); (None, what is missing) without one.

    Of several adapters the one that refuses the least.
    """
    missing = {f: [p for p in a.PARTS if not _has(model, p)] for f, a in FAMILIES.items()}
    found = [(FAMILIES[f], FAMILIES[f].check(model)) for f, parts in missing.items() if not parts]
    if not found:
        what = [Finding(f, f"there is no {', no '.join(p)}") for f, p in missing.items()]
        return None, what
    return min(found, key=lambda pair: sum(f.why_not is not None for f in pair[1]))


def _has(model: nn.Module, part: str) -> bool:
    """There is a module or parameter of this name, also where its block is wrapped by another."""
    try:
        return isinstance(operator.attrgetter(part)(model), nn.Module | Tensor)
    except AttributeError:
        return False
