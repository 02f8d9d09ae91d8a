"""Where to compute and in which precision, when nobody said."""

from __future__ import annotations

import torch

from .errors import LatentDiffError


def best_device() -> torch.device:
    """CUDA, or Apple's GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def as_device(device: torch.device | str | None) -> torch.device:
    """The device meant, `best_device()` for None.

    Raises:
        LatentDiffError: there is no such device.
    """
    try:
        return best_device() if device is None else torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise LatentDiffError(f"device={str(device)!r}: not there ({str(error).splitlines()[0]})") from None
