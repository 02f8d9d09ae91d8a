"""Processes that die or hang, losses that leap: the run goes on with the same bits, or says why not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from equality import same

from latentdiff.training.spikes import KEPT, Spikes

LONGER = ("train_latent.steps=18", "train_latent.checkpoint_every=4", "train_latent.validate_every=18")


@pytest.fixture
def latent(train, uninterrupted):
    """Latent training alone, on a VAE that is finished."""
    return lambda name, *settings, **accident: train(
        name, f"vae.pretrained={uninterrupted('fp32')}", *settings, stage="train_latent", **accident
    )


def test_a_spike_is_noted_with_its_pictures_and_skipped_on_request(latent, said, state, tmp_path):
    assert latent("noted", *LONGER, accident="spike", at=14) == 0
    assert latent("skipped", *LONGER, "train_latent.max_spike=50", accident="spike", at=14) == 0
    assert "times its running mean; pictures: train/0" in said("noted")
    assert "times its running mean, so this step was skipped; pictures: train/0" in said("skipped")
    assert said("noted").count("running mean") == 1
    lines = [json.loads(line) for line in (tmp_path / "noted/train_latent/log.jsonl").read_text().splitlines()]
    (spike,) = [line for line in lines if "spike" in line]
    assert spike["step"] == 14
    assert spike["spike"] > 1000
    assert len(spike["pictures"]) == 6
    noted, skipped = state("noted")[1], state("skipped")[1]
    assert skipped["skips/counts"].tolist()[0] == 1
    assert noted["skips/counts"].tolist()[0] == 0
    assert not same(noted, skipped)


@pytest.mark.slow
def test_a_run_resumes_exactly_through_a_spike(latent, state):
    settings = (*LONGER, "train_latent.max_spike=50")
    assert latent("one", *settings, accident="spike", at=14) == 0
    assert latent("two", *settings, accident="kill at step", at=13) == -9
    assert latent("two", *settings, accident="spike", at=14) == 0
    assert state("one")[0] == state("two")[0] == 18
    assert same(state("one")[1], state("two")[1])


class OneProcess:
    """The parts of a launch that the guard needs."""

    device = torch.device("cpu")

    class accelerator:
        reduce = staticmethod(lambda value, _: value)


def test_what_counts_as_a_spike():
    """Not before ten steps, nor where the loss is not finite; in the mean a spike counts as twice of it."""
    guard, one, zero = Spikes(OneProcess, 10.0), torch.tensor(1.0), torch.tensor(0.0)
    assert float(guard.accept(1, torch.tensor(500.0), one)) == 1
    guard = Spikes(OneProcess, 10.0)
    for step in range(1, 21):
        assert float(guard.accept(step, torch.tensor(2.0), one)) == 1
    assert float(guard.accept(21, torch.tensor(torch.nan), zero)) == 0
    assert float(guard.accept(22, torch.tensor(21.0), one)) == 0
    assert float(guard.accept(23, torch.tensor(19.0), one)) == 1
    mean = 2 + (4 - 2) / 21
    assert guard.state[0] == pytest.approx(mean + (19 - mean) / 22)
    assert guard.read() == [(22, 10.5)]
    assert guard.read() == []
    for step in range(30, 30 + 2 * KEPT):
        guard.accept(step, torch.tensor(1e9), one)
    assert [step for step, _ in guard.read()] == list(range(30 + KEPT, 30 + 2 * KEPT))


def test_a_loss_that_stays_high_becomes_the_usual_one():
    guard, one = Spikes(OneProcess, 3.0), torch.tensor(1.0)
    for step in range(1, 101):
        guard.accept(step, torch.tensor(0.1), one)
    taken = [float(guard.accept(step, torch.tensor(0.4), one)) for step in range(101, 251)]
    assert taken[0] == 0
    assert taken[-1] == 1


def test_killed_workers_are_replaced_and_the_result_is_the_same(train, said, state, uninterrupted):
    assert train("run", "workers=2", accident="kill workers", at=3) == 0
    assert "a process that reads pictures died; starting new ones" in said("run")
    for stage in ("train_vae", "train_latent"):
        from latentdiff.training.checkpoint import newest_checkpoint

        expected = newest_checkpoint(uninterrupted("fp32") / stage / "checkpoints", print)
        tensors = {
            f"{file}/{key}": tensor for file in expected.names() for key, tensor in expected.tensors(file).items()
        }
        assert same(state("run", stage)[1], tensors)


@pytest.mark.slow
def test_workers_that_die_again_and_again(latent, said, state):
    """Three times without a picture in between: a clear error, and nothing is lost."""
    assert latent("run", "workers=1", "train_latent.cache=false", accident="kill workers", at=-3) == 1
    assert "error: stopped at step" in said("run")
    assert "the processes that read pictures died 3 times in a row; they may need more memory" in said("run")


def test_a_second_sigterm_while_saving_changes_nothing(train, state, said):
    assert train("run", accident="terminate while saving", at=3, stage="train_vae") == 143
    assert state("run", "train_vae")[0] == 2
    assert said("run").count("stopped at step 2 of 6: SIGTERM") == 1


def test_a_process_that_hangs_is_named(train, said):
    """Both end within seconds, where the process group alone would wait for hours."""
    assert train("run", processes=2, accident="hang", at=4, stage="train_vae") == 1
    for rank in (0, 1):
        assert f"error: rank {rank}: step 4 has not ended for 2 s, so this run is given up; rank 1 lags" in said(
            "run", rank
        )
        assert "rank 1 is in <lambda>" in said("run", rank)


@pytest.mark.slow
def test_a_process_that_dies_is_started_again_by_the_launcher(short, pictures, tmp_path, state):
    """torchrun --max-restarts: killed once at step 4, and the result has the bits of a run without an accident."""
    script = tmp_path / "killed_once.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import scenario\n"
        "first, last = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0', os.environ['RANK'] == '1'\n"
        "accident = 'kill at step' if first and last and sys.argv[1] == 'kill' else None\n"
        "scenario.run(sys.argv[2:], 'train_vae', accident, 4)\n"
    )
    for name, accident in (("killed", "kill"), ("plain", "none")):
        settings = ["precision=fp32", "threads=1", f"data.source={pictures}", *short, f"output={tmp_path / name}"]
        command = [Path(sys.executable).with_name("torchrun"), "--nproc-per-node=2", "--max-restarts=1",
                   "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", script, accident, *settings]  # fmt: skip
        environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    assert same(state("killed", "train_vae")[1], state("plain", "train_vae")[1])
