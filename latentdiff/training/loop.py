"""The training loop of both stages: steps, logging, validation, checkpoints, and stopping early."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..data.cache import check_broken
from ..data.shards import digest
from ..errors import LatentDiffError
from ..sections import TrainSection
from .checkpoint import Checkpoint, newest_checkpoint, save_checkpoint
from .fingerprint import first_difference
from .launch import Launch
from .logging import MetricLogger
from .optimizer import TrainState
from .signals import StopFlag, StopReason


class Training(Protocol):
    """What a stage provides to the loop."""

    name: str  # train_vae or train_latent
    num_pictures: int  # in the training set

    @property
    def section(self) -> TrainSection:
        """The stage's section of the config."""

    @property
    def states(self) -> Mapping[str, TrainState]:
        """Weights, optimizers and EMAs by name: everything a checkpoint must hold."""

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """Settings that must stay the same when the run is resumed."""

    def batches(self, start: int, stop: int) -> Iterator[list[Any]]:
        """Yield the list of micro-batches of each step from `start` to `stop` - 1, counted from 0."""

    def train_step(self, batches: list[Any], step: int, log: MetricLogger) -> tuple[dict[str, Tensor], Tensor]:
        """Take one step, counted from 1, without waiting; return metrics, and 1 if it was finite, 0 if skipped."""

    def validate(self, step: int) -> dict[str, float]:
        """Compute metrics on held-out images and save some images for inspection."""


class Stopped(LatentDiffError):
    """Error that ends training early, with a checkpoint saved; `exit_code` is 128 + the signal number, or 1."""

    def __init__(self, message: str, reason: StopReason) -> None:
        super().__init__(message)
        self.exit_code = reason.exit_code


class SkippedSteps:
    """Counter of steps that were not finite, kept on the device."""

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(2, device=device)  # in total, in a row
        self.longest = torch.zeros((), device=device)  # longest streak since the last read

    def add(self, step_is_finite: Tensor) -> None:
        """Count one step; `step_is_finite` is 1 or 0."""
        total, streak = self.counts.unbind()
        streak = (streak + 1) * (1 - step_is_finite)
        self.counts = torch.stack([total + 1 - step_is_finite, streak])
        self.longest = torch.maximum(self.longest, streak)

    def read(self) -> tuple[int, int]:
        """Return the total and the longest streak since the last read; waits for the device."""
        total, longest = torch.stack([self.counts[0], self.longest]).tolist()
        self.longest = torch.zeros_like(self.longest)
        return int(total), int(longest)


def run_training(training: Training, run: Launch, folder: Path) -> None:
    """Train from the newest intact checkpoint in `folder`, or from scratch, to the last step.

    Raises `Stopped`, with a checkpoint saved, after a signal, too many non-finite steps or too many broken images.
    """
    skipped = SkippedSteps(run.device)
    first, section = restore(training, run, folder, skipped), training.section
    broken = _read_broken(folder, run)
    log = MetricLogger(run, folder, training.name, first, section.steps, section.batch_size)
    if first == 0 and section.validate_first:
        with log.untimed():
            log.write(0, training.validate(0))
    batches = training.batches(first, section.steps)
    with StopFlag(run.parent) as flag:
        for step in range(first + 1, section.steps + 1):
            with log.phase("data"):
                parts = next(batches)
            broken.update(entry for part in parts for entry in part.broken)
            metrics, step_is_finite = training.train_step(parts, step, log)
            skipped.add(step_is_finite)
            log.add(metrics, step_is_finite)
            why = too_many_broken(broken, training, run)
            reason = sync_reason(flag.requested() or (StopReason.BROKEN_PICTURES if why else StopReason.NONE), run)
            last = bool(step == section.steps or reason)
            if step % section.log_every == 0 or last:
                total, longest = skipped.read()
                log.log(step, {"skipped": total, "broken": len(broken)} if total or broken else {})
                if longest >= section.max_skipped:
                    reason, last = StopReason.NOT_FINITE, True
                    why = f"the loss was not finite in {longest} steps in a row"
                _write_broken(broken, folder, run)
            with log.untimed():
                if step % section.checkpoint_every == 0 or last:
                    save(training, run, folder, step, skipped)
                if (step % section.validate_every == 0 or step == section.steps) and not reason:
                    log.write(step, training.validate(step))
            if reason:
                sentence = reason.sentence(why)
                checkpoints = folder / "checkpoints"
                raise Stopped(f"stopped at step {step} of {section.steps}: {sentence}; saved in {checkpoints}", reason)
    log.close()


def save(training: Training, run: Launch, folder: Path, step: int, skips: SkippedSteps) -> None:
    """Save a checkpoint: all processes gather the tensors, the main one writes them."""
    tensors = {f"{name}-{what}": values for name, state in training.states.items()
               for what, values in state.tensors(keep=run.is_main).items()}  # fmt: skip
    tensors["skips"] = {"counts": skips.counts}
    if run.is_main:
        keep = training.section.keep_checkpoints
        metadata = {"key": digest(training.fingerprint), **training.fingerprint}
        save_checkpoint(folder / "checkpoints", step, tensors, metadata, keep=keep)
    run.accelerator.wait_for_everyone()


def restore(training: Training, run: Launch, folder: Path, skips: SkippedSteps) -> int:
    """Load the newest intact checkpoint and return its step, or 0 if there is none."""
    checkpoint = newest_checkpoint(folder / "checkpoints", run.report)
    _check_same_step(checkpoint, run)
    if checkpoint is None:
        return 0
    _check_same_run(checkpoint, training)
    for name, state in training.states.items():
        kinds = [file.removeprefix(f"{name}-") for file in checkpoint.names() if file.startswith(f"{name}-")]
        if not kinds:
            raise LatentDiffError(f"{checkpoint.path}: has no {name}-weights; delete the checkpoints to start over")
        state.load({kind: checkpoint.tensors(f"{name}-{kind}") for kind in kinds})
    skips.counts = checkpoint.tensors("skips")["counts"].to(run.device)
    run.report(f"{training.name}: resuming from step {checkpoint.step}")
    return checkpoint.step


def sync_reason(reason: StopReason, run: Launch) -> StopReason:
    """Return the largest stop reason of any process, over a CPU group so as not to wait for the device."""
    if run.accelerator.num_processes == 1:
        return reason
    largest = torch.tensor(int(reason))
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=run.cpu_group)
    return StopReason(int(largest))


def too_many_broken(broken: Mapping[str, str], training: Training, run: Launch) -> str | None:
    """Return why the run must stop if more images are broken than `data.max_broken` allows, else None."""
    try:
        check_broken(len(broken), training.num_pictures, run.config.data.max_broken)
    except LatentDiffError as error:
        return str(error)
    return None


def _check_same_step(checkpoint: Checkpoint | None, run: Launch) -> None:
    mine = torch.tensor([checkpoint.step if checkpoint else 0], device=run.device)
    steps = run.accelerator.gather(mine).tolist()
    if len(set(steps)) > 1:
        raise LatentDiffError(
            f"output={run.folder}: the processes found checkpoints of different steps {steps}; they must share a folder"
        )


def _check_same_run(checkpoint: Checkpoint, training: Training) -> None:
    if (difference := first_difference(checkpoint.metadata, training.fingerprint)) is not None:
        name, previous, new = difference
        raise LatentDiffError(
            f"{checkpoint.path}: this run started with {name}={previous!r}, but it is now {new!r}; "
            "choose another `output`, or delete the checkpoints to start over"
        )


def _read_broken(folder: Path, run: Launch) -> dict[str, str]:
    path = folder / f"broken-{run.accelerator.process_index}.txt"
    if not path.is_file():
        return {}
    entries = (line.partition("\t") for line in path.read_text(encoding="utf-8").splitlines())
    return {name: reason for name, _, reason in entries}


def _write_broken(broken: Mapping[str, str], folder: Path, run: Launch) -> None:
    if broken:
        lines = "".join(f"{name}\t{reason}\n" for name, reason in sorted(broken.items()))
        (folder / f"broken-{run.accelerator.process_index}.txt").write_text(lines, encoding="utf-8")
