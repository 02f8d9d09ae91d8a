"""The passes over all values in plain torch, on any device.

x, dy and out are (B, N, C) of N pixels; all others are float32 of (B, C), or (C) for the bias.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 2**20  # values at a time on a CPU: their float32 copies stay in its cache


def parts(x: Tensor) -> Iterator[slice]:
    """Yield the pictures to take at a time; on the meta device, or of an empty batch, there is nothing to compute."""
    if x.is_meta or not x.numel():
        return iter(())
    step = max(1, CHUNK * len(x) // x.numel()) if x.device.type == "cpu" else len(x)
    return (slice(first, first + step) for first in range(0, len(x), step))


def load(x: Tensor) -> Tensor:
    """Return the values in the form that the other functions take: float32."""
    return x.float()


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance over the pixels."""
    mean = x.mean(1)
    return mean, (x - mean[:, None]).square_().mean(1)


def normalize(x: Tensor, center: Tensor, scale: Tensor, bias: Tensor, silu: bool, *, out: Tensor) -> None:
    """Write act((x - center) scale + bias)."""
    z = _affine(x, center, scale, bias)
    out.copy_(F.silu(z, inplace=True) if silu else z)


def sums(x: Tensor, dy: Tensor, center: Tensor, scale: Tensor, bias: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    """Return the sums of dz and of dz (x - center) over the pixels."""
    dz = _dz(x, dy, center, scale, bias, silu)
    return dz.sum(1), (x - center[:, None]).mul_(dz).sum(1)


def gradient(
    x: Tensor, dy: Tensor, center: Tensor, scale: Tensor, bias: Tensor, silu: bool, p: Tensor, q: Tensor, *, out: Tensor
) -> None:
    """Write dz scale + (x - center) p + q."""
    dz = _dz(x, dy, center, scale, bias, silu)
    out.copy_(_affine(x, center, p, q).addcmul_(dz, scale[:, None]))


def _affine(x: Tensor, center: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return (x - center[:, None]).mul_(scale[:, None]).add_(bias.unsqueeze(-2))


def _dz(x: Tensor, dy: Tensor, center: Tensor, scale: Tensor, bias: Tensor, silu: bool) -> Tensor:
    return torch.ops.aten.silu_backward(dy, _affine(x, center, scale, bias)) if silu else dy
