"""How the code of a set of pictures is distributed (`LatentStatistics`), and its normalisation inside the weights.

The code of a set is a mixture: a picture and a place are picked at random, then a value is drawn from the posterior
there. All its moments follow from the posteriors' means and variances, so nothing here is random.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from .distribution import DiagonalGaussian
from .errors import VAEError
from .model import VAE

# Rows of the table of sums, (6 + c, c), one column a channel. From SECOND on: the c x c sums of products.
PICTURES, VALUES, KL, FIRST, THIRD, FOURTH, SECOND = range(7)


class LatentStatistics:
    """Running statistics of c channels, in float64.

    Sums are taken about zero, so that those of several processes simply add up. The price is cancellation where the
    mean is large beside the standard deviation: the kurtosis is off by about 1e-14 (mean / std)^4, the others by less.

    Several processes: `LatentStatistics.from_state(accelerator.reduce(statistics.state(), "sum"))`, where `device` is
    one that the processes can reduce on.

    Args:
        channels: c.
        device: of the sums; one that computes in float64. Posteriors may lie elsewhere.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self._sums = torch.zeros(SECOND + channels, channels, dtype=torch.float64, device=device)

    @property
    def channels(self) -> int:
        """c."""
        return self._sums.shape[1]

    def add(self, posterior: DiagonalGaussian) -> None:
        """Take in the posteriors of a batch of pictures, (B, c, h, w); of raw code or of latents.

        Raises:
            VAEError: the number of channels is another.
        """
        shape = posterior.mean.shape
        if len(shape) != 4 or shape[1] != self.channels:
            raise VAEError(f"posterior has shape {tuple(shape)}; expected (B, {self.channels}, height, width)")
        mean, logvar = self._columns(posterior.mean), self._columns(posterior.logvar)
        square, var = mean.square(), logvar.exp()
        sums = torch.empty_like(self._sums)
        sums[PICTURES] = shape[0]
        sums[VALUES] = mean.shape[0]
        sums[KL] = 0.5 * (square + var - 1.0 - logvar).sum(0)
        # Moments about zero of N(mean, var): E z, E z^3, E z^4; E z_i z_j has the variance on its diagonal only.
        sums[FIRST] = mean.sum(0)
        sums[THIRD] = (mean * (square + 3.0 * var)).sum(0)
        sums[FOURTH] = (square.square() + 6.0 * square * var + 3.0 * var.square()).sum(0)
        sums[SECOND:] = mean.T @ mean + var.sum(0).diag()
        self._sums += sums

    def state(self) -> Tensor:
        """All sums, (6 + c, c) float64: the states of disjoint sets of pictures add up to that of their union."""
        return self._sums.clone()

    @classmethod
    def from_state(cls, state: Tensor) -> LatentStatistics:
        """The statistics of such a tensor, or of the sum of several.

        Raises:
            VAEError: it is not such a tensor.
        """
        if state.dim() != 2 or state.shape[0] != SECOND + state.shape[1] or state.dtype != torch.float64:
            raise VAEError(f"state is {state.dtype} {tuple(state.shape)}; expected torch.float64 (c + {SECOND}, c)")
        statistics = cls(state.shape[1], state.device)
        statistics.merge(state)
        return statistics

    def merge(self, state: Tensor) -> None:
        """Take in what another object has seen, by its `state()`."""
        self._sums += state.to(self._sums.device)

    @property
    def num_pictures(self) -> int:
        """Pictures taken in so far."""
        return int(self._sums[PICTURES, 0])

    @property
    def mean(self) -> Tensor:
        """Mean of each channel, (c,).

        Raises:
            VAEError: as all that follow, no picture was added yet.
        """
        return self._average(FIRST)

    @property
    def covariance(self) -> Tensor:
        """Covariance of the channels at one place, (c, c)."""
        return self._second_moments() - torch.outer(self.mean, self.mean)

    @property
    def std(self) -> Tensor:
        """Standard deviation of each channel, (c,): the variance is E[sigma^2] + Var[mu] (law of total variance)."""
        return self.covariance.diagonal().clamp(min=0.0).sqrt()  # rounding may leave a variance of nothing below 0

    @property
    def correlation(self) -> Tensor:
        """Correlation of the channels at one place, (c, c), ones on the diagonal."""
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
        """KL(posterior || standard normal) of each channel in nats per picture, (c,); about 0: the channel is dead."""
        self._check_not_empty()
        return self._sums[KL] / self._sums[PICTURES]

    @property
    def kl(self) -> float:
        """KL(posterior || standard normal) in nats per picture."""
        return float(self.kl_per_channel.sum())

    @property
    def bits_per_dimension(self) -> float:
        """The same KL in bits per element of the code."""
        return float(self._average(KL).mean()) / math.log(2.0)

    def _columns(self, x: Tensor) -> Tensor:
        """(B, c, h, w) -> (B*h*w, c) in float64. Moved first: not every device computes in float64."""
        return x.detach().to(self._sums.device).double().movedim(1, -1).flatten(0, -2)

    def _average(self, row: int) -> Tensor:
        self._check_not_empty()
        return self._sums[row] / self._sums[VALUES]

    def _second_moments(self) -> Tensor:
        """E[z_i z_j], (c, c)."""
        self._check_not_empty()
        return self._sums[SECOND:] / self._sums[VALUES]

    def _check_not_empty(self) -> None:
        if not self.num_pictures:
            raise VAEError("no statistics of the code: no picture was added")


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
