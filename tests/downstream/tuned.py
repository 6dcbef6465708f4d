"""A small run of fine-tuning."""

from mae_fast.tasks.config import from_dict

MODEL = dict(preset="vit_tiny", img_size=32, patch_size=8, num_frames=4, embed_dim=24, depth=2,
             num_heads=2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)  # fmt: skip


def config(motions, output, **changes):
    tree = {
        "output": str(output),
        "model": dict(MODEL),
        "classifier": {"drop_path": 0.2, "dropout": 0.1},
        "augment": {"mixup": 0.0, "cutmix": 0.0},
        "data": {"index": str(motions.train), "repeat_aug": 2, "flip": 0.0, "workers": 0,
                 "short_side": 0},
        "train": {"batch_size": 2, "steps": 4, "warmup_steps": 1, "log_every": 1, "blr": 0.05,
                  "device": "cpu"},
        "test": {"temporal": 2, "spatial": 3},
    }  # fmt: skip
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            tree[section][name] = value
        else:
            tree[section] = value
    return from_dict(tree)
