"""What is measured of a finished model, in one report: VAE, denoising, and whether it draws what is asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vae.statistics import LatentStatistics

from ..data.cache import read_pixels, to_pixels
from ..data.sources import Source, open_source
from ..errors import LatentDiffError
from ..sections import DataConfig
from .concepts import ConceptReport, concepts_of, draw_concepts
from .denoising import DenoisingError, denoising_errors
from .grid import comparison_grid
from .reconstruction import psnr, ssim

if TYPE_CHECKING:
    from ..pipeline import LatentPipeline

Say = Callable[[str], None]
BATCH = 64
SHOWN = 8  # reconstructions


@dataclass(frozen=True)
class VAEReport:
    """Reconstructions of held-out pictures, and how the latents of the training pictures are distributed."""

    psnr: float  # dB, mean over the pictures
    ssim: float
    num_pictures: int
    latent_mean: list[float]  # of each channel
    latent_std: list[float]


@dataclass(frozen=True)
class Evaluation:
    """The whole report."""

    vae: VAEReport
    denoising: list[DenoisingError]
    concepts: ConceptReport

    def lines(self) -> Iterator[str]:
        """For a terminal."""
        vae = self.vae
        yield f"VAE on {vae.num_pictures} held-out pictures: PSNR {vae.psnr:.2f} dB, SSIM {vae.ssim:.3f}"
        mean = max(vae.latent_mean, key=abs)
        yield (
            f"latents of the training pictures, by channel: mean up to {abs(mean):.3f} from 0, "
            f"std {min(vae.latent_std):.3f} to {max(vae.latent_std):.3f}"
        )
        yield "error of the denoised latents on held-out pictures (1: their mean is guessed):"
        for found in self.denoising:
            yield (
                f"  sigma/alpha {found.level:5.2f}: {found.error:.3f} with the caption, "
                f"{found.without_caption:.3f} without"
            )
        yield from self.concepts.lines()

    def write(self, folder: Path) -> None:
        """`evaluation.json` and `concepts.png`.

        Raises:
            OSError: the folder cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"vae": asdict(self.vae), "denoising": [asdict(found) for found in self.denoising],
                 "concepts": self.concepts.facts()}  # fmt: skip
        (folder / "evaluation.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        self.concepts.grid.save(folder / "concepts.png")


def evaluate(
    pipe: LatentPipeline,
    data: DataConfig,
    folder: Path,
    *,
    style: str = "",
    say: Say = lambda _: None,
    **options: Any,
) -> Evaluation:
    """Measure a model on the pictures it was trained on and on those held out.

    Args:
        pipe: the model.
        data: source, splits and transform; the size is the model's.
        folder: where the report and two sheets of pictures go.
        style: regular expression of what to leave out of a caption, such as `a (3d|noto) emoji of `; pictures show the
            same concept where the rest is the same.
        say: told what is going on.
        options: `num_concepts`, `num_images`, `seed`, and as in a call of the pipeline.

    Raises:
        LatentDiffError: the data cannot be opened, or a setting is out of range.
        OSError: the folder cannot be written.
    """
    data = data.model_copy(update={"image_size": pipe.image_size, "min_size": data.min_size or 1})
    train, held_out = open_source(data)
    concepts = concepts_of(train, style)
    folder.mkdir(parents=True, exist_ok=True)
    say(f"VAE: {len(held_out)} held-out and {len(train)} training pictures")
    vae, latents = _evaluate_vae(pipe, train, held_out, data, folder)
    say("denoising held-out pictures")
    captions = [(held_out.captions(place) or [""])[0] for place in range(len(held_out))]
    errors = denoising_errors(pipe, latents, captions)
    report = Evaluation(vae, errors, draw_concepts(pipe, train, data, concepts, say=say, **options))
    report.write(folder)
    return report


@torch.no_grad()
def _evaluate_vae(
    pipe: LatentPipeline, train: Source, held_out: Source, data: DataConfig, folder: Path
) -> tuple[VAEReport, torch.Tensor]:
    statistics = LatentStatistics(pipe.vae.config.latent_channels)
    for pixels in _pixels(train, data):
        statistics.add(pipe.vae.latent_posterior(pixels.to(next(pipe.vae.parameters()))))
    quality, latents = [], []
    for number, pixels in enumerate(_pixels(held_out, data)):
        latents.append(pipe.vae.encode(pixels.to(next(pipe.vae.parameters()))).float().cpu())
        again = pipe.vae.decode(latents[-1].to(next(pipe.vae.parameters()))).float().cpu()
        quality.append(torch.stack([psnr(pixels, again), ssim(pixels, again)]))
        if number == 0:
            comparison_grid(pixels[:SHOWN], again[:SHOWN]).save(folder / "reconstructions.png")
    if not quality:
        raise LatentDiffError(f"{data.source}: no held-out pictures")
    means = torch.cat(quality, 1).mean(1).tolist()
    report = VAEReport(means[0], means[1], len(held_out), statistics.mean.tolist(), statistics.std.tolist())
    return report, torch.cat(latents)


def _pixels(source: Source, data: DataConfig) -> Iterator[torch.Tensor]:
    for start in range(0, len(source), BATCH):
        places = range(start, min(start + BATCH, len(source)))
        yield to_pixels(torch.from_numpy(np.stack([read_pixels(source, place, data) for place in places])))
