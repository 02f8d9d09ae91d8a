"""GroupNorm, with or without a SiLU after it, of activations in half precision and channels-last memory.

PyTorch's runs in float32 under autocast and on GPUs returns NCHW memory: cast, transpose, normalize, SiLU, transpose,
cast. Here half precision goes in and comes out, statistics are float32, and only the result is rounded. float32
activations keep PyTorch's, and so do compiled models, where the compiler fuses all of this.

Only sums over the pixels and the result itself need passes over all values (`torch_kernels`, `triton_kernels`); the
rest is algebra on (B, C). For y = act(z), z = (x - mean) scale + bias with scale = weight rstd, and dz = dy act'(z):

    dbias = sum dz,  dweight = rstd sum dz (x - mean),  dx = dz scale + (x - mean) p + q
    p = -rstd^2 / n sum weight dweight,  q = -rstd / n sum weight dbias  (summed over the n values of a group)
"""

from __future__ import annotations

import warnings
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import torch_kernels

HALF = (torch.bfloat16, torch.float16)


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm`, followed by SiLU if `silu`."""

    def __init__(self, num_groups: int, width: int, *, eps: float, silu: bool = False) -> None:
        super().__init__(num_groups, width, eps=eps)
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (B, C, H, W)."""
        if x.dtype in HALF and not torch.compiler.is_compiling():
            kernels = kernels_for(x.device)
            return half_group_norm(x, self.weight, self.bias, self.num_groups, self.eps, self.silu, kernels)
        y = super().forward(x)
        return F.silu(y) if self.silu else y


def half_group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, kernels: ModuleType
) -> Tensor:
    """Normalize x (B, C, H, W) in half precision, on some kernels."""
    y: Tensor = HalfGroupNorm.apply(x, weight, bias, groups, eps, silu, kernels)  # type: ignore[no-untyped-call]
    return y


class HalfGroupNorm(torch.autograd.Function):
    """GroupNorm and SiLU in half precision; see the module."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, kernels: ModuleType
    ) -> Tensor:
        """Return y, in channels-last memory."""
        x = x.contiguous(memory_format=torch.channels_last)
        pixels, weight, bias = _pixels(x), weight.float(), bias.float()
        y = torch.empty_like(x)
        mean, rstd = (torch.empty(len(x), groups, device=x.device) for _ in range(2))
        for part in kernels.parts(pixels):
            values = kernels.load(pixels[part])
            means, variances = (each.unflatten(1, (groups, -1)) for each in kernels.moments(values))
            mean[part] = means.mean(2)
            variance = (variances + (means - mean[part, :, None]).square()).mean(2)
            rstd[part] = torch.rsqrt(variance + eps)
            center, scale = _by_channel(mean[part], weight), _by_channel(rstd[part], weight) * weight
            kernels.normalize(values, center, scale, bias, silu, out=_pixels(y)[part])
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.kernels, ctx.silu = kernels, silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight and bias."""
        x, weight, bias, mean, rstd = ctx.saved_tensors
        kernels, groups = ctx.kernels, mean.shape[1]
        pixels, gradient = _pixels(x), _pixels(dy.contiguous(memory_format=torch.channels_last))
        dx = torch.empty_like(x)
        dweight, dbias = (torch.empty(x.shape[:2], device=x.device) for _ in range(2))
        count = pixels.shape[1] * pixels.shape[2] // groups
        for part in kernels.parts(pixels):
            center, spread = _by_channel(mean[part], weight), _by_channel(rstd[part], weight)
            values = kernels.load(pixels[part]), kernels.load(gradient[part]), center, spread * weight, bias, ctx.silu
            dbias[part], products = kernels.sums(*values)
            dweight[part] = products * spread
            p, q = (
                _by_channel((weight * each[part]).unflatten(1, (groups, -1)).sum(2), weight) * spread / -count
                for each in (dweight, dbias)
            )
            kernels.gradient(*values, p * spread, q, out=_pixels(dx)[part])
        return dx, dweight.sum(0), dbias.sum(0), None, None, None, None


def kernels_for(device: torch.device) -> ModuleType:
    """Return the kernels for a device: Triton's on an NVIDIA GPU where they have proved right, else torch's."""
    return trusted_kernels(device.index or 0) if device.type == "cuda" else torch_kernels


@cache
def trusted_kernels(index: int) -> ModuleType:
    """Return Triton's kernels if there are any and they compute the right thing on this GPU, else torch's."""
    try:
        from . import triton_kernels
    except ImportError:
        return torch_kernels
    with torch.inference_mode(False), torch.enable_grad():  # whatever the caller does, gradients are compared, too
        reason = failure(triton_kernels, torch.device("cuda", index))
    if reason is None:
        return triton_kernels
    warnings.warn(f"GroupNorm runs in plain torch, as its Triton kernels fail on cuda:{index}: {reason}", stacklevel=2)
    return torch_kernels


def failure(kernels: ModuleType, device: torch.device) -> str | None:
    """Say what is wrong with kernels on a device, compared with `F.group_norm` in float64; None if nothing is."""
    generator = torch.Generator().manual_seed(0)
    for width, groups, side, silu in ((96, 32, 17, True), (48, 8, 5, False), (320, 32, 70, True)):
        x, dy = (torch.randn(2, width, side, side, generator=generator) for _ in range(2))
        weight, bias = (torch.randn(width, generator=generator) for _ in range(2))
        inputs = [each.to(device).requires_grad_() for each in ((x + 1).bfloat16(), weight, bias)]
        exact = [each.detach().double().requires_grad_() for each in inputs]
        z = F.group_norm(exact[0], groups, exact[1], exact[2], 1e-5)
        y = F.silu(z) if silu else z
        upstream = dy.to(device, torch.bfloat16)
        expected = (y, *torch.autograd.grad(y, exact, upstream.double()))
        try:
            ours = half_group_norm(inputs[0], inputs[1], inputs[2], groups, 1e-5, silu, kernels)
            found = (ours, *torch.autograd.grad(ours, inputs, upstream))
        except Exception as raised:  # whatever a compiler or driver raises
            return f"{type(raised).__name__}: {str(raised)[:200]}"
        for name, one, other in zip(
            ("result", "gradient", "weight gradient", "bias gradient"), found, expected, strict=True
        ):
            error = float((one.double() - other).detach().abs().max() / other.detach().abs().max())
            if not error <= 0.01:  # bfloat16 rounds to 0.004
                return f"the {name} of {width} channels is wrong by {error:.2g} of the largest value"
    return None


def _pixels(x: Tensor) -> Tensor:
    """View (B, C, H, W) in channels-last memory as (B, N, C)."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _by_channel(values: Tensor, weight: Tensor) -> Tensor:
    """Repeat values of groups (B, G) for each of their channels, (B, C)."""
    return values.repeat_interleave(len(weight) // values.shape[1], 1)
