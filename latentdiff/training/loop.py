"""The training loop of both stages: steps, logging, validation, checkpoints, and stopping early."""

import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..data.order import BatchPlan
from ..data.shards import digest
from ..data.sources import Source
from ..data.workers import WorkersDiedError
from ..errors import LatentDiffError, several
from ..sections import TrainSection
from .best import Best
from .broken import read_broken, too_many_broken, write_broken
from .budget import OutOfTime, Pacer, no_limit
from .checkpoint import Checkpoint, newest_checkpoint, save_checkpoint
from .decisions import Decisions, read_decisions
from .fingerprint import first_difference
from .heartbeat import Heartbeat
from .launch import Launch
from .logging import MetricLogger
from .optimizer import TrainState
from .signals import StopFlag, StopReason
from .snapshots import Snapshots
from .spikes import Spikes
from .stopped import Stopped
from .timetable import Timetable

ENDLESS = 2**40  # steps; with a budget, the last one is decided along the way


class Training(Protocol):
    """What a stage provides to the loop."""

    name: str  # train_vae or train_latent
    source: Source  # the training pictures
    timetable: Timetable
    spikes: Spikes
    snapshots: Snapshots

    @property
    def section(self) -> TrainSection:
        """The stage's section of the config."""

    @property
    def best(self) -> Best | None:
        """The best average so far, if the stage keeps one."""

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

    def validate(self, step: int, check_time: Callable[[], None]) -> dict[str, float]:
        """Compute metrics on held-out images and save some images for inspection; call `check_time` along the way."""

    def rehearse(self) -> float:
        """Return how many seconds `validate` takes, estimated from a part of it."""


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


def run_training(
    training: Training, run: Launch, folder: Path, limit: float | None, *,
    begin: Callable[[], None] = lambda: None, finishing: Callable[[], float] = lambda: 0.0,
) -> None:  # fmt: skip
    """Train from the newest intact checkpoint in `folder`, or from scratch, to the last step.

    `begin` is called once it is clear that the run may go on. With a budget, there are as many steps as let the stage
    be finished `limit` seconds after the launch; `finishing` estimates what follows the last step.

    Raises `Stopped`, with a checkpoint saved, after a signal, too many non-finite steps or too many broken images, and
    LatentDiffError if the budget is too short.
    """
    section, timetable = training.section, training.timetable
    skipped, decisions = SkippedSteps(run.device), Decisions(folder / "checkpoints", training.fingerprint)
    step = restore(training, run, folder, skipped, decisions)
    begin()
    pacer = Pacer(run, timetable, decisions, limit, checkpoint_bytes(training), training.snapshots.planned)
    broken = read_broken(folder, run)
    log = MetricLogger(run, folder, training.name, step, timetable.steps, section.batch_size).begin()
    if step == 0 and section.validate_first:
        validate_first(training, log, pacer)
    batches = training.batches(step, ENDLESS if limit is not None else section.steps)
    heartbeat = Heartbeat(run, folder)
    with StopFlag(run.parent) as flag:
        while timetable.steps is None or step < timetable.steps:
            step += 1
            with log.phase("data"), saving_if_workers_die(training, run, folder, step - 1, skipped):
                parts = next(batches)
            broken.update(entry for part in parts for entry in part.broken)
            with heartbeat.step(step):
                metrics, step_is_finite = training.train_step(parts, step, log)
            skipped.add(step_is_finite)
            log.add(metrics, step_is_finite)
            why = too_many_broken(broken, len(training.source), run)
            wanted = flag.requested() or (StopReason.BROKEN_PICTURES if why else StopReason.NONE)
            reason, save_is_due, validation_is_due = pacer.after(
                step, wanted, partial(rehearse, training, finishing, log)
            )
            log.steps, finished = timetable.steps, step == timetable.steps
            if step % section.log_every == 0 or finished or reason:
                total, longest = skipped.read()
                log.log(step, {"skipped": total, "broken": len(broken)} if total or broken else {})
                report_spikes(training, run, log)
                if longest >= section.max_skipped:
                    reason, why = StopReason.NOT_FINITE, no_step_taken(longest, section)
                write_broken(broken, folder, run)
            with log.untimed():
                take_snapshot(training, pacer, step)  # before a checkpoint, which records it
                if (validation_is_due or finished) and not reason:
                    validate(training, log, pacer, step)
                if save_is_due or finished or reason:
                    with pacer.timing(pacer.checkpoint):
                        save(training, run, folder, step, skipped)
            if reason:
                raise Stopped(stop_message(training, log, step, reason, why), reason)
    pacer.settle()
    log.close()


@contextmanager
def saving_if_workers_die(
    training: Training, run: Launch, folder: Path, step: int, skipped: SkippedSteps
) -> Iterator[None]:  # fmt: skip
    """Save a checkpoint if the processes that read pictures cannot be kept alive; others wait for none of this."""
    try:
        yield
    except WorkersDiedError as error:
        if run.accelerator.num_processes > 1:  # the others are in the next step already
            raise
        if step:
            save(training, run, folder, step, skipped)
        raise LatentDiffError(f"stopped at step {step}: {error}; saved in {folder / 'checkpoints'}") from None


def no_step_taken(count: int, section: TrainSection) -> str:
    """Say why so many steps in a row have changed nothing."""
    spikes = "" if section.max_spike is None else f", or more than max_spike={section.max_spike:g} times its mean,"
    return f"the loss was not finite{spikes} in {count} steps in a row"


def report_spikes(training: Training, run: Launch, log: MetricLogger) -> None:
    """Note the spikes since the last log line, with the names of their pictures."""
    for step, ratio in training.spikes.read():
        plan, seed = BatchPlan(training.section.batch_size), run.config.seed
        items = plan.items(step - 1, len(training.source), seed, training.name)
        names = [training.source.name(index) for _, index, _ in items]
        log.note(step, {"spike": ratio, "pictures": names})
        skipped = "" if training.section.max_spike is None else ", so this step was skipped"
        run.report(f"{training.name} {step}: the loss was {ratio:,.0f} times its running mean{skipped}; pictures: "
                   f"{several(names)} (all in {log.folder / 'log.jsonl'})")  # fmt: skip


def validate_first(training: Training, log: MetricLogger, pacer: Pacer) -> None:
    """Validate and log before the first step."""
    log.run.report(f"{training.name} 0: validating before the first step")
    with log.untimed(), pacer.timing(pacer.validation):
        log.write(0, training.validate(0, no_limit))


def validate(training: Training, log: MetricLogger, pacer: Pacer, step: int) -> None:
    """Validate and log, unless the budget would not be kept."""
    try:
        if step == training.timetable.steps:
            pacer.check_time_to_validate()
        with pacer.timing(pacer.validation):
            log.write(step, training.validate(step, pacer.check_time))
    except OutOfTime:
        pacer.run.report(f"{training.name} {step}: no time is left in the budget for a validation")


def take_snapshot(training: Training, pacer: Pacer, step: int) -> None:
    """Take a snapshot of the averages if one is due."""
    if training.snapshots.is_due(step):
        with pacer.timing(pacer.snapshot):
            training.snapshots.take(step, training.fingerprint)


def rehearse(training: Training, finishing: Callable[[], float], log: MetricLogger) -> tuple[float, float]:
    """Return the estimated seconds of a validation, and of finishing the stage after the last step."""
    with log.untimed():
        return training.rehearse(), finishing()


def stop_message(training: Training, log: MetricLogger, step: int, reason: StopReason, why: str | None) -> str:
    """Note where training stopped and why; return that, how to go on, and whether the run can be used as it is."""
    log.note(step, {"stopped": reason.sentence(why)})
    run, folder = log.run, log.folder
    number = f"step {step}" + (f" of {training.timetable.steps}" if training.timetable.steps else "")
    message = f"stopped at {number}: {reason.sentence(why)}; saved in {folder / 'checkpoints'}"
    if reason in (StopReason.NOT_FINITE, StopReason.BROKEN_PICTURES):
        return message
    usable = "the VAE is not finished, so nothing can be sampled yet"
    if training.name == "train_latent":
        usable = f'to sample from it as it is: latentdiff sample "a prompt" -m {shlex.quote(str(run.folder))}'
    return f"{message}. To go on, give the same command again; {usable}"


def save(training: Training, run: Launch, folder: Path, step: int, skips: SkippedSteps) -> None:
    """Save a checkpoint: all processes gather the tensors, the main one writes them."""
    tensors = {f"{name}-{what}": values for name, state in training.states.items()
               for what, values in state.tensors(keep=run.is_main).items()}  # fmt: skip
    tensors["skips"] = {"counts": skips.counts, "spikes": training.spikes.state}
    if run.is_main:
        current = [decision for decision in training.timetable.decisions if decision.step <= step][-1:]
        metadata = {"key": digest(training.fingerprint), **training.fingerprint, "steps": training.timetable.steps,
                    "seconds": run.clock.elapsed(), "decisions": _decisions_before(step, training),
                    "best": training.best.record if training.best else None, **training.snapshots.facts()}  # fmt: skip
        save_checkpoint(folder / "checkpoints", step, tensors, metadata, keep=training.section.keep_checkpoints,
                        pinned={decision.decay_start for decision in current})  # fmt: skip
        if training.best:
            training.best.delete_others()
        training.snapshots.delete_others()
    run.accelerator.wait_for_everyone()


def restore(
    training: Training, run: Launch, folder: Path, skips: SkippedSteps, decisions: Decisions
) -> int:  # fmt: skip
    """Load the decisions and the newest intact checkpoint; return its step, or 0 if there is none."""
    if run.budget is not None:
        training.timetable.decisions = read_decisions(run, folder, decisions, run.budget)
    checkpoint = newest_checkpoint(folder / "checkpoints", run.report)
    _check_same_step(checkpoint, run)
    if checkpoint is None:
        training.snapshots.go_on_from(0, [])
        return 0
    _check_same_run(checkpoint, training)
    for name, state in training.states.items():
        kinds = [file.removeprefix(f"{name}-") for file in checkpoint.names() if file.startswith(f"{name}-")]
        if not kinds:
            raise LatentDiffError(f"{checkpoint.path}: has no {name}-weights; delete the checkpoints to start over")
        state.load({kind: checkpoint.tensors(f"{name}-{kind}") for kind in kinds})
    counters = checkpoint.tensors("skips")
    skips.counts = counters["counts"].to(run.device)
    training.spikes.state = counters.get("spikes", training.spikes.state).to(run.device)
    run.clock.go_on_from(checkpoint.metadata.get("seconds", 0.0))
    if training.best:
        training.best.record = checkpoint.metadata.get("best")
    training.snapshots.go_on_from(checkpoint.step, checkpoint.metadata.get("snapshots", []))
    run.report(f"{training.name}: going on from step {checkpoint.step}")
    return checkpoint.step


def checkpoint_bytes(training: Training) -> int:
    """Return the size of a checkpoint: weights, averages and two moments in float32."""
    return sum(4 * len(state.kinds) * p.numel() for state in training.states.values()
               for p in state.parameters.values())  # fmt: skip


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
    if _decisions_before(checkpoint.step, training) != checkpoint.metadata.get("decisions", []):
        raise LatentDiffError(
            f"{checkpoint.path.parent / 'decisions'}: are not the decisions that led to {checkpoint.path.name}; put "
            "them back, or delete the checkpoints to start over"
        )


def _decisions_before(step: int, training: Training) -> list[dict[str, Any]]:
    """The decisions that led to a step, for the metadata of its checkpoint."""
    return [asdict(decision) for decision in training.timetable.decisions if decision.step < step]
