"""Snapshots: when they are taken, that they give the averages that were not tracked, and accidents."""

import fcntl
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from equality import same
from typer.testing import CliRunner

from latentdiff.cli import app
from latentdiff.config import load_config
from latentdiff.errors import LatentDiffError
from latentdiff.training.checkpoint import newest_checkpoint
from latentdiff.training.ema import EMA, TRACKED
from latentdiff.training.optimizer import TrainState
from latentdiff.training.rebuild import read_series
from latentdiff.training.snapshots import Snapshots, thinned
from latentdiff.training.timetable import Decision, Timetable
from unet import UNet, UNetConfig

SETTINGS = ("train_latent.steps=20", "train_latent.ema_snapshots=5", "train_latent.checkpoint_every=6",
            "train_latent.validate_every=20", "train_latent.log_every=20", "validation.num_steps=1")  # fmt: skip
MAIN = SimpleNamespace(is_main=True)


def snapshots(number, settings=(), state=None, has_budget=False):
    section = load_config("demo", settings).train_latent
    timetable = Timetable(section, "train_latent", has_budget=has_budget)
    return Snapshots(MAIN, Path("nowhere"), number, timetable, state)


def due(taken, last):
    return [step for step in range(1, last + 1) if taken.is_due(step)]


def test_snapshots_are_evenly_spaced_and_end_with_the_run():
    known = ["train_latent.steps=1000"]
    assert due(snapshots(24, known), 1000) == [-(-k * 1000 // 24) for k in range(1, 25)]
    assert due(snapshots(24, ["train_latent.steps=7", "train_latent.warmup_steps=1"]), 7) == list(range(1, 8))
    assert due(snapshots(0, known), 1000) == []


def test_under_a_budget_each_takes_its_place_by_what_is_known_then():
    """No decision, one of 100 steps, one of 60: a function of the list, even if all of it is known from the start."""
    taken = snapshots(10, has_budget=True)
    assert due(taken, 4) == []
    decisions = [Decision("train_latent", 4, 75, 25, 60.0), Decision("train_latent", 45, 45, 15, 60.0)]
    taken.timetable.decisions = decisions[:1]
    before = due(taken, 45)
    assert before == [10, 20, 30, 40]
    taken.timetable.decisions = decisions
    assert due(taken, 60) == [*before, 48, 54, 60]
    taken.timetable.decisions = [*decisions, Decision("train_latent", 57, 45, 12, 60.0)]  # no time is left
    assert due(taken, 57) == [*before, 48, 54, 57]


def test_too_many_are_thinned_where_they_are_close():
    assert thinned([10, 20, 30, 40, 60, 80], 5) == [20, 30, 40, 60, 80]
    assert thinned([100, 200, 210, 300], 3) in ([100, 210, 300], [100, 200, 300])
    dense = thinned([*range(1, 101), *range(110, 401, 10)], 24)
    gaps = [after - before for before, after in zip([0, *dense], dense, strict=False)]
    assert len(dense) == 24
    assert dense[-1] == 400
    assert max(gaps) <= 3 * min(gaps)


@pytest.mark.slow
def test_averages_that_were_not_tracked(tmp_path, relative_error):
    """A UNet is trained on fixed latents; five other widths are tracked directly, beside the two of the snapshots."""
    unet = UNet(UNetConfig(block_out_channels=(8, 8), layers_per_block=1, attention_levels=(), norm_groups=4,
                           in_channels=4, out_channels=4, context_dim=8, sample_size=4))  # fmt: skip
    config = ["train_latent.steps=120", "train_latent.learning_rate=3e-3", "train_latent.warmup_steps=20",
              "train_latent.ema_sigma_rel=0.1"]  # fmt: skip
    section = load_config("demo", config).train_latent
    parameters = {f"unet.{name}": parameter for name, parameter in unet.named_parameters()}
    state = TrainState([(parameters, 3e-3)], section, tracked=TRACKED)
    assert state.averages["ema_100"] is state.ema  # tracked once, under two names
    widths = {width: EMA(list(parameters.values()), width) for width in (0.03, 0.04, 0.07, 0.14, 0.2)}
    taken = Snapshots(MAIN, tmp_path / "train_latent", 24, state.timetable, state)
    data, context = torch.randn(64, 4, 4, 4), torch.randn(4, 3, 8)
    for step in range(1, 121):
        x0, noise = data[torch.randint(64, (4,))], torch.randn(4, 4, 4, 4)
        F.mse_loss(unet((x0 + noise) / 2**0.5, torch.full((4,), 500), context), noise).backward()
        state.update(step, state.gradient_norm(), torch.tensor(1.0))
        for average in widths.values():
            average.update(step)
        if taken.is_due(step):
            taken.take(step, {})
    series = read_series(tmp_path)
    assert (series.step, len(series.profiles), series.left_out) == (120, 48, {})

    def flat(tensors):
        return torch.cat([tensor.detach().double().flatten() for tensor in tensors])

    apart = float((flat(state.averages["ema_050"].tensors) - flat(state.ema.tensors)).norm())
    for width, direct in widths.items():
        rebuilt = series.average(series.mixture(width))
        assert rebuilt.keys() == parameters.keys()
        error = float((flat(rebuilt[name] for name in parameters) - flat(direct.tensors)).norm()) / apart
        assert error <= 0.15, f"{width}: {error:.3f}"
    rebuilt = series.average(series.mixture(0.1))
    assert relative_error(flat(rebuilt[name] for name in parameters), flat(state.ema.tensors)) < 1e-7


@pytest.fixture
def latent(train, uninterrupted):
    def run(name, *settings, **accident):
        given = (f"vae.pretrained={uninterrupted('fp32')}", *SETTINGS, *settings)
        return train(name, *given, stage="train_latent", **accident)

    return run


def contents(folder):
    """Bytes of all files by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def latentdiff(*arguments):
    result = CliRunner().invoke(app, ["ema", *map(str, arguments)])
    return result.exit_code, result.output


@pytest.mark.slow  # seven trainings
def test_a_run_with_snapshots(latent, state, log, said, weights, tmp_path):
    """The same weights as without; after kills at steps, in and after a snapshot, the same bytes; then the command."""
    assert latent("plain", "train_latent.ema_snapshots=0") == 0
    assert latent("run") == 0
    plain, tensors = state("plain")[1], state("run")[1]
    assert {name.split("/")[0] for name in tensors.keys() - plain.keys()} == {"model-ema_050"}
    assert same({name: tensors[name] for name in plain}, plain)
    facts = [newest_checkpoint(tmp_path / name / "train_latent" / "checkpoints", print).metadata
             for name in ("plain", "run")]  # fmt: skip
    assert facts[1].pop("snapshots") == [4, 8, 12, 16, 20]
    assert {**facts[1], "seconds": 0, "best": 0} == {**facts[0], "seconds": 0, "best": 0}
    assert not (tmp_path / "plain" / "train_latent" / "snapshots").exists()

    # Between the snapshot of step 4 and the checkpoint of step 6; within that snapshot; after two more of each.
    for accident, at in (("kill at step", 6), ("kill while saving", 3), ("kill at step", 14)):
        assert latent("killed", accident=accident, at=at) == -9
    assert latent("killed") == 0
    expected = contents(tmp_path / "run" / "train_latent" / "snapshots")
    assert len(expected) == 5 * 4
    assert contents(tmp_path / "killed" / "train_latent" / "snapshots") == expected
    assert same(state("killed")[1], tensors)

    run, out = tmp_path / "run", tmp_path / "out"
    code, output = latentdiff(run, "--sigma-rel", "0.1", "--output", out)
    assert code == 0, output
    for part in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        ours, theirs = (weights(folder / f"{part}.safetensors") for folder in (out, run / "model"))
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[name], theirs[name], rtol=1e-6, atol=1e-8) for name in ours)
    assert json.loads((out / "ema.json").read_text())["step"] == 20
    for target in ((), ("--output", out)):
        code, output = latentdiff(run, "--sigma-rel", "0.07", *target)
        assert code == 1
        assert "is not empty; give another --output FOLDER; --overwrite replaces it" in output
    with (run / ".lock").open("r+") as lock:  # as a training holds it
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, output = latentdiff(run, "--sigma-rel", "0.07", "--overwrite")
        assert (code, "another run is writing there" in output) == (1, True), output
    launches = (run / "run.json").read_text()
    code, output = latentdiff(run, "--pick", "validation", "--sigma-rel", "0.07", "--sigma-rel", "0.1", "--overwrite")
    assert code == 0, output
    assert (run / "run.json").read_text() == launches  # no training has begun
    table = [line.split() for line in output.splitlines() if line.startswith("sigma_rel")]
    assert [row[1] for row in table] == ["0.07", "0.1"]
    assert float(table[1][-1]) == pytest.approx(log("run", "validation_loss")[20], rel=1e-4)
    record = json.loads((run / "model" / "ema.json").read_text())
    assert record["figures"]["loss without captions"] == pytest.approx(min(float(row[9]) for row in table), rel=1e-4)

    shutil.rmtree(run / "train_latent" / "snapshots" / "step-00000004")
    damaged = run / "train_latent" / "snapshots" / "step-00000012" / "ema_100.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    again = tmp_path / "again"
    code, output = latentdiff(run, "--sigma-rel", "0.1", "--output", again)
    assert code == 0, output
    assert "left out: step-00000004: is missing\n" in output
    assert "left out: step-00000012: ema_100.safetensors is corrupt" in output
    code, output = latentdiff(run, "--sigma-rel", "0.2", "--output", tmp_path / "third")
    assert code == 1
    assert "miss the profile of this average by" in output
    assert "step-00000004: is missing; step-00000012: ema_100" in output
    assert not (tmp_path / "third").exists()


@pytest.mark.slow
def test_a_full_disk_and_a_run_that_began_without(latent, said, tmp_path):
    assert latent("run", accident="full disk", at=3) == 1
    assert "the checkpoint of step 4 cannot be written (No space left on device)" in said("run")
    assert "Traceback" not in said("run")
    assert latent("late", "train_latent.steps=6", "train_latent.ema_snapshots=0") == 0
    assert latent("late") == 1
    assert "train_latent.ema_snapshots: the checkpoint lacks ema_050, as the run began without" in said("late")
    with pytest.raises(LatentDiffError, match=r"has no snapshots; training takes them with train_latent\.ema_snap"):
        read_series(tmp_path / "late")
