"""The work of a GroupNorm in plain torch, on any device.

x, dy and out are (B, N, C) of N pixels, in half precision; all others float32, (B, C) or, for weight and bias, (C).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 2**20  # values at a time on a CPU: their float32 copies stay in its cache


def normalize(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, *, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Write act(z); return the mean and the reciprocal standard deviation of each channel's group, (B, C)."""
    center, spread = (torch.zeros(len(x), x.shape[2], device=x.device) for _ in range(2))
    for part in _parts(x):
        values = x[part].float()
        means = values.mean(1)
        values.sub_(means[:, None])  # first, so that nothing cancels afterwards
        variances = values.square().mean(1)
        mean = _group_mean(means, groups)
        center[part] = mean
        spread[part] = torch.rsqrt(_group_mean(variances + (means - mean).square(), groups) + eps)
        scale = spread[part] * weight
        z = _affine(values, scale, bias + (means - mean) * scale)
        out[part].copy_(F.silu(z, inplace=True) if silu else z)
    return center, spread


def gradients(
    x: Tensor, dy: Tensor, center: Tensor, spread: Tensor, weight: Tensor, bias: Tensor, groups: int, silu: bool, *,
    out: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write dx; return the gradients of weight and bias, (C)."""
    dweight, dbias = (torch.zeros_like(center) for _ in range(2))
    for part in _parts(x):
        values, dz, scale = x[part].float().sub_(center[part][:, None]), dy[part].float(), spread[part] * weight
        if silu:
            dz = torch.ops.aten.silu_backward(dz, _affine(values, scale, bias.expand_as(scale)))
        dbias[part] = dz.sum(1)
        dweight[part] = (values * dz).sum(1) * spread[part]
        p, q = (_group_mean(weight * each[part], groups) * spread[part] / -x.shape[1] for each in (dweight, dbias))
        out[part].copy_(_affine(values, p * spread[part], q).addcmul_(dz, scale[:, None]))
    return dweight.sum(0), dbias.sum(0)


def _parts(x: Tensor) -> Iterator[slice]:
    """Yield the pictures to take at a time; on the meta device, or of an empty batch, there is nothing to compute."""
    if x.is_meta or not x.numel():
        return iter(())
    step = max(1, CHUNK * len(x) // x.numel()) if x.device.type == "cpu" else len(x)
    return (slice(first, first + step) for first in range(0, len(x), step))


def _group_mean(values: Tensor, groups: int) -> Tensor:
    """Average (B, C) over the channels of each group, and repeat it for each of them."""
    share = values.shape[1] // groups
    return values.view(-1, groups, share).mean(2).repeat_interleave(share, 1)


def _affine(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return torch.addcmul(bias[:, None], x, scale[:, None])
