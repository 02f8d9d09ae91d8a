"""The evaluation report of a finished model: VAE quality, denoising error and prompt fidelity."""

import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import latentdiff

from ..data.sources import open_source
from ..errors import LatentDiffError
from ..sampling.parts import ModelParts
from ..sampling.settings import SamplingSettings
from ..sections import DataConfig
from .combinations import CombinationReport, compare_combinations, new_combinations
from .concepts import ConceptReport, choose, compare, concepts_of
from .denoising import DenoisingError, denoising_errors
from .gallery import embed, read_pictures

MAX_TRAINING, MAX_HELD_OUT = 20_000, 1_000  # pictures to evaluate


@dataclass(frozen=True)
class VAEReport:
    """Quality of held-out reconstructions, and statistics of the training pictures' latents."""

    psnr: float  # dB, mean over the pictures
    ssim: float
    num_pictures: int
    latent_mean: list[float]  # per channel
    latent_std: list[float]


@dataclass(frozen=True)
class Evaluation:
    """The complete report."""

    settings: dict[str, Any]  # source, seed, guidance scale etc.
    broken: list[str]  # pictures that could not be read
    vae: VAEReport
    denoising: list[DenoisingError]
    concepts: ConceptReport | None  # None if all pictures show the same concept
    combinations: CombinationReport | None  # None if no held-out caption is a new combination

    def lines(self) -> Iterator[str]:
        """Yield the report for a terminal, line by line."""
        if self.broken:
            yield f"pictures that could not be read and skipped: {len(self.broken)}, the first is {self.broken[0]}"
        vae = self.vae
        yield f"VAE on {vae.num_pictures} held-out pictures: PSNR {vae.psnr:.2f} dB, SSIM {vae.ssim:.3f}"
        mean, low, high = max(map(abs, vae.latent_mean)), min(vae.latent_std), max(vae.latent_std)
        yield f"latents of the training pictures, per channel: |mean| up to {mean:.3f}, std {low:.3f} to {high:.3f}"
        yield "mean squared error of denoised held-out latents (1: no better than predicting their mean):"
        for at in self.denoising:
            yield f"  sigma/alpha {at.level:5.2f}: {at.error:.3f} with the caption, {at.without_caption:.3f} without"
        if self.concepts is None:
            yield "prompt fidelity is not measured: all training pictures show the same concept"
        else:
            yield from self.concepts.lines()
        if self.combinations is not None:
            yield from self.combinations.lines()

    def write(self, folder: Path) -> None:
        """Write `evaluation.json` to an existing folder, and of each of `concepts` and `combinations` a grid as PNG.

        `drawn.jsonl` has one line per sample of the first, `drawn-combinations.jsonl` of the second.
        """
        record = asdict(self)
        for name, file in (("concepts", "drawn.jsonl"), ("combinations", "drawn-combinations.jsonl")):
            if record[name] is not None:
                rows = record[name].pop("rows")
                lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                (folder / file).write_text(lines, encoding="utf-8")
                record[name].pop("grid").save(folder / f"{name}.png")
        text = json.dumps(record, indent=2, allow_nan=False)
        (folder / "evaluation.json").write_text(text + "\n", encoding="utf-8")


def evaluate(
    pipe: ModelParts,
    data: DataConfig,
    settings: SamplingSettings,
    *,
    style: str = "",
    num_concepts: int = 64,
    say: Callable[[str], None] = lambda _: None,
) -> Evaluation:
    """Evaluate a model on its training pictures and on held-out ones.

    Args:
        pipe: the model.
        data: source, splits and transform; the image size is the model's. With `flip`, mirrored training pictures count
            as training pictures too.
        settings: how to sample, `num_images` per concept; `seed` also chooses the concepts.
        style: regular expression for the part of a caption to ignore, such as `a (3d|noto) emoji of `; pictures show
            the same concept if the rest of their captions is equal.
        num_concepts: number of training concepts to sample, and of new combinations that held-out captions ask for; all
            of them if there are fewer.
        say: called with progress messages.

    Raises:
        LatentDiffError: the data cannot be opened, or a setting is out of range.
    """
    if num_concepts < 2:
        raise LatentDiffError(f"num_concepts={num_concepts}: expected at least 2")
    data = data.model_copy(update={"image_size": pipe.image_size})
    train, held_out = open_source(data)
    concepts = concepts_of(train, style)
    broken: list[str] = []
    say(f"encoding {min(len(train), MAX_TRAINING)} training and {min(len(held_out), MAX_HELD_OUT)} held-out pictures")
    gallery = embed(pipe.vae, read_pictures(train, data, MAX_TRAINING, broken, flip=data.flip), pipe.image_size)
    others = embed(pipe.vae, read_pictures(held_out, data, MAX_HELD_OUT, broken), pipe.image_size, reconstruct=True)
    report = None
    shown = [concepts[index] for index in gallery.indices]
    if len(set(shown) - {""}) > 1:
        chosen = [gallery.indices[number] for number in choose(shown, num_concepts, settings.seed)]
        say(f"sampling {len(chosen) * settings.num_images} pictures")
        report = compare(pipe, gallery, train, data, concepts, chosen, settings)
    combined = None
    new = [index for index in new_combinations(train, held_out, style) if index in set(others.indices)]
    if style and len(new) > 1:
        chosen = np.random.default_rng(settings.seed).permutation(new)[:num_concepts].tolist()
        say(f"sampling {len(chosen) * settings.num_images} pictures of new combinations")
        combined = compare_combinations(pipe, (gallery, others), (train, held_out), data, style, chosen, settings)
    say("denoising held-out pictures")
    captions = {i: found[0] for i, index in enumerate(others.indices) if (found := held_out.captions(index))}
    errors = denoising_errors(pipe, others.latents[list(captions)], list(captions.values()))
    (psnr, ssim), latents = others.quality.mean(1).tolist(), gallery.statistics
    vae = VAEReport(psnr, ssim, len(others.indices), latents.mean.tolist(), latents.std.tolist())
    return Evaluation(_settings(pipe, data, settings, style), broken, vae, errors, report, combined)


def _settings(pipe: ModelParts, data: DataConfig, settings: SamplingSettings, style: str) -> dict[str, Any]:
    """Return the settings that the figures depend on, without local paths."""
    sampling = settings.metadata([""], 0, 0).items()
    return {
        "source": next((part for part in reversed(Path(data.source).parts) if "*" not in part), data.source),
        "flip": data.flip,
        "style": style,
        "seed": settings.seed,
        "num_images": settings.num_images,
        **{name: value for name, value in sampling if name not in ("prompt", "negative_prompt", "seed")},
        "dtype": str(next(pipe.unet.parameters()).dtype).removeprefix("torch."),
        "device": pipe.device.type if pipe.device.type != "cpu" else f"cpu ({platform.machine()})",
        "versions": {"latentdiff": latentdiff.__version__, "torch": torch.__version__},
    }
