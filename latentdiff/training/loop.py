"""The loop that both trainings share: steps, lines, validations, checkpoints, and how it stops."""

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
    """What differs between the trainings."""

    name: str  # train_vae or train_latent
    num_pictures: int  # to train on

    @property
    def section(self) -> TrainSection:
        """Its settings."""

    @property
    def states(self) -> Mapping[str, TrainState]:
        """What moves the weights, and all that a checkpoint must hold."""

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """What a continuation must share with the run it continues."""

    def batches(self, start: int, stop: int) -> Iterator[list[Any]]:
        """The micro-batches of steps start ... stop - 1, counted from 0."""

    def train_step(self, batches: list[Any], step: int, log: MetricLogger) -> tuple[dict[str, Tensor], Tensor]:
        """One training step, counted from 1, without waiting: metrics; 1 if it was finite and moved the weights."""

    def validate(self, step: int) -> dict[str, float]:
        """Measure on held-out pictures, and draw some to look at."""


class Stopped(LatentDiffError):
    """Training ended before its last step, with a checkpoint saved; `exit_code` 128 + the signal's number, or 1."""

    def __init__(self, message: str, reason: StopReason) -> None:
        super().__init__(message)
        self.exit_code = reason.exit_code


class SkippedSteps:
    """Counts, on the device, the steps that were not finite."""

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(2, device=device)  # in all, in a row
        self.most = torch.zeros((), device=device)  # in a row since they were last read

    def add(self, step_is_finite: Tensor) -> None:
        """One step more; `step_is_finite` is 1 or 0."""
        total, in_row = self.counts.unbind()
        in_row = (in_row + 1) * (1 - step_is_finite)
        self.counts = torch.stack([total + 1 - step_is_finite, in_row])
        self.most = torch.maximum(self.most, in_row)

    def read(self) -> tuple[int, int]:
        """In all, and most in a row since the last time; waits for the device."""
        total, most = torch.stack([self.counts[0], self.most]).tolist()
        self.most = torch.zeros_like(self.most)
        return int(total), int(most)


def run_training(training: Training, run: Launch, folder: Path) -> None:
    """Train from the newest good checkpoint in `folder`, or from the start, to the last step.

    Raises:
        Stopped: a signal came, or too many steps in a row were not finite; a checkpoint was saved.
        LatentDiffError: the checkpoint belongs to another run, or a file cannot be written.
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
            reason = agreed(flag.requested() or (StopReason.BROKEN_PICTURES if why else StopReason.NONE), run)
            last = bool(step == section.steps or reason)
            if step % section.log_every == 0 or last:
                total, most = skipped.read()
                log.log(step, {"skipped": total, "broken": len(broken)} if total or broken else {})
                if most >= section.max_skipped:
                    reason, last = StopReason.NOT_FINITE, True
                    why = f"the loss was not finite in {most} steps in a row"
                _write_broken(broken, folder, run)
            with log.untimed():
                if step % section.checkpoint_every == 0 or last:
                    save(training, run, folder, step, skipped)
                if (step % section.validate_every == 0 or step == section.steps) and not reason:
                    log.write(step, training.validate(step))
            if reason:
                said = reason.sentence(why)
                where = folder / "checkpoints"
                raise Stopped(f"stopped at step {step} of {section.steps}: {said}; saved in {where}", reason)
    log.close()


def save(training: Training, run: Launch, folder: Path, step: int, skips: SkippedSteps) -> None:
    """Write a checkpoint; all processes gather, the main one writes."""
    tensors = {f"{name}-{what}": values for name, state in training.states.items()
               for what, values in state.tensors(keep=run.is_main).items()}  # fmt: skip
    tensors["skips"] = {"counts": skips.counts}
    if run.is_main:
        keep = training.section.keep_checkpoints
        facts = {"key": digest(training.fingerprint), **training.fingerprint}
        save_checkpoint(folder / "checkpoints", step, tensors, facts, keep=keep)
    run.accelerator.wait_for_everyone()


def restore(training: Training, run: Launch, folder: Path, skips: SkippedSteps) -> int:
    """Load the newest good checkpoint; returns its step, 0 where there is none."""
    checkpoint = newest_checkpoint(folder / "checkpoints", run.report)
    _check_same_step(checkpoint, run)
    if checkpoint is None:
        return 0
    _check_same_run(checkpoint, training)
    for name, state in training.states.items():
        kinds = [file.removeprefix(f"{name}-") for file in checkpoint.names() if file.startswith(f"{name}-")]
        if not kinds:
            raise LatentDiffError(f"{checkpoint.path}: has no {name}-weights; delete the checkpoints to begin again")
        state.load({kind: checkpoint.tensors(f"{name}-{kind}") for kind in kinds})
    skips.counts = checkpoint.tensors("skips")["counts"].to(run.device)
    run.report(f"{training.name}: going on from step {checkpoint.step}")
    return checkpoint.step


def agreed(reason: StopReason, run: Launch) -> StopReason:
    """The largest reason that any of the processes has: asked over a CPU group, so that no device is waited for."""
    if run.accelerator.num_processes == 1:
        return reason
    largest = torch.tensor(int(reason))
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=run.cpu_group)
    return StopReason(int(largest))


def too_many_broken(broken: Mapping[str, str], training: Training, run: Launch) -> str | None:
    """Why the run must stop, where more pictures turned out broken than `data.max_broken` allows."""
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
            f"output={run.folder}: the processes find checkpoints of steps {steps}; it must be one disk"
        )


def _check_same_run(checkpoint: Checkpoint, training: Training) -> None:
    if (difference := first_difference(checkpoint.facts, training.fingerprint)) is not None:
        name, former, new = difference
        raise LatentDiffError(
            f"{checkpoint.path}: this run began with {name}={former!r} and now it is {new!r}; "
            "choose another `output`, or delete the checkpoints to begin again"
        )


def _read_broken(folder: Path, run: Launch) -> dict[str, str]:
    """What was found before the training was stopped."""
    path = folder / f"broken-{run.accelerator.process_index}.txt"
    if not path.is_file():
        return {}
    entries = (line.partition("\t") for line in path.read_text(encoding="utf-8").splitlines())
    return {name: reason for name, _, reason in entries}


def _write_broken(broken: Mapping[str, str], folder: Path, run: Launch) -> None:
    if broken:
        lines = "".join(f"{name}\t{reason}\n" for name, reason in sorted(broken.items()))
        (folder / f"broken-{run.accelerator.process_index}.txt").write_text(lines, encoding="utf-8")
