"""`DiagonalGaussian`: the posterior over an image's latents that the encoder predicts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DiagonalGaussian:
    """Independent normal distributions, one per element.

    Densities and divergences are in nats and summed over all dimensions but the first: one value per image, (B,). They
    are computed in at least float32, whatever the dtype of the moments.
    """

    mean: Tensor  # (B, C, H, W)
    logvar: Tensor  # log-variance, same shape

    @classmethod
    def from_moments(cls, moments: Tensor) -> DiagonalGaussian:
        """Split moments (B, 2C, H, W) into means and log-variances, the latter clamped to [-30, 20] as in LDM."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30.0, 20.0))

    @property
    def std(self) -> Tensor:
        """Standard deviation, same shape as the mean."""
        return (0.5 * self.logvar).exp()

    def mode(self) -> Tensor:
        """Return the most probable value, which is the mean."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw a sample, differentiable in mean and logvar (Kingma & Welling, arXiv 1312.6114, section 2.4)."""
        noise = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        return self.reparameterize(noise)

    def reparameterize(self, noise: Tensor) -> Tensor:
        """Return mean + std * noise, a sample if `noise` is standard normal."""
        return self.mean + self.std * noise

    def kl(self, other: DiagonalGaussian | None = None) -> Tensor:
        """Return KL(self || other) in nats, (B,), by default to the standard normal (arXiv 1312.6114, appendix B)."""
        mean, logvar = _precise(self.mean), _precise(self.logvar)
        if other is None:
            terms = mean.square() + logvar.exp() - 1.0 - logvar
        else:
            other_mean, other_logvar = _precise(other.mean), _precise(other.logvar)
            difference = (mean - other_mean).square() + logvar.exp()
            terms = difference / other_logvar.exp() - 1.0 - logvar + other_logvar
        return 0.5 * terms.flatten(1).sum(1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of `value` in nats, (B,)."""
        mean, logvar = _precise(self.mean), _precise(self.logvar)
        terms = math.log(2.0 * math.pi) + logvar + (value - mean).square() / logvar.exp()
        return -0.5 * terms.flatten(1).sum(1)


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
