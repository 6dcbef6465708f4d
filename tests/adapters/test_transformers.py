"""transformers' VideoMAE, as it is installed, with and without the one line."""

import copy
import random

import pytest
import torch
from compare import check, check_curves, differences, results, scattered

import mae_fast
from mae_fast.errors import AccelerateError

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
TINY = dict(
    image_size=16,
    patch_size=8,
    num_frames=4,
    tubelet_size=2,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=40,
    decoder_hidden_size=12,
    decoder_num_hidden_layers=2,
    decoder_num_attention_heads=2,
    decoder_intermediate_size=20,
)


@pytest.fixture(scope="module")
def videomae():
    pytest.importorskip("transformers")
    from transformers.models import videomae

    return videomae


@pytest.fixture
def make(videomae):
    def build(seed: int = 0, **changes):
        settings = TINY | changes
        heads = settings["num_attention_heads"], settings["decoder_num_attention_heads"]
        assert settings["hidden_size"] % heads[0] == settings["decoder_hidden_size"] % heads[1] == 0
        torch.manual_seed(seed)
        config = videomae.VideoMAEConfig(**settings)
        return scattered(videomae.VideoMAEForPreTraining(config), seed).train()

    return build


def batch(model, seed: int = 0, n: int = 3, keep: int | None = None):
    """Clips [n, T, C, H, W], and a mask of the same count in every row."""
    generator = torch.Generator().manual_seed(seed)
    config, embed = model.config, model.videomae.embeddings
    size = embed.patch_embeddings.image_size
    clips = torch.randn(
        n, config.num_frames, config.num_channels, *size, generator=generator, dtype=torch.float64
    )
    order = torch.rand(n, embed.num_patches, generator=generator).argsort(dim=1)
    keep = max(1, embed.num_patches // 4) if keep is None else keep
    return clips, order.argsort(dim=1) >= keep


def run_with(clips, mask, **kwargs):
    def run(model):
        dtype = model.mask_token.dtype if clips.is_floating_point() else clips.dtype
        out = model(clips.to(dtype), bool_masked_pos=mask, **kwargs)
        return [out.loss, out.logits]

    return run


def random_settings(seed: int) -> dict:
    """Odd sizes, heads of widths that no kernel prefers, all that the configuration varies."""
    r = random.Random(seed)
    patch, heads, decoder_heads = r.choice([3, 4, 7, 8]), r.randint(1, 4), r.randint(1, 3)
    tubelet = r.randint(1, 3)
    size = (patch * r.randint(1, 4), patch * r.randint(1, 4))
    return dict(
        image_size=size if r.random() < 0.5 else size[0] + patch,
        patch_size=patch,
        num_frames=tubelet * r.randint(2, 4),
        tubelet_size=tubelet,
        hidden_size=heads * r.choice([3, 5, 10, 20, 36]),
        num_attention_heads=heads,
        num_hidden_layers=r.randint(1, 3),
        intermediate_size=r.randint(5, 50),
        decoder_hidden_size=decoder_heads * r.choice([3, 7, 12, 20]),
        decoder_num_attention_heads=decoder_heads,
        decoder_num_hidden_layers=r.randint(1, 3),
        decoder_intermediate_size=r.randint(5, 40),
        qkv_bias=r.random() < 0.7,
        norm_pix_loss=r.random() < 0.7,
        use_mean_pooling=r.random() < 0.5,
        layer_norm_eps=r.choice([1e-12, 1e-6, 1e-3]),
        attn_implementation=("eager", "sdpa")[seed % 2],
    )


def skip_rounded_softmax(model):
    """transformers 4's eager attention rounds its softmax to fp32, in fp64 too."""
    import transformers

    rounds = transformers.__version__.startswith("4.")
    if rounds and model.config._attn_implementation == "eager":
        pytest.skip("its eager softmax is in fp32, whatever the dtype")


def test_flat_patches_are_no_difference(make):
    """Grey that is no number of fp32 deviates by rounding alone, which the family divides by: its
    own loss is off there. The comparison before the first call must not mind."""
    model = make(image_size=64, patch_size=16)
    clips, mask = batch(model)
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in IMAGENET.values())
    clips = clips.float()
    clips[..., : clips.shape[-1] // 2] = (0.3 - mean) / std
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(clips.double(), mask).loss
        own = model(clips, mask).loss
        loss = mae_fast.accelerate(model)(clips, mask).loss
    assert abs(own / exact - 1) > 1e-4
    assert abs(loss / exact - 1) < 1e-6


@pytest.mark.parametrize("seed", range(8))
def test_random_models(make, seed, record_property):
    model = make(seed, **random_settings(seed))
    skip_rounded_softmax(model)
    check(model, run_with(*batch(model, seed)), record_property)


@pytest.mark.parametrize(
    "changes",
    [
        dict(norm_pix_loss=False),
        dict(qkv_bias=False),
        dict(use_mean_pooling=False),
        dict(num_channels=1),
        dict(num_channels=4),
        dict(attn_implementation="eager"),
        dict(decoder_num_hidden_layers=1),
    ],
    ids=lambda changes: "-".join(f"{k}_{v}" for k, v in changes.items()),
)
def test_settings(make, changes):
    model = make(**changes)
    skip_rounded_softmax(model)
    check(model, run_with(*batch(model)))


def test_one_visible_token_and_one_masked(make):
    model = make()
    length = model.videomae.embeddings.num_patches
    for keep in (1, length - 1):
        check(model, run_with(*batch(model, keep=keep)))


def test_curves(make):
    model = make(hidden_act="gelu", norm_pix_loss=False)

    def run(model, step):
        clips, mask = batch(model, 0)
        return model(clips, bool_masked_pos=mask.roll(step, dims=1)).loss

    check_curves(model, run)


def test_gradient_checkpointing(make):
    model = make(image_size=8, patch_size=2)
    clips, mask = batch(model)
    fast, kept = mae_fast.accelerate(copy.deepcopy(model)), []
    for checkpointed in (False, False, True, True):  # the first of each compares both forwards
        if checkpointed and not fast.is_gradient_checkpointing:
            fast.gradient_checkpointing_enable(dict(use_reentrant=False))
        kept.append(0)

        def pack(t):
            kept[-1] += 0 if isinstance(t, torch.nn.Parameter) else t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            fast(clips.float(), bool_masked_pos=mask)
    assert kept[3] < kept[1] / 2
    model.gradient_checkpointing_enable(dict(use_reentrant=False))
    check(model, run_with(clips, mask))


def test_reentrant_checkpoints_are_compared_too(make):
    model = make()
    clips, mask = batch(model)
    model.gradient_checkpointing_enable(dict(use_reentrant=True))
    want = copy.deepcopy(model)(clips.float(), mask).loss
    loss = mae_fast.accelerate(model)(clips.float(), mask).loss
    assert abs(loss / want - 1) < 1e-5
    assert all(p.grad is None for p in model.parameters())  # of the comparison


def test_under_torch_compile(make):
    model = make()
    run = run_with(*batch(model))
    want = results(copy.deepcopy(model), run)
    torch._dynamo.reset()
    compiled = torch.compile(mae_fast.accelerate(copy.deepcopy(model)), backend="eager")
    got = results(compiled, run)
    got = {name.removeprefix("_orig_mod."): t for name, t in got.items()}
    assert max(differences(got, want).values()) < 1e-5


def test_tuple_and_class_of_the_output(make, videomae):
    model = mae_fast.accelerate(make())
    clips, mask = batch(model)
    out = model(clips.float(), bool_masked_pos=mask)
    assert type(out) is videomae.modeling_videomae.VideoMAEForPreTrainingOutput
    assert list(out.keys()) == ["loss", "logits"]
    loss, logits = model(clips.float(), mask, return_dict=False)
    assert torch.equal(loss, out.loss) and torch.equal(logits, out.logits)


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_what_only_the_own_forward_gives(make, name, caplog):
    model, fast = make(attn_implementation="eager"), make(attn_implementation="eager")
    clips, mask = batch(model)
    want = model(clips.float(), bool_masked_pos=mask, **{name: True})
    mae_fast.accelerate(fast)
    for _ in range(2):
        got = fast(clips.float(), bool_masked_pos=mask, **{name: True})
        field = name.removeprefix("output_")
        assert len(got[field]) == len(want[field]) > 0
        assert all(map(torch.equal, got[field], want[field]))
        # The hooks that transformers leaves in place do nothing at other calls.
        other = fast(clips.float(), bool_masked_pos=mask)
        torch.testing.assert_close(other.loss, want.loss, rtol=1e-5, atol=0)
        assert getattr(other, field) is None
    assert caplog.text.count(f"its own forward runs: {name} is asked for") == 1


def test_masks_of_unequal_counts_are_the_own_forwards(make):
    model = make()
    clips, mask = batch(model, n=2)
    fast = mae_fast.accelerate(copy.deepcopy(model))
    mask[0] = ~mask[0]  # 6 and 2: reshaped across clips
    args = clips.float(), mask
    assert torch.equal(fast(*args).loss, model(*args).loss)
    mask[0, 0] = ~mask[0, 0]
    for each in (model, fast):
        with pytest.raises(RuntimeError, match="shape"):
            each(*args)
    with pytest.raises(IndexError, match="shape of the mask"):
        fast(clips.float(), batch(model, n=2)[1][:, :-2])
    with pytest.raises(ValueError, match="One must provided a boolean mask"):
        fast(clips.float(), bool_masked_pos=None)
    with pytest.raises(ValueError, match="Input image size"):
        fast(clips.float()[..., :8], bool_masked_pos=batch(model, n=2)[1])


def test_uint8_clips(make):
    model = make()
    generator = torch.Generator().manual_seed(0)
    _, mask = batch(model)
    clips = torch.randint(0, 256, (3, 4, 3, 16, 16), generator=generator, dtype=torch.uint8)
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in IMAGENET.values())
    want = model((clips / 255 - mean) / std, bool_masked_pos=mask)
    fast = mae_fast.accelerate(copy.deepcopy(model), **IMAGENET)
    for _ in range(2):  # the first call compares both forwards
        got = fast(clips, bool_masked_pos=mask)
        torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=0)
    other = mae_fast.accelerate(copy.deepcopy(model), mean=0.45, std=0.225)
    want = model((clips / 255 - 0.45) / 0.225, bool_masked_pos=mask)
    torch.testing.assert_close(other(clips, bool_masked_pos=mask).loss, want.loss)


def test_bfloat16(make):
    model = make(hidden_size=48, decoder_hidden_size=32)
    clips, mask = batch(model)
    exact = copy.deepcopy(model).double()(clips, bool_masked_pos=mask)
    fast = mae_fast.accelerate(copy.deepcopy(model))
    outs = []
    for each in (model, fast):
        with torch.autocast("cpu", torch.bfloat16):
            autocast = each(clips.float(), bool_masked_pos=mask)
        halved = copy.deepcopy(each).bfloat16()(clips.bfloat16(), bool_masked_pos=mask)
        outs.append((autocast.loss, autocast.logits, halved.loss, halved.logits))
    for plain, ours, want in zip(*outs, (exact.loss, exact.logits) * 2, strict=True):
        assert (plain.dtype, plain.shape) == (ours.dtype, ours.shape)
        assert (ours - want).norm() <= 2 * (plain - want).norm() + 2e-3 * want.norm()


@pytest.mark.parametrize(
    ("changes", "why_not"),
    [
        (
            dict(attention_probs_dropout_prob=0.1, attn_implementation="flex_attention"),
            "dropout_prob: is 0.1 of flex_attention",
        ),
        (dict(hidden_act="gelu_new"), "is no exact GELU"),
        (dict(hidden_act="relu"), "is no exact GELU"),
        (dict(image_size=17), "image_size: is (17, 17), not (16, 16)"),
        (dict(num_frames=5), "num_frames: is 5, not 4"),
    ],
    ids=lambda x: str(x),
)
def test_refusals(make, changes, why_not):
    with pytest.raises(AccelerateError) as error:
        mae_fast.accelerate(make(**changes))
    assert why_not in str(error.value)


def test_a_forward_of_ones_own_is_refused(make, videomae):
    class Mine(videomae.VideoMAEForPreTraining):
        def forward(self, pixel_values, bool_masked_pos, **kwargs):
            out = super().forward(pixel_values, bool_masked_pos, **kwargs)
            return type(out)(loss=2 * out.loss, logits=out.logits)

    model = Mine(make().config)
    with pytest.raises(AccelerateError, match="is not that of transformers"):
        mae_fast.accelerate(model)
