"""What is measured of a finished model, in one report: VAE, denoising, and whether it draws what is asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from ..data.sources import open_source
from ..recipe import Options
from ..sections import DataConfig
from .concepts import ConceptReport, choose, compare, concepts_of, draw_concepts
from .denoising import DenoisingError, denoising_errors
from .gallery import embed, readable

if TYPE_CHECKING:
    from ..pipeline import LatentPipeline

Say = Callable[[str], None]
MOST_TRAINING, MOST_HELD_OUT = 20_000, 1_000  # pictures that are looked at


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

    settings: dict[str, Any]  # source, seed, guidance and so on
    broken: list[str]  # pictures that could not be read
    vae: VAEReport
    denoising: list[DenoisingError]
    concepts: ConceptReport

    def lines(self) -> Iterator[str]:
        """For a terminal."""
        if self.broken:
            yield f"{len(self.broken)} pictures cannot be read and are left out, the first: {self.broken[0]}"
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
        facts = {"settings": self.settings, "broken": self.broken, "vae": asdict(self.vae),
                 "denoising": [asdict(found) for found in self.denoising],
                 "concepts": self.concepts.facts()}  # fmt: skip
        text = json.dumps(facts, indent=2, allow_nan=False)
        (folder / "evaluation.json").write_text(text + "\n", encoding="utf-8")
        self.concepts.grid.save(folder / "concepts.png")


def evaluate(
    pipe: LatentPipeline,
    data: DataConfig,
    folder: Path,
    *,
    style: str = "",
    num_concepts: int = 64,
    choice: int = 0,
    say: Say = lambda _: None,
    **options: Unpack[Options],
) -> Evaluation:
    """Measure a model on the pictures it was trained on and on those held out.

    Args:
        pipe: the model.
        data: source, splits and transform; the size is the model's.
        folder: where the report and a sheet of pictures go.
        style: regular expression of what to leave out of a caption, such as `a (3d|noto) emoji of `; pictures show the
            same concept where the rest is the same.
        num_concepts: training concepts to draw, at most as many as there are.
        choice: seed of their choice.
        say: told what is going on.
        options: as in a call of the pipeline; `num_images` of each concept.

    Raises:
        LatentDiffError: the data cannot be opened, or a setting is out of range.
        OSError: the folder cannot be written.
    """
    data = data.model_copy(update={"image_size": pipe.image_size, "min_size": data.min_size or 1})
    train, held_out = open_source(data)
    concepts = concepts_of(train, style)
    chosen = choose(concepts, num_concepts, choice)
    folder.mkdir(parents=True, exist_ok=True)
    say(f"drawing {len(chosen) * options.get('num_images', 1)} pictures")  # first: a wrong setting shows at once
    drawn = draw_concepts(pipe, train, concepts, chosen, **options)
    broken: list[str] = []
    say(f"encoding {len(train)} training pictures and {len(held_out)} held out")
    gallery = embed(pipe.vae, readable(train, data, MOST_TRAINING, broken), pipe.image_size)
    others = embed(pipe.vae, readable(held_out, data, MOST_HELD_OUT, broken), pipe.image_size, reconstruct=True)
    mean_psnr, mean_ssim = others.quality.mean(1).tolist()
    statistics = gallery.statistics
    vae = VAEReport(mean_psnr, mean_ssim, len(others.places), statistics.mean.tolist(), statistics.std.tolist())
    say("denoising the pictures held out")
    captioned = [(place, caption) for place, index in enumerate(others.places)
                 for caption in held_out.captions(index)[:1]]  # fmt: skip
    errors = denoising_errors(pipe, others.latents[[place for place, _ in captioned]], [text for _, text in captioned])
    settings = {"source": Path(data.source).name, "style": style, "choice": choice, **options}
    report = Evaluation(settings, broken, vae, errors, compare(pipe, drawn, gallery, train, data, concepts))
    report.write(folder)
    return report
