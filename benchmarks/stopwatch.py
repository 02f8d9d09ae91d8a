"""Timing of several functions in alternation, ratios of their times, and the memory that one call takes."""

from __future__ import annotations

import ctypes
import itertools
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

WARM_UP = 3  # untimed calls of each function
RESAMPLES = 2000  # of the bootstrap
M_MMAP_THRESHOLD = -3  # from malloc.h

Call = Callable[[], Any]


def time_in_turns(calls: dict[str, Call], rounds: int, device: str) -> dict[str, list[float]]:
    """Return the seconds of every call. Each round calls every function once, in each permutation in turn."""
    for call in calls.values():
        for _ in range(WARM_UP):
            timed(call, device)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for order in itertools.islice(itertools.cycle(itertools.permutations(calls)), rounds):
        for name in order:
            seconds[name].append(timed(calls[name], device))
    return seconds


def timed(call: Call, device: str) -> float:
    """Return the wall-clock seconds, including the work on the device."""
    if device == "cuda":
        torch.compiler.cudagraph_mark_step_begin()
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratio_of_medians(above: list[float], below: list[float]) -> tuple[float, float, float]:
    """Return the ratio and its bootstrap 90 % interval; rounds are resampled, so simultaneous slowdowns stay paired."""
    rounds = np.array([above, below])  # (2, R)
    resampled = np.random.default_rng(0).integers(rounds.shape[1], size=(RESAMPLES, rounds.shape[1]))
    medians = np.median(rounds[:, resampled], axis=2)  # (2, RESAMPLES)
    low, high = np.quantile(medians[0] / medians[1], [0.05, 0.95])
    return float(np.median(above) / np.median(below)), float(low), float(high)


def peak_on_cuda(call: Call) -> float:
    """Return the MiB allocated at the peak of one call, beyond what was allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def peak_in_new_process(prepare: Callable[..., Call], *arguments: Any) -> float | None:
    """Run `peak_resident` in a process that does nothing else; returns None if the system is not Linux."""
    if sys.platform != "linux":
        return None
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:  # like spawn, but imports only once
        return pool.submit(peak_resident, prepare, *arguments).result()


def peak_resident(prepare: Callable[..., Call], *arguments: Any) -> float:
    """Return the MiB of resident memory at the peak of the second call, beyond what was held just before it.

    The first call also loads code, and weights that were only memory-mapped before. Uses Linux's VmHWM rather than
    `ru_maxrss`, which starts at the parent's peak and cannot be reset.
    """
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)  # freed tensors of 64 KiB or more are returned to the system
    call = prepare(*arguments)
    call()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak to the current value
    before = high_water_mark()
    call()
    return high_water_mark() - before


def high_water_mark() -> float:
    """Return the largest resident memory of this process since the last reset, in MiB."""
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in status)
    return int(fields["VmHWM"].split()[0]) / 1024  # from KiB
