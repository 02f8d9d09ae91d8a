"""Progress of a run: a line every few steps, `log.jsonl`, and accelerate's trackers."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from ..sections.values import duration
from .contention import Contention
from .launch import Launch
from .record import now, write_json

PHASES = ("data", "model", "optimizer")


class MetricLogger:
    """Metrics accumulated on the device; the loop waits for the device only when a line is logged."""

    def __init__(
        self, run: Launch, folder: Path, name: str, first_step: int, steps: int | None, batch_size: int
    ) -> None:
        self.run, self.folder, self.name = run, folder, name
        self.steps, self.batch_size, self.done = steps, batch_size, first_step
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}  # sum and number of finite steps, on the device
        self._spent = dict.fromkeys(PHASES, 0.0)
        self._since, self._contention = time.perf_counter(), Contention(run)
        run.accelerator.init_trackers(name, config={"config": run.config.model_dump_json()})
        if run.is_main:
            _drop_lines_after(folder / "log.jsonl", first_step or -1)  # -1: a new run starts an empty log

    def begin(self) -> Self:
        """Note that a training begins or goes on, and with which pictures."""
        self.run.trained.add(self.name)
        if self.run.is_main and self.run.pictures:
            write_json(self.run.folder / "data.json", self.run.pictures)
        self.note(self.done, {"resumed" if self.done else "began": now()})
        return self

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Attribute the time inside to `data`, `model` or `optimizer`; the rest is logged as `other`."""
        start = time.perf_counter()
        yield
        self._spent[name] += time.perf_counter() - start

    def add(self, metrics: Mapping[str, Tensor], step_is_finite: Tensor) -> None:
        """Add one step's scalar metrics on the device, or ignore them if `step_is_finite` is 0."""
        for name, value in metrics.items():
            total, steps = self._sums.get(name, (torch.zeros_like(value), torch.zeros_like(step_is_finite)))
            self._sums[name] = total + torch.where(step_is_finite > 0, value.detach(), 0.0), steps + step_is_finite

    def log(self, step: int, extra: Mapping[str, float]) -> dict[str, float]:
        """Log and return means over the finite steps since the last line; also log the time per phase."""
        count = step - self.done
        sums = torch.stack([torch.stack([total.float(), steps.float()]) for total, steps in self._sums.values()])
        totals = self.run.accelerator.reduce(sums, "mean").tolist()
        means = {name: total / steps for name, (total, steps) in zip(self._sums, totals, strict=True) if steps}
        means |= extra
        elapsed = time.perf_counter() - self._since
        rate = count * self.batch_size / elapsed
        shares = {name: spent / elapsed for name, spent in self._spent.items()}
        shares["other"] = max(0.0, 1 - sum(shares.values()))
        shown = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
        spread = " ".join(f"{name} {share:.0%}" for name, share in shares.items())
        self.run.report(f"{self.name} {step}/{self.steps or '?'}  {shown}  {rate:.1f} pictures/s ({spread})  "
                        f"{self._left(step, elapsed / count)}")  # fmt: skip
        timing = {"pictures_per_second": rate} | {f"time_{name}": share for name, share in shares.items()}
        self.write(step, means | timing)
        self._contention.report()
        self._sums, self._spent, self.done = {}, dict.fromkeys(PHASES, 0.0), step
        self._since = time.perf_counter()
        return means

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write values to log.jsonl and to the trackers."""
        self.note(step, values)
        self.run.accelerator.log({f"{self.name}/{name}": value for name, value in values.items()}, step=step)

    def note(self, step: int, values: Mapping[str, object]) -> None:
        """Write a line of any values to log.jsonl alone, with the seconds that the run has taken."""
        if self.run.is_main:
            seconds = round(self.run.clock.elapsed(), 3)
            with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values, "seconds": seconds}) + "\n")

    def _left(self, step: int, seconds_per_step: float) -> str:
        """Say what is left of the budget or, without one, of the stage."""
        if (budget := self.run.config.budget) is not None:
            left = max(0, round(duration(budget) - self.run.clock.elapsed()))
            return f"{timedelta(seconds=left)} left of {budget}"
        return f"{timedelta(seconds=round(((self.steps or step) - step) * seconds_per_step))} left"

    def close(self) -> None:
        """Finish the trackers; the next stage starts its own."""
        for tracker in self.run.accelerator.trackers:
            tracker.finish()
        self.run.accelerator.trackers = []

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Exclude the time inside, such as validation and saving, from the time of the steps."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start


def _drop_lines_after(path: Path, step: int) -> None:
    """Drop lines logged after the checkpoint that the run resumes from; those steps will be repeated."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, KeyError, TypeError):  # a line truncated when the process died
                if json.loads(line)["step"] <= step:
                    kept.append(line)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(partial, path)
