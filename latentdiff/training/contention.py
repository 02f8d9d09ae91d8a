"""How much of its time a training spends waiting for a CPU that others use as well.

Threads that wait for each other do so busily, so on shared cores a training loses far more than the others take: with
two threads on two cores, beside another job of two, 77 pictures/s were seen to become 11.
"""

import time
from pathlib import Path

import torch

from .launch import Launch

SCHEDULED = Path("/proc/thread-self/schedstat")  # Linux: nanoseconds that a thread was on a CPU, and waiting for one
NOTED = 0.25  # share of the time
SHORTEST = 10.0  # seconds over which it is measured, at least


class Contention:
    """The share of the time that the thread which trains was ready to run and no CPU was free, in the main process."""

    def __init__(self, run: Launch) -> None:
        self.run, self.waited, self.since = run, waiting_seconds(), time.monotonic()

    def report(self) -> None:
        """Say so, once in a launch, if the share has been large since it was last measured."""
        waited, since = waiting_seconds(), time.monotonic()
        if since - self.since < SHORTEST or self.run.device.type != "cpu":
            return
        if waited is not None and self.waited is not None:
            share = (waited - self.waited) / (since - self.since)
            if share > NOTED:
                self.run.say_once(warning(share, self.run), about="shared CPU")
        self.waited, self.since = waited, since


def warning(share: float, run: Launch) -> str:
    """Return what to say of a share of the time."""
    own = (f"processes={run.accelerator.num_processes}, each with threads={torch.get_num_threads()} and "
           f"workers={run.config.workers}")  # fmt: skip
    return (f"warning: {share:.0%} of the time, this process was ready to run and no CPU was free: other programs use "
            f"them, or this run has too many threads for them ({own}). It would be faster with nothing beside it, or "
            "stopped and given again with fewer threads or workers")  # fmt: skip


def waiting_seconds() -> float | None:
    """Return for how long this thread has waited for a CPU; None where the system does not say."""
    try:
        running, waiting = map(int, SCHEDULED.read_text().split()[:2])
    except (OSError, ValueError):
        return None
    return waiting / 1e9 if running else None  # kernels that do not count say 0
