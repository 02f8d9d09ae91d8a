"""GroupNorm, with or without a SiLU after it, and LayerNorm of activations in half precision.

PyTorch's run in float32 under autocast, and its GroupNorm returns NCHW memory on GPUs: cast, transpose, normalize,
SiLU, transpose, cast. Here half precision goes in and comes out, statistics are float32, and only the result is
rounded. float32 activations keep PyTorch's, and so do compiled models, where the compiler fuses all of this.

The work is done by `torch_kernels` or `triton_kernels`. For y = act(z), z = weight n + bias, n = (x - mean) rstd, and
dz = dy act'(z), with sums over pictures and pixels and means over the values of a picture's group:

    dbias = sum dz,  dweight = sum dz n,  dx = rstd (weight dz - n mean(weight dz n) - mean(weight dz))
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, partial
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
            if x.device.type == "cpu" and x.numel() and not torch.is_grad_enabled():
                return self._forward_only(x)
            kernels = kernels_for(x.device)
            return half_group_norm(x, self.weight, self.bias, self.num_groups, self.eps, self.silu, kernels)
        y = super().forward(x)
        return F.silu(y) if self.silu else y

    def _forward_only(self, x: Tensor) -> Tensor:
        """Normalize by ATen's kernel for CPUs: its forward pass is the fastest there, its backward pass the slowest."""
        x = x.contiguous(memory_format=torch.channels_last)
        batch, width, height, across = x.shape
        y = torch.native_group_norm(
            x, self.weight, self.bias, batch, width, height * across, self.num_groups, self.eps
        )[0]
        y = y.contiguous(memory_format=torch.channels_last)
        return F.silu(y, inplace=True) if self.silu else y


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


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm`; under autocast on an NVIDIA GPU, half precision goes in and comes out."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (..., C)."""
        autocast = x.dtype in HALF and self.weight.dtype == torch.float32 and not torch.compiler.is_compiling()
        if autocast and hasattr(kernels := kernels_for(x.device), "layer_norm"):
            return half_layer_norm(x, self.weight, self.bias, self.eps, kernels)
        return super().forward(x)


def half_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, kernels: ModuleType) -> Tensor:
    """Normalize x (..., C) in half precision, on some kernels."""
    y: Tensor = HalfLayerNorm.apply(x, weight, bias, eps, kernels)  # type: ignore[no-untyped-call]
    return y


class HalfLayerNorm(torch.autograd.Function):
    """LayerNorm in half precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, kernels: ModuleType) -> Tensor:
        """Return y."""
        rows = x.contiguous().view(-1, x.shape[-1])
        y = torch.empty_like(rows)
        means, spreads = kernels.layer_norm(rows, weight, bias, eps, out=y)
        ctx.save_for_backward(rows, means, spreads, weight)
        ctx.kernels = kernels
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight and bias."""
        x, *saved = ctx.saved_tensors
        dx = torch.empty_like(x)
        gradients = ctx.kernels.layer_norm_gradients(x, dy.contiguous().view(x.shape), *saved, out=dx)
        return dx.view(dy.shape), *gradients, None, None


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
    warnings.warn(f"norms run in plain torch, as their Triton kernels fail on cuda:{index}: {reason}", stacklevel=2)
    return torch_kernels


def failure(kernels: ModuleType, device: torch.device) -> str | None:
    """Say what is wrong with kernels on a device, compared with PyTorch's in float64; None if nothing is."""
    for width, groups, side, silu in ((96, 32, 17, True), (48, 8, 5, False), (320, 32, 70, True)):
        ours = partial(half_group_norm, groups=groups, eps=1e-5, silu=silu, kernels=kernels)
        theirs = partial(_group_norm, groups=groups, silu=silu)
        if wrong := _difference(theirs, ours, (2, width, side, side), width, device):
            return wrong
    for width, rows in ((96, 130), (320, 9000)) if hasattr(kernels, "layer_norm") else ():
        ours = partial(half_layer_norm, eps=1e-5, kernels=kernels)
        if wrong := _difference(_layer_norm, ours, (rows, width), width, device):
            return wrong
    return None


def _group_norm(x: Tensor, weight: Tensor, bias: Tensor, *, groups: int, silu: bool) -> Tensor:
    y = F.group_norm(x, groups, weight, bias, 1e-5)
    return F.silu(y) if silu else y


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


def _difference(
    exact: Callable[..., Tensor], ours: Callable[..., Tensor], shape: tuple[int, ...], width: int, device: torch.device
) -> str | None:
    """Compare results and gradients on random numbers in bfloat16 with those in float64."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator) for _ in range(2))
    weight, bias = (torch.randn(width, generator=generator) for _ in range(2))
    inputs = [each.to(device).requires_grad_() for each in ((x + 1).bfloat16(), weight, bias)]
    doubles, upstream = [each.detach().double().requires_grad_() for each in inputs], dy.to(device, torch.bfloat16)
    y = exact(*doubles)
    expected = (y, *torch.autograd.grad(y, doubles, upstream.double()))
    try:
        found = ours(*inputs)
        results = (found, *torch.autograd.grad(found, inputs, upstream))
    except Exception as raised:  # whatever a compiler or driver raises
        return f"{type(raised).__name__}: {str(raised)[:200]}"
    names = ("result", "gradient", "weight gradient", "bias gradient")
    for name, one, other in zip(names, results, expected, strict=True):
        error = float((one.double() - other).detach().abs().max() / other.detach().abs().max())
        if not error <= 0.01:  # bfloat16 rounds to 0.004
            return f"the {name} of {width} channels is wrong by {error:.2g} of the largest value"
    return None


def _pixels(x: Tensor) -> Tensor:
    """View (B, C, H, W) in channels-last memory as (B, N, C)."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)
