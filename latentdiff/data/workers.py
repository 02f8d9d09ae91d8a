"""Worker processes that read and decode ahead, while this process computes."""

import logging
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import LatentDiffError

MAX_WORKERS = 8
FEW_BATCHES = 8  # that take less time to read than workers take to start
TIMEOUT, POLL = 600.0, 5.0  # seconds without an item after which a worker counts as dead; between looks at it
MOST_DEATHS = 3  # in a row, without an item in between
DIED = re.compile(r"DataLoader worker \(pid.*(exited unexpectedly|killed by signal)|DataLoader timed out after")

logger = logging.getLogger(__name__)


class WorkersDiedError(LatentDiffError):
    """The processes that read pictures have died again and again."""


def load_ahead(
    dataset: Dataset[Any], numbers: Sequence[int], workers: int, *, pin: bool = False, prefetch: int = 4
) -> Iterator[Any]:
    """Yield the items of these numbers, in order; each of the workers stays `prefetch` items ahead.

    If a worker dies, new ones go on from the item that is due, which is the same whoever computes it. Raises
    WorkersDiedError if they die three times without an item in between.
    """
    done, deaths = 0, 0
    while done < len(numbers):
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=numbers[done:],
            num_workers=workers,
            pin_memory=pin,
            prefetch_factor=prefetch if workers else None,
            timeout=POLL if workers else 0,
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),  # of seeds that nobody uses; torch's own generator stays as it is
        )
        items = _without_child_signals(loader)
        try:
            while done < len(numbers):
                yield _next(items)
                done, deaths = done + 1, 0
        except RuntimeError as error:
            if not DIED.search(str(error)):
                raise
            for worker in getattr(items, "_workers", ()):  # one that hangs ignores torch's SIGTERM
                worker.kill()
            deaths += 1
            if deaths == MOST_DEATHS:
                raise WorkersDiedError(
                    f"the processes that read pictures died {deaths} times in a row; they may need more memory than "
                    f"there is: set workers below {workers}, or 0"
                ) from error
            logger.warning("a process that reads pictures died; starting new ones (%s)", str(error).splitlines()[0])


def _next(items: Iterator[Any]) -> Any:
    """Wait for the next item, up to `TIMEOUT`; every few seconds torch looks whether the workers still live."""
    start = time.monotonic()
    while True:
        try:
            return next(items)
        except RuntimeError as error:
            if "timed out" not in str(error) or time.monotonic() - start > TIMEOUT:
                raise


def _without_child_signals(loader: DataLoader[Any]) -> Iterator[Any]:
    """Iterate without torch's signal handler, which would raise within whatever this process is doing just then.

    A death is still noticed, within seconds, when the next item is waited for.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    items = iter(loader)
    signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
    return items


def choose_workers(wanted: int, num_batches: int) -> int:
    """Return the number of workers: `wanted` unless 0; else none for a few batches, or all cores but one, at most 8."""
    if wanted or num_batches < FEW_BATCHES:
        return wanted
    return max(1, min(MAX_WORKERS, torch.get_num_threads() - 1))  # the threads are this process's share of the cores


def _ignore_signals(_: int) -> None:
    # A scheduler signals the whole process group; a worker that dies would take the trainer down before it saves.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
