"""Building blocks of the encoder and decoder; attribute names match the tensor names in checkpoints."""

from collections.abc import Iterator
from itertools import chain, zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latentdiff.norms import GroupNorm

NORM_EPS = 1e-6  # epsilon of every GroupNorm in the KL autoencoder


class ResBlock(nn.Module):
    """Two 3x3 convolutions, each after GroupNorm and SiLU, with a residual connection."""

    def __init__(self, in_width: int, width: int, norm_groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(norm_groups, in_width, eps=NORM_EPS, silu=True)
        self.conv1 = nn.Conv2d(in_width, width, 3, padding=1)
        self.norm2 = GroupNorm(norm_groups, width, eps=NORM_EPS, silu=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_width, width, 1) if in_width != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.norm2(h))
        return self.conv_shortcut(x) + h


class Attention(nn.Module):
    """Single-head self-attention over all pixels, with a residual connection."""

    def __init__(self, width: int, norm_groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(norm_groups, width, eps=NORM_EPS)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])  # a list because checkpoints name it to_out.0

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).permute(0, 2, 3, 1).flatten(1, 2)[:, None]  # (B, 1, H*W, C), a view in channels-last
        h = self.to_out[0](F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h)))
        return x + h[:, 0].unflatten(1, x.shape[-2:]).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """Strided convolution that halves height and width, padded at the bottom and right only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbor upsampling by 2, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cuda", enabled=False):  # which would copy half precision as float32
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x)


class Level(nn.Module):
    """ResBlocks of one resolution, each optionally followed by attention, and then possibly down- or upsampling."""

    def __init__(self, resnets: list[ResBlock], attentions: list[Attention]) -> None:
        super().__init__()
        self.gradient_checkpointing = False  # recompute every layer in the backward pass
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList()  # lists of zero or one, named as in checkpoints
        self.upsamplers = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self._layers():
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)  # no layer is stochastic
            else:
                x = layer(x)
        return x

    def _layers(self) -> Iterator[nn.Module]:
        alternating = chain.from_iterable(zip_longest(self.resnets, self.attentions))
        return chain((layer for layer in alternating if layer is not None), self.downsamplers, self.upsamplers)
