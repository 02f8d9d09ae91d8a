"""Steps and learning rates of a run with a budget, as a function of its decisions."""

import math
from itertools import pairwise

import pytest

from latentdiff.config import load_config
from latentdiff.training.timetable import Decision, Timetable

RECIPE = ("warmup_steps=50", "learning_rate=2", "final_lr=0.5")  # 1,000 steps of which 50 warm up


def timetable(*entries):
    settings = ["budget=10m", *(f"train_latent.{setting}" for setting in RECIPE)]
    table = Timetable(load_config("demo", settings).train_latent, "train_latent", has_budget=True)
    table.decisions = [Decision("train_latent", step, start, last - start, 600.0) for step, start, last in entries]
    return table


def test_warm_up_constant_and_linear_decay():
    table = timetable((4, 300, 400))
    assert table.steps == 400
    assert [table.learning_rate(step) for step in (1, 4)] == [1 / 50, 4 / 50]  # not decided yet: as in the recipe
    assert [table.learning_rate(step) for step in (5, 20)] == [5 / 20, 1.0]  # 5 % of 400 steps
    assert all(table.learning_rate(step) == 1.0 for step in range(20, 301))
    for step in range(300, 401):
        assert math.isclose(table.learning_rate(step), 1 - 0.75 * (step - 300) / 100)


def test_nothing_is_decided_at_first():
    table = timetable()
    assert table.steps is None
    assert table.learning_rate(25) == 0.5
    assert table.first_step(700) > 25
    assert table.first_step(1) == 1


@pytest.mark.parametrize(
    "entries",
    [
        [(4, 300, 400), (200, 360, 480)],  # more steps
        [(4, 300, 400), (200, 200, 240)],  # far fewer: it falls at once
        [(4, 300, 400), (330, 300, 360)],  # fewer while it is falling
        [(4, 300, 400), (330, 300, 500), (450, 300, 460)],  # more while it is falling, then fewer
    ],
)
def test_decisions_bend_the_rate_and_never_break_it(entries):
    table = timetable(*entries)
    assert table.steps == entries[-1][2]
    rates = [table.learning_rate(step) for step in range(20, table.steps + 1)]
    assert rates[0] == 1.0
    assert math.isclose(rates[-1], 0.25)
    falls = [before - after for before, after in pairwise(rates)]
    assert min(falls) >= 0
    assert max(falls) <= 0.75 / min(last - max(step, start) for step, start, last in entries) + 1e-12


def test_later_decisions_leave_earlier_steps_alone():
    entries = [(4, 300, 400), (200, 360, 480), (430, 360, 450)]
    for number, (following, _, _) in enumerate(entries[1:], start=1):
        before, after = timetable(*entries[:number]), timetable(*entries)
        assert [before.learning_rate(s) for s in range(1, following + 1)] == [
            after.learning_rate(s) for s in range(1, following + 1)
        ]


@pytest.mark.parametrize(
    ("entries", "first"),
    [
        ([(4, 300, 400)], 280),
        ([(4, 300, 400), (100, 150, 200)], 140),
        ([(4, 300, 400), (200, 150, 240)], 201),  # the moment has passed: at once
        ([(4, 300, 400), (290, 700, 900)], 280),  # it has begun, and does not end again
        ([(4, 300, 400), (100, 600, 800)], 560),
    ],
)
def test_the_discriminator_keeps_its_share_of_the_steps(entries, first):
    """Step 700 of the recipe's 1,000; a decision applies from the step after its own."""
    assert timetable(*entries).first_step(700) == first
    assert timetable(*entries).first_step(1500) > entries[-1][2]  # never, as in the recipe


def test_a_settled_list_ends_with_its_last_step():
    assert not timetable().is_settled
    assert not timetable((4, 300, 400)).is_settled
    assert timetable((4, 300, 400), (400, 300, 400)).is_settled


def test_without_a_budget_the_config_decides():
    table = Timetable(load_config("demo", ["train_latent.lr_schedule=constant"]).train_latent)
    assert (table.steps, table.first_step(700), table.learning_rate(1000)) == (1000, 700, 1.0)
