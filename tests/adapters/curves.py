"""20 steps of training in other people's loops, with a model's own forward and with the fused one.

python tests/adapters/curves.py      prints the greatest relative difference of the losses, by loop
"""

import copy
import importlib.util
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import mae_fast

STEPS = 20
SIZES = dict(image_size=32, patch_size=8, num_frames=4, hidden_size=48, num_hidden_layers=2)
SIZES |= dict(num_attention_heads=3, intermediate_size=96, decoder_hidden_size=24)
SIZES |= dict(decoder_num_attention_heads=2, decoder_num_hidden_layers=2)
SIZES |= dict(decoder_intermediate_size=48, norm_pix_loss=False)


def model() -> nn.Module:
    """transformers' VideoMAE, small, the same at each call."""
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    torch.manual_seed(0)
    return VideoMAEForPreTraining(VideoMAEConfig(**SIZES))


class Clips(torch.utils.data.Dataset):
    """Noise around a picture that can be learned, and a mask of three tokens in four."""

    def __len__(self) -> int:
        return 8 * STEPS

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(i % 8)
        picture = torch.linspace(-1, 1, 32).expand(4, 3, 32, 32)
        order = torch.rand(32, generator=generator).argsort()
        clip = picture + 0.1 * torch.randn(picture.shape, generator=generator)
        return dict(pixel_values=clip, bool_masked_pos=order >= 8)


def trainer(model: nn.Module, folder: str, resumed: bool = False, **how) -> list[float]:
    """Losses of transformers' Trainer; `resumed`: of a run that stops in the middle and goes on."""
    from transformers import Trainer, TrainingArguments

    settings = dict(max_steps=STEPS, learning_rate=3e-3, logging_steps=1, seed=0, report_to=[])
    settings |= dict(per_device_train_batch_size=2, disable_tqdm=True, use_cpu=True)
    settings |= dict(lr_scheduler_type="constant")
    settings |= dict(save_strategy="steps" if resumed else "no", save_steps=STEPS // 2)
    run = Trainer(model, TrainingArguments(folder, **settings, **how), train_dataset=Clips())
    run.train()
    if resumed:
        with torch.no_grad():  # what a new process would not have
            for p in model.parameters():
                p.mul_(0)
        run.state.log_history.clear()
        run.train(resume_from_checkpoint=str(Path(folder) / f"checkpoint-{STEPS // 2}"))
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def accelerator(model: nn.Module, folder: str, precision: str) -> list[float]:
    """Losses of a loop with accelerate's Accelerator."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    accelerator, losses = Accelerator(mixed_precision=precision, cpu=True), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = torch.utils.data.DataLoader(Clips(), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _, batch in zip(range(STEPS), loader, strict=False):
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def lightning(model: nn.Module, folder: str, precision: str) -> list[float]:
    """Losses of lightning's Trainer."""
    import lightning

    losses = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch, step):
            loss = self.model(batch["pixel_values"].to(self.dtype), batch["bool_masked_pos"]).loss
            losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=3e-3)

    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    quiet |= dict(enable_model_summary=False, default_root_dir=folder)
    how = dict(max_steps=STEPS, precision=precision, accelerator="cpu", devices=1)
    loader = torch.utils.data.DataLoader(Clips(), batch_size=2)
    lightning.Trainer(**how, **quiet).fit(Module(), loader)
    return losses


Loop = Callable[[nn.Module, str], list[float]]
LOOPS: dict[str, tuple[str, Callable, dict]] = {
    "Trainer fp32": ("accelerate", trainer, {}),
    "Trainer bf16": ("accelerate", trainer, dict(bf16=True)),
    "Trainer fp16": ("accelerate", trainer, dict(fp16=True)),
    "Trainer bf16, accumulation": (
        "accelerate",
        trainer,
        dict(bf16=True, gradient_accumulation_steps=2),
    ),
    "Trainer bf16, checkpointing": (
        "accelerate",
        trainer,
        dict(bf16=True, gradient_checkpointing=True),
    ),
    "Trainer bf16, compile": (
        "accelerate",
        trainer,
        dict(bf16=True, torch_compile=True, torch_compile_backend="eager"),
    ),
    "Trainer bf16, resumed": ("accelerate", trainer, dict(bf16=True, resumed=True)),
    "Accelerator no": ("accelerate", accelerator, dict(precision="no")),
    "Accelerator bf16": ("accelerate", accelerator, dict(precision="bf16")),
    "Accelerator fp16": ("accelerate", accelerator, dict(precision="fp16")),
    "Lightning 32-true": ("lightning", lightning, dict(precision="32-true")),
    "Lightning bf16-mixed": ("lightning", lightning, dict(precision="bf16-mixed")),
    "Lightning bf16-true": ("lightning", lightning, dict(precision="bf16-true")),
}


def missing(name: str) -> str | None:
    """The library that a loop needs and that is not installed."""
    needed = ("transformers", LOOPS[name][0])
    return next((n for n in needed if importlib.util.find_spec(n) is None), None)


def curves(name: str) -> tuple[list[float], list[float]]:
    """Losses with the model's own forward, and with the fused one."""
    _, loop, how = LOOPS[name]
    found = []
    for line in (False, True):
        each = copy.deepcopy(model())
        torch.compiler.reset()
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(loop(mae_fast.accelerate(each) if line else each, folder, **how))
    return found[0], found[1]


def difference(own: list[float], fused: list[float]) -> float:
    """The greatest relative one of the losses of two curves."""
    return max(abs(b / a - 1) for a, b in zip(own, fused, strict=True))


if __name__ == "__main__":
    for name in sys.argv[1:] or LOOPS:
        if library := missing(name):
            print(f"{name:30} {library} is not installed")
            continue
        own, fused = curves(name)
        learned = f"loss {own[0]:.4f} -> {own[-1]:.4f}"
        print(f"{name:30} {learned}  greatest difference {difference(own, fused):.1e}", flush=True)
