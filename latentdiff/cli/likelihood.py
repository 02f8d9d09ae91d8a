"""`latentdiff likelihood`: how probable pictures are, and which captions fit them."""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from ..errors import LatentDiffError, several
from .models import Device, Model, PrecisionOption, open_pipeline

if TYPE_CHECKING:
    from ..data.left_out import LeftOut
    from ..sampling.pipeline import LatentPipeline


class Variances(StrEnum):
    """Of the reverse steps."""

    beta = "beta"
    posterior = "posterior"


BATCH = 8  # pictures at a time


def likelihood(
    pictures: Annotated[list[str], Argument(help="Picture files, or folders of pictures with captions.")],
    model: Model = None,
    prompt: Annotated[str | None, Option(help="For all pictures; default: their own captions, or none.")] = None,
    caption: Annotated[list[str] | None, Option(help="Give several: which fits each picture best?")] = None,
    distractors: Annotated[int, Option(min=0, help="Does each caption fit better than this many of the others?")] = 0,
    draws: Annotated[int, Option(min=1, help="Independent estimates of each picture; their spread is the error.")] = 4,
    timesteps: Annotated[int, Option(min=0, help="Timesteps in each estimate; 0: all, which is slow.")] = 8,
    variance: Annotated[Variances, Option(help="Of the model's reverse steps.")] = Variances.beta,
    floor: Annotated[float, Option(min=0, help="Least standard deviation of the encoder's posterior.")] = 0.0,
    seed: Annotated[int, Option(min=0, help="Of all noise.")] = 0,
    output: Annotated[Path | None, Option("--output", "-o", help="Also write a table: .csv or .json.")] = None,
    device: Device = None,
    precision: PrecisionOption = None,
) -> Iterator[str]:
    """Bound how probable pictures are under a model, in nats and bits per value, with and without their captions.

    Example: latentdiff likelihood my-pictures --model runs/mine
    """
    if output is not None and output.suffix not in (".csv", ".json"):
        raise LatentDiffError(f"--output {output}: expected a name ending in .csv or .json")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)  # fail now rather than after the measurement
    from ..evaluation.proposal import FILE

    pipe = open_pipeline(model, device, precision)
    options = {"draws": draws, "num_timesteps": timesteps or None, "variance": variance.value,
               "posterior_floor": floor, "seed": seed}  # fmt: skip
    rows, found, left_out = [], *_open(pipe, pictures)
    yield from left_out.lines()
    for row in _rows(pipe, found, prompt, caption or [], distractors, options):
        rows.append(row)
        yield _line(row)
    yield from _odd(rows)
    if pipe.proposals and pipe.folder is not None and not (pipe.folder / FILE).exists():
        pipe.proposals.write(pipe.folder)
    if output is not None:
        _write(rows, output)
        yield f"table written to {output}"


def _rows(
    pipe: LatentPipeline,
    found: list[tuple[str, Any, str]],
    prompt: str | None,
    captions: list[str],
    distractors: int,
    options: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    if captions or distractors:
        yield from _matches(pipe, found, captions, distractors, options)
        return
    for start in range(0, len(found), BATCH):
        part = found[start : start + BATCH]
        images = [image for _, image, _ in part]
        prompts = [own if prompt is None else prompt for _, _, own in part]
        bounds = pipe.log_likelihood(images, prompts, **options)
        plain = pipe.log_likelihood(images, "", decoder=False, **options) if any(prompts) else bounds
        for (name, _, _), text, bound, without in zip(part, prompts, bounds, plain, strict=True):
            low, high = bound.interval
            bits = math.log(2) * bound.dimensions
            same = bound.decoder if without is not bound and math.isfinite(bound.decoder) else 0.0
            yield {"picture": name, "prompt": text, "nats": bound.nats, "standard_error": bound.standard_error,
                   "low": low, "high": high, "bits_per_dimension": bound.bits_per_dimension,
                   "decoder": bound.decoder, "entropy": bound.entropy, "prior": bound.prior, "kl": bound.kl,
                   "first": bound.first, "nats_without_prompt": without.nats + same,
                   "png_bits_per_dimension": bound.png / bits}  # fmt: skip


def _matches(
    pipe: LatentPipeline,
    found: list[tuple[str, Any, str]],
    captions: list[str],
    distractors: int,
    options: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Compare the same captions for all pictures, or each picture's own with some of the others."""
    others = sorted({caption for _, _, caption in found if caption})
    for number, (name, image, own) in enumerate(found):
        if captions:
            evidence = pipe.match_captions(image, captions, **options)
            yield {"picture": name, "best": evidence.best, **dict(zip(captions, evidence.nats.tolist(), strict=True))}
        elif own:
            chosen = random.Random(options["seed"] + number).sample(others, min(distractors + 1, len(others)))
            candidates = [own, *[text for text in chosen if text != own][:distractors]]
            evidence = pipe.match_captions(image, candidates, **options)
            yield {"picture": name, "prompt": own, "evidence": float(evidence.nats[0]), "fits": evidence.best == own,
                   "fits_better": "" if evidence.best == own else evidence.best}  # fmt: skip


def _odd(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Add to each row how odd the picture is among the others, and name those that stand out."""
    from ..evaluation.oddness import FEWEST, ODD, oddness

    if len(rows) < FEWEST or not all(row.get("bits_per_dimension", 0) > 0 for row in rows):
        return
    import torch

    columns = (torch.tensor([row[name] for row in rows]) for name in ("bits_per_dimension", "png_bits_per_dimension"))
    for row, value in zip(rows, oddness(*columns).tolist(), strict=True):
        row["oddness"] = value
    if standing_out := sorted((row for row in rows if row["oddness"] > ODD), key=lambda row: -row["oddness"]):
        yield "may not belong to the others: " + several(
            (f"{row['picture']} ({row['oddness']:.1f} deviations)" for row in standing_out), 10
        )


def _open(pipe: LatentPipeline, pictures: list[str]) -> tuple[list[tuple[str, Any, str]], LeftOut]:
    """Return name, image and caption of every picture, of folders in their order; and what is left out."""
    from PIL import Image

    from ..data.cache import read_pixels
    from ..data.left_out import LeftOut
    from ..data.pictures import PictureError
    from ..data.sources import open_splits
    from ..sections import DataConfig

    found: list[tuple[str, Any, str]] = []
    left_out = LeftOut()
    for name in pictures:
        if Path(name).expanduser().is_file() and not name.endswith((".parquet", ".tar")):
            found.append((name, name, ""))
            continue
        data = DataConfig(source=name, image_size=pipe.image_size, min_size=1, flip=False)
        for source in open_splits(data, left_out).values():
            for index in range(len(source)):
                try:
                    image = Image.fromarray(read_pixels(source, index, data))
                    found.append((source.name(index), image, (source.captions(index) or [""])[0]))
                except PictureError as error:
                    left_out.add("broken pictures", [f"{source.name(index)}: {error}"])
    if not found:
        raise LatentDiffError(f"{', '.join(pictures)}: no picture that can be read; {'; '.join(left_out.lines())}")
    return found, left_out


def _line(row: dict[str, Any]) -> str:
    if "fits" in row:
        better = "" if row["fits"] else f"; this fits better: {row['fits_better']!r}"
        return f"{row['picture']}: {row['prompt']!r} {row['evidence']:+.0f} nats{better}"
    if "best" in row:
        values = sorted(((value, text) for text, value in row.items() if text not in ("picture", "best")), reverse=True)
        return f"{row['picture']}: " + "; ".join(f"{text!r} {value:+.0f} nats" for value, text in values)
    prompt = f" given {row['prompt']!r}; {row['nats_without_prompt']:.0f} without it" if row["prompt"] else ""
    return (f"{row['picture']}: log p >= {row['nats']:.0f} ± {row['standard_error']:.0f} nats{prompt}; "
            f"{row['bits_per_dimension']:.3f} bits per value "
            f"(uncompressed 8, as PNG {row['png_bits_per_dimension']:.3f})")  # fmt: skip


def _write(rows: list[dict[str, Any]], path: Path) -> None:
    """Write a table; what is not a number becomes empty, or null."""
    clean = [{name: None if isinstance(value, float) and not math.isfinite(value) else value
              for name, value in row.items()} for row in rows]  # fmt: skip
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            if path.suffix == ".json":
                json.dump(clean, file, indent=1, ensure_ascii=False)
            elif clean:
                table = csv.DictWriter(file, clean[0].keys())
                table.writeheader()
                table.writerows(clean)
    except OSError as error:
        raise LatentDiffError(f"{path}: cannot be written ({error})") from None
