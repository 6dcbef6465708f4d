"""A run as a job: what srun says, what submitit is given, and a preempted one that goes on."""

import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import config, free_port, losses

from mae_fast import metrics, submit
from mae_fast.data import build_index
from mae_fast.distributed import srun
from mae_fast.errors import ConfigError, Interrupted

SLURM = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[07-08]", "gpu07"),
        ("gpu[7,9-11]", "gpu7"),
        ("a1", "a1"),
        ("a1,b2", "a1"),
        ("rack-3-[004-005,9],x1", "rack-3-004"),
        ("gpu[3-4]-ib", "gpu3-ib"),
        ("rack[1-2,5]n[03-04],x1", "rack1n03"),
        ("n-1.site.org,n-2.site.org", "n-1.site.org"),
    ],
)
def test_what_srun_says_is_what_torchrun_would(nodes, first, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = srun(SLURM | {"SLURM_STEP_NODELIST": nodes})
    port = int(found.pop("MASTER_PORT"))
    assert found == {"RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "MASTER_ADDR": first}
    assert 15000 <= port < 31000
    for other in ({"SLURM_JOB_ID": "4712"}, {"SLURM_STEP_ID": "1"}):  # on one node
        assert int(srun(SLURM | other)["MASTER_PORT"]) != port


def test_a_task_that_sees_one_gpu_takes_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for count, local in ((1, "0"), (4, "3")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert srun(SLURM)["LOCAL_RANK"] == local


def test_other_variables_stand():
    """torchrun's; a job's script, which is no task of a step; one task; a port that was chosen."""
    assert srun(SLURM | {"RANK": "0"}) == {} == srun({})
    script = {k: v for k, v in SLURM.items() if "STEP" not in k} | {"SLURM_NTASKS": "16"}
    assert srun(script) == {} == srun(SLURM | {"SLURM_STEP_NUM_TASKS": "1"})
    assert srun(SLURM | {"MASTER_PORT": "5"})["MASTER_PORT"] == "5"


def test_without_submitit_it_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    (tmp_path / "a.toml").write_text("")
    with pytest.raises(ConfigError, match=r"pip install mae-fast\[slurm\]"):
        submit.submit(str(tmp_path / "a.toml"))


def test_a_configuration_is_checked_before_it_waits_in_a_queue(tmp_path):
    (tmp_path / "a.toml").write_text("[train]\nblrr = 1.0")
    with pytest.raises(ConfigError, match="blrr"):
        submit.submit(str(tmp_path / "a.toml"))


def test_slurm_gets_what_was_asked_for(tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit", reason="submitit is not installed")
    given = {}

    class Executor:
        def __init__(self, folder, **how):
            given.update(how, folder=folder)

        def update_parameters(self, **how):
            given.update(how)

        def submit(self, job):
            given["job"] = job
            paths = submitit.core.utils.JobPaths(given["folder"], "7")
            return type("J", (), {"job_id": "7", "paths": paths})

    monkeypatch.setattr(submitit, "AutoExecutor", Executor)
    toml = tmp_path / "big.toml"
    toml.write_text(f'output = "{tmp_path}/run"')
    more = dict(partition="p", slurm=("account=a", "mem=0"), hours=1.5, again=3)
    submit.submit(str(toml), nodes=2, gpus_per_node=4, cpus_per_gpu=6, **more)
    wanted = dict(nodes=2, tasks_per_node=4, gpus_per_node=4, timeout_min=90, name="big")
    wanted |= dict(slurm_partition="p", slurm_account="a", slurm_mem="0", slurm_max_num_timeout=3)
    wanted |= dict(cpus_per_task=6)
    assert wanted.items() <= given.items() and given["folder"] == f"{tmp_path}/run/slurm"
    again = given["job"].checkpoint()
    assert again.function is given["job"] and given["job"].cfg.output == f"{tmp_path}/run"
    with pytest.raises(ConfigError, match="name=value"):
        submit.submit(str(toml), slurm=("account",))


def test_only_the_signal_of_a_preemption_queues_a_job_again(monkeypatch):
    submitit = pytest.importorskip("submitit", reason="submitit is not installed")
    joined = SimpleNamespace(export=lambda **how: None)
    monkeypatch.setattr("submitit.helpers.TorchDistributedEnvironment", lambda: joined)

    def stopped(told):
        error = Interrupted("saved")
        error.told = told
        raise error

    sent, preempted = [], submitit.JobEnvironment._usr_sig()
    monkeypatch.setattr("mae_fast.train.pretrain", stopped)
    monkeypatch.setattr(submit.os, "kill", lambda pid, signum: sent.append(signum))
    monkeypatch.setattr(submit.time, "sleep", lambda seconds: None)
    with pytest.raises(Interrupted):
        submit.Job("pretrain", signal.SIGTERM)()
    assert sent == []
    with pytest.raises(SystemExit):
        submit.Job("pretrain", preempted)()
    assert sent == [preempted]


def test_a_preempted_job_is_queued_again_and_ends_as_if_nothing_had_been(
    folder, tmp_path, monkeypatch
):
    """Two tasks of submitit's local executor get the signal that SLURM sends."""
    submitit = pytest.importorskip("submitit", reason="submitit is not installed")
    build_index([folder], tmp_path / "index.jsonl", progress=False)
    cfg = config(str(tmp_path / "index.jsonl"), tmp_path / "run", steps=40, batch_size=1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    executor = submitit.AutoExecutor(tmp_path / "logs", cluster="local")
    executor.update_parameters(tasks_per_node=2, timeout_min=60)
    job = executor.submit(submit.Job("pretrain", cfg))
    try:
        path, end = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 300
        while not (path.exists() and len(metrics.read(path)) >= 5):
            assert time.monotonic() < end and not job.done(), job.stderr()
            time.sleep(0.02)
        controller = job._process.pid
        for task in Path(f"/proc/{controller}/task/{controller}/children").read_text().split():
            os.kill(int(task), signal.SIGUSR2)
        assert job.results()[0]["step"] == 40
    finally:
        job.cancel()
    assert len(losses(tmp_path / "run")) == 40
    starts = (tmp_path / "run" / "environment.jsonl").read_text().splitlines()
    assert len(starts) == 2
    assert "this job is preempted" in job.stderr() and "Requeued" in job.stdout()
