"""The PatchGAN discriminator of VAE training, and the adversarial losses."""

import math
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentdiff.errors import LatentDiffError, check_choice

Adversarial = Literal["hinge", "nonsaturating"]


class Discriminator(nn.Module):
    """PatchGAN discriminator: one logit per overlapping patch, positive for real images.

    Isola et al., arXiv 1611.07004, appendix 6.1.2; LDM's NLayerDiscriminator. `num_layers` strided 4x4 convolutions are
    followed by two of stride 1; widths double from `width` up to 8 * `width`. The receptive field of three layers is
    70 x 70 pixels. GroupNorm replaces the paper's BatchNorm, so that the logits of an image depend neither on the rest
    of the batch nor on the number of processes. Images must be at least 3 * 2 ** num_layers pixels a side.
    """

    def __init__(self, width: int = 64, num_layers: int = 3, norm_groups: int = 32) -> None:
        super().__init__()
        self.min_size = 3 * 2**num_layers  # the last two convolutions each shrink the map by one
        widths = [width * min(2**i, 8) for i in range(num_layers + 1)]
        strides = [2] * (num_layers - 1) + [1]
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for before, after, stride in zip(widths, widths[1:], strides, strict=False):
            layers += [
                nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=False),  # GroupNorm has a bias
                nn.GroupNorm(math.gcd(norm_groups, after), after),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        self._initialize()
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels (B, 3, H, W) in [-1, 1] to logits (B, 1, h, w), where h is floor(H / 2 ** num_layers) - 2."""
        if pixels.dim() != 4 or pixels.shape[1] != 3 or min(pixels.shape[2:]) < self.min_size:
            raise LatentDiffError(
                f"pixels have shape {tuple(pixels.shape)}; the discriminator expects (B, 3, H, W) "
                f"with at least {self.min_size} pixels a side; smaller images need fewer layers"
            )
        return self.layers(pixels.to(memory_format=torch.channels_last))

    def _initialize(self) -> None:
        """Initialize weights from N(0, 0.02^2) (arXiv 1611.07004, section 6.2) and biases to 0."""
        for conv in self._convolutions():
            nn.init.normal_(conv.weight, std=0.02)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    def _convolutions(self) -> Iterator[nn.Conv2d]:
        return (layer for layer in self.layers if isinstance(layer, nn.Conv2d))


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, kind: Adversarial = "hinge") -> Tensor:
    """Compute the discriminator's loss, (): half the sum of its mean losses on real and on reconstructed images.

    hinge: max(0, 1 - real) and max(0, 1 + fake) (arXiv 1705.02894). nonsaturating: -log sigmoid(real) and
    -log(1 - sigmoid(fake)) (arXiv 1406.2661).
    """
    check_choice("adversarial loss", kind, ("hinge", "nonsaturating"))
    if kind == "hinge":
        return 0.5 * (F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean())
    return 0.5 * (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean())


def generator_loss(fake_logits: Tensor, kind: Adversarial = "hinge") -> Tensor:
    """Compute the autoencoder's adversarial loss, (): -mean(fake) for hinge, else mean(-log sigmoid(fake)).

    LDM uses -mean(fake) with either discriminator loss.
    """
    check_choice("adversarial loss", kind, ("hinge", "nonsaturating"))
    return -fake_logits.mean() if kind == "hinge" else F.softplus(-fake_logits).mean()
