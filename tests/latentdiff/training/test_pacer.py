"""The pace of a stage with a budget, in simulated time: it ends on time, whatever happens to its speed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from latentdiff.config import load_config
from latentdiff.errors import LatentDiffError
from latentdiff.sections.values import duration
from latentdiff.training.budget import OutOfTime, Pacer, format_duration
from latentdiff.training.decisions import Decisions
from latentdiff.training.signals import StopReason
from latentdiff.training.timetable import Decision, Timetable


class SimulatedClock:
    def __init__(self, now):
        self.now = now

    def elapsed(self):
        return self.now


class Stage:
    """A stage that begins `start` seconds after the launch and shall have ended at `limit`."""

    def __init__(self, folder, limit, start=10.0, validation=0.5, saving=0.2, finishing=1.0, budget=None, **settings):
        overrides = [f"train_latent.{name}={value}" for name, value in settings.items()]
        budget = "null" if limit is None else budget or format_duration(limit)
        config = load_config("demo", [f"budget={budget}", *overrides])
        self.clock, self.lines = SimulatedClock(start), []
        run = SimpleNamespace(clock=self.clock, config=config, budget=config.budget and duration(config.budget),
                              accelerator=SimpleNamespace(num_processes=1), is_main=True, report=self.lines.append,
                              device=torch.device("cpu"))  # fmt: skip
        self.timetable = Timetable(config.train_latent, "train_latent", has_budget=limit is not None)
        self.decisions = Decisions(folder, {"seed": 0})
        self.pacer = Pacer(run, self.timetable, self.decisions, limit, num_bytes=1000)
        self.costs, self.finishing = {"validation": validation, "checkpoint": saving}, finishing
        self.validated, self.saved, self.limit = [], [], limit
        self.out_of_time = False
        self.slower = lambda now: 1.0  # how much more everything else takes at some time

    def rehearse(self):
        return self.costs["validation"], self.finishing

    def spend(self, kind):
        with self.pacer.timing(getattr(self.pacer, kind)):
            for _ in range(20):
                self.clock.now += self.costs[kind] / 20 * self.slower(self.clock.now)
                if kind == "validation":
                    self.pacer.check_time()

    def run(self, seconds):
        """Train; `seconds` gives the time of a step that begins at some time. Return when all is finished."""
        step = 0
        while self.timetable.steps is None or step < self.timetable.steps:
            step += 1
            self.clock.now += seconds(self.clock.now)
            due = self.pacer.after(step, StopReason.NONE, self.rehearse)
            last = step == self.timetable.steps
            try:
                if last:
                    self.pacer.check_time_to_validate()
                if due.validate or last:
                    self.spend("validation")
                    self.validated.append(step)
            except OutOfTime:
                self.out_of_time = True
            if due.save or last:
                self.saved.append(step)
                self.spend("checkpoint")
        self.pacer.settle()
        after = 2 * self.costs["checkpoint"] + self.finishing  # two models are written
        return self.clock.now + after * self.slower(self.clock.now)


SPEEDS = {
    "steady": lambda now, noise: 0.1,
    "noisy": lambda now, noise: 0.1 * noise.lognormal(0, 0.5),
    "half as fast from the middle on": lambda now, noise: 0.1 if now < 150 else 0.2,
    "half as fast near the end": lambda now, noise: 0.1 if now < 255 else 0.2,
    "three times as fast from the middle on": lambda now, noise: 0.3 if now < 150 else 0.1,
    "slow at first": lambda now, noise: 2.0 if now < 20 else 0.05,
    "a long pause": lambda now, noise: 40.0 if 100 < now < 100.2 else 0.1,
    "one second per step": lambda now, noise: 1.0,
}


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("validation", [0.5, 12.0])
def test_the_stage_ends_on_time(tmp_path, speed, validation):
    stage, noise = Stage(tmp_path, 300.0, validation=validation), np.random.default_rng(0)
    ended = stage.run(lambda now: SPEEDS[speed](now, noise))
    assert 0.85 * 300 <= ended <= 300
    assert len(stage.timetable.decisions) <= 15
    steps, newest = stage.timetable.steps, stage.timetable.decisions[-1]
    assert stage.saved[-1] == stage.validated[-1] == steps
    assert newest.decay_start in stage.saved
    assert stage.saved[0] == 4  # at once, so that a run that is stopped early is worth something
    spent = validation * (len(stage.validated) - 1) + 0.2 * (len(stage.saved) - 1)  # the last ones are the tail
    assert spent <= 0.10 * 300
    assert len(stage.validated) >= (8 if validation == 0.5 else 2)


@pytest.mark.parametrize("factor", [2.0, 10.0])
def test_a_machine_that_becomes_busy(tmp_path, factor):
    """Threads wait for one another at every operation, so one other program can make everything ten times slower."""
    stage = Stage(tmp_path, 300.0, validation=1.0, finishing=2.0)
    stage.slower = lambda now: 1.0 if now < 150 else factor
    assert 0.85 * 300 <= stage.run(lambda now: 0.1 * stage.slower(now)) <= 300


def test_the_last_validation_is_left_out_rather_than_late(tmp_path):
    """A pause of 34 seconds just before the end takes the time that was kept free for it."""
    stage = Stage(tmp_path, 300.0, validation=12.0)
    assert stage.run(lambda now: 34.0 if 255 < now < 255.2 else 0.1) <= 300
    assert stage.out_of_time
    assert stage.validated[-1] < stage.timetable.steps == stage.saved[-1]


@pytest.mark.parametrize("begins", [250.0, 262.0, 264.0])
def test_a_validation_that_becomes_slow_is_given_up(tmp_path, begins):
    """Another program makes everything six times slower, shortly before the last validation or in the middle of it."""
    stage = Stage(tmp_path, 300.0, validation=12.0, saving=0.1, finishing=0.2)
    stage.slower = lambda now: 1.0 if now < begins else 6.0
    assert 0.85 * 300 <= stage.run(lambda now: 0.1 * stage.slower(now)) <= 300
    assert stage.out_of_time
    assert stage.validated[-1] < stage.timetable.steps == stage.saved[-1]


def test_a_steady_stage_needs_one_decision(tmp_path):
    """A quarter of its steps have a falling rate."""
    stage = Stage(tmp_path, 300.0)
    stage.run(lambda now: 0.1)
    first, closing = stage.decisions.read()
    assert (first.step, closing.step) == (4, first.last)
    assert first.decay_steps == pytest.approx(first.last / 4, abs=1)
    assert (closing.decay_start, closing.last) == (first.decay_start, first.last)
    assert stage.lines == [line for line in stage.lines if line.startswith("train_latent 4: 0.1")]


def test_the_list_alone_decides_once_it_is_complete(tmp_path):
    """At half the speed, as on a machine that is in use, a list that is complete is followed to its end."""
    stage = Stage(tmp_path, 300.0)
    stage.run(lambda now: 0.1 if now < 150 else 0.2)
    repeated = Stage(tmp_path, 300.0)
    repeated.timetable.decisions = repeated.decisions.read()
    repeated.run(lambda now: 0.2)
    assert repeated.decisions.read() == stage.decisions.read()
    assert repeated.timetable.steps == stage.timetable.steps
    assert len(list((tmp_path / "decisions").iterdir())) == len(stage.decisions.read())


@pytest.mark.parametrize(("budget", "share", "begin", "start"), [("12s", 1.0, 10.0, 10.0), ("39s", 0.35, 33.0, 33.0),
                                                                 ("100s", 0.35, 20.0, 46.0)])  # fmt: skip
def test_a_budget_that_is_too_short_is_refused_with_the_least(tmp_path, budget, share, begin, start):
    """What is said to be enough is; a stage with 35 % of what is left says what the whole must be.

    In the last case the stage has begun at 20 s and goes on at 46 s.
    """
    limit = begin + share * (duration(budget) - begin)
    stage = Stage(tmp_path / "one", limit, start=start, budget=budget)
    with pytest.raises(LatentDiffError, match=f"budget={budget}: too short for 20 steps of train_latent") as failure:
        stage.run(lambda now: 0.1)
    assert list(tmp_path.rglob("*.json")) == []
    least = duration(str(failure.value).split()[-1])
    assert least > duration(budget)
    enough = begin + share * (least - begin)
    stage = Stage(tmp_path / "two", enough, start=start, budget=format_duration(least))
    assert stage.run(lambda now: 0.1) <= enough * (1.0 if share == 1 else 1.05)
    assert 10 <= stage.timetable.steps <= 80


def test_steps_on_the_command_line_bound_them(tmp_path):
    stage = Stage(tmp_path, 300.0, steps=50)
    assert stage.run(lambda now: 0.1) < 30
    assert stage.timetable.steps == 50
    assert [decision.step for decision in stage.decisions.read()] == [4, 50]
    few = Stage(tmp_path / "few", 300.0, steps=3)
    few.run(lambda now: 0.1)
    assert few.timetable.steps == 3


@pytest.mark.parametrize(("saving", "saved"), [(1.0, [5, 10, 15, 20]), (60.0, [5, 15, 20])])
def test_without_a_budget_checkpoints_also_come_every_five_minutes(tmp_path, saving, saved):
    """Less often if one takes so long that they would take more than a tenth of the time."""
    stage = Stage(tmp_path, None, saving=saving, steps=20, warmup_steps=0, checkpoint_every=10**6)
    stage.run(lambda now: 61.0)
    assert stage.saved == saved
    assert not (tmp_path / "decisions").exists()


def test_files_of_decisions(tmp_path):
    ours, others = Decisions(tmp_path, {"seed": 0}), Decisions(tmp_path, {"seed": 1})
    made = [Decision("train_vae", step, 75, 25, 60.0) for step in (4, 20, 80, 100)]
    others.append(made[3])
    for decision in made[:3]:
        ours.append(decision)
    assert ours.read() == made[:3]
    back = Decision("train_vae", 75, 150, 50, 120.0)  # with a larger budget, from the beginning of the decay on
    ours.append(back)
    assert ours.read() == [*made[:2], back]
    assert others.read() == [made[3]]
    (tmp_path / "decisions" / "00001.json").write_text("{")
    with pytest.raises(LatentDiffError, match=r"00001\.json: is not a decision"):
        ours.read()


@pytest.mark.parametrize(("seconds", "text"), [(1.2, "2s"), (120, "120s"), (121, "2.1m"), (7201, "2.1h")])
def test_durations_are_rounded_up(seconds, text):
    assert format_duration(seconds) == text
    assert duration(text) >= seconds
