"""Generative adversarial network: a generator that a discriminator cannot tell from the data. There is no p(x)."""

import torch
import torch.nn.functional as F
from pictures import to_levels, to_pixels
from torch import Tensor, nn

R1_EVERY, R1_WEIGHT = 4, 1.0  # Mescheder et al. 2018, arXiv 1801.04406; applied lazily (Karras et al. 2020)


def generator(latent: int) -> nn.Sequential:
    """Return a network from z to pixels (B, 3, 16, 16)."""
    return nn.Sequential(
        nn.Linear(latent, 2048), nn.Unflatten(1, (128, 4, 4)), nn.BatchNorm2d(128), nn.ReLU(),
        nn.Conv2d(128, 176, 3, padding=1), nn.BatchNorm2d(176), nn.ReLU(),
        nn.Upsample(scale_factor=2), nn.Conv2d(176, 88, 3, padding=1), nn.BatchNorm2d(88), nn.ReLU(),
        nn.Upsample(scale_factor=2), nn.Conv2d(88, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 3, 3, padding=1), nn.Tanh(),
    )  # fmt: skip


def discriminator() -> nn.Sequential:
    """Return a network from pixels to a score."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(32, 96, 4, 2, padding=1), nn.LeakyReLU(0.2),
        nn.Conv2d(96, 256, 4, 2, padding=1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(4096, 1),
    )  # fmt: skip


class Adversarial(nn.Module):
    """A GAN with the hinge loss (arXiv 1705.02894) and R1 regularization."""

    def __init__(self, latent: int = 64) -> None:
        super().__init__()
        self.latent = latent
        self.generator, self.discriminator = generator(latent), discriminator()

    def discriminator_loss(self, x: Tensor, step: int) -> Tensor:
        """Return the hinge loss of telling x from drawn pictures, now and then with the penalty on its slope at x."""
        real = to_pixels(x).requires_grad_(step % R1_EVERY == 0)
        with torch.no_grad():
            fake = self.generator(torch.randn(len(x), self.latent))
        score = self.discriminator(real)
        loss = F.relu(1 - score).mean() + F.relu(1 + self.discriminator(fake)).mean()
        if real.requires_grad:
            (slope,) = torch.autograd.grad(score.sum(), real, create_graph=True)
            loss = loss + R1_EVERY * R1_WEIGHT / 2 * slope.square().flatten(1).sum(1).mean()
        return loss

    def generator_loss(self, count: int) -> Tensor:
        """Return minus the mean score of drawn pictures."""
        return -self.discriminator(self.generator(torch.randn(count, self.latent))).mean()

    @torch.no_grad()
    def from_code(self, z: Tensor) -> Tensor:
        """Return the pictures of z as levels."""
        return to_levels(self.generator(z))

    def new_code(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw z from the prior."""
        return torch.randn(count, self.latent, generator=generator)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw pictures."""
        return self.from_code(self.new_code(count, generator))
