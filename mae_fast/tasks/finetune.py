"""`mae-fast finetune`: the run of a task."""

from pathlib import Path
from typing import Any

from mae_fast.run import run
from mae_fast.tasks.config import FinetuneConfig, as_config


def finetune(cfg: FinetuneConfig | str | Path) -> dict[str, Any]:
    """Fine-tune as `cfg`, or the TOML file of that path, says, resuming the run found in its
    output. Returns the last row of metrics; raises as `pretrain` does."""
    cfg = as_config(cfg)
    if cfg.task == "ava":
        from mae_fast.tasks.ava.run import AvaRun as Task
    else:
        from mae_fast.tasks.classify import FinetuneRun as Task
    return run(Task, cfg)
