"""Frozen features, and what is read off them: kNN, a linear probe, an attentive probe.

`features` runs the encoder once over all views of an index; `probe` then takes minutes. Heads of
every rate and decay of a grid are trained at once, on the same batches; the one that is kept is
chosen on a part of the training videos, and only then sees the test.
"""

import itertools
import json
import logging
import math
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import tyro
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mae_fast import checkpoint, weights
from mae_fast.classifier import FAMILIES, ClassifierConfig, FamilyName, VideoClassifier
from mae_fast.config import preset
from mae_fast.data import VideoRow, read_index
from mae_fast.distributed import check_device
from mae_fast.errors import CheckpointError, ConfigError, DataError
from mae_fast.fields import check_seed, positive
from mae_fast.files import check_output, write, writing
from mae_fast.forward import Affine, apply_layer, transformer_block
from mae_fast.model import MaskedAutoencoder, Mlp, TransformerBlock
from mae_fast.ops.attention import attention
from mae_fast.ops.layer_norm import layer_norm
from mae_fast.tasks.clips import Views, classes_of, normalised, numbers_of
from mae_fast.tasks.config import ClipsConfig, Sampling
from mae_fast.weights import classifier as into

log = logging.getLogger("mae_fast")

Kind = Literal["all", "knn", "linear", "attentive"]
TEMPERATURE = 0.07
HELD_OUT = 0.2  # of the training videos of each class, to choose a head by


def features(
    source: Annotated[str, tyro.conf.arg(name="checkpoint", metavar="CHECKPOINT")],
    index: Annotated[str, tyro.conf.arg(metavar="INDEX")],
    /,
    output: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="OUT.safetensors")],
    tokens: bool = False,
    model: str = "",
    family: FamilyName = "mae_st",
    temporal: int = 1,
    spatial: int = 1,
    short_side: int = 0,
    sampling: Sampling = "seconds",
    sampling_rate: int = 4,
    workers: int = 2,
    device: Literal["cpu", "cuda"] = "cpu",
) -> None:
    """Write what a frozen encoder makes of every view of every video of an index: the mean of its
    patches after its last norm, or with --tokens all of them, in bf16.

    Args:
        source: a run's checkpoint, or weights of any family (then name --model and --family).
        index: the videos, with labels where there are any.
        output: the file to write.
        tokens: keep every patch's, which the attentive probe needs.
        model: a preset, for weights that do not say which model they are.
        family: whose pixels and positions, for such weights and fine-tuned runs; a slowfast run
            says so itself.
        temporal: clips spread over a video.
        spatial: square crops, 1 or 3.
        short_side: pixels of the short side; 0: the model's own side.
        sampling: how a clip lies in its video: seconds (MAE-ST), frames (VideoMAE) or uniform.
        sampling_rate: frames from one of a clip to the next, at 30 a second with `seconds`.
        workers: processes that decode.
        device: where the encoder runs.
    """
    check_output(output, source, index)
    check_device(device)
    net = encoder(source, model, family).to(device)
    cfg = ClipsConfig(sampling=sampling, sampling_rate=sampling_rate, workers=workers)
    m = net.cfg.model
    views = Views(
        read_index(index, broken=True),
        cfg,
        m.num_frames,
        short_side or m.img_size,
        temporal,
        spatial,
    )
    found, bad = features_of(net, views, tokens)
    names = {
        "paths": json.dumps([r.path for r in views.rows]),
        "labels": json.dumps([r.label for r in views.rows]),
        "checkpoint": source,
    }
    path = Path(output)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_tensors(path, {"features": found}, names)
    for name, reason in bad[:20]:
        print(f"bad video, its features are NaN: {name}: {reason}")
    print(f"{path}: {' x '.join(map(str, found.shape))} {str(found.dtype).removeprefix('torch.')}")


def encoder(source: str, model: str = "", family: FamilyName = "mae_st") -> VideoClassifier:
    """A frozen encoder with its own last norm; its head means nothing."""
    found, table = weights._read(Path(source))
    if not found and not model:
        raise ConfigError(f"{source} does not say which model it is: name it (--model vit_base)")
    if found:
        family = "slowfast" if found.variant == "slowfast" else family
    learned = any("pos_embed" in name for name in table)
    if learned != FAMILIES[family].learned:
        has = "has learned positions" if learned else "has no positions, as fixed ones are not kept"
        raise ConfigError(f"{source} {has}: it is not of family {family}, name its own (--family)")
    # Of one class: a head that no file has.
    cfg = ClassifierConfig(found or preset(model), family, 1, pool="first")
    net = VideoClassifier(cfg).eval().requires_grad_(False)
    into.load(net, source)
    return net


def encoder_of(model: MaskedAutoencoder) -> VideoClassifier:
    """The encoder of a model as it is now, frozen: on the model's own tensors, not on copies."""
    cfg = ClassifierConfig(model.cfg, model.cfg.variant, 2, pool="first")
    with torch.random.fork_rng(devices=[]):
        net = VideoClassifier(cfg).eval().requires_grad_(False)
    theirs = {n: t for n, t in model.state_dict().items() if n in net.state_dict()}
    missing, _ = net.load_state_dict(theirs, strict=False, assign=True)
    if set(missing) != {"head.weight", "head.bias"}:
        raise ValueError(f"not an encoder of a masked autoencoder: {missing} are missing")
    return net.requires_grad_(False).to(next(iter(theirs.values())).device)


def judge(
    net: VideoClassifier,
    train: list[VideoRow],
    test: list[VideoRow],
    clips: ClipsConfig,
    kinds: Collection[str] = ("knn", "linear"),
    *,
    epochs: int = 20,
    seed: int = 0,
    grid: list[tuple[float, float]] | None = None,
    waiting: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """{kind: accuracy on `test`} of probes ("knn", "linear", "attentive") that learn from what the
    frozen encoder makes of `train`: videos with labels, of each one view in its middle.

    grid: (rate, decay) of the attentive heads, by default GRID. The state of torch's random numbers
    is as it was afterwards. `waiting` is called while videos decode; it may raise.
    """
    m, classes, pooled, tokens, labels = net.cfg.model, classes_of(train), [], [], []
    for rows in (train, test):
        views = Views(rows, clips, m.num_frames, clips.short_side or m.img_size, 1, 1)
        found, bad = features_of(net, views, "attentive" in kinds, waiting=waiting)
        if bad:
            said = "%d of %d videos do not decode, left out of training and wrong in the test: %s"
            log.warning("probe: " + said, len(bad), len(rows), ": ".join(bad[0]))
        if found.dim() == 4:
            tokens.append(found)
            found = found.float().mean(dim=2)
        pooled.append(found)
        labels.append(torch.tensor(numbers_of(rows, classes), device="cpu"))
    n, found = len(classes), {}
    with torch.random.fork_rng(devices=[]):
        if "knn" in kinds:
            found["knn"] = accuracy(knn(pooled[0], labels[0], pooled[1], n, 10), labels[1])
        if "linear" in kinds:
            found |= linear(*pooled, *labels, n, epochs=5 * epochs, seed=seed)
        if "attentive" in kinds:
            found |= attentive(*tokens, *labels, n, epochs, seed, grid or GRID)
    return {kind: found[kind] for kind in kinds}


@torch.no_grad()
def features_of(
    net: VideoClassifier,
    views: Views,
    tokens: bool = False,
    size: int = 8,
    waiting: Callable[[], None] = lambda: None,
) -> tuple[Tensor, list[tuple[str, str]]]:
    """(features [N, V, D] fp32, or with `tokens` [N, V, L, D] bf16, (path, reason) of bad videos,
    whose features are NaN)."""
    device, bad, found = net.head.weight.device, [], []
    m, norm = net.cfg.model, getattr(net, net.norm_name)
    empty = (len(views), *((m.num_patches,) if tokens else ()), m.embed_dim)
    kind = torch.bfloat16 if tokens else torch.float32
    for batch in views.of(range(len(views.rows)), waiting):
        if batch.bad:
            bad += batch.bad
            found.append(torch.full(empty, torch.nan, dtype=kind, device="cpu"))
            continue
        parts = []
        for part in normalised(batch.to(device), net).split(size):
            x = layer_norm(net.tokens(part), norm.weight, norm.bias, norm.eps)
            x = x[:, int(net.has_cls) :]
            parts.append(x if tokens else x.mean(dim=1))
        found.append(torch.cat(parts).to("cpu", kind))
    return torch.stack(found), bad


def probe(
    train: Annotated[str, tyro.conf.arg(metavar="TRAIN.safetensors")],
    test: Annotated[str, tyro.conf.arg(metavar="TEST.safetensors")],
    /,
    kind: Kind = "all",
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "",
    epochs: int = 20,
    seed: int = 0,
) -> None:
    """Read classes off frozen features: nearest neighbours, a linear and an attentive probe.

    Args:
        train: features with labels, to learn from.
        test: features with labels, of other videos.
        kind: one probe; all leaves out what the features do not allow.
        output: a JSON file of the accuracies.
        epochs: passes of the attentive probe; the linear one makes five times as many.
        seed: of what is drawn at random.
    """
    positive(epochs=epochs)
    check_seed(seed)
    if output:
        check_output(output, train, test)
    (x, labels), (y, wanted) = read(train), read(test)
    classes = sorted({*labels})
    unknown = sorted({*wanted} - {*labels})
    if unknown:
        raise DataError(f"{test}: no training video is of class {unknown[0]!r}")
    if x.shape[-1] != y.shape[-1]:
        raise DataError(f"{train} has features of {x.shape[-1]} numbers, {test} of {y.shape[-1]}")
    a, b = (
        torch.tensor([classes.index(n) for n in names], device="cpu") for names in (labels, wanted)
    )
    found: dict[str, Any] = {"videos": len(y), "chance": 1 / len(classes)}
    pooled = [t.float().mean(dim=2) if t.dim() == 4 else t for t in (x, y)]
    if kind in ("all", "knn"):
        for k in (10, 20):
            found[f"knn_{k}"] = accuracy(knn(pooled[0], a, pooled[1], len(classes), k), b)
    if kind in ("all", "linear"):
        found |= linear(*pooled, a, b, len(classes), epochs=5 * epochs, seed=seed)
    bare = next((path for path, t in ((train, x), (test, y)) if t.dim() != 4), None)
    if kind == "attentive" and bare:
        raise DataError(f"{bare} has no tokens, which the attentive probe needs: features --tokens")
    if kind in ("all", "attentive") and not bare:
        found |= attentive(x, y, a, b, len(classes), epochs=epochs, seed=seed)
    for key, value in found.items():
        print(f"{key}: {value:.2%}" if isinstance(value, float) else f"{key}: {value}")
    if output:
        write(output, json.dumps(found, indent=2))


def read(path: str | Path) -> tuple[Tensor, list[str]]:
    """(features [N, V, ...], labels) of a file of `features`; NaN rows stay, and count as wrong."""
    try:
        with safe_open(path, "pt") as f:
            labels = json.loads((f.metadata() or {}).get("labels", "null"))
            found = f.get_tensor("features")
    except (OSError, SafetensorError, ValueError) as e:
        raise CheckpointError(f"cannot read {path}: {e}") from e
    if not isinstance(labels, list) or len(labels) != len(found):
        raise CheckpointError(f"{path} is no file of `mae-fast features`")
    if None in labels:
        raise DataError(f"{path}: video {labels.index(None)} has no label")
    return found, labels


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Top-1 of scores [N, C]; a NaN is wrong."""
    right = (scores.nan_to_num().argmax(dim=1) == labels) & scores.isfinite().all(dim=1)
    return float(right.double().mean())


def _decoded(x: Tensor) -> Tensor:
    """bool [N]: which training videos [N, ...] there are features of. DataError where of none."""
    good = x.flatten(1).isfinite().all(dim=1)
    if not good.any():
        raise DataError("a probe has nothing to learn from: no training video decodes")
    return good


def knn(x: Tensor, labels: Tensor, y: Tensor, classes: int, k: int) -> Tensor:
    """DINO's: scores [N, C] of y [N, V, D], its k nearest of x by cosine voting with
    exp(similarity / TEMPERATURE). Of each video the last view, the middle one."""
    x, y = (F.normalize(t[:, -1].float(), dim=-1) for t in (x, y))
    good = _decoded(x)
    x, labels, found = x[good], labels[good], []
    for part in y.split(256):  # of Kinetics, all similarities at once would be 19 GB
        near, at = (part @ x.T).topk(min(k, len(x)), dim=1)
        votes = torch.zeros(len(part), classes, device="cpu")
        found.append(votes.scatter_add_(1, labels[at], (near / TEMPERATURE).exp()))
    return torch.cat(found)


class LinearHead(nn.Module):
    """A linear layer with MAE's start: weights normal 0.01."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def linear(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, classes: int, epochs: int, seed: int = 0
) -> dict[str, Any]:
    """MAE's linear probe of pooled features [N, V, D]: batch norm without affine (eps 1e-6, by the
    training videos), and one linear layer. Views are samples in training, their mean the score."""
    flat = x[_decoded(x)].flatten(0, 1).float()
    mean, std = flat.mean(0), (flat.var(0, correction=0) + 1e-6).sqrt()
    x, y = (x.float() - mean) / std, (y.float() - mean) / std
    grid = [(rate, decay) for rate in (3e-4, 1e-3, 3e-3, 1e-2, 3e-2) for decay in (0.0, 1e-2, 1e-1)]
    make = lambda: LinearHead(x.shape[-1], classes)  # noqa: E731
    return _named("linear", *best(make, x, y, a, b, grid, epochs, seed))


class AttentiveHead(nn.Module):
    """V-JEPA 2's attentive classifier: depth - 1 blocks over all tokens, then one query that looks
    at them, and a linear layer."""

    def __init__(self, dim: int, classes: int, heads: int = 16, depth: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.blocks = nn.ModuleList(TransformerBlock(dim, 4.0, True) for _ in range(depth - 1))
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.kv, self.mlp = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), Mlp(dim, 4 * dim)
        self.linear = nn.Linear(dim, classes)
        self.query_tokens = nn.Parameter(self.linear.weight.new_zeros(1, 1, dim))
        nn.init.trunc_normal_(self.query_tokens, std=0.02)
        for layer in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            for i, block in enumerate(self.blocks, 1):
                block.norm1.eps = block.norm2.eps = 1e-5  # torch's own, there
                block.attn.proj.weight.div_(math.sqrt(2 * i))
                block.mlp.fc2.weight.div_(math.sqrt(2 * i))
            # The cross-attention is scaled as the last of the blocks, as the official code has it.
            self.mlp.fc2.weight.div_(math.sqrt(2 * max(depth - 1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        y = None
        for block in self.blocks:
            x, y = transformer_block(x, y, block.params(), self.heads)
        x = x if y is None else x + y
        h = layer_norm(x, self.norm1.weight, self.norm1.bias, self.norm1.eps)
        token = self.query_tokens.expand(len(x), -1, -1)
        q, kv = apply_layer(token, Affine.of(self.q)), apply_layer(h, Affine.of(self.kv))
        k, v = kv.chunk(2, dim=-1)
        split = (t.unflatten(-1, (self.heads, -1)) for t in (q, k.contiguous(), v.contiguous()))
        token = token + attention(*split).flatten(2)
        h = layer_norm(token, self.norm2.weight, self.norm2.bias, self.norm2.eps)
        token = token + self.mlp.fc2(F.gelu(self.mlp.fc1(h)))
        return self.linear(token[:, 0])


# V-JEPA 2's grid: 20 heads.
GRID = [(rate, decay) for rate in (5e-3, 3e-3, 1e-3, 3e-4, 1e-4) for decay in (0.01, 0.1, 0.4, 0.8)]


def attentive(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    classes: int,
    epochs: int,
    seed: int = 0,
    grid: list[tuple[float, float]] = GRID,
    heads: int = 16,
    depth: int = 4,
) -> dict[str, Any]:
    """The attentive probe of tokens [N, V, L, D]."""
    dim = x.shape[-1]
    while heads > 1 and (dim % heads or dim < 16 * heads):  # of a small encoder
        heads //= 2
    make = lambda: AttentiveHead(dim, classes, heads, depth)  # noqa: E731
    return _named("attentive", *best(make, x, y, a, b, grid, epochs, seed))


def _named(name: str, score: float, rate: float, decay: float) -> dict[str, Any]:
    return {name: score, f"{name}_chosen": f"rate {rate:g}, decay {decay:g}"}


def best(
    make: Callable[[], nn.Module],
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    grid: list[tuple[float, float]],
    epochs: int,
    seed: int,
) -> tuple[float, float, float]:
    """(test accuracy, rate, decay) of the head whose rate and decay did best on HELD_OUT of the
    training videos, trained again on all of them."""
    good = _decoded(x)
    x, a = x[good], a[good]
    part = held_out(a, seed)
    if 0 < int(part.sum()) < len(a):
        heads = fit(make, x[~part], a[~part], grid, epochs, seed)
        scores = [accuracy(score(head, x[part]), a[part]) for head in heads]
        grid = [grid[max(range(len(grid)), key=scores.__getitem__)]]
    else:
        grid = grid[:1]
    [head] = fit(make, x, a, grid, epochs, seed)
    return accuracy(score(head, y), b), *grid[0]


def held_out(labels: Tensor, seed: int) -> Tensor:
    """bool [N]: HELD_OUT of each class, one video at least where there are two."""
    generator = torch.Generator().manual_seed(seed)
    part = torch.zeros(len(labels), dtype=torch.bool, device="cpu")
    for label in labels.unique():
        at = (labels == label).nonzero()[:, 0]
        count = max(1, round(HELD_OUT * len(at))) if len(at) > 1 else 0
        part[at[torch.randperm(len(at), generator=generator, device="cpu")[:count]]] = True
    return part


def fit(
    make: Callable[[], nn.Module],
    x: Tensor,
    labels: Tensor,
    grid: list[tuple[float, float]],
    epochs: int,
    seed: int,
    size: int = 64,
) -> list[nn.Module]:
    """A head for each (rate, decay), all on the same batches of views, AdamW with a cosine."""
    torch.manual_seed(seed)
    heads = [make() for _ in grid]
    for head in heads[1:]:
        head.load_state_dict(heads[0].state_dict())
    optimizers = [
        torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=decay)
        for head, (rate, decay) in zip(heads, grid, strict=True)
    ]
    views, flat = x.shape[1], x.flatten(0, 1)
    steps = epochs * math.ceil(len(flat) / size)
    batches = itertools.islice(_batches(len(flat), size, seed), steps)
    for step, at in enumerate(batches):
        scale = 0.5 * (1 + math.cos(math.pi * step / steps))
        part, target = flat[at].float(), labels[at // views]
        for head, optimizer, (rate, _) in zip(heads, optimizers, grid, strict=True):
            optimizer.param_groups[0]["lr"] = rate * scale
            F.cross_entropy(head(part), target).backward()
            optimizer.step()
            optimizer.zero_grad()
    return [head.eval() for head in heads]


def _batches(n: int, size: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(n, generator=generator, device="cpu").split(size)


@torch.no_grad()
def score(head: nn.Module, x: Tensor, size: int = 64) -> Tensor:
    """Scores [N, C] of features [N, V, ...]: the mean of softmax over views."""
    flat = torch.cat([head(part.float()) for part in x.flatten(0, 1).split(size)])
    return flat.softmax(dim=-1).unflatten(0, x.shape[:2]).mean(dim=1)
