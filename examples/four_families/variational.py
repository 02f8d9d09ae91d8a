"""Variational autoencoder: p(x) = integral of p(x | z) p(z), bounded from below through an encoder q(z | x)."""

import math

import torch
import torch.nn.functional as F
from pictures import to_levels, to_pixels
from torch import Tensor, nn

HALF = 1 / 255  # half the width of a level, in pixels of [-1, 1]


def discretized_logistic(levels: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Return log of the mass that a logistic distribution has on each level 0 ... 255, the outer ones with the tails.

    sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b)), which loses no digits far from the mean.
    """
    value, scale = levels.to(mean.dtype) / 127.5 - 1, log_scale.exp()
    a = ((value - HALF - mean) / scale).masked_fill(levels == 0, -math.inf)
    b = ((value + HALF - mean) / scale).masked_fill(levels == 255, math.inf)
    return F.logsigmoid(b) + F.logsigmoid(-a) + (-torch.expm1(a - b)).log()


def encoder(latent: int) -> nn.Sequential:
    """Return a network from pixels (B, 3, 16, 16) to mean and log variance of z, (B, 2 latent)."""
    return nn.Sequential(
        nn.Conv2d(3, 48, 3, padding=1), nn.SiLU(), nn.Conv2d(48, 80, 3, 2, padding=1), nn.GroupNorm(8, 80), nn.SiLU(),
        nn.Conv2d(80, 112, 3, 2, padding=1), nn.GroupNorm(8, 112), nn.SiLU(), nn.Flatten(), nn.Linear(1792, 2 * latent),
    )  # fmt: skip


def decoder(latent: int) -> nn.Sequential:
    """Return a network from z to mean and log scale of every value, (B, 6, 16, 16)."""
    return nn.Sequential(
        nn.Linear(latent, 1792), nn.Unflatten(1, (112, 4, 4)), nn.SiLU(), nn.Conv2d(112, 112, 3, padding=1),
        nn.GroupNorm(8, 112), nn.SiLU(), nn.Upsample(scale_factor=2), nn.Conv2d(112, 96, 3, padding=1),
        nn.GroupNorm(8, 96), nn.SiLU(), nn.Upsample(scale_factor=2), nn.Conv2d(96, 64, 3, padding=1),
        nn.GroupNorm(8, 64), nn.SiLU(), nn.Conv2d(64, 6, 3, padding=1),
    )  # fmt: skip


class Variational(nn.Module):
    """A VAE with a discretized logistic decoder."""

    def __init__(self, latent: int = 96, networks: tuple[nn.Module, nn.Module] | None = None) -> None:
        super().__init__()
        self.latent = latent
        self.encoder, self.decoder = networks or (encoder(latent), decoder(latent))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of q(z | x), (B, latent)."""
        mean, log_var = self.encoder(to_pixels(x)).chunk(2, 1)
        return mean, (log_var.clamp(-12, 6) / 2).exp()

    def log_weight(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return log p(x | z) p(z) / q(z | x) at one z of q(z | x), (B,); its mean is at most log p(x)."""
        mean, std = self.encode(x)
        noise = torch.randn(mean.shape, generator=generator)
        z = mean + std * noise
        log_ratio = (0.5 * (noise.square() - z.square()) + std.log()).sum(1)
        center, log_scale = self.decoder(z).chunk(2, 1)
        return log_ratio + discretized_logistic(x, center, log_scale.clamp(-7, 3)).flatten(1).sum(1)

    def loss(self, x: Tensor) -> Tensor:
        """Return the negative bound per value, in nats."""
        return -self.log_weight(x).mean() / x[0].numel()

    @torch.no_grad()
    def log_prob(self, x: Tensor, generator: torch.Generator, samples: int = 64) -> tuple[Tensor, Tensor]:
        """Return two lower bounds on log p(x) in nats, (B,): the ELBO, and IWAE's with that many samples of z.

        Burda et al. 2016, arXiv 1509.00519, equation 8.
        """
        weights = torch.stack([self.log_weight(x, generator).double() for _ in range(samples)])
        return weights.mean(0), weights.logsumexp(0) - math.log(samples)

    @torch.no_grad()
    def from_code(self, z: Tensor) -> Tensor:
        """Return the decoder's means for z as levels."""
        return to_levels(self.decoder(z).chunk(2, 1)[0])

    @torch.no_grad()
    def to_code(self, x: Tensor) -> Tensor:
        """Return the mean of q(z | x)."""
        return self.encode(x)[0]

    def new_code(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw z from the prior."""
        return torch.randn(count, self.latent, generator=generator)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw pictures: the decoder's means, as usual, without the decoder's noise in every value."""
        return self.from_code(self.new_code(count, generator))
