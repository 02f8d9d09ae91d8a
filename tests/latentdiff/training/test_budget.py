"""Real runs with a budget: the list of decisions makes the run, through kills, more time and several processes."""

import json
import shutil
import time

import pytest
from equality import same

from latentdiff import LatentPipeline

STAGES = ("train_vae", "train_latent")
BUDGET = ("budget=10m", "train_vae.steps=24", "train_latent.steps=24")  # bounds: a test does not take ten minutes
# A list as it comes about on a busy machine: more steps, fewer, and a decay that is shortened; 24 steps in all.
LIST = ((4, 15, 20), (8, 21, 28), (12, 18, 26), (20, 18, 24), (24, 18, 24))


def decisions(folder, stage):
    return [json.loads(path.read_text()) for path in sorted((folder / stage / "checkpoints" / "decisions").iterdir())]


def entries(folder, stage):
    made = decisions(folder, stage)
    return [(each["step"], each["decay_start"], each["decay_start"] + each["decay_steps"]) for each in made]


def write_list(folder, stage, example):
    place = folder / stage / "checkpoints" / "decisions"
    place.mkdir(parents=True)
    for number, (step, start, last) in enumerate(LIST):
        values = {**example, "step": step, "decay_start": start, "decay_steps": last - start}
        (place / f"{number:05}.json").write_text(json.dumps(values))


def same_state(one, other):
    return one[0] == other[0] and same(one[1], other[1])


@pytest.fixture
def stage_alone(train, uninterrupted):
    """Train one stage, latent training on a VAE that is finished."""

    def run(stage, name, *settings, **accident):
        pretrained = [f"vae.pretrained={uninterrupted('fp32')}"] if stage == "train_latent" else []
        return train(name, *BUDGET, *pretrained, *settings, stage=stage, **accident)

    return run


KILLS = (("kill at step", 7), ("kill while saving", 25), ("kill at step", 5), ("kill at step", 3),
         ("kill while saving", 10))  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "kills"),
    [(stage, kills) for stage in STAGES for kills in (KILLS[:2], KILLS)],
)
def test_a_run_is_a_function_of_its_list(stage_alone, state, stage, kills, tmp_path):
    """Killed again and again, at steps and while saving: every tensor equal, and no decision added."""
    assert stage_alone(stage, "example") == 0
    for name in ("one", "two"):
        write_list(tmp_path / name, stage, decisions(tmp_path / "example", stage)[0])
    assert stage_alone(stage, "one") == 0
    for accident, at in kills:
        assert stage_alone(stage, "two", accident=accident, at=at) == -9
    assert stage_alone(stage, "two") == 0
    assert entries(tmp_path / "two", stage) == list(LIST)
    assert state("one", stage)[0] == 24
    assert same_state(state("one", stage), state("two", stage))
    assert not same_state(state("one", stage), state("example", stage))  # the list matters


@pytest.mark.slow
def test_killed_between_a_decision_and_its_first_step(train, state, tmp_path):
    """The decision stands, and the run that goes on equals one that was given the finished list."""
    assert train("run", *BUDGET, accident="kill after deciding", at=1) == -9
    assert entries(tmp_path / "run", "train_vae") == [(4, 18, 24)]
    assert train("run", *BUDGET, accident="kill after deciding", at=2) == -9  # the first of latent training
    assert train("run", *BUDGET) == 0
    for stage in STAGES:
        place = f"{stage}/checkpoints/decisions"
        shutil.copytree(tmp_path / "run" / place, tmp_path / "again" / place)
    assert train("again", *BUDGET) == 0
    assert [same_state(state("run", stage), state("again", stage)) for stage in STAGES] == [True, True]


@pytest.mark.slow
def test_a_larger_budget_goes_on_from_the_beginning_of_the_decay(train, state, log, said, tmp_path):
    assert train("run", *BUDGET) == 0
    vae, model = (tmp_path / "run" / name for name in ("vae", "model"))
    first = {path: path.stat().st_mtime_ns for path in vae.rglob("*") if path.is_file()}
    assert train("run", *BUDGET) == 0
    assert f"{model}: already done" in said("run")
    more = ("budget=20m", "train_vae.steps=24", "train_latent.steps=40")
    assert train("run", *more) == 0
    assert "train_latent: going on from step 18" in said("run")
    assert {path: path.stat().st_mtime_ns for path in first} == first  # latents of another VAE would not fit
    assert state("run")[0] == 40
    assert sorted(log("run")) == sorted(set(log("run")))
    assert json.loads((model / "done.json").read_text())["steps"] == 40
    assert "cannot be used" not in said("run")
    made = entries(tmp_path / "run", "train_latent")
    assert made[:2] == [(4, 18, 24), (24, 18, 24)]
    assert made[-1][0] == made[-1][2] == 40
    for path in (tmp_path / "run" / "train_latent" / "checkpoints").glob("step-00000030"):
        shutil.rmtree(path)  # from which it would go on with a budget that is larger still
    assert train("run", "budget=30m", "train_vae.steps=24", "train_latent.steps=60") == 1
    assert "step-00000030" in said("run") or "the checkpoint of step 30" in said("run")


def test_the_list_and_the_budget_belong_to_the_run(train, said, tmp_path):
    assert train("run", *BUDGET, accident="kill at step", at=20) == -9
    assert train("run") == 1
    assert "this run started with recipe_steps=20, but it is now None" in said("run")
    place = tmp_path / "run" / "train_vae" / "checkpoints" / "decisions"
    values = json.loads((place / "00000.json").read_text())
    (place / "00000.json").write_text(json.dumps({**values, "decay_start": 17, "decay_steps": 7}))
    assert train("run", *BUDGET) == 1
    assert f"{place}: are not the decisions that led to step-" in said("run")


@pytest.mark.slow
def test_two_processes_follow_the_main_one(train, state, said, tmp_path):
    """Steps, checkpoints and validations that the clock decides are the same for both; else they would wait forever."""
    settings = ("budget=10m", "train_vae.steps=20", "train_latent.steps=20", "train_vae.micro_batch_size=null",
                "train_latent.micro_batch_size=null")  # fmt: skip
    assert train("run", *settings, processes=2) == 0
    assert [state("run", stage)[0] for stage in STAGES] == [20, 20]
    assert [entries(tmp_path / "run", stage) for stage in STAGES] == [[(4, 15, 20), (20, 15, 20)]] * 2


@pytest.mark.slow
def test_it_ends_on_time_with_a_model(train, said, tmp_path):
    """No bound but the budget: 30 seconds for everything."""
    began = time.monotonic()
    unbounded = [f"{stage}.{setting}" for stage in STAGES for setting in ("max_steps=null", "log_every=50")]
    assert train("run", "budget=30s", *unbounded) == 0
    assert 0.80 * 30 <= time.monotonic() - began <= 1.1 * 30  # the test suite is busy beside it
    assert "left of 30s" in said("run")
    assert len(LatentPipeline.from_pretrained(tmp_path / "run")("a red circle", num_steps=2, seed=0)) == 1


def test_too_short(train, said, tmp_path):
    assert train("run", "budget=1s") == 1
    assert "error: budget=1s: too short for 20 steps of train_vae on this machine; it takes at least " in said("run")
    assert not (tmp_path / "run" / "train_vae" / "checkpoints").exists()
