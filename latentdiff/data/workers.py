"""Worker processes that read and decode ahead, while this process computes."""

import signal
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

MAX_WORKERS = 8
FEW_BATCHES = 8  # that take less time to read than workers take to start
TIMEOUT = 600  # seconds without an item from a worker, after which it counts as dead


def load_ahead(
    dataset: Dataset[Any], numbers: Sequence[int], workers: int, *, pin: bool = False, prefetch: int = 4
) -> Iterator[Any]:
    """Yield the items of these numbers, in order; each of the workers stays `prefetch` items ahead."""
    if numbers:
        yield from DataLoader(
            dataset,
            batch_size=None,
            sampler=numbers,
            num_workers=workers,
            pin_memory=pin,
            prefetch_factor=prefetch if workers else None,
            timeout=TIMEOUT if workers else 0,
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),  # of seeds that nobody uses; torch's own generator stays as it is
        )


def choose_workers(wanted: int, num_batches: int) -> int:
    """Return the number of workers: `wanted` unless 0; else none for a few batches, or all cores but one, at most 8."""
    if wanted or num_batches < FEW_BATCHES:
        return wanted
    return max(1, min(MAX_WORKERS, torch.get_num_threads() - 1))  # the threads are this process's share of the cores


def _ignore_signals(_: int) -> None:
    # A scheduler signals the whole process group; a worker that dies would take the trainer down before it saves.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
