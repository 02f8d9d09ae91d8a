"""The evaluation report of a finished model: VAE quality, denoising error and prompt fidelity."""

import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import latentdiff

from ..data.shards import digest
from ..data.sources import Source, open_source
from ..errors import LatentDiffError
from ..files.tensors import read_json
from ..sampling.parts import ModelParts
from ..sampling.settings import SamplingSettings
from ..sections import DataConfig
from .combinations import CombinationReport, compare_combinations, new_combinations
from .comparison import QualityReport, Reference, reconstruction_figures
from .concepts import Asked, ConceptReport, choose, compare, concepts_of
from .denoising import DenoisingError, denoising_errors
from .drawing import draw, model_digest
from .figures import Figure
from .gallery import Gallery, embed, read_pictures
from .kept import forget
from .networks import FeatureNetwork

MAX_TRAINING, MAX_HELD_OUT = 20_000, 2_000  # pictures to evaluate; a Fréchet distance needs 2,000
RECORD, DRAWN, ENCODED = "evaluation.json", "drawn", "encoded"


@dataclass(frozen=True)
class VAEReport:
    """Quality of held-out reconstructions, and statistics of the training pictures' latents."""

    psnr: float  # dB, mean over the pictures
    ssim: float
    num_pictures: int
    latent_mean: list[float]  # per channel
    latent_std: list[float]
    figures: list[Figure]  # of the reconstructions, against the originals
    left_out: list[str]  # figures that are not there, and why


@dataclass(frozen=True)
class Evaluation:
    """The complete report."""

    settings: dict[str, Any]  # source, seed, guidance scale etc.
    broken: list[str]  # pictures that could not be read
    vae: VAEReport
    denoising: list[DenoisingError]
    concepts: ConceptReport | None  # None if all pictures show the same concept
    quality: QualityReport | None  # likewise
    combinations: CombinationReport | None  # None if no held-out caption is a new combination
    seconds: dict[str, float]  # that each part took

    def lines(self) -> Iterator[str]:
        """Yield the report for a terminal, line by line."""
        if self.broken:
            yield f"pictures that could not be read and skipped: {len(self.broken)}, the first is {self.broken[0]}"
        vae = self.vae
        yield f"VAE on {vae.num_pictures} held-out pictures: PSNR {vae.psnr:.2f} dB, SSIM {vae.ssim:.3f}"
        for figure in vae.figures:
            yield f"  {figure.name}: {figure}, {figure.drawn} reconstructions against {figure.real} originals"
        yield from (f"  {reason}" for reason in vae.left_out)
        mean, low, high = max(map(abs, vae.latent_mean)), min(vae.latent_std), max(vae.latent_std)
        yield f"latents of the training pictures, per channel: |mean| up to {mean:.3f}, std {low:.3f} to {high:.3f}"
        yield "mean squared error of denoised held-out latents (1: no better than predicting their mean):"
        for at in self.denoising:
            yield f"  sigma/alpha {at.level:5.2f}: {at.error:.3f} with the caption, {at.without_caption:.3f} without"
        if self.concepts is None:
            yield "prompt fidelity is not measured: all training pictures show the same concept"
        else:
            yield from self.concepts.lines()
        if self.quality is not None:
            yield from self.quality.lines()
        if self.combinations is not None:
            yield from self.combinations.lines()
        yield "took " + ", ".join(f"{part} {seconds:.0f} s" for part, seconds in self.seconds.items())

    def write(self, folder: Path) -> None:
        """Write `evaluation.json` to an existing folder, and `concepts`, `combinations` and `copies` as grids in PNG.

        `drawn.jsonl` has one line per sample of the first, `drawn-combinations.jsonl` of the second.
        """
        record: dict[str, Any] = {
            name: asdict(part) if name in ("vae", "concepts", "combinations") and part else part
            for name, part in vars(self).items()
        }
        record["denoising"] = [asdict(each) for each in self.denoising]
        record["vae"]["figures"] = [figure.record() for figure in self.vae.figures]
        if self.quality is not None:
            self.quality.grid.save(folder / "copies.png")
            record["quality"] = self.quality.record()
        for name, file in (("concepts", "drawn.jsonl"), ("combinations", "drawn-combinations.jsonl")):
            if record[name] is not None:
                rows = record[name].pop("rows")
                lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                (folder / file).write_text(lines, encoding="utf-8")
                record[name].pop("grid").save(folder / f"{name}.png")
        text = json.dumps(record, indent=2, allow_nan=False)
        (folder / RECORD).write_text(text + "\n", encoding="utf-8")
        forget(folder / ENCODED)


class Clock:
    """Says what is being done, and remembers how long it took."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.seconds = say, dict[str, float]()

    @contextmanager
    def __call__(self, part: str, what: str) -> Iterator[None]:
        """Time a part of the evaluation, adding to what the part took before."""
        self.say(f"{part} {what}")
        start = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Studio:
    """Draws what is asked for, with one model or two, and compares it."""

    pipe: ModelParts  # whose VAE encodes all pictures
    settings: SamplingSettings
    network: FeatureNetwork | None
    folder: Path | None  # where what is drawn and computed is kept
    clock: Clock

    def draw(self, model: ModelParts, asked: Asked) -> tuple[list[Image.Image], Gallery]:
        """Draw pictures and encode them; pictures of another size are resized to that of `pipe`."""
        size = (self.pipe.image_size,) * 2
        with self.clock("drawing", f"{len(asked.prompts)} pictures"):
            images = draw(model, asked.prompts, asked.seeds, self.settings, self.folder and self.folder / DRAWN)
            images = [image if image.size == size else image.resize(size, Image.Resampling.BICUBIC) for image in images]
        with self.clock("encoding", "them"):
            pictures = enumerate(map(np.asarray, images))
            return images, embed(self.pipe.vae, pictures, self.pipe.image_size, self.network,
                                 folder=self.folder and self.folder / ENCODED)  # fmt: skip

    def compare(
        self, reference: Reference, chosen: Sequence[int], held_out: Gallery, against: tuple[str, ModelParts] | None
    ) -> tuple[ConceptReport, QualityReport]:
        """Draw the captions of the `chosen` training pictures, with the other model, too, and measure the pictures."""
        asked = Asked.of(reference.source, reference.concepts, chosen, self.settings)
        images, queries = self.draw(self.pipe, asked)
        what = (reference.gallery, reference.source, reference.data, reference.concepts, asked)
        with self.clock("comparing", "them with the training pictures"):
            report, other = compare(*what, images, queries), None
        if against is not None:
            pictures, theirs = self.draw(against[1], asked)
            other = (against[0], theirs, compare(*what, pictures, theirs))
        drawn = (
            f"{len(images)} pictures of {len(set(asked.prompts))} prompts at guidance "
            f"{self.settings.guidance_scale:g}, {self.settings.num_steps} steps of {self.settings.sampler}"
        )
        with self.clock("comparing", "all of them with all training pictures"):
            return report, reference.report(queries, images, report, held_out, drawn, other)

    def combine(
        self, galleries: tuple[Gallery, Gallery], sources: tuple[Source, Source], data: DataConfig, style: str,
        chosen: Sequence[int],
    ) -> CombinationReport:  # fmt: skip
        """Draw new combinations and compare them with all pictures."""
        asked = Asked.of(sources[1], concepts_of(sources[1], style), chosen, self.settings)
        images, queries = self.draw(self.pipe, asked)
        with self.clock("comparing", "new combinations with all pictures"):
            return compare_combinations(galleries, sources, data, style, asked, images, queries)


def evaluate(
    pipe: ModelParts,
    data: DataConfig,
    settings: SamplingSettings,
    *,
    style: str = "",
    num_concepts: int = 64,
    network: FeatureNetwork | None = None,
    against: tuple[str, ModelParts] | None = None,
    output: Path | None = None,
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
        network: compare pictures by its features, too.
        against: name of another model, and the model, to draw the same prompts from the same seeds.
        output: folder of an evaluation, which goes on after a kill: drawn pictures are kept in `drawn` there, and what
            is computed of pictures in `encoded`, which `Evaluation.write` removes.
        say: called with progress messages.

    Raises:
        LatentDiffError: the data cannot be opened, a setting is out of range, or `output` has another evaluation.
    """
    if num_concepts < 2:
        raise LatentDiffError(f"num_concepts={num_concepts}: expected at least 2")
    data = data.model_copy(update={"image_size": pipe.image_size})
    facts = _settings(pipe, data, settings, style, num_concepts, network, against)
    check_output(output, facts)
    train, held_out = open_source(data)
    concepts, broken, clock = concepts_of(train, style), list[str](), Clock(say)
    encoded = None if output is None else output / ENCODED
    counts = f"{min(len(train), MAX_TRAINING)} training and {min(len(held_out), MAX_HELD_OUT)} held-out pictures"
    with clock("encoding", counts):
        gallery = embed(pipe.vae, read_pictures(train, data, MAX_TRAINING, broken, flip=data.flip), pipe.image_size,
                        network, folder=encoded)  # fmt: skip
        others = embed(pipe.vae, read_pictures(held_out, data, MAX_HELD_OUT, broken), pipe.image_size, network,
                       reconstruct=True, folder=encoded)  # fmt: skip
    report = quality = combined = None
    shown = [concepts[index] for index in gallery.indices]
    studio = Studio(pipe, settings, network, output, clock)
    if len(set(shown) - {""}) > 1:
        chosen = [gallery.indices[number] for number in choose(shown, num_concepts, settings.seed)]
        same = float(others.quality[2].median())
        reference = Reference(train, data, concepts, gallery, same, network, settings.seed)
        report, quality = studio.compare(reference, chosen, others, against)
    new = [index for index in new_combinations(train, held_out, style) if index in set(others.indices)]
    if style and len(new) > 1:
        chosen = np.random.default_rng(settings.seed).permutation(new)[:num_concepts].tolist()
        combined = studio.combine((gallery, others), (train, held_out), data, style, chosen)
    with clock("denoising", "held-out pictures"):
        captions = {i: found[0] for i, index in enumerate(others.indices) if (found := held_out.captions(index))}
        errors = denoising_errors(pipe, others.latents[list(captions)], list(captions.values()))
    with clock("comparing", "reconstructions with the originals"):
        names = concepts_of(held_out, style)
        again, missing = reconstruction_figures(others, [names[index] for index in others.indices], network)
    (psnr, ssim, _), latents = others.quality.mean(1).tolist(), gallery.statistics
    vae = VAEReport(psnr, ssim, len(others.indices), latents.mean.tolist(), latents.std.tolist(), again, missing)
    return Evaluation(facts, broken, vae, errors, report, quality, combined, clock.seconds)


def check_output(folder: Path | None, facts: dict[str, Any]) -> None:
    """Raise LatentDiffError if the folder has the evaluation of another model, or with other settings."""
    if folder is None or not (folder / RECORD).exists():
        return
    found = read_json(folder / RECORD, "").get("settings", {})
    if changed := [name for name, value in facts.items() if found.get(name) != value]:
        which = "; ".join(f"{name}: {found.get(name)!r}, now {facts[name]!r}" for name in changed)
        raise LatentDiffError(f"{folder / RECORD} has another evaluation ({which}): choose another --output, or remove "
                              "it")  # fmt: skip


def _settings(
    pipe: ModelParts, data: DataConfig, settings: SamplingSettings, style: str, num_concepts: int,
    network: FeatureNetwork | None, against: tuple[str, ModelParts] | None,
) -> dict[str, Any]:  # fmt: skip
    """Return the settings that the figures depend on, without local paths."""
    sampling = settings.metadata([""], 0, 0).items()
    return {
        "source": next((part for part in reversed(Path(data.source).parts) if "*" not in part), data.source),
        "model": model_digest(pipe),
        "against": None if against is None else model_digest(against[1]),
        "features": None if network is None else f"{network.name} ({network.digest[:12]})",
        "num_concepts": num_concepts,
        "flip": data.flip,
        "data": digest(data.model_dump(mode="json"))[:12],  # all its settings, which may be paths
        "style": style,
        "seed": settings.seed,
        "num_images": settings.num_images,
        **{name: value for name, value in sampling if name not in ("prompt", "negative_prompt", "seed")},
        "dtype": str(next(pipe.unet.parameters()).dtype).removeprefix("torch."),
        "device": pipe.device.type if pipe.device.type != "cpu" else f"cpu ({platform.machine()})",
        "versions": {"latentdiff": latentdiff.__version__, "torch": torch.__version__},
    }
