"""A data distribution whose every marginal, denoiser and likelihood is known in closed form."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor


@dataclass
class Mixture:
    """Gaussians of D dimensions with diagonal covariance, float64."""

    weights: Tensor  # (K,)
    means: Tensor  # (K, D)
    stds: Tensor  # (K, D)

    def _components(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Log of weight times density of x (B, D) at a noise level, per component (B, K); the variances (K, D)."""
        var = alpha**2 * self.stds**2 + sigma**2
        terms = (x[:, None] - alpha * self.means) ** 2 / var + (2 * torch.pi * var).log()
        return self.weights.log() - 0.5 * terms.sum(-1), var

    def log_density(self, x: Tensor, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
        alpha, sigma = torch.as_tensor(alpha).double(), torch.as_tensor(sigma).double()
        return self._components(x, alpha, sigma)[0].logsumexp(1)

    def denoise(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """E[x0 | x_t = x]."""
        share, means, _ = self.posterior(x, alpha, sigma)
        return (share[..., None] * means).sum(1)

    def posterior(self, x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
        """x0 given x_t: each component's share (B, K), mean (B, K, D) and variance (K, D)."""
        alpha, sigma = torch.as_tensor(alpha).double(), torch.as_tensor(sigma).double()
        log_weights, var = self._components(x, alpha, sigma)
        gain = alpha * self.stds**2 / var
        return (
            log_weights.softmax(1),
            self.means + gain * (x[:, None] - alpha * self.means),
            self.stds**2 * sigma**2 / var,
        )

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], dtype=torch.float64, generator=generator)
        return self.means[which] + self.stds[which] * noise


@pytest.fixture
def mixture():
    """Mixture(weights, means, stds) from lists."""

    def make(weights: list, means: list, stds: list) -> Mixture:
        weights, means, stds = (torch.tensor(values, dtype=torch.float64) for values in (weights, means, stds))
        return Mixture(weights, means.view(len(weights), -1), stds.view(len(weights), -1))

    return make
