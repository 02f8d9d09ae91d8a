"""`LatentStatistics`: mean, spread and shape of the code over a set of pictures, without drawing from the posteriors.

The code of a set is a mixture: a picture and a place are picked at random, then a value is drawn from the posterior
there. All its moments follow from the posteriors' means and variances, so nothing here is random.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .distribution import DiagonalGaussian
from .errors import VAEError

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
