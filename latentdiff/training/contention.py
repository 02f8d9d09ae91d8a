"""How long a training waits for a CPU that other processes use, too.

Threads that wait for each other do so busily, so on a shared CPU a training loses far more than the others take: with
two threads on two cores, beside another job of two, 77 pictures/s were seen to become 11.
"""

import time
from pathlib import Path

import torch

from .launch import Launch

SCHEDULED = Path("/proc/self/schedstat")  # Linux; of the main thread: nanoseconds on a CPU, and waiting for one
NOTED = 0.25  # share of the time


class Contention:
    """The share of the time since the last call that the main thread was ready to compute and had no CPU."""

    def __init__(self, run: Launch) -> None:
        self.run, self.waited, self.since = run, waiting_seconds(), time.monotonic()

    def report(self) -> None:
        """Say once in a launch if it is large, on a CPU."""
        waited, since = waiting_seconds(), time.monotonic()
        if waited is not None and self.waited is not None and self.run.device.type == "cpu":
            share = (waited - self.waited) / max(since - self.since, 1e-9)
            if share > NOTED:
                self.run.say_once(advice(share, torch.get_num_threads(), self.run.config.workers))
        self.waited, self.since = waited, since


def advice(share: float, threads: int, workers: int) -> str:
    """Say that the CPU is shared, and what to do."""
    others = f"other programs, or this run's workers={workers}," if workers else "other programs"
    fewer = f", or stop it and give its command again with threads={threads // 2}" if threads > 1 else ""
    return (f"warning: {others} use the same CPU: {share:.0%} of the time, this process has waited for its turn; "
            f"end them{fewer}")  # fmt: skip


def waiting_seconds() -> float | None:
    """Return for how long the main thread has waited for a CPU; None where the system does not say."""
    try:
        return int(SCHEDULED.read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return None
