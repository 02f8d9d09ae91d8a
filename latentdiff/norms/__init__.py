"""GroupNorm, with or without a SiLU after it, of activations in half precision and channels-last memory.

PyTorch's runs in float32 under autocast and on GPUs returns NCHW memory: cast, transpose, normalize, SiLU, transpose,
cast. Here half precision goes in and comes out, statistics are float32, and only the result is rounded. float32
activations keep PyTorch's, and so do compiled models, where the compiler fuses all of this.

The work is done by `torch_kernels` or `triton_kernels`. For y = act(z), z = weight n + bias, n = (x - mean) rstd, and
dz = dy act'(z), with sums over pictures and pixels and means over the values of a picture's group:

    dbias = sum dz,  dweight = sum dz n,  dx = rstd (weight dz - n mean(weight dz n) - mean(weight dz))
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
        y, weight, bias = torch.empty_like(x), weight.float(), bias.float()
        center, spread = kernels.normalize(_pixels(x), weight, bias, groups, eps, silu, out=_pixels(y))
        ctx.save_for_backward(x, center, spread, weight, bias)
        ctx.settings = groups, silu, kernels
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight and bias."""
        x, *saved = ctx.saved_tensors
        groups, silu, kernels = ctx.settings
        dy, dx = dy.contiguous(memory_format=torch.channels_last), torch.empty_like(x)
        gradients = kernels.gradients(_pixels(x), _pixels(dy), *saved, groups, silu, out=_pixels(dx))
        return dx, *gradients, None, None, None, None


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
