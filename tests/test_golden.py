"""The model against figures recorded from the official code (fp32, CPU)."""

import pytest
import torch

import mae_fast
from mae_fast.ops import OPS, dispatch
from mae_fast.weights import to_mae_st


@pytest.fixture(params=["chosen", "reference"], autouse=True)
def engine(request):
    """Every op by the backend that is chosen here (the C++ kernels, or Triton's in the
    interpreter), and every op by its reference."""
    if request.param == "reference":
        with mae_fast.backends(**dict.fromkeys(OPS, "reference")):
            yield request.param
        return
    native = "triton" if dispatch.interpreting() else "cpp"
    if not dispatch.MACHINE[native]():
        whole = {n: [b for b in op.backends if b not in dispatch.PARTIAL] for n, op in OPS.items()}
        chosen = {n: next(b for b in known if not _declines(b)) for n, known in whole.items()}
        others = ["linear"] if native == "triton" else ["adamw", "linear"]
        assert [op for op, b in chosen.items() if b != native] == others
    yield request.param


def _declines(backend: str) -> str | None:
    return dispatch.MACHINE.get(backend, lambda: None)()


def _relative(ours, theirs) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("full_pred", [False, True], ids=["masked_only", "full_pred"])
@pytest.mark.parametrize("pixels", ["uint8", "float"])
def test_golden_loss_and_gradients(golden, pixels, full_pred, record_property):
    model = golden.model()
    video = golden["video_u8"] if pixels == "uint8" else golden.float_video()
    loss, pred, mask = model(video, golden.mask_ratio, noise=golden["noise"], full_pred=full_pred)
    loss.backward()

    assert torch.equal(mask, golden["mask"])
    assert abs(loss.item() / golden["loss"].item() - 1) < 1e-5
    if full_pred:
        assert (pred - golden["pred"]).abs().max() < 1e-4
    worst = {}
    for name, grad in to_mae_st(model, "grad").items():
        theirs = golden[f"grad.{name}"]
        if name.endswith("attn.k.bias"):
            # Its true value is 0: a constant added to every key does not change the softmax.
            assert grad.abs().max() < 1e-7 and theirs.abs().max() < 1e-7
        else:
            worst[name] = _relative(grad, theirs)
    name = max(worst, key=worst.get)
    record_property("worst gradient", f"{name} {worst[name]:.1e}")
    assert worst[name] < 1e-4, name
    assert len(worst) + sum("attn.k.bias" in n for n in golden.state()) == len(golden.state())


def test_golden_masked_prediction_is_part_of_the_full_one(golden):
    model, noise = golden.model(), golden["noise"]
    _, some, mask = model(golden["video_u8"], golden.mask_ratio, noise=noise)
    ids_mask = noise.argsort(dim=1)[:, -some.shape[1] :]
    wanted = golden["pred"].gather(1, ids_mask[..., None].expand_as(some))
    assert mask.gather(1, ids_mask).min() == 1
    torch.testing.assert_close(some, wanted, rtol=0, atol=1e-4)


def test_golden_from_ids_and_from_strided_video(golden):
    model, noise = golden.model(), golden["noise"]
    ids_keep = noise.argsort(dim=1)[:, : int(noise.shape[1] * (1 - golden.mask_ratio))]
    video = golden["video_u8"].permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    assert not video.is_contiguous()
    loss, _, mask = model(video, ids_keep=ids_keep)
    assert torch.equal(mask, golden["mask"])
    assert abs(loss.item() / golden["loss"].item() - 1) < 1e-5
