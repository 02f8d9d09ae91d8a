"""Building blocks of the UNet: ResBlocks conditioned on the timestep, down- and upsampling, and the levels they form.

Shapes: B batch, C channels, H W height and width. Attribute names match the tensor names in checkpoints.
"""

from collections.abc import Iterator, Sequence
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentdiff.norms import GroupNorm

from .attention import KeyValue, SpatialTransformer

Time = Tensor | Sequence[Tensor]  # embedding (B or 1, E), or its projection for each ResBlock, (B or 1, C)
Context = Tensor | Sequence[KeyValue]  # features (B, L, D), or the keys and values of each cross-attention


class ResBlock(nn.Module):
    """Two 3x3 convolutions after GroupNorm and SiLU, the timestep added in between (arXiv 2105.05233, as in LDM)."""

    def __init__(self, in_width: int, width: int, time_dim: int, *, norm_groups: int, norm_eps: float) -> None:
        super().__init__()
        self.index = 0  # position among the UNet's ResBlocks, set by UNet
        self.norm1 = GroupNorm(norm_groups, in_width, eps=norm_eps, silu=True)
        self.conv1 = nn.Conv2d(in_width, width, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, width)
        self.norm2 = GroupNorm(norm_groups, width, eps=norm_eps, silu=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_width, width, 1) if in_width != width else nn.Identity()

    def project(self, time: Tensor) -> Tensor:
        """Project a (B, E) time embedding to this block's channels, (B, C)."""
        return self.time_emb_proj(F.silu(time))

    def forward(self, x: Tensor, time: Time) -> Tensor:
        shift = self.project(time) if isinstance(time, Tensor) else time[self.index]
        h = self.conv1(self.norm1(x))
        h = h + shift[:, :, None, None]
        h = self.conv2(self.norm2(h))
        return self.conv_shortcut(x) + h


class Downsample(nn.Module):
    """Strided convolution that halves height and width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest-neighbor upsampling to the size of the level above, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        with torch.autocast("cuda", enabled=False):  # which would copy half precision as float32
            x = F.interpolate(x, size=size, mode="nearest")
        return self.conv(x)


class Level(nn.Module):
    """ResBlocks of one resolution, each optionally followed by a transformer; in the middle, only the first is."""

    def __init__(self, resnets: list[ResBlock], attentions: list[SpatialTransformer]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList()  # lists of zero or one, named as in checkpoints
        self.upsamplers = nn.ModuleList()

    def layers(self) -> Iterator[tuple[nn.Module, nn.Module | None]]:
        """Iterate over (ResBlock, transformer or None) in order."""
        return zip_longest(self.resnets, self.attentions)
