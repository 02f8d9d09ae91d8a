"""The real launcher: a scheduler's SIGTERM, and the warning if fewer processes start than requested."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from torch.distributed import HashStore
from torch.distributed.rendezvous import rendezvous

from latentdiff.training.checkpoint import newest_checkpoint
from latentdiff.training.rendezvous import process_group_settings

ROOT = Path(__file__).resolve().parents[3]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]


def command(processes, pictures, output, *overrides):
    launch = [*LAUNCH, "--multi_gpu" if processes == 2 else "--cpu", "--num_processes", str(processes)]
    settings = ["precision=fp32", "threads=1", f"data.source={pictures}", f"output={output}", *overrides]
    return [*launch, str(ROOT / "train_vae.py"), "--config", "debug", *settings]


def environment(pictures, processes):
    cpu = {"ACCELERATE_USE_CPU": "1"} if processes == 2 else {}
    return {**os.environ, **cpu, "HF_DATASETS_CACHE": str(pictures.parent / "cache")}


def those_of(output):
    """Processes whose command line names the run."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(output) in word for word in process.cmdline()) and process.pid != os.getpid():
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (2, 1)])
def test_sigterm_to_the_launcher_saves_and_leaves_nobody(pictures, tmp_path, processes, workers):
    """The signal reaches the whole process group, data loader workers included."""
    output = tmp_path / "run"
    log, said = output / "train_vae" / "log.jsonl", tmp_path / "terminal"
    with said.open("w") as terminal:
        launcher = subprocess.Popen(
            command(processes, pictures, output, "train_vae.steps=1000000", "train_vae.log_every=1",
                    f"workers={workers}",
                    "train_vae.checkpoint_every=1000000", "train_vae.validate_every=1000000"),
            env=environment(pictures, processes), stdout=terminal, stderr=terminal, cwd=tmp_path,
        )  # fmt: skip
        assert wait_until(lambda: log.is_file() and log.read_text().count("\n") > 3, 60), (
            tmp_path / "terminal"
        ).read_text()
        assert len(those_of(output)) > processes
        at_signal = log.read_text().count("\n")
        launcher.send_signal(signal.SIGTERM)
        assert wait_until(lambda: not those_of(output), 40), [process.cmdline() for process in those_of(output)]
        launcher.wait(10)
    checkpoint = newest_checkpoint(output / "train_vae" / "checkpoints", print)
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert checkpoint.step == steps[-1]
    assert checkpoint.step <= at_signal + 30  # a step takes 10 ms, and the signal needs time to arrive
    assert f"stopped at step {checkpoint.step} of 1000000" in said.read_text()


@pytest.mark.parametrize(("attempt", "machines", "agent", "warns"),
                         [("0", "1", "True", False), ("1", "1", "False", False), ("1", "2", "True", True)])  # fmt: skip
def test_processes_find_each_other_as_usual(monkeypatch, capsys, attempt, machines, agent, warns):
    elastic = {"TORCHELASTIC_RESTART_COUNT": attempt, "GROUP_WORLD_SIZE": machines,
               "TORCHELASTIC_USE_AGENT_STORE": agent, "LOCAL_RANK": "0"}  # fmt: skip
    for name, value in elastic.items():
        monkeypatch.setenv(name, value)
    assert process_group_settings().init_method is None
    assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in capsys.readouterr().err) == warns


def test_processes_that_are_started_again_do_not_read_what_the_dead_ones_wrote(monkeypatch):
    store = HashStore()
    store.set("address", "of a dead process")
    monkeypatch.setattr("latentdiff.training.rendezvous.rendezvous", lambda url, timeout: iter([(store, 1, 2)]))
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for attempt in ("1", "2"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        url = process_group_settings().init_method
        ((found, rank, size),) = rendezvous(url, timeout=timedelta(seconds=1))
        assert (rank, size) == (1, 2)
        assert not found.check(["address"])
        found.set("address", attempt)
    assert store.get("address") == b"of a dead process"


@pytest.mark.slow
def test_fewer_processes_than_requested_are_noticed(pictures, tmp_path):
    """`accelerate launch --cpu --num_processes 2` starts one."""
    words = command(1, pictures, tmp_path / "run", "train_vae.steps=1", "train_vae.warmup_steps=0")
    words[words.index("--num_processes") + 1] = "2"
    finished = subprocess.run(
        words, env=environment(pictures, 1), capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert finished.returncode == 0, finished.stderr
    assert "warning: 2 processes were requested but 1 started" in finished.stderr
