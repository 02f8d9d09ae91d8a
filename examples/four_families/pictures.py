"""The data that all four families learn: the shipped emoji at 16x16, and what coding them takes without a model."""

import io
import math
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentdiff.config import load_config
from latentdiff.data.pictures import open_picture
from latentdiff.data.sources import open_source

SIZE = 16
DIMENSIONS = 3 * SIZE * SIZE


class Pictures(NamedTuple):
    """Levels 0 ... 255, int64, (N, 3, 16, 16)."""

    train: Tensor
    held_out: Tensor


def load() -> Pictures:
    """Return the shipped emoji, averaged over areas to 16x16."""
    data = load_config("demo").data
    splits = []
    for source in open_source(data):
        images = [open_picture(source.read(index), max_pixels=data.max_pixels, background=data.background)
                  for index in range(len(source))]  # fmt: skip
        small = [np.array(image.resize((SIZE, SIZE), Image.Resampling.BOX)) for image in images]
        splits.append(torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).long())
    return Pictures(*splits)


def to_pixels(levels: Tensor) -> Tensor:
    """Return levels as pixels in [-1, 1]."""
    return levels.float() / 127.5 - 1


def to_levels(pixels: Tensor) -> Tensor:
    """Return the nearest levels of pixels in [-1, 1]."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().long()


def histogram_bits(pictures: Pictures) -> float:
    """Return bits per dimension of the held-out levels under each channel's histogram, each level counted once more."""
    bits = 0.0
    for channel in range(3):
        counts = pictures.train[:, channel].flatten().bincount(minlength=256).double() + 1
        bits -= (counts / counts.sum()).log2()[pictures.held_out[:, channel]].mean().item() / 3
    return bits


def png_bits(levels: Tensor) -> float:
    """Return bits per dimension of one PNG file with all pictures below one another: its header hardly counts."""
    column = levels.permute(0, 2, 3, 1).reshape(-1, SIZE, 3).byte().numpy()
    file = io.BytesIO()
    Image.fromarray(column).save(file, "PNG", optimize=True)
    return 8 * len(file.getvalue()) / levels.numel()


def bits_per_dimension(nats: Tensor, dimensions: int = DIMENSIONS) -> float:
    """Return the mean of -log p, (N,) in nats, as bits per value."""
    return float(nats.mean()) / math.log(2) / dimensions
