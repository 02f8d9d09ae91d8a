"""The loop that both trainings share: steps, lines, validations, checkpoints, and how it stops."""

from __future__ import annotations

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
from .launch import Launch
from .logging import Record
from .optimizer import Updater
from .signals import StopFlag

# Settings that may change between a run and its continuation: they do not decide what a step computes.
FREE = {"steps", "log_every", "checkpoint_every", "keep_checkpoints", "validate_every", "validate_first", "max_skipped",
        "compile", "micro_batch_size", "gradient_checkpointing", "max_broken"}  # fmt: skip


class Task(Protocol):
    """What differs between the trainings."""

    name: str  # train_vae or train_latent
    num_pictures: int  # to train on

    @property
    def section(self) -> TrainSection:
        """Its settings."""

    @property
    def updaters(self) -> Mapping[str, Updater]:
        """What moves the weights, and all that a checkpoint must hold."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What a continuation must share with the run it continues."""

    def batches(self, start: int, stop: int) -> Iterator[list[Any]]:
        """The micro-batches of steps start ... stop - 1, counted from 0."""

    def learn(self, batches: list[Any], step: int, record: Record) -> tuple[dict[str, Tensor], Tensor]:
        """One step, counted from 1, without waiting: metrics; 1 if it moved the weights, 0 if it was not finite."""

    def validate(self, step: int) -> dict[str, float]:
        """Measure on held-out pictures, and draw some to look at."""


class Stopped(LatentDiffError):
    """Training ended before its last step, with a checkpoint saved; `exit_code` 128 + the signal's number, or 1."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + {"SIGINT": 2}.get(reason, 15) if "SIG" in reason or "launcher" in reason else 1


class Skips:
    """Counts, on the device, the steps that were not finite."""

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(2, device=device)  # in all, in a row
        self.most = torch.zeros((), device=device)  # in a row since they were last read

    def add(self, moves: Tensor) -> None:
        """One step more; `moves` is 1 or 0."""
        total, in_row = self.counts.unbind()
        in_row = (in_row + 1) * (1 - moves)
        self.counts = torch.stack([total + 1 - moves, in_row])
        self.most = torch.maximum(self.most, in_row)

    def read(self) -> tuple[int, int]:
        """In all, and most in a row since the last time; waits for the device."""
        total, most = torch.stack([self.counts[0], self.most]).tolist()
        self.most = torch.zeros_like(self.most)
        return int(total), int(most)


def run_training(task: Task, run: Launch, folder: Path) -> None:
    """Train from the newest good checkpoint in `folder`, or from the start, to the last step.

    Raises:
        Stopped: a signal came, or too many steps in a row were not finite; a checkpoint was saved.
        LatentDiffError: the checkpoint belongs to another run, or a file cannot be written.
    """
    skips = Skips(run.device)
    first = restore(task, run, folder, skips)
    section = task.section
    broken = _read_broken(folder, run)
    record = Record(run, folder, task.name, first, section.steps, section.batch_size)
    if first == 0 and section.validate_first:
        with record.aside():
            record.write(0, task.validate(0))
    batches = task.batches(first, section.steps)
    with StopFlag(run.parent) as flag:
        for step in range(first + 1, section.steps + 1):
            with record.phase("data"):
                parts = next(batches)
            broken.update(entry for part in parts for entry in part.broken)
            metrics, moves = task.learn(parts, step, record)
            skips.add(moves)
            record.add(metrics, moves)
            reason = agreed(flag.requested() or too_many_broken(broken, task, run), run)
            last = step == section.steps or reason is not None
            if step % section.log_every == 0 or last:
                skipped, most = skips.read()
                record.log(step, {"skipped": skipped, "broken": len(broken)} if skipped or broken else {})
                if most >= section.max_skipped:
                    reason, last = f"the loss was not finite in {most} steps in a row", True
                _write_broken(broken, folder, run)
            with record.aside():
                if step % section.checkpoint_every == 0 or last:
                    save(task, run, folder, step, skips)
                if (step % section.validate_every == 0 or step == section.steps) and reason is None:
                    record.write(step, task.validate(step))
            if reason is not None:
                where = folder / "checkpoints"
                raise Stopped(f"stopped at step {step} of {section.steps}: {reason}; saved in {where}", reason)
    record.close()


def save(task: Task, run: Launch, folder: Path, step: int, skips: Skips) -> None:
    """Write a checkpoint; all processes gather, the main one writes."""
    tensors = {f"{name}-{what}": values for name, updater in task.updaters.items()
               for what, values in updater.state(keep=run.is_main).items()}  # fmt: skip
    tensors["skips"] = {"counts": skips.counts}
    if run.is_main:
        keep = task.section.keep_checkpoints
        save_checkpoint(folder / "checkpoints", step, tensors, {"key": digest(task.facts), **task.facts}, keep=keep)
    run.accelerator.wait_for_everyone()


def restore(task: Task, run: Launch, folder: Path, skips: Skips) -> int:
    """Load the newest good checkpoint; returns its step, 0 where there is none."""
    checkpoint = newest_checkpoint(folder / "checkpoints", run.report)
    _check_same_step(checkpoint, run)
    if checkpoint is None:
        return 0
    _check_same_run(checkpoint, task)
    for name, updater in task.updaters.items():
        kinds = [file.removeprefix(f"{name}-") for file in checkpoint.names() if file.startswith(f"{name}-")]
        updater.load({kind: checkpoint.tensors(f"{name}-{kind}") for kind in kinds})
    skips.counts = checkpoint.tensors("skips")["counts"].to(run.device)
    run.report(f"{task.name}: going on from step {checkpoint.step}")
    return checkpoint.step


def agreed(reason: str | None, run: Launch) -> str | None:
    """Why any of the processes wants to stop: asked over a CPU group, so that no device is waited for."""
    if run.accelerator.num_processes == 1:
        return reason
    elsewhere = (None, "too many broken pictures in another process", "SIGINT", "SIGTERM")
    known = elsewhere.index(reason) if reason in elsewhere else 3 if reason == "the launcher is gone" else 1
    wish = torch.tensor(known)
    torch.distributed.all_reduce(wish, torch.distributed.ReduceOp.MAX, group=run.cpu_group)
    return reason or elsewhere[int(wish)]


def too_many_broken(broken: Mapping[str, str], task: Task, run: Launch) -> str | None:
    """Why the run must stop, where more pictures turned out broken than `data.max_broken` allows."""
    try:
        check_broken(len(broken), task.num_pictures, run.config.data.max_broken)
    except LatentDiffError as error:
        return str(error)
    return None


def run_facts(run: Launch, *sections: str) -> dict[str, Any]:
    """The settings that decide what a step computes."""
    values = run.config.model_dump(mode="json", include={"seed", "data", *sections})
    for section in values.values():
        if isinstance(section, dict):
            free = FREE - {"steps"} if section.get("lr_schedule") == "cosine" else FREE
            for name in free & section.keys():
                del section[name]
    return {**values, "precision": run.precision}


def first_difference(section: str, before: Any, now: Any) -> tuple[str, Any, Any] | None:
    """The dotted name of the first setting that differs, and its two values; None where none does.

    A setting that an older version did not know counts as None; one that is not recorded now does not count.
    """
    if isinstance(now, dict) and isinstance(before, dict):
        differ = (key for key in now if before.get(key) != now[key])
        key = next(differ, None)
        return None if key is None else (f"{section}.{key}", before.get(key), now[key])
    return None if before == now else (section, before, now)


def _check_same_step(checkpoint: Checkpoint | None, run: Launch) -> None:
    mine = torch.tensor([checkpoint.step if checkpoint else 0], device=run.device)
    steps = run.accelerator.gather(mine).tolist()
    if len(set(steps)) > 1:
        raise LatentDiffError(
            f"output={run.folder}: the processes find checkpoints of steps {steps}; it must be one disk"
        )


def _check_same_run(checkpoint: Checkpoint, task: Task) -> None:
    for section, now in task.facts.items():
        difference = first_difference(section, checkpoint.facts.get(section), now)
        if difference is None:
            continue
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
