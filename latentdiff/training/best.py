"""The best average of a run, kept beside the last: the one with the lowest loss on held-out pictures.

    <stage>/best/step-00001000/   its tensors, in the form of a checkpoint

Which one is the best is recorded in every checkpoint of the run, so a run that goes on from an earlier checkpoint knows
what was the best by then, and its tensors are not deleted before no checkpoint needs them.
"""

from pathlib import Path
from typing import TypedDict

from torch import Tensor

from .checkpoint import Checkpoint, discard, intact_metadata, save_checkpoint, step_folders, verify
from .launch import Launch
from .manifest import read_metadata
from .optimizer import TrainState


class Record(TypedDict):
    """Which average is the best so far."""

    step: int
    loss: float


class Best:
    """Keeps the average with the lowest loss."""

    def __init__(self, run: Launch, folder: Path) -> None:
        self.run, self.folder = run, folder / "best"
        self.checkpoints = folder / "checkpoints"
        self.record: Record | None = None

    def offer(self, step: int, loss: float, state: TrainState) -> None:
        """Keep the average of this step if its loss is lower than any before; all processes call this."""
        if self.record is not None and not loss < self.record["loss"]:
            return
        average = state.named("ema", keep=self.run.is_main)
        if self.run.is_main:
            save_checkpoint(self.folder, step, {"ema": average}, {"loss": loss}, keep=2**30)
        self.record = {"step": step, "loss": loss}

    def delete_others(self) -> None:
        """Delete what no checkpoint refers to; the main process calls this once a checkpoint has been saved."""
        records = [metadata.get("best") for metadata in intact_metadata(self.checkpoints)]
        needed = {record["step"] for record in (*records, self.record) if record}
        for step, path in step_folders(self.folder):
            if step not in needed:
                discard(path)

    def tensors(self) -> dict[str, Tensor] | None:
        """Read the best average, by parameter name; None if none was kept or it is damaged."""
        if self.record is None:
            return None
        for step, path in step_folders(self.folder):
            if step == self.record["step"] and verify(path) is None:
                return Checkpoint(step, path, read_metadata(path)).tensors("ema")
        self.run.report(f"{self.folder}: the average of step {self.record['step']} is missing or damaged")
        return None
