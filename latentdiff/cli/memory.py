"""How a command uses memory."""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from malloc.h


def keep_freed_memory() -> None:
    """Keep memory that is freed for the next tensor, instead of returning it to the system; on Linux with glibc only.

    glibc maps tensors above 32 MiB anew each time, and the system zeroes them page by page: at 256 px that is a third
    of a VAE's training step on a CPU (`benchmarks/freed_memory.py`). The settings of whoever sets `MALLOC_...` stay.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
