"""What is measured of a finished model, in one report: VAE, denoising, and whether it draws what is asked."""

import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..data.sources import open_source
from ..errors import LatentDiffError
from ..sampling.parts import ModelParts
from ..sampling.settings import SamplingSettings
from ..sections import DataConfig
from .concepts import ConceptReport, choose, compare, concepts_of
from .denoising import DenoisingError, denoising_errors
from .gallery import embed, readable

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
        mean, low, high = max(map(abs, vae.latent_mean)), min(vae.latent_std), max(vae.latent_std)
        yield f"latents of the training pictures, by channel: mean up to {mean:.3f} from 0, std {low:.3f} to {high:.3f}"
        yield "error of the denoised latents on held-out pictures (1: their mean is guessed):"
        for one in self.denoising:
            yield f"  sigma/alpha {one.level:5.2f}: {one.error:.3f} with the caption, {one.without_caption:.3f} without"
        if self.concepts is None:
            yield "whether it draws what is asked is left out: all training pictures show the same concept"
        else:
            yield from self.concepts.lines()

    def write(self, folder: Path) -> None:
        """`evaluation.json`, `drawn.jsonl` with a line for each drawn picture, and `concepts.png`.

        Raises:
            OSError: the folder cannot be written.
        """
        facts = asdict(self)
        drawn = facts["concepts"] or {"rows": [], "grid": None}
        rows, grid = drawn.pop("rows"), drawn.pop("grid")
        text = json.dumps(facts, indent=2, allow_nan=False)
        (folder / "evaluation.json").write_text(text + "\n", encoding="utf-8")
        if self.concepts:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / "drawn.jsonl").write_text(lines, encoding="utf-8")
            grid.save(folder / "concepts.png")


def evaluate(
    pipe: ModelParts,
    data: DataConfig,
    settings: SamplingSettings,
    *,
    style: str = "",
    num_concepts: int = 64,
    say: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Measure a model on the pictures it was trained on and on those held out.

    Args:
        pipe: the model.
        data: source, splits and transform; the size is the model's. With `flip` the pictures in the mirror are training
            pictures, too.
        settings: how to sample, `num_images` of each concept; its `seed` also chooses the concepts.
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
        chosen = [gallery.places[number] for number in choose(there, num_concepts, settings.seed)]
        say(f"drawing {len(chosen) * settings.num_images} pictures")
        report = compare(pipe, gallery, train, data, concepts, chosen, settings)
    say("denoising the pictures held out")
    captions = {place: found[0] for place, index in enumerate(others.places) if (found := held_out.captions(index))}
    errors = denoising_errors(pipe, others.latents[list(captions)], list(captions.values()))
    (psnr, ssim), latents = others.quality.mean(1).tolist(), gallery.statistics
    vae = VAEReport(psnr, ssim, len(others.places), latents.mean.tolist(), latents.std.tolist())
    return Evaluation(_settings(pipe, data, settings, style), broken, vae, errors, report)


def _settings(pipe: ModelParts, data: DataConfig, settings: SamplingSettings, style: str) -> dict[str, Any]:
    """What the figures depend on, without the folders of this machine."""
    drawn = settings.metadata([""], 0, 0).items()
    return {
        "source": next((part for part in reversed(Path(data.source).parts) if "*" not in part), data.source),
        "flip": data.flip,
        "style": style,
        "seed": settings.seed,
        "num_images": settings.num_images,
        **{name: value for name, value in drawn if name not in ("prompt", "negative_prompt", "seed")},
        "dtype": str(next(pipe.unet.parameters()).dtype).removeprefix("torch."),
        "device": pipe.device.type if pipe.device.type != "cpu" else f"cpu ({platform.machine()})",
        "versions": {name: version(name) for name in ("latentdiff", "torch")},
    }
