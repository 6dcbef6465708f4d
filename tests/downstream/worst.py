"""Greatest relative errors of classifiers and heads against the official codes' recorded figures,
by family and part: `python tests/downstream/worst.py`, seconds on a CPU.

The parts are those of test_classifier.py, test_probe.py and tests/ava; a gradient is held to its
own norm, and a key's bias, which has none but rounding, is left out. `groups`: how many parameters
have the official group's rate and decay.
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "ava"))

import test_classifier as classifier
import test_probe
from test_classifier import CODES, LIMITS, Golden, family_of, normalised, relative

from mae_fast import probe
from mae_fast.weights.families import read


def row(name: str, **parts: float | str) -> None:
    said = (f"{k} {v:.1e}" if isinstance(v, float) else f"{k} {v}" for k, v in parts.items())
    print(f"{name:28}" + "  ".join(said), flush=True)


def of_classifier(code: str, dtype: torch.dtype, folder: Path) -> dict[str, float]:
    golden = Golden(code)
    model, _ = golden.model(code, folder)
    model.to(dtype)
    logits = model(normalised(model, golden["video_u8"]).to(dtype))
    loss = classifier.soft_loss(logits, golden["target"].to(dtype))
    loss.backward()
    theirs, _ = read(golden.state("grad."), family_of(code))
    found = {n: p.grad for n, p in model.named_parameters() if not n.endswith("k.bias")}
    return {
        "logits": relative(logits, golden["logits"]),
        "loss": abs(float(loss.detach() / golden["loss"]) - 1),
        "gradients": max(relative(g, theirs[n]) for n, g in found.items()),
    }


def others(code: str, folder: Path) -> dict[str, float | str]:
    """Bytes in place of normalised pixels, drop path's random numbers, parameter groups."""
    golden = Golden(code)
    model, _ = golden.model(code, folder)
    found = {"uint8 logits": relative(model.double()(golden["video_u8"]), golden["logits"])}
    if code not in ("transformers", "slowfast"):
        model, _ = golden.model(code, folder, drop_path=0.3)
        torch.manual_seed(7)
        logits = model.double().train()(normalised(model, golden["video_u8"]))
        found["drop path"] = relative(logits, golden["drop_path_logits"])
    if groups := json.loads(golden.metadata["groups"]):
        classifier.test_official_parameter_groups_with_their_rates(golden, code, folder)
        found["groups"] = f"{len(groups)} of {len(groups)}"
    return found


def of_attentive() -> dict[str, float]:
    golden = load_file(test_probe.GOLDEN)
    tables = {kind: test_probe.renamed(golden, kind) for kind in ("state.", "grad.")}
    head = probe.AttentiveHead(16, 5, heads=4, depth=3).double()
    head.load_state_dict(tables["state."])
    logits = head(golden["x"])
    classifier.soft_loss(logits, golden["target"]).backward()
    grads = {n: p.grad for n, p in head.named_parameters() if float(tables["grad."][n].norm())}
    return {
        "logits": relative(logits, golden["logits"]),
        "gradients": max(
            relative(g, tables["grad."][n]) for n, g in grads.items() if not n.endswith("k.bias")
        ),
    }


def of_boxes(dtype: torch.dtype) -> dict[str, float]:
    import test_model as ava

    golden = {k: v.to(dtype) for k, v in ava.GOLDEN.items()}
    net = ava.tiny().to(dtype)
    with torch.no_grad():
        for name in ("norm.weight", "norm.bias", "head.weight", "head.bias"):
            net.get_parameter(name).copy_(golden[name])
    tokens = golden["tokens"].detach().clone().requires_grad_()
    logits = net.on_boxes(tokens, (2, 3, 4), golden["boxes"])
    loss = F.binary_cross_entropy_with_logits(logits, golden["target"])
    loss.backward()
    grads = {"tokens": tokens.grad} | {n: p.grad for n, p in net.named_parameters()}
    theirs = {n: ava.GOLDEN[f"grad.{n}"] for n in grads if f"grad.{n}" in ava.GOLDEN}
    return {
        "scores": relative(logits.sigmoid(), ava.GOLDEN["prob"]),
        "loss": abs(float(loss.detach() / ava.GOLDEN["loss"]) - 1),
        "gradients": max(relative(grads[n], t) for n, t in theirs.items()),
    }


def main() -> None:
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as tmp:
        for code in CODES:
            for dtype in LIMITS:
                name = f"{code} {str(dtype)[6:]}"
                row(name, **of_classifier(code, dtype, Path(tmp)))
            row(f"{code} float64", **others(code, Path(tmp)))
    row("vjepa2 attentive float64", **of_attentive())
    try:
        for dtype in LIMITS:
            row(f"AVA's head {str(dtype)[6:]}", **of_boxes(dtype))
    except ModuleNotFoundError as e:
        print(f"AVA's head: {e}")


if __name__ == "__main__":
    main()
