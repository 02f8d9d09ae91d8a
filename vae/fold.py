"""`fold_statistics`: write the latents' normalisation into the VAE's weights, channel by channel."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from .errors import VAEError
from .model import VAE


def fold_statistics(vae: VAE, mean: Tensor, std: Tensor) -> None:
    """Change the weights so that each channel of the raw code has mean 0 and standard deviation 1. In place.

    The raw code z of the changed VAE is (z - mean) / std of the former one, posterior and all, and what it decodes to
    is the same to rounding. Its config says scale_factor 1 and shift_factor 0, whatever it said before: latents are
    the raw code, also for programs that know one scale for all channels and no shift. (LDM, arXiv 2112.10752,
    appendix G, divides by one standard deviation for all channels.)

    The log-variances fall by 2 log std. Those that `DiagonalGaussian.from_moments` clamps to [-30, 20], before or
    after, are the exception to "the same": a standard deviation below 3e-7 or above 2e4 is clamped at another value.

    A VAE without one of its two 1x1 convolutions gets one scale for all channels instead, in its config:
    1 / sqrt(mean(std^2)), and no shift. Its next layers are 3x3 convolutions padded with zeros, and a shift folded into
    those would be wrong along the edges.

    Args:
        vae: changed in place, in whatever dtype it has; computed in float64.
        mean: (c,) of the raw code, a draw from the posterior, over the training set: `LatentStatistics.mean`.
        std: (c,), `LatentStatistics.std`; positive.

    Raises:
        VAEError: `mean` or `std` has another shape, is not finite, or `std` is not positive. Nothing was changed.
    """
    channels = vae.config.latent_channels
    for name, value in (("mean", mean), ("std", std)):
        if value.shape != (channels,) or not value.isfinite().all():
            raise VAEError(f"{name} is {value.tolist()}; expected {channels} finite numbers, one a channel")
    if not (std > 0.0).all():
        raise VAEError(f"std is {std.tolist()}; a channel that never varies cannot be scaled to 1")
    if isinstance(vae.quant_conv, nn.Conv2d) and isinstance(vae.post_quant_conv, nn.Conv2d):
        _fold_forward(vae.quant_conv, mean, std)
        _fold_inverse(vae.post_quant_conv, mean, std)
        scale = 1.0
    else:
        scale = 1.0 / math.sqrt(float(std.double().square().mean()))
    vae.config = replace(vae.config, scale_factor=scale, shift_factor=0.0)


def _fold_forward(conv: nn.Conv2d, mean: Tensor, std: Tensor) -> None:
    """moments -> ((means - mean) / std, log-variances - 2 log std)."""
    weight, bias, mean, std = _in_float64(conv, mean, std)
    means, logvars = slice(None, len(mean)), slice(len(mean), None)
    weight[means] /= std[:, None, None, None]
    bias[means] = (bias[means] - mean) / std
    bias[logvars] -= 2.0 * std.log()
    _write(conv, weight, bias)


def _fold_inverse(conv: nn.Conv2d, mean: Tensor, std: Tensor) -> None:
    """conv(std * z + mean) as one convolution of z."""
    weight, bias, mean, std = _in_float64(conv, mean, std)
    bias += weight[:, :, 0, 0] @ mean
    weight *= std[:, None, None]
    _write(conv, weight, bias)


def _in_float64(conv: nn.Conv2d, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight, bias, mean and std as copies, on the CPU because not every device computes in float64."""
    assert conv.bias is not None
    weight, bias, mean, std = (x.detach().to("cpu", copy=True).double() for x in (conv.weight, conv.bias, mean, std))
    return weight, bias, mean, std


def _write(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    """Into the parameters that exist, so that optimizers and hooks that hold them see the change."""
    assert conv.bias is not None
    with torch.no_grad():
        conv.weight.copy_(weight)
        conv.bias.copy_(bias)
