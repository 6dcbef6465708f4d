"""Fine-tuned classifiers with and without the one line: logits, losses, every gradient."""

import pytest
import torch
import torch.nn.functional as F
from compare import differences, results, scattered
from foreign import MaskedAutoencoderViT
from stand_ins import VideoMAE
from torch import nn

import mae_fast
from mae_fast import adapters
from mae_fast.errors import AccelerateError


class DropPath(nn.Module):
    """Of timm: whole samples."""

    def __init__(self, p):
        super().__init__()
        self.drop_prob = p

    def forward(self, x):
        if not self.training:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty(len(x), 1, 1).bernoulli_(keep).div_(keep)


class MaeSt(nn.Module):
    """models_vit.VisionTransformer, of the parts of the pre-training model."""

    def __init__(self, cfg, path=0.0):
        super().__init__()
        whole = MaskedAutoencoderViT(cfg)
        self.sep_pos_embed, self.cls_embed = cfg.sep_pos_embed, cfg.cls_embed
        for name in ("cls_token", "pos_embed_spatial", "pos_embed_temporal", "pos_embed_class"):
            setattr(self, name, getattr(whole, name))
        self.patch_embed, self.blocks, self.norm = whole.patch_embed, whole.blocks, whole.norm
        for block in self.blocks:
            block.drop_path = DropPath(path) if path else nn.Identity()
        self.dropout, self.head = nn.Dropout(path), nn.Linear(cfg.embed_dim, 5)

    def forward(self, x):
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        pos = (self.pos_embed_temporal[0, :, None] + self.pos_embed_spatial[0]).flatten(0, 1)
        cls = (self.cls_token + self.pos_embed_class).expand(len(x), -1, -1)
        x = torch.cat([cls, x + pos], dim=1)
        for block in self.blocks:
            x = x + block.drop_path(block.attn(block.norm1(x)))
            x = x + block.drop_path(block.mlp(block.norm2(x)))
        return self.head(self.dropout(self.norm(x[:, 1:, :].mean(dim=1))))


class OfVideoMAE(nn.Module):
    """modeling_finetune.VisionTransformer, of the parts of the pre-training encoder."""

    def __init__(self, v2=False, path=0.0):
        super().__init__()
        encoder = VideoMAE(size=(16, 16), frames=4, dims=(12, 12)).encoder
        self.patch_embed, self.blocks = encoder.patch_embed, encoder.blocks
        self.pos_embed, self.norm, self.pos_drop = encoder.pos_embed, nn.Identity(), nn.Dropout(0.0)
        for block in self.blocks:
            block.drop_path = DropPath(path) if path else nn.Identity()
        self.fc_norm = nn.LayerNorm(12, eps=1e-6)
        setattr(self, "head_dropout" if v2 else "fc_dropout", nn.Dropout(path))
        self.head, self.v2 = nn.Linear(12, 5), v2

    def forward(self, x):
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        x = x + self.pos_embed.type_as(x).to(x.device).clone().detach()
        for block in self.blocks:
            x = x + block.drop_path(block.attn(block.norm1(x)))
            x = x + block.drop_path(block.mlp(block.norm2(x)))
        drop = self.head_dropout if self.v2 else self.fc_dropout
        return self.head(drop(self.fc_norm(x.mean(1))))


CLIPS = torch.randn(3, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()


def transformers_classifier(**changes):
    videomae = pytest.importorskip("transformers").models.videomae
    sizes = dict(image_size=16, patch_size=8, num_frames=4, hidden_size=12, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=3, intermediate_size=20, num_labels=5)
    return videomae.VideoMAEForVideoClassification(videomae.VideoMAEConfig(**sizes | changes))


def same(model, run):
    """Outputs and gradients agree in fp64 to rounding, fused and not."""
    model = scattered(model).double().train()
    theirs = results(model, run)
    mae_fast.accelerate(model)
    model(*adapters.FAMILIES[model.forward.family].sample(model, torch.float64))  # it fits
    ours = results(model, run)
    found = differences(ours, theirs)
    assert max(found.values()) < 1e-9, found
    mae_fast.restore(model)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("path", [0.0, 0.3], ids=["plain", "drop_path_and_dropout"])
@pytest.mark.parametrize("kind", ["mae_st", "videomae", "videomae_v2"])
def test_official_classifiers(kind, path, tiny_cfg):
    if kind == "mae_st":
        model, frames = MaeSt(tiny_cfg, path), tiny_cfg.num_frames
    else:
        model, frames = OfVideoMAE(kind == "videomae_v2", path), 4
    clips = torch.randn(3, 3, frames, 16, 16, dtype=torch.float64)
    labels = torch.tensor([0, 3, 1])

    def run(model):
        logits = model(clips)
        return [F.cross_entropy(logits, labels), logits]

    same(model, run)


@pytest.mark.parametrize("mean", [True, False], ids=["mean", "first"])
def test_transformers_classifier(mean):
    model = transformers_classifier(use_mean_pooling=mean)

    def run(model):
        out = model(CLIPS, labels=torch.tensor([0, 3, 1]))
        assert list(out.keys()) == ["loss", "logits"]
        return [out.loss, out.logits, model(pixel_values=CLIPS, return_dict=False)[0]]

    same(model, run)


def test_trainers_count_of_labels_divides_the_loss():
    """With gradient accumulation Trainer gives that of all micro-batches."""

    def run(model):
        out = model(CLIPS, labels=torch.tensor([0, 3, 1]), num_items_in_batch=12)
        return [out.loss, out.logits]

    same(transformers_classifier(), run)


def test_the_second_argument_is_head_mask_or_labels_by_version():
    model, labels = transformers_classifier().double(), torch.tensor([0, 3, 1])
    want = model(CLIPS, labels)
    got = mae_fast.accelerate(model)(CLIPS, labels)
    assert list(got.keys()) == list(want.keys())
    torch.testing.assert_close(got.logits, want.logits)


def test_uint8_clips_are_read_by_mean_and_std():
    model = scattered(transformers_classifier()).double()
    clips = torch.randint(0, 256, (2, 4, 3, 16, 16), dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    scale = [torch.tensor(t, dtype=torch.float64).view(3, 1, 1) for t in (mean, std)]
    wanted = model((clips.double() / 255 - scale[0]) / scale[1]).logits
    mae_fast.accelerate(model, mean=mean, std=std)
    torch.testing.assert_close(model(clips).logits, wanted, rtol=1e-5, atol=1e-6)


def test_what_is_another_computation_is_refused_by_name():
    model = OfVideoMAE()
    model.blocks[0].gamma_1 = nn.Parameter(torch.ones(12))
    with pytest.raises(AccelerateError, match=r"blocks\.0\.gamma_1"):
        mae_fast.accelerate(model)
    model = OfVideoMAE()
    model.pos_drop = nn.Dropout(0.1)
    with pytest.raises(AccelerateError, match="pos_drop"):
        mae_fast.accelerate(model)
