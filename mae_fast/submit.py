"""`mae-fast submit`: a run as a SLURM job, by submitit, which queues it again when it is preempted
or its time is up. The run saves by itself when it is told, and the next job goes on from there."""

import importlib
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mae_fast.errors import ConfigError, Interrupted

Task = Literal["pretrain", "finetune"]
_MODULES = {"pretrain": "mae_fast.train", "finetune": "mae_fast.tasks.finetune"}


class Job:
    """What each task of a job does; submitit pickles it, and `checkpoint` for the next job."""

    def __init__(self, task: Task, cfg: Any) -> None:
        self.task, self.cfg = task, cfg

    def __call__(self) -> dict[str, Any]:
        from submitit import JobEnvironment
        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        try:
            return getattr(importlib.import_module(_MODULES[self.task]), self.task)(self.cfg)
        except Interrupted as e:
            # It is saved, and submitit's handler is back, which queues the job again and leaves.
            if e.told != JobEnvironment._usr_sig():
                raise
            os.kill(os.getpid(), e.told)
            time.sleep(1.0)  # the handler leaves; on another rank than the first it does nothing
            sys.exit(0)

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(
    config: Annotated[str, tyro.conf.arg(metavar="CONFIG.toml")],
    /,
    task: Task = "pretrain",
    nodes: int = 1,
    gpus_per_node: int = 8,
    cpus_per_gpu: int = 8,
    hours: float = 24.0,
    again: int = 20,
    partition: str = "",
    slurm: tuple[str, ...] = (),
    logs: str = "",
    cluster: Literal["slurm", "local"] = "slurm",
) -> None:
    """Queue a run on SLURM, one task a GPU (needs submitit). A job that is preempted, or whose time
    is up, saves and is queued again; preemption needs SlurmctldParameters=preempt_send_user_signal.

    Args:
        config: the TOML file of the run, as for the verb `task`.
        task: the verb that does it.
        nodes: nodes of the job.
        gpus_per_node: GPUs, and tasks, of a node; 0: one task on its CPUs.
        cpus_per_gpu: cores of a task: data.workers, and one more.
        hours: of a job, after which the run goes on in the next.
        again: how often the run may go on because its time was up.
        partition: the partition, if not the default one.
        slurm: more of sbatch's options, as name=value: --slurm account=vision mem=0
        logs: where stdout, stderr and the pickled job go; by default OUTPUT/slurm.
        cluster: local runs the tasks here, without a scheduler, to try the command.
    """
    cfg, executor = _loaded(task, config), _executor()
    folder = logs or str(Path(cfg.output) / "slurm")
    tasks = gpus_per_node or 1
    options: dict[str, Any] = dict(nodes=nodes, tasks_per_node=tasks, gpus_per_node=gpus_per_node)
    options |= dict(timeout_min=int(hours * 60), cpus_per_task=cpus_per_gpu, name=Path(config).stem)
    if cluster == "slurm":
        more = dict(_pair(text) for text in slurm) | ({"partition": partition} if partition else {})
        options |= {f"slurm_{name}": value for name, value in more.items()}
    try:
        how = {"slurm_max_num_timeout": again} if cluster == "slurm" else {}
        made = executor(folder, cluster=cluster, **how)
        made.update_parameters(**options)
    except (RuntimeError, ValueError, TypeError) as e:
        raise ConfigError(f"submit: {' '.join(str(e).split())}") from None
    job = made.submit(Job(task, cfg))
    print(f"job {job.job_id}: {nodes} x {tasks} tasks; {job.paths.stdout}, {job.paths.stderr}")
    if cluster == "local":
        job.wait()
        print(job.stderr() if job.exception() else "the run ended")


def _loaded(task: Task, config: str) -> Any:
    if task == "pretrain":
        return importlib.import_module("mae_fast.config_file").load_config(config)
    return importlib.import_module("mae_fast.tasks.config").load(config)


def _executor() -> Any:
    try:
        from submitit import AutoExecutor
    except ImportError as e:
        raise ConfigError(f"submit needs submitit (pip install mae-fast[slurm]): {e}") from None
    return AutoExecutor


def _pair(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not name.isidentifier():
        raise ConfigError(f"--slurm takes name=value, got {text!r}")
    return name, value
