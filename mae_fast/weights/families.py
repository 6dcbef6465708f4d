"""Names of each family of models, and the one table in the middle.

The table in the middle is the official mae_st's: its names, q, k and v apart. A family is one
mapping from these names to its own; `read` and `write` go through it in the two directions.
"""

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mae_fast.errors import CheckpointError

_BLOCK = ("norm1", "attn.q", "attn.k", "attn.v", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
_TOKENS = ("cls_token", "decoder_cls_token", "mask_token")
_POSITIONS = ("", "_spatial", "_temporal", "_class")
TARGET_ENCODER = "target_encoder."  # the encoder's running average, beside it in a run's checkpoint


@dataclass(frozen=True)
class Family:
    """What a family calls the parts of mae_st; a part that is not named has the same name.

    `encoder` is the prefix that a file of the encoder alone may lack. `biases`: of q, k and v
    ("qkv"), of q and v only ("qv"), or one fused product with all three ("fused") or, as VideoMAE
    has it, with q's and v's beside it ("fused_qv"). `positions`: learned and of one form for both
    halves ("learned"), learned and of any form ("any"), or fixed sines and cosines ("sincos").
    `unsaid`: what its weights do not tell. `classifier`: it has one of videos.
    """

    title: str
    parts: dict[str, str] = field(default_factory=dict)
    block: dict[str, str] = field(default_factory=dict)
    encoder: str = ""
    biases: str = "qkv"
    positions: str = "learned"
    cls: bool = True
    unsaid: str = ""
    classifier: bool = True

    def part(self, name: str, layer: int = 0) -> str:
        return self.parts.get(name, name).format(depth=layer)


FAMILIES = {
    "mae_st": Family(
        "the official MAE-ST, and mae_fast",
        unsaid="16 decoder heads by default, eps 1e-6, pixels of mean 0.45 and std 0.225",
    ),
    "slowfast": Family(
        "PySlowFast's MaskMViT",
        parts={
            "decoder_blocks": "pred_head.transforms.0",
            "decoder_norm": "pred_head.transforms.0.{depth}",  # the layer after the last block
            "decoder_pred": "pred_head.projections.0",
            "decoder_pos_embed_spatial": "dec_pos_embed_spatial",
            "decoder_pos_embed_temporal": "dec_pos_embed_temporal",
            "decoder_pos_embed_class": "dec_pos_embed_class",
            "head": "head.projection",
        },
        biases="fused",
        positions="any",
        unsaid="decoder heads of 64 always, eps 1e-6, pixels of mean 0.45 and std 0.225",
    ),
    "videomae": Family(
        "VideoMAE and VideoMAE V2 of their authors",
        parts={
            "patch_embed.proj": "encoder.patch_embed.proj",
            "pos_embed": "encoder.pos_embed",  # with use_learnable_pos_emb only
            "blocks": "encoder.blocks",
            "norm": "encoder.norm",
            "decoder_embed": "encoder_to_decoder",
            "decoder_blocks": "decoder.blocks",
            "decoder_norm": "decoder.norm",
            "decoder_pred": "decoder.head",
        },
        encoder="encoder.",
        biases="fused_qv",
        positions="sincos",
        cls=False,
        unsaid="decoder heads of 64 by default, eps 1e-6, pixels of ImageNet's mean and std",
    ),
    "transformers": Family(
        "transformers' VideoMAE",
        parts={
            "patch_embed.proj": "videomae.embeddings.patch_embeddings.projection",
            "blocks": "videomae.encoder.layer",
            "norm": "videomae.layernorm",
            "decoder_embed": "encoder_to_decoder",
            "decoder_blocks": "decoder.decoder_layers",
            "decoder_norm": "decoder.norm",
            "decoder_pred": "decoder.head",
            "head": "classifier",
        },
        block={
            "norm1": "layernorm_before",
            "attn.q": "attention.attention.query",
            "attn.k": "attention.attention.key",
            "attn.v": "attention.attention.value",
            "attn.proj": "attention.output.dense",
            "norm2": "layernorm_after",
            "mlp.fc1": "intermediate.dense",
            "mlp.fc2": "output.dense",
        },
        encoder="videomae.",
        biases="qv",
        positions="sincos",
        cls=False,
        unsaid="decoder heads of 64 by default, layer_norm_eps 1e-12 by default (and 1e-5 in "
        "decoder.norm), pixels of ImageNet's mean and std",
    ),
    "timm-vit": Family(
        "timm's VisionTransformer of images",
        biases="fused",
        positions="any",
        unsaid="eps 1e-6, pixels as the model's own configuration has them",
        classifier=False,  # of images
    ),
}


def identify(state: dict[str, Tensor]) -> str:
    """The family of a table of weights, by its names. CheckpointError where it is none of them."""
    if any(n.endswith("patch_embeddings.projection.weight") for n in state):
        return "transformers"
    if "encoder.patch_embed.proj.weight" in state or any(n.endswith("attn.q_bias") for n in state):
        return "videomae"
    patch = state.get("patch_embed.proj.weight")
    if patch is not None and "blocks.0.attn.qkv.weight" in state:
        return "timm-vit" if patch.dim() == 4 else "slowfast"
    if patch is not None and "pred_head.projections.0.weight" in state:
        return "slowfast"
    if patch is not None and "blocks.0.attn.q.weight" in state:
        return "mae_st"
    raise CheckpointError(
        f"weights of no known family ({', '.join(FAMILIES)}): {', '.join(list(state)[:3])}, ..."
    )


def strip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same table without what compilers and wrappers (DDP, FSDP, Lightning) put into names."""
    plain = {}
    for name, value in state.items():
        name = re.sub(r"\b(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.", "", name)
        name = re.sub(r"^((module|model|backbone)\.)+", "", name)
        if name in plain:
            raise CheckpointError(f"two tensors are called {name} without their wrappers' prefixes")
        plain[name] = value
    return plain


def read(state: dict[str, Tensor], family: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the table under mae_st's names, what has no place in it) of one family's weights."""
    f, state = FAMILIES[family], _apart(state)
    if family == "transformers":  # before version 5 its q and v biases stood outside of q and v
        spelled = ((r"\.q_bias$", ".query.bias"), (r"\.v_bias$", ".value.bias"))
        for old, new in spelled:
            state = {re.sub(old, new, name): value for name, value in state.items()}
    bare = f.encoder and f.part("patch_embed.proj") + ".weight" not in state
    depth, decoder_depth = (_depth(state, f, part, bare) for part in ("blocks", "decoder_blocks"))
    if family == "timm-vit":  # an image MAE's decoder predicts no clip
        decoder_depth = 0
    table, rest = {}, dict(state)
    for neutral, theirs in _names(f, depth, decoder_depth).items():
        theirs = theirs.removeprefix(f.encoder) if bare else theirs
        if theirs in rest:
            table[neutral] = rest.pop(theirs)
    if "patch_embed.proj.weight" not in table or not depth:
        raise CheckpointError(f"these are no weights of {f.title}: {', '.join(list(state)[:3])}")
    if not decoder_depth:
        rest |= {n: table.pop(n) for n in list(table) if n.startswith(("decoder_", "mask_token"))}
    return table, rest


def write(table: dict[str, Tensor], family: str, apart: bool = False) -> dict[str, Tensor]:
    """The family's own names of a table that holds nothing it has no place for. apart: q, k and v
    stay three products in a family that has them in one."""
    f = FAMILIES[family]
    names = _names(f, *(depths(table)))
    state = {names[name]: value for name, value in table.items()}
    if family == "videomae" and "head.weight" in table:  # its classifier is no part `encoder`
        state = {name.removeprefix(f.encoder): value for name, value in state.items()}
    return _fused(state, f.biases) if f.biases.startswith("fused") and not apart else state


def depths(table: dict[str, Tensor]) -> tuple[int, int]:
    """Blocks of the encoder and of the decoder (0 without one) in a table of mae_st's names."""
    f = FAMILIES["mae_st"]
    return _depth(table, f, "blocks"), _depth(table, f, "decoder_blocks")


def _names(f: Family, depth: int, decoder_depth: int) -> dict[str, str]:
    """{mae_st's name: the family's} of every tensor that models of these depths may have."""
    stems = {"patch_embed.proj": f.part("patch_embed.proj")}
    for half, blocks in (("", depth), ("decoder_", decoder_depth)):
        for i in range(blocks):
            for part in _BLOCK:
                theirs = f"{f.part(half + 'blocks')}.{i}.{f.block.get(part, part)}"
                stems[f"{half}blocks.{i}.{part}"] = theirs
        stems[half + "norm"] = f.part(half + "norm", blocks)
    # The last two are a fine-tuned classifier's.
    parts = ("decoder_embed", "decoder_pred", "fc_norm", "head")
    stems |= {part: f.part(part) for part in parts if f.classifier or part not in parts[2:]}
    names = {name: f.part(name) for name in _TOKENS}
    for half in ("", "decoder_"):
        positions = [f"{half}pos_embed{form}" for form in _POSITIONS]
        names |= {name: f.part(name) for name in positions}
    return names | {f"{a}.{x}": f"{b}.{x}" for a, b in stems.items() for x in ("weight", "bias")}


def _depth(state: dict[str, Tensor], f: Family, part: str, bare: bool = False) -> int:
    prefix = f.part(part).removeprefix(f.encoder) if bare else f.part(part)
    depth = 0
    while f"{prefix}.{depth}.{f.block.get('norm1', 'norm1')}.weight" in state:
        depth += 1
    return depth


def _apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fused products and biases of q, k and v in three, as copies: they can be saved one by one."""
    apart = {}
    for name, value in state.items():
        stem, _, kind = name.rpartition(".")
        if stem.endswith("attn.qkv") and value.dim() and len(value) % 3 == 0:
            for one, part in zip("qkv", value.chunk(3), strict=True):
                apart[f"{stem[:-3]}{one}.{kind}"] = part.clone()
        elif stem.endswith("attn") and kind in ("q_bias", "v_bias"):
            apart[f"{stem}.{kind[0]}.bias"] = value
        else:
            apart[name] = value
    return apart


def _fused(state: dict[str, Tensor], biases: str) -> dict[str, Tensor]:
    """The inverse of `_apart`; k's bias counts as zero where only q's and v's are there."""
    fused = {}
    for name, value in state.items():
        stem, _, kind = name.rpartition(".")
        one, attn = stem.rpartition(".")[2], stem.rpartition(".")[0]
        if not attn.endswith("attn") or one not in ("q", "k", "v"):
            fused[name] = value
        elif kind == "bias" and biases == "fused_qv":
            fused[f"{attn}.{one}_bias"] = value
        elif one == "q":
            three = [state[f"{attn}.{x}.{kind}"] for x in "qkv"]
            fused[f"{attn}.qkv.{kind}"] = torch.cat(three)
    return fused
