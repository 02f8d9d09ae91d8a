"""Peak speed and memory of devices: vendor figures for GPUs, a measurement for this machine's CPU."""

import time
from dataclasses import dataclass

import psutil
import torch

from ..device import computes_in_bf16

GIB = 2**30
USABLE = 0.9  # share of a device's memory; the rest is for libraries, workspaces and fragmentation


@dataclass(frozen=True)
class Device:
    """A device with its peak for dense matmuls."""

    name: str
    memory: float  # GiB available to programs
    half: float  # TFLOP/s in bf16, or fp16 if there is no bf16
    single: float  # TFLOP/s in float32, or TF32 if the GPU has it
    has_bf16: bool = True


DEVICES = {device.name: device for device in (
    Device("a100-40", 39.4, 312, 156),
    Device("a100-80", 79.2, 312, 156),
    Device("h100", 79.2, 989, 494),
    Device("h200", 139.8, 989, 494),
    Device("b200", 178.0, 2250, 1125),
    Device("l4", 22.0, 121, 60),
    Device("l40s", 44.4, 362, 183),
    Device("a10", 22.0, 125, 62.5),
    Device("v100", 15.8, 125, 15.7, has_bf16=False),
    Device("v100-32", 31.7, 125, 15.7, has_bf16=False),
    Device("rtx-3090", 23.7, 71, 35.6),
    Device("rtx-4090", 23.6, 165, 82.6),
    Device("rtx-5090", 31.4, 209, 104.8),
    Device("t4", 14.6, 65, 8.1, has_bf16=False),
)}  # fmt: skip


def measure_cpu(num_processes: int) -> Device:
    """Return one process's share of this machine, with its peak measured by a second of matmuls per dtype."""
    memory = psutil.virtual_memory().total / GIB / num_processes
    bf16 = computes_in_bf16(torch.device("cpu"))
    single = _matmul_speed(torch.float32) / num_processes
    half = _matmul_speed(torch.bfloat16) / num_processes if bf16 else single
    return Device("cpu", memory, half, single, bf16)


def _matmul_speed(dtype: torch.dtype) -> float:
    """Return the measured speed in TFLOP/s."""
    size, count = 1024, 0
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    torch.mm(a, b)  # warm up
    start = time.perf_counter()
    while (seconds := time.perf_counter() - start) < 1 or not count:
        torch.mm(a, b)
        count += 1
    return 2 * size**3 * count / seconds / 1e12
