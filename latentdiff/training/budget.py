"""A run with a budget: the pace that makes a stage end on time.

Time between launches is free: a checkpoint has the seconds spent so far, to which a launch adds its own.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ..errors import LatentDiffError
from .decisions import Decisions
from .launch import Launch
from .signals import StopReason
from .timetable import DECAY, Decision, Timetable

AIM, LEAST_USED = 0.95, 0.85  # of the budget: what a decision aims at, and the forecast below which a new one is made
AGAIN = 1.1  # factor on the least budget that a refusal names, as another launch may be slower
MEASURED = 4  # steps of a launch before its first decision; the first of them warms up and is not counted
MIN_STEPS = 20  # of a stage; fewer make no warm-up, constant part and decay
OVERHEAD = 0.10  # most of the time for validations and checkpoints
PARTS = 10  # a stage is validated once in each, if that is cheap
SAVE_SECONDS = 300.0  # between checkpoints
RESERVE, LEAVING = 1.25, 1.0  # factor for what follows the last step; seconds for Python to exit
DISK_SPEED = 2e8  # bytes/s at which checkpoints are assumed to be written, until one was
MEMORY = 0.05  # of the stage: time over which the speed is averaged
OUTLIER = 10.0  # times the average: the most that one step counts as
PAUSE = 0.02  # of the stage: least time between decisions


class OutOfTime(Exception):
    """A validation takes longer than the budget has left for it."""


class Due(NamedTuple):
    """What follows a step, the same for all processes."""

    reason: StopReason
    save: bool
    validate: bool


@dataclass
class Cost:
    """What validating, saving a checkpoint or finishing a stage takes."""

    last: float = 0.0  # when it ended last
    seconds: float = 0.0  # of the last one, or an estimate
    pace: float = 0.0  # seconds per step at that time; 0 if they have nothing to do with each other
    start: float = 0.0  # when it began last

    def at(self, pace: float) -> float:
        """Return the seconds it takes now, as a busy machine slows down steps and validations alike."""
        return self.seconds * pace / self.pace if self.pace and pace else self.seconds


@dataclass
class Speed:
    """Seconds per step, averaged over the last `window` seconds."""

    window: float
    steps: float = 0.0
    seconds: float = 0.0
    newest: float = 0.0  # seconds of the last step

    def add(self, seconds: float) -> None:
        """Count one step; a single long pause says nothing about the steps to come, so it counts as an outlier."""
        self.newest = seconds = min(seconds, OUTLIER * self.per_step()) if self.steps else seconds
        fade = math.exp(-seconds / self.window)
        self.steps, self.seconds = self.steps * fade + 1, self.seconds * fade + seconds

    def per_step(self) -> float:
        """Return the average, 0 before the first step."""
        return self.seconds / self.steps if self.steps else 0.0


class Pacer:
    """Says after each step what follows and, with a budget, decides how many steps the stage has.

    What the clock says is read by the main process, which tells the others.
    """

    def __init__(
        self, run: Launch, timetable: Timetable, decisions: Decisions, limit: float | None, num_bytes: int,
        snapshots: tuple[int, int] = (0, 0),
    ) -> None:  # fmt: skip
        """Begin a stage that must have ended `limit` seconds after the launch.

        A checkpoint has `num_bytes`; `snapshots` says how many there will be, and the bytes of one.
        """
        self.run, self.timetable, self.decisions, self.limit = run, timetable, decisions, limit
        self.budget = run.budget or 0.0
        self.is_last = limit == run.budget  # the stage before may be a little late
        self.begin = self.mark = run.clock.elapsed()
        self.decided = -math.inf  # when the newest decision was made in this launch
        self.length = math.inf if limit is None else max(1.0, limit - self.begin)
        self.validation, self.checkpoint = Cost(self.begin), Cost(self.begin, num_bytes / DISK_SPEED)
        self.num_snapshots, self.snapshot = snapshots[0], Cost(self.begin, snapshots[1] / DISK_SPEED)
        self.finishing = Cost()  # from the last checkpoint to the end of the stage
        self.overhead = 0.0  # seconds spent on validations and checkpoints
        self.speed, self.num_steps = Speed(MEMORY * self.length), 0  # of this launch

    @contextmanager
    def timing(self, cost: Cost) -> Iterator[None]:
        """Count the time inside as that of a validation, checkpoint or snapshot, not of a step."""
        cost.start = self.mark = self.run.clock.elapsed()
        try:
            yield
        finally:
            cost.last = self.mark = self.run.clock.elapsed()
            cost.seconds = cost.last - cost.start
            # The average lags behind when the machine has just become busy.
            cost.pace = max(self.speed.per_step(), self.speed.newest) if cost is self.validation else 0.0
            self.overhead += cost.seconds if cost is not self.snapshot else 0.0

    def after(self, step: int, reason: StopReason, rehearse: Callable[[], tuple[float, float]]) -> Due:
        """Say what follows a step; all processes call this at every step.

        `rehearse` returns the seconds that the last validation and all that comes after it will take.
        """
        decision, save, validate = None, False, False
        if self.limit is not None:
            self._measure(step, rehearse)
        if self.run.is_main:
            decision = self._decide(step)
            save, validate = self._save_is_due(step), self._validation_is_due(step)
        values = [int(reason), save, validate, *((decision.decay_start, decision.last) if decision else (0, 0))]
        if self.run.accelerator.num_processes > 1:  # over a CPU group, so as not to wait for the device
            largest = torch.tensor(values)
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=self.run.cpu_group)
            values = largest.tolist()
        start, last = values[3:]
        if last and not self.run.is_main:
            self.timetable.decisions.append(Decision(self.timetable.stage, step, start, last - start, self.budget))
        return Due(StopReason(values[0]), bool(values[1]), bool(values[2]))

    def check_time(self) -> None:
        """Raise `OutOfTime` if there is no time left to go on with a validation; all processes call this along the way.

        Where it takes longer than expected, because the machine has just become busy, so does what follows.
        """
        now, expected = self.run.clock.elapsed(), self.validation.at(self.speed.per_step())
        slower = max(1.0, (now - self.validation.start) / expected) if expected else 1.0  # no estimate after a resume
        self._check_time(now - self.mark + (slower - 1) * self._finish())  # as long as since the last check
        self.mark = now

    def check_time_to_validate(self) -> None:
        """Raise `OutOfTime` if the last validation no longer fits; all processes call this."""
        self._check_time(self.validation.at(self.speed.per_step()))

    def _check_time(self, needed: float) -> None:
        if self.limit is None or not self.is_last:
            return
        left = self.limit - self.run.clock.elapsed() - RESERVE * self._finish() - LEAVING
        late = torch.tensor(int(needed > left))
        if self.run.accelerator.num_processes > 1:
            torch.distributed.all_reduce(late, torch.distributed.ReduceOp.MAX, group=self.run.cpu_group)
        if late:
            raise OutOfTime

    def settle(self) -> None:
        """Close the list of decisions after the last step, so that it is known to be complete."""
        if self.run.is_main and self.limit is not None and not self.timetable.is_settled:
            newest = self.timetable.decisions[-1]
            self.decisions.append(replace(newest, step=newest.last))

    def _measure(self, step: int, rehearse: Callable[[], tuple[float, float]]) -> None:
        self.num_steps += 1
        ready = self.num_steps == MEASURED or step == self.timetable.section.max_steps
        if self.run.device.type == "cuda" and (ready or self.num_steps == 1):
            torch.cuda.synchronize(self.run.device)  # the steps so far have only been queued
        if self.num_steps > 1:
            self.speed.add(self.run.clock.elapsed() - self.mark)
        if ready:
            validation, self.finishing.seconds = rehearse()
            self.validation.seconds = self.validation.seconds or validation  # one before the first step tells more
            self.validation.pace = self.finishing.pace = self.speed.per_step()
        self.mark = self.run.clock.elapsed()

    def _decide(self, step: int) -> Decision | None:
        """Make, write and return a new decision if there is none yet, or if the stage would not end on time."""
        decisions, now = self.timetable.decisions, self.run.clock.elapsed()
        if self.limit is None or (self.num_steps < MEASURED and step != self.timetable.section.max_steps):
            return None
        if decisions:
            (*_, newest), left = decisions, decisions[-1].last - step
            if step <= newest.step or left <= 0 or now < self.decided + PAUSE * self.length:
                return None
            forecast = now + left * self._seconds_per_step() + self._tail()
            if LEAST_USED * self.limit <= forecast <= self.limit:
                return None
        decision = self._plan(step, now)
        self.decided = now
        if decisions and (decision.decay_start, decision.last) == (newest.decay_start, newest.last):
            return None
        self.decisions.append(decision)
        decisions.append(decision)
        self.run.report(f"{decision.stage} {step}: {self._seconds_per_step():.3g} s per step, so {decision.last} steps "
                        f"fit; the learning rate falls from step {decision.decay_start + 1} on")  # fmt: skip
        return decision

    def _plan(self, step: int, now: float) -> Decision:
        """Plan as many steps as fit, a quarter of them with a falling rate; raise if they are too few to begin with."""
        assert self.limit is not None
        decisions, most = self.timetable.decisions, self.timetable.section.max_steps or sys.maxsize
        seconds = self._seconds_per_step()
        last = step + int(max(0.0, AIM * self.limit - now - self._tail()) / max(seconds, 1e-9))
        last = max(step, min(last, most))
        if not decisions and last < (fewest := min(MIN_STEPS, most)):
            raise self._too_short((now + (fewest - step) * seconds + self._tail()) / AIM)
        falling = bool(decisions) and step > decisions[-1].decay_start
        start = decisions[-1].decay_start if falling else max(step, last - math.ceil(DECAY * last))
        return Decision(self.timetable.stage, step, start, last - start, self.budget)

    def _seconds_per_step(self) -> float:
        """Seconds per step, including the validations, checkpoints and snapshots in between."""
        pace = self.speed.per_step()
        share = PARTS * (self.validation.at(pace) + self.checkpoint.seconds) / self.length
        return pace * (1 + min(OVERHEAD, share) + self.num_snapshots * self.snapshot.seconds / self.length)

    def _tail(self) -> float:
        """Seconds to keep free after the last step."""
        return RESERVE * self._after() + LEAVING if self.is_last else self._after()

    def _after(self) -> float:
        """Seconds from the last step to the end."""
        return self.validation.at(self.speed.per_step()) + self._finish()

    def _finish(self) -> float:
        """Seconds from the last validation to the end; writing a model takes about as long as a checkpoint."""
        return 3 * self.checkpoint.seconds + self.finishing.at(self.speed.per_step())

    def _too_short(self, needed: float) -> LatentDiffError:
        limit, budget = self.limit or 0.0, self.run.budget or 0.0
        share = 1.0 if self.is_last else self.run.config.budget_share  # of each further second
        least = format_duration(AGAIN * (max(limit, budget) + (needed - limit) / share))
        return LatentDiffError(f"budget={self.run.config.budget}: too short for {MIN_STEPS} steps of "
                               f"{self.timetable.stage} on this machine; it takes at least {least}")  # fmt: skip

    def _save_is_due(self, step: int) -> bool:
        since = self.run.clock.elapsed() - self.checkpoint.last
        if self.limit is None:
            every = self.timetable.section.checkpoint_every
            return step % every == 0 or since >= max(SAVE_SECONDS, self.checkpoint.seconds / OVERHEAD)
        if not (decisions := self.timetable.decisions):
            return False
        first = self.checkpoint.last == self.begin  # early, so that what it takes is known
        pause = min(SAVE_SECONDS, self.length / PARTS)
        return first or step == decisions[-1].decay_start or (since >= pause and self._affordable(self.checkpoint))

    def _validation_is_due(self, step: int) -> bool:
        if self.limit is None:
            return step % self.timetable.section.validate_every == 0
        now, pause = self.run.clock.elapsed(), self.length / PARTS
        left = self.limit - self._tail() - now
        due = bool(self.timetable.decisions) and now - self.validation.last >= pause and left >= pause / 2
        return due and self._affordable(self.validation)

    def _affordable(self, cost: Cost) -> bool:
        return self.overhead + cost.at(self.speed.per_step()) <= OVERHEAD * (self.run.clock.elapsed() - self.begin)


def no_limit() -> None:
    """Check no time: what is measured or comes first may take as long as it does."""


def seconds_of(work: Callable[[], object]) -> float:
    """Return how long some work takes, which must end by reading a result from the device."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def format_duration(seconds: float) -> str:
    """Format a time as `duration` reads it, rounded up."""
    for unit, length, step in (("s", 1, 1), ("m", 60, 0.1)):
        if seconds <= 120 * length:
            return f"{math.ceil(seconds / length / step) * step:g}{unit}"
    return f"{math.ceil(seconds / 360) / 10:g}h"
