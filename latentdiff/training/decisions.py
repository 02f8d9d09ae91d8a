"""The decisions of a run with a budget, on disk.

    <stage>/checkpoints/decisions/00000.json   one each, synced to disk before the first step that it governs

A list that ends with a decision made at the last step is complete: it is followed, and nothing is added to it.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from ..data.shards import digest
from ..errors import LatentDiffError
from .checkpoint import discard, step_folders, sync_folder, verify
from .launch import Launch
from .manifest import read_metadata
from .timetable import DECAY, Decision


class Decisions:
    """The decisions of a stage on disk; the main process reads and writes them, and files are only ever added."""

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        self.folder, self.key = folder / "decisions", digest(fingerprint)

    def append(self, decision: Decision) -> None:
        """Write a decision and sync it to disk."""
        path = self.folder / f"{len(self._files()):05d}.json"
        partial = path.with_suffix(".partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with partial.open("w", encoding="utf-8") as file:
                json.dump(asdict(decision) | {"key": self.key}, file, indent=2)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            sync_folder(self.folder)
        except OSError as error:
            raise LatentDiffError(f"{path}: cannot be written ({error.strerror})") from error

    def read(self) -> list[Decision]:
        """Return the decisions in order, without those made with other settings or later undone."""
        found: list[Decision] = []
        for path in self._files():
            try:
                values = json.loads(path.read_text(encoding="utf-8"))
                key, decision = values.pop("key"), Decision(**values)
            except (OSError, ValueError, TypeError, LookupError, AttributeError):
                raise LatentDiffError(f"{path}: is not a decision of this version of latentdiff") from None
            if key == self.key:
                found = [earlier for earlier in found if earlier.step <= decision.step] + [decision]
        return found

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.json"))


def read_decisions(run: Launch, folder: Path, decisions: Decisions, budget: float) -> list[Decision]:
    """Return the decisions of a stage, read by the main process; a finished stage is reopened if `budget` is larger."""
    made: list[Decision] = []
    if run.is_main:
        made = decisions.read()
        if made and (further := reopen(made, folder / "checkpoints", budget)):
            decisions.append(further)
            made = decisions.read()
    return list(broadcast_object_list([made])[0]) if run.accelerator.num_processes > 1 else made


def reopen(decisions: list[Decision], checkpoints: Path, budget: float) -> Decision | None:
    """Return the decision with which a finished stage goes on if `budget` is larger than it was, else None.

    It goes on from the checkpoint at which the decay began, which was kept; later ones are deleted. How many steps fit
    is judged by the time the decay took; the next decision corrects that.

    Raises:
        LatentDiffError: that checkpoint is gone or damaged.
    """
    closing = decisions[-1]
    start, spare = closing.decay_start, budget - closing.budget
    if spare <= 0 or closing.step < closing.last:
        return None
    kept = next((path for step, path in step_folders(checkpoints) if step == start and verify(path) is None), None)
    if kept is None:
        raise LatentDiffError(
            f"{checkpoints}: the checkpoint of step {start}, where the learning rate began to fall, is missing or "
            "damaged, so a larger budget cannot be used; choose another `output`"
        )
    for step, path in step_folders(checkpoints):
        if step > start:
            discard(path)
    seconds_left = closing.budget - float(read_metadata(kept)["seconds"])
    last = start + round(closing.decay_steps * (1 + spare / max(1.0, seconds_left)))
    constant = max(start, last - math.ceil(DECAY * last))
    return Decision(closing.stage, start, constant, last - constant, budget)
