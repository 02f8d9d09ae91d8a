"""Pictures as a model sees them: encoded to features that can be compared, skipping broken ones."""

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

from ..data.cache import encode_batch_size, read_pixels
from ..data.pictures import PictureError, to_images, to_pixels
from ..data.sources import Source
from ..device import without_tf32
from ..errors import LatentDiffError
from ..sections import DataConfig
from .metrics import psnr, ssim
from .networks import FeatureNetwork

THUMBNAIL = 32  # pixels per side
GRID = 4  # blocks of latents per side whose means and deviations are compared
LATENTS, RGB = "latents", f"{THUMBNAIL}x{THUMBNAIL} RGB"

Pictures = Iterator[tuple[int, NDArray[np.uint8]]]  # index in the source, and uint8 (H, W, 3)


@dataclass(frozen=True)
class Gallery:
    """Features of some pictures, and the quality of their reconstructions."""

    indices: list[int]  # in the source; listed twice if the mirrored picture is included
    latents: Tensor  # (N, c, h, w) float32 on the CPU: scaled mode of the posterior
    thumbnails: Tensor  # (N, 3, 32, 32) in [-1, 1]
    statistics: LatentStatistics
    quality: Tensor  # (3, N): PSNR in dB, SSIM and latent difference of the reconstructions; (3, 0) if there are none
    network: dict[str, Tensor]  # (N, D), by the network's name; empty without one
    reconstructed: dict[str, Tensor]  # `pooled()` of the reconstructions; empty if there are none

    def features(self) -> dict[str, Tensor]:
        """Return the flattened features that single pictures are compared by, (N, D) each, by name."""
        return {LATENTS: self.latents.flatten(1), RGB: self.thumbnails.flatten(1), **self.network}

    def pooled(self) -> dict[str, Tensor]:
        """Return the features that sets of pictures are compared by, (N, D) each, by name."""
        return {LATENTS: pool(self.latents), **self.network}


def root_mean_square(latents: Tensor) -> Tensor:
    """Return the root mean square of each of some latents (N, c, h, w), (N,) float64."""
    return latents.double().square().flatten(1).mean(1).sqrt()


def pool(latents: Tensor) -> Tensor:
    """Return mean and standard deviation of each channel in 4 x 4 blocks of latents (N, c, h, w): (N, 32 c).

    The means say what is where, the deviations how much detail there is. All 4,096 values of a picture of 256 px would
    be too many: covariances need more pictures than features, and distances between them are all alike.
    """
    size = (min(GRID, latents.shape[2]), min(GRID, latents.shape[3]))
    mean, square = (F.adaptive_avg_pool2d(each, size) for each in (latents.double(), latents.double().square()))
    return torch.cat([mean, (square - mean.square()).clamp(min=0.0).sqrt()], 1).flatten(1)


def read_pictures(source: Source, data: DataConfig, limit: int, broken: list[str], *, flip: bool = False) -> Pictures:
    """Yield up to `limit` pictures spread evenly over the source, with `flip` each of them also mirrored.

    The names of pictures that cannot be read are appended to `broken`.
    """
    indices = np.unique(np.linspace(0, len(source) - 1, min(limit, len(source))).round().astype(int))
    for index in indices.tolist():
        try:
            picture = read_pixels(source, index, data)
        except PictureError:
            broken.append(source.name(index))
            continue
        yield index, picture
        if flip:
            yield index, picture[:, ::-1]


@torch.no_grad()
@without_tf32()
def embed(
    vae: VAE, pictures: Pictures, image_size: int, network: FeatureNetwork | None = None, *, reconstruct: bool = False
) -> Gallery:
    """Encode pictures, and with `reconstruct` decode them again to measure the quality of the reconstructions."""
    weights = next(vae.parameters())
    statistics = LatentStatistics(vae.config.latent_channels)
    indices: list[int] = []
    latents, thumbnails, quality = [], [], [torch.zeros(3, 0, dtype=torch.float64)]
    seen: list[Tensor] = []
    again: dict[str, list[Tensor]] = {}
    while batch := list(islice(pictures, encode_batch_size(image_size))):
        indices += [index for index, _ in batch]
        pixels = to_pixels(torch.from_numpy(np.stack([picture for _, picture in batch])))
        posterior = vae.latent_posterior(pixels.to(weights))
        statistics.add(posterior)
        latents.append(posterior.mode().float().cpu())
        thumbnails.append(F.interpolate(pixels, size=(THUMBNAIL, THUMBNAIL), mode="area"))
        if network is not None:
            seen.append(network.images([picture for _, picture in batch]))
        if reconstruct:
            decoded = vae.decode(posterior.mode().to(weights.dtype)).float().cpu()
            images = [np.asarray(image) for image in to_images(decoded)]
            shown = to_pixels(torch.from_numpy(np.stack(images))).to(weights)
            encoded = vae.latent_posterior(shown).mode().float().cpu()
            again.setdefault(LATENTS, []).append(pool(encoded))
            quality.append(
                torch.stack([psnr(pixels, decoded), ssim(pixels, decoded), root_mean_square(encoded - latents[-1])])
            )
            if network is not None:
                again.setdefault(network.name, []).append(network.images(images))
    if not indices:
        raise LatentDiffError("none of the pictures can be read")
    gallery = Gallery(indices, torch.cat(latents), torch.cat(thumbnails), statistics, torch.cat(quality, 1),
                      {} if network is None else {network.name: torch.cat(seen)},
                      {name: torch.cat(parts) for name, parts in again.items()})  # fmt: skip
    if not bool(gallery.latents.isfinite().all()):
        raise LatentDiffError("the VAE's latents are not finite; float32 (--precision fp32) may help")
    return gallery
