"""Statistics of z, the VAE's unscaled latents, over a set of images, and how to fold them into its weights.

Over a set of images z is a mixture: pick an image and a position at random, then sample the posterior there. All its
moments follow from the posteriors' means and variances, so nothing here is random.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from .distribution import DiagonalGaussian
from .errors import VAEError
from .model import VAE

# Rows of the table of sums, (6 + c, c), with one column per channel. From SECOND on: the c x c sums of products.
IMAGES, VALUES, KL, FIRST, THIRD, FOURTH, SECOND = range(7)


class LatentStatistics:
    """Running statistics of z (or of latents) with c channels, in float64.

    Moments are taken about the origin, so that the sums of several processes simply add up:
    `LatentStatistics.from_state(accelerator.reduce(statistics.state(), "sum"))`. The price is cancellation if the mean
    is large relative to the standard deviation: the kurtosis is off by about 1e-14 (mean / std)^4, the rest by less.

    Args:
        channels: number of channels c.
        device: of the sums; it must support float64, and `reduce` if used. Posteriors may be elsewhere.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self._sums = torch.zeros(SECOND + channels, channels, dtype=torch.float64, device=device)

    @property
    def channels(self) -> int:
        """Number of channels c."""
        return self._sums.shape[1]

    def add(self, posterior: DiagonalGaussian) -> None:
        """Add the posteriors of a batch of images, (B, c, h, w); raise VAEError if the number of channels differs."""
        shape = posterior.mean.shape
        if len(shape) != 4 or shape[1] != self.channels:
            raise VAEError(f"posterior has shape {tuple(shape)}; expected (B, {self.channels}, height, width)")
        mean, logvar = self._columns(posterior.mean), self._columns(posterior.logvar)
        square, var = mean.square(), logvar.exp()
        sums = torch.empty_like(self._sums)
        sums[IMAGES] = shape[0]
        sums[VALUES] = mean.shape[0]
        sums[KL] = 0.5 * (square + var - 1.0 - logvar).sum(0)
        # Moments about zero of N(mean, var): E z, E z^3, E z^4; E z_i z_j has the variance on its diagonal only.
        sums[FIRST] = mean.sum(0)
        sums[THIRD] = (mean * (square + 3.0 * var)).sum(0)
        sums[FOURTH] = (square.square() + 6.0 * square * var + 3.0 * var.square()).sum(0)
        sums[SECOND:] = mean.T @ mean + var.sum(0).diag()
        self._sums += sums

    def state(self) -> Tensor:
        """Return all sums, (6 + c, c) float64; the states of disjoint sets of images add up to that of their union."""
        return self._sums.clone()

    @classmethod
    def from_state(cls, state: Tensor) -> LatentStatistics:
        """Create statistics from a `state()` or a sum of several; raise VAEError if the shape or dtype is wrong."""
        if state.dim() != 2 or state.shape[0] != SECOND + state.shape[1] or state.dtype != torch.float64:
            raise VAEError(f"state is {state.dtype} {tuple(state.shape)}; expected torch.float64 (c + {SECOND}, c)")
        statistics = cls(state.shape[1], state.device)
        statistics.merge(state)
        return statistics

    def merge(self, state: Tensor) -> None:
        """Add the `state()` of other statistics."""
        self._sums += state.to(self._sums.device)

    @property
    def num_pictures(self) -> int:
        """Number of images added so far."""
        return int(self._sums[IMAGES, 0])

    @property
    def mean(self) -> Tensor:
        """Mean of each channel, (c,); like all properties below, raises VAEError if no image was added."""
        return self._average(FIRST)

    @property
    def covariance(self) -> Tensor:
        """Covariance of the channels at one position, (c, c)."""
        return self._second_moments() - torch.outer(self.mean, self.mean)

    @property
    def std(self) -> Tensor:
        """Standard deviation of each channel, (c,): the variance is E[sigma^2] + Var[mu] (law of total variance)."""
        return self.covariance.diagonal().clamp(min=0.0).sqrt()  # rounding can make a zero variance negative

    @property
    def correlation(self) -> Tensor:
        """Correlation of the channels at one position, (c, c), with ones on the diagonal."""
        return self.covariance / torch.outer(self.std, self.std)

    @property
    def skewness(self) -> Tensor:
        """E[(z - m)^3] / s^3 of each channel, (c,); 0 for a Gaussian."""
        mean, second, third = self.mean, self._second_moments().diagonal(), self._average(THIRD)
        return (third - 3.0 * mean * second + 2.0 * mean**3) / self.std**3

    @property
    def excess_kurtosis(self) -> Tensor:
        """E[(z - m)^4] / s^4 - 3 of each channel, (c,); 0 for a Gaussian."""
        mean, second, third = self.mean, self._second_moments().diagonal(), self._average(THIRD)
        central = self._average(FOURTH) - 4.0 * mean * third + 6.0 * mean**2 * second - 3.0 * mean**4
        return central / self.std**4 - 3.0

    @property
    def kl_per_channel(self) -> Tensor:
        """KL(posterior || standard normal) of each channel in nats per image, (c,); near 0 for a dead channel."""
        self._check_not_empty()
        return self._sums[KL] / self._sums[IMAGES]

    @property
    def kl(self) -> float:
        """KL(posterior || standard normal) in nats per image."""
        return float(self.kl_per_channel.sum())

    @property
    def bits_per_dimension(self) -> float:
        """The same KL in bits per element of z."""
        return float(self._average(KL).mean()) / math.log(2.0)

    def _columns(self, x: Tensor) -> Tensor:
        # (B*h*w, c) in float64; moved first, because not every device supports float64.
        return x.detach().to(self._sums.device).double().movedim(1, -1).flatten(0, -2)

    def _average(self, row: int) -> Tensor:
        self._check_not_empty()
        return self._sums[row] / self._sums[VALUES]

    def _second_moments(self) -> Tensor:
        self._check_not_empty()
        return self._sums[SECOND:] / self._sums[VALUES]  # E[z_i z_j], (c, c)

    def _check_not_empty(self) -> None:
        if not self.num_pictures:
            raise VAEError("the latent statistics are empty: no image was added")


def fold_statistics(vae: VAE, mean: Tensor, std: Tensor) -> None:
    """Normalize each channel of z to mean 0 and standard deviation 1 by changing the VAE's weights in place.

    The new z and its posterior are (z - mean) / std of the old ones, and decode to the same pixels up to rounding. The
    config gets scale_factor 1 and shift_factor 0, so that latents equal z, also in programs that support only a single
    scale and no shift. (LDM, arXiv 2112.10752, appendix G, divides all channels by a single standard deviation.)

    Log-variances fall by 2 log std, except where `DiagonalGaussian.from_moments` clamps them to [-30, 20] before or
    after: at standard deviations below 3e-7 or above 2e4.

    A VAE that lacks either 1x1 convolution (`quant_convs`) gets a single scale_factor 1 / sqrt(mean(std^2)) instead and
    no shift: its next convolutions are zero-padded, and a shift folded into them would be wrong at the borders.

    Args:
        vae: changed in place, of any dtype; the computation is in float64.
        mean: (c,), of posterior samples z over the training set: `LatentStatistics.mean`.
        std: (c,), positive, of the same samples: `LatentStatistics.std`.

    Raises:
        VAEError: `mean` or `std` has the wrong shape or is not finite, or `std` is not positive; the VAE is unchanged.
    """
    channels = vae.config.latent_channels
    for name, value in (("mean", mean), ("std", std)):
        if value.shape != (channels,) or not value.isfinite().all():
            raise VAEError(f"{name} is {value.tolist()}; expected {channels} finite numbers, one per channel")
    if not (std > 0.0).all():
        raise VAEError(f"std is {std.tolist()}; expected positive numbers: a constant channel cannot be normalized")
    if isinstance(vae.quant_conv, nn.Conv2d) and isinstance(vae.post_quant_conv, nn.Conv2d):
        _fold_forward(vae.quant_conv, mean, std)
        _fold_inverse(vae.post_quant_conv, mean, std)
        scale = 1.0
    else:
        scale = 1.0 / math.sqrt(float(std.double().square().mean()))
    vae.config = replace(vae.config, scale_factor=scale, shift_factor=0.0)


def _fold_forward(conv: nn.Conv2d, mean: Tensor, std: Tensor) -> None:
    # New moments: (means - mean) / std, log-variances - 2 log std.
    weight, bias, mean, std = _in_float64(conv, mean, std)
    means, logvars = slice(None, len(mean)), slice(len(mean), None)
    weight[means] /= std[:, None, None, None]
    bias[means] = (bias[means] - mean) / std
    bias[logvars] -= 2.0 * std.log()
    _write(conv, weight, bias)


def _fold_inverse(conv: nn.Conv2d, mean: Tensor, std: Tensor) -> None:
    # conv(std * z + mean) as a single convolution of z.
    weight, bias, mean, std = _in_float64(conv, mean, std)
    bias += weight[:, :, 0, 0] @ mean
    weight *= std[:, None, None]
    _write(conv, weight, bias)


def _in_float64(conv: nn.Conv2d, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # On the CPU, because not every device supports float64.
    assert conv.bias is not None
    weight, bias, mean, std = (x.detach().to("cpu", copy=True).double() for x in (conv.weight, conv.bias, mean, std))
    return weight, bias, mean, std


def _write(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    # Into the existing parameters, so that optimizers and hooks that hold them see the change.
    assert conv.bias is not None
    with torch.no_grad():
        conv.weight.copy_(weight)
        conv.bias.copy_(bias)
