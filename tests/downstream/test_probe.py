"""Frozen features and the probes, V-JEPA 2's attentive classifier against its own figures."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from mae_fast import checkpoint, cli, probe
from mae_fast.classifier import ClassifierConfig, VideoClassifier
from mae_fast.config import ModelConfig
from mae_fast.config_file import to_dict
from mae_fast.data import read_index
from mae_fast.errors import ConfigError, DataError
from mae_fast.forward import encode
from mae_fast.model import MaskedAutoencoder
from mae_fast.ops.layer_norm import layer_norm
from mae_fast.tasks.clips import Views
from mae_fast.tasks.config import ClipsConfig

TINY = dict(img_size=32, patch_size=8, num_frames=4, pred_t_dim=2, embed_dim=192, depth=1,
            num_heads=3, decoder_embed_dim=192, decoder_depth=1, decoder_num_heads=6)  # fmt: skip
GOLDEN = Path(__file__).parent / "golden" / "vjepa2_attentive.safetensors"


def ours(name):
    """Our name of one of V-JEPA 2's parameters, q, k and v still fused."""
    name = name.removeprefix("pooler.").removeprefix("cross_attention_block.")
    return name.removeprefix("xattn.")


def renamed(golden, kind):
    """What lies under `kind` in V-JEPA 2's figures, by our names."""
    table = {}
    for key, value in golden.items():
        if not key.startswith(kind):
            continue
        name = ours(key.removeprefix(kind))
        stem, _, end = name.rpartition(".")
        if stem.endswith("attn.qkv"):
            parts = zip("qkv", value.chunk(3), strict=True)
            table |= {f"{stem[:-3]}{x}.{end}": t for x, t in parts}
        else:
            table[name] = value
    return table


def test_attentive_probe_is_v_jepa_2s_to_every_gradient():
    golden = load_file(GOLDEN)
    head = probe.AttentiveHead(16, 5, heads=4, depth=3).double()
    tables = {kind: renamed(golden, kind) for kind in ("state.", "grad.")}
    head.load_state_dict(tables["state."])
    logits = head(golden["x"])
    loss = -(golden["target"] * logits.log_softmax(-1)).sum(-1).mean()
    loss.backward()
    torch.testing.assert_close(logits, golden["logits"], rtol=1e-9, atol=1e-9)
    for name, p in head.named_parameters():
        theirs = tables["grad."][name].double()
        assert (p.grad - theirs).norm() <= 1e-6 * theirs.norm() + 1e-9, name


def blobs(n, seed, views=2, tokens=0, far=3.0):
    """n videos of three classes, around three points; the first is bad."""
    labels = torch.arange(n) % 3
    generator = torch.Generator().manual_seed(seed)
    shape = (n, views, tokens, 16) if tokens else (n, views, 16)
    x = torch.randn(shape, generator=generator)
    x[..., 0:3] += far * torch.nn.functional.one_hot(labels, 3).view(n, *(1,) * (x.dim() - 2), 3)
    x[0] = torch.nan
    return x, labels


def test_probes_find_what_is_there_and_count_bad_videos_as_wrong():
    (x, a), (y, b) = blobs(60, 0), blobs(31, 1)
    assert probe.accuracy(probe.knn(x, a, y, 3, 10), b) == pytest.approx(30 / 31, abs=0.07)
    found = probe.linear(x, y, a, b, 3, epochs=30)
    assert 0.85 < found["linear"] <= 30 / 31
    tokens = blobs(60, 0, tokens=5), blobs(31, 1, tokens=5)
    (x, a), (y, b) = tokens
    grid = [(1e-2, 0.01), (1e-9, 0.01)]
    found = probe.attentive(x, y, a, b, 3, 10, grid=grid, heads=4, depth=2)
    assert 0.85 < found["attentive"] <= 30 / 31
    assert found["attentive_chosen"] == "rate 0.01, decay 0.01"


def test_a_probe_without_anything_to_learn_from_is_refused():
    x, y = torch.full((4, 1, 8), torch.nan), torch.randn(2, 1, 8)
    labels = torch.tensor([0, 1, 0, 1])
    asked = [
        lambda: probe.knn(x, labels, y, 2, k=1),
        lambda: probe.linear(x, y, labels, labels[:2], 2, epochs=1),
        lambda: probe.attentive(x[:, :, None], y[:, :, None], labels, labels[:2], 2, epochs=1),
    ]
    for one in asked:
        with pytest.raises(DataError, match="no training video decodes"):
            one()


def test_nearest_neighbours_vote_a_few_videos_at_a_time(largest):
    """Of Kinetics, the similarities of all would be 19 GB."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 1, 8, generator=generator) for n in (300, 700))
    labels = torch.randint(0, 40, (300,), generator=generator)
    with largest:
        found = probe.knn(x, labels, y, 40, 10)
    assert largest.numbers <= 256 * 300
    x, y = (t[:, 0] / t[:, 0].norm(dim=1, keepdim=True) for t in (x, y))
    for scores, similar in zip(found, y @ x.T, strict=True):
        wanted = torch.zeros(40)
        for i in similar.argsort(descending=True)[:10].tolist():
            wanted[labels[i]] += (similar[i] / 0.07).exp()
        torch.testing.assert_close(scores, wanted, rtol=1e-4, atol=1e-3)


def test_heads_are_chosen_without_the_test(monkeypatch):
    """The test's labels change nothing but the accuracy."""
    (x, a), (y, b) = blobs(60, 0, far=0.5), blobs(30, 1, far=0.5)
    one = probe.linear(x, y, a, b, 3, epochs=3)
    other = probe.linear(x, y, a, (b + 1) % 3, 3, epochs=3)
    assert one["linear_chosen"] == other["linear_chosen"] and one["linear"] != other["linear"]
    part = probe.held_out(a, 0)
    assert [int((part & (a == c)).sum()) for c in range(3)] == [4, 4, 4]


def test_a_neighbour_is_one_of_the_last_view():
    """The middle one; what the views before it hold changes nothing."""
    x, y = torch.eye(3)[:, None], torch.eye(3)[:, None]
    x, y = (torch.cat([t.roll(by, 0), t], dim=1) for t, by in ((x, 1), (y, 2)))
    assert probe.knn(x, torch.arange(3), y, 3, 1).argmax(dim=1).tolist() == [0, 1, 2]


def test_features_of_a_test_are_normalised_as_those_of_training():
    """Of one class alone they would lie in the middle by their own mean."""
    (x, a), (y, b) = blobs(60, 0), blobs(60, 1)
    only = (b == 2) & (torch.arange(60) > 0)
    assert probe.linear(x, y[only], a, b[only], 3, epochs=30)["linear"] > 0.85


def test_a_head_is_chosen_by_what_it_has_not_seen_and_then_sees_all(monkeypatch):
    (x, a), (y, b) = blobs(61, 0), blobs(31, 1)
    fit, score, seen = probe.fit, probe.score, []
    monkeypatch.setattr(probe, "fit", lambda make, x, *how: seen.append(x) or fit(make, x, *how))
    monkeypatch.setattr(probe, "score", lambda head, x: seen.append(x) or score(head, x))
    probe.best(lambda: probe.LinearHead(16, 3), x, y, a, b, [(1e-2, 0.0), (1e-3, 0.0)], 2, 0)
    part, good = probe.held_out(a[1:], 0), x[1:]
    wanted = [good[~part], good[part], good[part], good, y]
    assert len(seen) == len(wanted)
    for found, of in zip(seen, wanted, strict=True):
        torch.testing.assert_close(found, of, rtol=0, atol=0, equal_nan=True)


def test_a_head_has_its_own_decay():
    x, a = blobs(60, 0)
    make, grid = lambda: probe.LinearHead(16, 3), [(1e-2, 0.0), (1e-2, 30.0)]
    free, held = probe.fit(make, x[1:], a[1:], grid, 10, 0)
    assert held.linear.weight.norm() < 0.9 * free.linear.weight.norm()


def test_a_score_is_the_mean_of_softmax_over_views():
    views = torch.tensor([[[9.0, 0.0], [0.0, 2.0], [0.0, 2.0]]])  # one is sure of the other class
    wanted = views.softmax(dim=2).mean(dim=1)
    assert wanted.argmax() == 1 != views.mean(dim=1).argmax()
    torch.testing.assert_close(probe.score(torch.nn.Identity(), views), wanted)


def test_features_are_of_the_views_that_are_asked_for(motions, tmp_path, monkeypatch):
    seen = []

    def recorded(net, views, tokens):
        cfg = views.cfg
        seen.append((views.temporal, views.spatial, views.short_side, tokens))
        seen.append((cfg.sampling, cfg.sampling_rate))
        return torch.zeros(8, 1, 2), []

    net = VideoClassifier(ClassifierConfig(ModelConfig(**TINY), "mae_st", 1))
    monkeypatch.setattr(probe, "encoder", lambda *how: seen.append(how) or net)
    monkeypatch.setattr(probe, "features_of", recorded)
    how = "--model vit_tiny --family videomae --temporal 2 --spatial 3 --short-side 40 --tokens"
    how += " --sampling frames --sampling-rate 7"
    out = str(tmp_path / "x.safetensors")
    assert cli.main(["features", "w.pth", str(motions.val), "-o", out, *how.split()]) == 0
    assert seen == [("w.pth", "vit_tiny", "videomae"), (2, 3, 40, True), ("frames", 7)]


def test_features_and_probe_from_a_pretrained_encoder(motions, tmp_path, capsys, monkeypatch):
    model = MaskedAutoencoder(ModelConfig(**TINY))
    state = {"model": to_dict(model.cfg)}
    optimizer = torch.optim.AdamW(model.parameters())
    path = checkpoint.save(tmp_path, 1, model, optimizer, {"config": state, "run": "r"}, 1)
    for name, index in (("a", motions.train), ("b", motions.val)):
        out = str(tmp_path / f"{name}.safetensors")
        how = ["--sampling", "uniform", "--workers", "0", "--tokens"]
        assert cli.main(["features", str(path), str(index), "-o", out, *how]) == 0
    with safe_open(tmp_path / "a.safetensors", "pt") as f:
        assert f.get_tensor("features").shape == (16, 1, 32, 192)
        assert f.get_tensor("features").dtype == torch.bfloat16
        assert json.loads(f.metadata()["labels"])[:2] == ["down", "left"]
    args = [str(tmp_path / f"{n}.safetensors") for n in "ab"]
    out = tmp_path / "found.json"
    assert cli.main(["probe", *args, "--kind", "knn", "-o", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["chance"] == 0.25 and 0 <= found["knn_10"] <= 1 and found["videos"] == 8
    assert cli.main(["probe", *args, "--epochs", "-1"]) == 2
    full = tmp_path / "full.safetensors"

    def no_space(*args):
        full.with_name(full.name + ".tmp").write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", no_space)
    assert cli.main(["features", str(path), str(motions.val), "-o", str(full), *how]) == 73
    assert f"cannot write {full}: I/O error: No space left" in capsys.readouterr().err
    assert not list(tmp_path.glob("full*"))
    monkeypatch.undo()
    capsys.readouterr()
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert cli.main(["probe", args[0], str(tmp_path / "x.safetensors")]) == 73
    assert "error" in capsys.readouterr().err
    unknown = str(tmp_path / "x.safetensors")
    assert cli.main(["features", unknown, str(motions.val), "-o", "y"]) == 2


def test_weights_are_taken_for_their_own_family_or_refused(tmp_path):
    """Without its own positions a VideoMAE would have none; of one with two classes, whose head is
    as large as an encoder's that has one for form's sake, no pooling is asked."""
    models = {
        "learned": MaskedAutoencoder(ModelConfig(**TINY)),
        "no": VideoClassifier(ClassifierConfig(ModelConfig(**TINY), "videomae", 2)),
    }
    for (has, model), right, wrong in zip(
        models.items(), ("mae_st", "videomae"), ("transformers", "slowfast"), strict=True
    ):
        state = {"config": {"model": to_dict(ModelConfig(**TINY))}, "run": "r"}
        how = model, torch.optim.AdamW(model.parameters()), state, 1
        (tmp_path / has).mkdir()
        path = str(checkpoint.save(tmp_path / has, 1, *how))
        with pytest.raises(ConfigError, match=f"has {has} positions.*not of family {wrong}"):
            probe.encoder(path, family=wrong)
        net = probe.encoder(path, family=right)
        assert torch.equal(net.blocks[0].attn.q.weight, model.blocks[0].attn.q.weight)


def test_a_live_encoder_is_judged_as_its_checkpoint_would_be(motions, caplog):
    """On the model's own tensors, and without a number drawn from the run's."""
    model = MaskedAutoencoder(ModelConfig(**TINY))
    net = probe.encoder_of(model)
    assert net.blocks[0].attn.q.weight.data_ptr() == model.blocks[0].attn.q.weight.data_ptr()
    assert not any(p.requires_grad for p in net.parameters())
    assert all(p.requires_grad for p in model.parameters())
    video = torch.randint(0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8)
    ids = torch.arange(32, dtype=torch.int32).expand(2, -1)
    wanted = encode(model.params(), model.spec, video, ids)
    norm = net.norm
    found = layer_norm(net.tokens(video), norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)

    rows = read_index(motions.train), read_index(motions.val)
    clips, before = ClipsConfig(sampling="uniform", workers=0), torch.get_rng_state()
    how = dict(epochs=1, grid=[(1e-3, 0.1)])
    found = probe.judge(net, *rows, clips, ("linear", "knn", "attentive"), **how)
    assert list(found) == ["linear", "knn", "attentive"]
    assert all(0 <= x <= 1 for x in found.values())
    assert torch.equal(torch.get_rng_state(), before)
    assert probe.judge(net, *rows, clips, ("knn",)) == {"knn": found["knn"]} and not caplog.text
    lost = [dataclasses.replace(rows[1][0], path="gone.mp4", bytes=0), *rows[1][1:]]
    assert probe.judge(net, rows[0], lost, clips, ("knn",))["knn"] <= 7 / 8
    assert "1 of 8 videos do not decode" in caplog.text and "gone.mp4: missing" in caplog.text
    # The mean is of the patches, without the cls token.
    views = Views(rows[1], clips, 4, 32, 1, 1)
    pooled, tokens = (probe.features_of(net, views, tokens)[0] for tokens in (False, True))
    torch.testing.assert_close(pooled, tokens.float().mean(dim=2), rtol=0, atol=3e-3)
    # Of the training videos themselves a nearest neighbour knows all.
    alone = probe.knn(x := probe.features_of(net, Views(rows[0], clips, 4, 32, 1, 1))[0],
                      a := torch.arange(16), x, 16, 1)  # fmt: skip
    assert probe.accuracy(alone, a) == 1.0


def test_an_unknown_class_is_refused(tmp_path):
    for name, labels in (("a", ["x", "y"]), ("b", ["x", "z"])):
        table = {"features": torch.randn(2, 1, 4)}
        save_file(table, tmp_path / f"{name}.safetensors", {"labels": json.dumps(labels)})
    with pytest.raises(DataError, match="no training video is of class 'z'"):
        probe.probe(str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"))


def test_features_that_do_not_belong_together_are_refused(tmp_path, capsys):
    """Of another width; of tokens and means `all` leaves out what needs tokens on both sides."""
    shapes = {"tokens": (4, 1, 3, 8), "means": (4, 1, 8), "wide": (4, 1, 16)}
    for name, shape in shapes.items():
        labels = {"labels": json.dumps(list("abab"))}
        save_file({"features": torch.randn(shape)}, tmp_path / name, labels)
    tokens, means, wide = (str(tmp_path / name) for name in shapes)
    assert cli.main(["probe", means, wide]) == 65
    assert "features of 8 numbers" in capsys.readouterr().err
    assert cli.main(["probe", tokens, means, "--epochs", "1"]) == 0
    out = capsys.readouterr().out
    assert "linear: " in out and "attentive" not in out
    assert cli.main(["probe", tokens, means, "--kind", "attentive"]) == 65
    assert f"{means} has no tokens" in capsys.readouterr().err
