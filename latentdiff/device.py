"""Default device and precision, and checks of what a device supports."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from .errors import LatentDiffError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by their names in configs


def best_device() -> torch.device:
    """Return CUDA if available, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def computes_in_bf16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 in hardware, faster than float32.

    CPUs do so with AMX, and non-Intel ones with AVX512-BF16. On Intel CPUs without AMX, or in a virtual machine that
    hides it, bfloat16 runs at half the speed of float32 (measured: 153 vs. 278 GFLOP/s).
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # older versions of torch cannot tell
        return False
    return multiplies_bf16(torch.cpu.get_capabilities())


def multiplies_bf16(cpu: Mapping[str, Any]) -> bool:
    """Return the same for a CPU with the given `torch.cpu.get_capabilities`."""
    intel = "Intel" in str(cpu.get("cpu_name", ""))
    return bool(cpu.get("amx_bf16") or (cpu.get("avx512_bf16") and not intel))


def as_device(device: torch.device | str | None) -> torch.device:
    """Return the device, `best_device()` for None; raise LatentDiffError if it is not available."""
    if str(device).startswith("meta"):
        raise LatentDiffError(f"device={str(device)!r}: holds no values; choose cpu, cuda or mps")
    try:
        return best_device() if device is None else torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise LatentDiffError(f"device={str(device)!r}: not available ({str(error).splitlines()[0]})") from None


@contextmanager
def without_tf32() -> Iterator[None]:
    """Compute float32 in full on NVIDIA GPUs: for what is kept or compared. Also a decorator.

    Elsewhere convolutions in float32 are rounded to TF32's ten bits there, as is PyTorch's default.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def check_attention(name: str, device: torch.device, setting: str = "attention") -> None:
    """Raise LatentDiffError if the attention backend does not run on the device."""
    if name == "xformers" and device.type != "cuda":
        raise LatentDiffError(f"{setting}=xformers: needs an NVIDIA GPU, not {device.type}; choose sdpa")
