"""The steps of a stage: how many there are, and the learning rate of each.

The config says so or, with a budget, a list of decisions made from the measured speed. Everything here is a function of
the config and that list, so a run that is resumed with its list computes the same.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from ..sections import TrainSection

DECAY = 0.25  # of the steps of a run with a budget have a falling learning rate


@dataclass(frozen=True)
class Decision:
    """How a stage goes on after `step`: at a constant rate up to `decay_start`, then linearly down."""

    stage: str
    step: int
    decay_start: int
    decay_steps: int
    budget: float  # of the run, in seconds

    @property
    def last(self) -> int:
        """The last step of the stage."""
        return self.decay_start + self.decay_steps


class Timetable:
    """Number of steps, learning rates and first step of the discriminator; steps are counted from 1."""

    def __init__(self, section: TrainSection, stage: str = "", *, has_budget: bool = False) -> None:
        self.section, self.stage, self.has_budget = section, stage, has_budget
        self.decisions: list[Decision] = []  # in order; each governs the steps after its own, up to the next one's

    @property
    def is_settled(self) -> bool:
        """Whether the last step has been taken; a list with this decision is complete."""
        return bool(self.decisions) and self.decisions[-1].step >= self.decisions[-1].last

    @property
    def steps(self) -> int | None:
        """The number of the last step; None as long as it has not been decided."""
        if not self.has_budget:
            return self.section.steps
        return self.decisions[-1].last if self.decisions else None

    def steps_before(self, step: int) -> int | None:
        """The number of the last step, as it was known before a step was taken."""
        if not self.has_budget:
            return self.section.steps
        return next((decision.last for decision in reversed(self.decisions) if decision.step < step), None)

    def learning_rate(self, step: int) -> float:
        """Return the factor of the learning rate at a step: linear warm-up, then constant or decaying."""
        if not self.has_budget:
            return learning_rate(step, self.section)
        warmup: float = self.section.warmup_steps
        if self.decisions and step > self.decisions[0].step:
            warmup *= self.decisions[0].last / self.section.steps
        return min(1.0, step / warmup if warmup else 1.0) * self._decay(step)

    def first_step(self, planned: int) -> int:
        """Return the step that `planned`, one of the recipe's `steps`, corresponds to; if none does, one past the last.

        With a budget it keeps its share of the steps. A later decision moves it only if it has not passed.
        """
        if not self.has_budget or planned <= 1:
            return planned
        share, after = planned / self.section.steps, sys.maxsize  # not before the first decision
        for decision, until in self._governed():
            after = max(decision.step + 1, math.ceil(share * decision.last))
            if after <= until:
                return after
        return after

    def _decay(self, step: int) -> float:
        """Factor without warm-up; each decision leads on from the level reached, so there are no jumps."""
        level, final = 1.0, self.section.final_lr / self.section.learning_rate
        for decision, until in self._governed():
            start, now = max(decision.step, decision.decay_start), min(step, until)
            if now > start:
                level = final + (level - final) * (decision.last - now) / (decision.last - start)
        return level

    def _governed(self) -> Iterator[tuple[Decision, int]]:
        """Each decision with the last step that it governs."""
        for decision, following in zip(self.decisions, [*self.decisions[1:], None], strict=False):
            yield decision, following.step if following else decision.last


def learning_rate(step: int, section: TrainSection) -> float:
    """Return the learning rate factor at a step, counted from 1: linear warm-up, then constant or cosine decay."""
    warm = min(1.0, step / section.warmup_steps) if section.warmup_steps else 1.0
    if section.lr_schedule == "constant" or step <= section.warmup_steps:
        return warm
    final = section.final_lr / section.learning_rate
    progress = (step - section.warmup_steps) / max(1, section.steps - section.warmup_steps)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
