"""A set of pictures as a model sees them: read once, the broken ones left out, turned into features to compare."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vae import VAE
from vae.normalize import LatentStatistics

from ..data.cache import pictures_at_a_time, read_pixels
from ..data.pictures import PictureError, to_pixels
from ..data.sources import Source
from ..errors import LatentDiffError
from ..sections import DataConfig
from .metrics import psnr, ssim

THUMBNAIL = 32  # pixels a side
LATENTS, RGB = "latents", f"{THUMBNAIL}x{THUMBNAIL} RGB"

Pictures = Iterator[tuple[int, NDArray[np.uint8]]]  # places, and uint8 (H, W, 3)


@dataclass(frozen=True)
class Gallery:
    """Some pictures' features."""

    places: list[int]  # in the source; twice where a picture is there in the mirror, too
    latents: Tensor  # (N, c, h, w) float32 on the CPU, the posterior's mode, scaled
    thumbnails: Tensor  # (N, 3, 32, 32) in [-1, 1]
    statistics: LatentStatistics
    quality: Tensor  # (2, N): PSNR in dB and SSIM of the reconstructions; (2, 0) where none were asked for

    def features(self) -> dict[str, Tensor]:
        """(N, D) each."""
        return {LATENTS: self.latents.flatten(1), RGB: self.thumbnails.flatten(1)}


def readable(source: Source, data: DataConfig, most: int, broken: list[str], *, flip: bool = False) -> Pictures:
    """At most so many pictures, spread over the source; the names of those that cannot be read go to `broken`.

    Args:
        source: the pictures.
        data: how they become pixels.
        most: pictures that are read.
        broken: is added to.
        flip: give each in the mirror, too, at the same place.
    """
    places = np.unique(np.linspace(0, len(source) - 1, min(most, len(source))).round().astype(int))
    for place in places.tolist():
        try:
            picture = read_pixels(source, place, data)
        except PictureError:
            broken.append(source.name(place))
            continue
        yield place, picture
        if flip:
            yield place, picture[:, ::-1]


@torch.no_grad()
def embed(vae: VAE, pictures: Pictures, image_size: int, *, reconstruct: bool = False) -> Gallery:
    """Encode pictures, and decode them again where their quality is wanted.

    Raises:
        LatentDiffError: there are none, or the VAE gives numbers that are not finite.
    """
    weights = next(vae.parameters())
    statistics = LatentStatistics(vae.config.latent_channels)
    places: list[int] = []
    latents, thumbnails, quality = [], [], [torch.zeros(2, 0, dtype=torch.float64)]
    while batch := list(islice(pictures, pictures_at_a_time(image_size))):
        places += [place for place, _ in batch]
        pixels = to_pixels(torch.from_numpy(np.stack([picture for _, picture in batch])))
        posterior = vae.latent_posterior(pixels.to(weights))
        statistics.add(posterior)
        latents.append(posterior.mode().float().cpu())
        thumbnails.append(F.interpolate(pixels, size=(THUMBNAIL, THUMBNAIL), mode="area"))
        if reconstruct:
            again = vae.decode(posterior.mode().to(weights.dtype)).float().cpu()
            quality.append(torch.stack([psnr(pixels, again), ssim(pixels, again)]))
    if not places:
        raise LatentDiffError("no picture can be read")
    gallery = Gallery(places, torch.cat(latents), torch.cat(thumbnails), statistics, torch.cat(quality, 1))
    if not bool(gallery.latents.isfinite().all()):
        raise LatentDiffError("the VAE's latents are not finite; float32 (--precision fp32) may help")
    return gallery
