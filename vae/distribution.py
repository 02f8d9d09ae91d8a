"""`DiagonalGaussian`: what the encoder says about a picture's code."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DiagonalGaussian:
    """Independent normal distributions, one an element.

    Densities and divergences are summed over all dimensions but the first, in nats: one number a picture, (B,). They
    are taken in float32 at least, whatever the dtype of the moments.
    """

    mean: Tensor  # (B, C, H, W)
    logvar: Tensor  # log of the variance, same shape

    @classmethod
    def from_moments(cls, moments: Tensor) -> DiagonalGaussian:
        """From (B, 2C, H, W): means, then log-variances, which are held within [-30, 20] as in LDM."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30.0, 20.0))

    @property
    def std(self) -> Tensor:
        """Standard deviation, shape of the mean."""
        return (0.5 * self.logvar).exp()

    def mode(self) -> Tensor:
        """The most probable value: the mean."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """A draw, differentiable in mean and log-variance (Kingma & Welling, arXiv 1312.6114, section 2.4)."""
        noise = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        return self.reparameterize(noise)

    def reparameterize(self, noise: Tensor) -> Tensor:
        """mean + std * noise: the draw that given standard normal noise makes."""
        return self.mean + self.std * noise

    def kl(self, other: DiagonalGaussian | None = None) -> Tensor:
        """KL(self || other), or to the standard normal where `other` is None: (B,) nats (arXiv 1312.6114, app. B)."""
        mean, logvar = _precise(self.mean), _precise(self.logvar)
        if other is None:
            terms = mean.square() + logvar.exp() - 1.0 - logvar
        else:
            other_mean, other_logvar = _precise(other.mean), _precise(other.logvar)
            difference = (mean - other_mean).square() + logvar.exp()
            terms = difference / other_logvar.exp() - 1.0 - logvar + other_logvar
        return 0.5 * terms.flatten(1).sum(1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of `value`: (B,) nats."""
        mean, logvar = _precise(self.mean), _precise(self.logvar)
        terms = math.log(2.0 * math.pi) + logvar + (value - mean).square() / logvar.exp()
        return -0.5 * terms.flatten(1).sum(1)


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
