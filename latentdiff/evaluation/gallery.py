"""Pictures as a model sees them: encoded to features that can be compared, skipping broken ones."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from vae import VAE
from vae.normalize import LatentStatistics

from .. import __version__
from ..data.cache import encode_batch_size, read_pixels, weights_digest
from ..data.pictures import PictureError, to_images, to_pixels
from ..data.shards import digest
from ..data.sources import Source
from ..device import without_tf32
from ..errors import LatentDiffError
from ..sections import DataConfig
from .kept import Compute, kept
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

    The names of pictures that cannot be read are appended to `broken`. Raises LatentDiffError if none can be.
    """
    problem, found = None, False
    indices = np.unique(np.linspace(0, len(source) - 1, min(limit, len(source))).round().astype(int))
    for index in tqdm(indices.tolist(), desc="reading", unit=" pictures", leave=False, disable=None):
        try:
            picture = read_pixels(source, index, data)
        except PictureError as error:
            broken.append(source.name(index))
            problem = error
            continue
        found = True
        yield index, picture
        if flip:
            yield index, picture[:, ::-1]
    if problem and not found:
        raise LatentDiffError(f"none of {len(indices)} pictures is usable; for example, {broken[-1]}: {problem}")


@torch.no_grad()
@without_tf32()
def embed(
    vae: VAE, pictures: Pictures, image_size: int, network: FeatureNetwork | None = None, *, reconstruct: bool = False,
    folder: Path | None = None,
) -> Gallery:  # fmt: skip
    """Encode pictures, and with `reconstruct` decode them again to measure the quality of the reconstructions.

    With a `folder`, what is computed of each batch is kept there. Raises LatentDiffError if no picture can be read, or
    latents are not finite.
    """
    compute: Compute = partial(_see, vae, network, reconstruct)
    if folder is not None:
        weights = next(vae.parameters())
        facts = {
            "vae": [weights_digest(vae), vae.config.to_diffusers(), str(weights.dtype), weights.device.type],
            "network": network and network.digest,
            "reconstruct": reconstruct,
            "versions": [__version__, torch.__version__],
        }
        compute = kept(compute, folder, digest(facts))
    indices, thumbnails, parts = list[int](), list[Tensor](), list[dict[str, Tensor]]()
    statistics = LatentStatistics(vae.config.latent_channels)
    while batch := list(islice(pictures, encode_batch_size(image_size))):
        indices += [index for index, _ in batch]
        levels = np.stack([picture for _, picture in batch])
        thumbnails.append(F.interpolate(to_pixels(torch.from_numpy(levels)), size=(THUMBNAIL, THUMBNAIL), mode="area"))
        parts.append(compute(levels))
        statistics.merge(parts[-1].pop("statistics"))
    if not indices:
        raise LatentDiffError("there are no pictures to encode")
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if not bool(found["latents"].isfinite().all()):
        raise LatentDiffError("the VAE's latents are not finite; float32 (--precision fp32) may help")
    names = {"pooled": LATENTS} | ({"network": network.name} if network else {})
    return Gallery(
        indices, found["latents"], torch.cat(thumbnails), statistics,
        found["quality"].T if reconstruct else torch.zeros(3, 0, dtype=torch.float64),
        {network.name: found["network"]} if network else {},
        {name: found[f"reconstructed {kind}"] for kind, name in names.items()} if reconstruct else {},
    )  # fmt: skip


def _see(vae: VAE, network: FeatureNetwork | None, reconstruct: bool, levels: NDArray[np.uint8]) -> dict[str, Tensor]:
    """Return what a batch (B, H, W, 3) looks like: one row a picture each, but the `statistics`, which are sums."""
    weights, pixels = next(vae.parameters()), to_pixels(torch.from_numpy(levels))
    posterior, statistics = vae.latent_posterior(pixels.to(weights)), LatentStatistics(vae.config.latent_channels)
    statistics.add(posterior)
    latents = posterior.mode().float().cpu()
    found = {"latents": latents, "statistics": statistics.state()}
    if network is not None:
        found["network"] = network.images(list(levels))
    if reconstruct:
        decoded = vae.decode(posterior.mode().to(weights.dtype)).float().cpu()
        images = np.stack([np.asarray(image) for image in to_images(decoded)])
        encoded = vae.latent_posterior(to_pixels(torch.from_numpy(images)).to(weights)).mode().float().cpu()
        distance = root_mean_square(encoded - latents)
        found["quality"] = torch.stack([psnr(pixels, decoded), ssim(pixels, decoded), distance], 1)
        found["reconstructed pooled"] = pool(encoded)
        if network is not None:
            found["reconstructed network"] = network.images(list(images))
    return {name: values.contiguous() for name, values in found.items()}
