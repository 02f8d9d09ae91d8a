"""What is measured of a finished model, in one report: VAE, denoising, and whether it draws what is asked."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.sources import open_source
from ..errors import LatentDiffError
from ..sampling.settings import Recipe
from ..sections import DataConfig
from .concepts import ConceptReport, choose, compare, concepts_of, draw_concepts
from .denoising import DenoisingError, denoising_errors
from .gallery import Gallery, embed, readable

if TYPE_CHECKING:
    from ..sampling.pipeline import LatentPipeline

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
    concepts: ConceptReport | None  # None where all pictures show the same

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
        if self.concepts is None:
            yield "whether it draws what is asked is left out: all training pictures show the same concept"
        else:
            yield from self.concepts.lines()

    def write(self, folder: Path) -> None:
        """`evaluation.json`, `drawn.jsonl` with a line for each drawn picture, and `concepts.png`.

        Raises:
            OSError: the folder cannot be written.
        """
        facts = {"settings": self.settings, "broken": self.broken, "vae": asdict(self.vae),
                 "denoising": [asdict(found) for found in self.denoising],
                 "concepts": self.concepts and self.concepts.facts()}  # fmt: skip
        text = json.dumps(facts, indent=2, allow_nan=False)
        (folder / "evaluation.json").write_text(text + "\n", encoding="utf-8")
        if self.concepts:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.concepts.rows)
            (folder / "drawn.jsonl").write_text(lines, encoding="utf-8")
            self.concepts.grid.save(folder / "concepts.png")


def evaluate(
    pipe: LatentPipeline,
    data: DataConfig,
    recipe: Recipe,
    *,
    style: str = "",
    num_concepts: int = 64,
    say: Say = lambda _: None,
) -> Evaluation:
    """Measure a model on the pictures it was trained on and on those held out.

    Args:
        pipe: the model.
        data: source, splits and transform; the size is the model's. With `flip` the pictures in the mirror are training
            pictures, too.
        recipe: how to draw, `num_images` of each concept; its `seed` also chooses the concepts.
        style: regular expression of what to leave out of a caption, such as `a (3d|noto) emoji of `; pictures show the
            same concept where the rest is the same.
        num_concepts: training concepts to draw, at most as many as there are.
        say: told what is going on.

    Raises:
        LatentDiffError: the data cannot be opened, or a setting is out of range.
    """
    if num_concepts < 2:
        raise LatentDiffError(f"{num_concepts} concepts asked for: two at least are needed to tell them apart")
    data = data.model_copy(update={"image_size": pipe.image_size})
    train, held_out = open_source(data)
    concepts = concepts_of(train, style)
    broken: list[str] = []
    say(f"encoding {min(len(train), MOST_TRAINING)} training pictures and {min(len(held_out), MOST_HELD_OUT)} held out")
    gallery = embed(pipe.vae, readable(train, data, MOST_TRAINING, broken, flip=data.flip), pipe.image_size)
    others = embed(pipe.vae, readable(held_out, data, MOST_HELD_OUT, broken), pipe.image_size, reconstruct=True)
    report = None
    there = [concepts[place] for place in gallery.places]
    if len(set(there) - {""}) > 1:
        chosen = [gallery.places[number] for number in choose(there, num_concepts, recipe.seed)]
        say(f"drawing {len(chosen) * recipe.num_images} pictures")
        report = compare(pipe, draw_concepts(pipe, train, concepts, chosen, recipe), gallery, train, data, concepts)
    say("denoising the pictures held out")
    captioned = [(place, caption) for place, index in enumerate(others.places)
                 for caption in held_out.captions(index)[:1]]  # fmt: skip
    errors = denoising_errors(pipe, others.latents[[place for place, _ in captioned]], [text for _, text in captioned])
    return Evaluation(_settings(pipe, data, recipe, style), broken, _of_vae(gallery, others), errors, report)


def _of_vae(gallery: Gallery, held_out: Gallery) -> VAEReport:
    mean_psnr, mean_ssim = held_out.quality.mean(1).tolist()
    statistics = gallery.statistics
    return VAEReport(mean_psnr, mean_ssim, len(held_out.places), statistics.mean.tolist(), statistics.std.tolist())


def _settings(pipe: LatentPipeline, data: DataConfig, recipe: Recipe, style: str) -> dict[str, Any]:
    """What the figures depend on, without the folders of this machine."""
    drawing = recipe.facts([""], 0, 0)
    for name in ("prompt", "negative_prompt", "seed"):
        drawing.pop(name, None)
    return {
        "source": next((part for part in reversed(Path(data.source).parts) if "*" not in part), data.source),
        "flip": data.flip,
        "style": style,
        "seed": recipe.seed,
        "num_images": recipe.num_images,
        **drawing,
        "dtype": str(next(pipe.unet.parameters()).dtype).removeprefix("torch."),
        "device": pipe.device.type if pipe.device.type != "cpu" else f"cpu ({platform.machine()})",
        "versions": {name: version(name) for name in ("latentdiff", "torch")},
    }
