"""Snapshots of two averages along a run, from which `latentdiff ema` computes an average of any length afterwards.

    <stage>/snapshots/step-00001000/   the averages of that step, in the form of a checkpoint

They are evenly spaced over the steps, and the last step has one. Where the number of steps is decided along the way,
each takes its place by what is known then; if they become too many, one of two that are close goes. Which there are is
recorded in every checkpoint, so a run that goes on from one goes on with its snapshots, and none is deleted before no
checkpoint needs it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data.shards import digest
from .checkpoint import discard, intact_metadata, save_checkpoint, step_folders
from .ema import TRACKED
from .launch import Launch
from .optimizer import TrainState
from .timetable import Timetable


class Snapshots:
    """Takes and keeps at most `number` snapshots; none at all if that is 0."""

    def __init__(self, run: Launch, folder: Path, number: int, timetable: Timetable, state: TrainState) -> None:
        self.run, self.folder, self.number = run, folder / "snapshots", number
        self.checkpoints = folder / "checkpoints"
        self.timetable, self.state = timetable, state
        self.steps: list[int] = []  # that have one, ascending

    @property
    def planned(self) -> tuple[int, int]:
        """How many there will be, and the size of one in bytes."""
        return self.number, 4 * len(TRACKED) * sum(parameter.numel() for parameter in self.state.parameters.values())

    def is_due(self, step: int) -> bool:
        """Whether a step has one: a function of the config and the decisions before the step, and true for the last."""
        last = self.timetable.steps_before(step)
        in_its_place = last is not None and step * self.number // last > (step - 1) * self.number // last
        return self.number > 0 and (in_its_place or step == self.timetable.steps)

    def take(self, step: int, fingerprint: Mapping[str, Any]) -> None:
        """Write the averages of this step of the run with this fingerprint; all processes call this."""
        averages = {name: self.state.named(name, keep=self.run.is_main) for name in TRACKED}
        if self.run.is_main:
            metadata = {"key": digest(fingerprint), "sigma_rel": TRACKED}
            save_checkpoint(self.folder, step, averages, metadata, keep=None)
        self.steps = thinned([*self.steps, step], self.number)

    def facts(self) -> dict[str, list[int]]:
        """Return what a checkpoint records."""
        return {"snapshots": self.steps} if self.number else {}

    def go_on_from(self, step: int, recorded: list[int]) -> None:
        """Take over the snapshots that a checkpoint records; delete those after its step, which are taken again."""
        self.steps = recorded
        if self.number and self.run.is_main:
            for other, path in step_folders(self.folder):
                if other > step:
                    discard(path)

    def delete_others(self) -> None:
        """Delete what no checkpoint refers to; the main process calls this once a checkpoint has been saved."""
        if not self.number:
            return
        recorded = (metadata.get("snapshots", []) for metadata in intact_metadata(self.checkpoints))
        needed = set(self.steps).union(*recorded)
        for step, path in step_folders(self.folder):
            if step not in needed:
                discard(path)


def thinned(steps: list[int], number: int) -> list[int]:
    """Return at most `number` of the steps, the last among them: again and again, the one in the smallest gap goes."""
    steps = list(steps)
    while len(steps) > number:
        before = [0, *steps]
        steps.pop(min(range(len(steps) - 1), key=lambda place: steps[place + 1] - before[place]))
    return steps
