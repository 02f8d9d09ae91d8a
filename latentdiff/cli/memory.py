"""How a command uses memory."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from malloc.h


def keep_freed_memory(device: torch.device) -> bool:
    """Keep memory that is freed for the next tensor, instead of returning it to the system; return whether it is kept.

    glibc maps tensors above 32 MiB anew each time, and the system zeroes them page by page: see "Freed memory" in
    docs/performance.md. Only on CPUs; the malloc settings of whoever has some in the environment stay.
    """
    theirs = [name for name in os.environ if name.startswith("MALLOC_")] + [os.environ.get("GLIBC_TUNABLES", "")]
    if device.type != "cpu" or sys.platform != "linux" or any("MALLOC" in setting.upper() for setting in theirs):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
