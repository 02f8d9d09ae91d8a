"""Where to compute and in which precision, when nobody said."""

from collections.abc import Mapping
from typing import Any

import torch

from .errors import LatentDiffError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # precisions by their names here


def best_device() -> torch.device:
    """CUDA, or Apple's GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware, and faster than float32.

    On CPUs that is so with AMX, and with AVX512-BF16 where it is not Intel's: there, and where a virtual machine hides
    AMX, it runs at half of float32's rate (measured: 153 against 278 GFLOP/s).
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # an older torch cannot say
        return False
    return multiplies_bf16(torch.cpu.get_capabilities())


def multiplies_bf16(cpu: Mapping[str, Any]) -> bool:
    """The same, from what `torch.cpu.get_capabilities` says of a CPU."""
    intel = "Intel" in str(cpu.get("cpu_name", ""))
    return bool(cpu.get("amx_bf16") or (cpu.get("avx512_bf16") and not intel))


def as_device(device: torch.device | str | None) -> torch.device:
    """The device meant, `best_device()` for None.

    Raises:
        LatentDiffError: there is no such device.
    """
    try:
        return best_device() if device is None else torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise LatentDiffError(f"device={str(device)!r}: not there ({str(error).splitlines()[0]})") from None


def check_attention(name: str, device: torch.device) -> None:
    """Raise where an attention backend does not run on the device."""
    if name == "xformers" and device.type != "cuda":
        raise LatentDiffError(f"attention=xformers: needs an NVIDIA GPU, not {device.type}; choose sdpa")
