"""Figures of `latentdiff evaluate` and `latentdiff likelihood`, with their intervals, as tables and curves."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from .curves import Curve, draw
from .run import Run, mapping, number, sequence

SHOWN_ROWS = 48  # of drawn.jsonl
MEASURES = {"bits_per_dimension": "bits per value", "png_bits_per_dimension": "bits per value as PNG",
            "nats": "log p, nats, at least", "evidence": "nats by which the caption fits better"}  # fmt: skip
INTERVAL = 1.645  # standard errors on either side: 90 %, as everywhere


@dataclass(frozen=True)
class Table:
    """A table, with a sentence on what it says."""

    caption: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""
    facts: list[str] = field(default_factory=list)


def evaluation_tables(run: Run) -> Iterator[Table]:
    """Yield the tables of evaluation.json."""
    found = run.evaluation
    vae = mapping(found.get("vae"))
    if vae:
        rows = [["PSNR", f"{_text(vae.get('psnr'), '.2f')} dB"], ["SSIM", _text(vae.get("ssim"), ".4f")]]
        yield Table("VAE", ["measure", "mean"], rows, f"{_text(vae.get('num_pictures'), '.0f')} held-out pictures.")
    concepts, combined = mapping(found.get("concepts")), mapping(found.get("combinations"))
    for title, part, key in (
        ("Nearest training picture shows the concept asked for", concepts, "agreements"),
        ("New combinations: nearest picture shows the thing", combined, "concepts"),
        ("New combinations: nearest picture has the style", combined, "attributes"),
    ):
        rows = [_agreement(mapping(row)) for row in sequence(part.get(key))]
        if rows:
            note = f"{_text(part.get('pictures'), '.0f')} samples, {_text(part.get('gallery'), '.0f')} pictures."
            yield Table(title, ["compared by", "share (90 % interval)", "chance", "shuffled prompts"], rows, note)
    quality = mapping(found.get("quality"))
    for title, part, of in (("Samples as a whole, against training pictures", quality, str(quality.get("drawn", ""))),
                            ("Reconstructions as a whole, against the originals", vae, "")):  # fmt: skip
        rows = [_figure(mapping(row)) for row in sequence(part.get("figures"))]
        if rows:
            yield Table(title, ["figure", "value (90 % interval)", "pictures"], rows, of)
    denoising = [mapping(row) for row in sequence(found.get("denoising"))]
    rows = [[_text(row.get(key), ".3g") for key in ("level", "error", "without_caption")] for row in denoising]
    if rows:
        yield Table("Squared error of denoised latents", ["noise / signal", "with caption", "without"], rows,
                    "1: no better than the mean of all latents.")  # fmt: skip


def drawn_table(run: Run) -> Table | None:
    """Return what the samples show by their nearest training pictures, or None if that is not known."""
    rows = []
    for row in run.drawn[:SHOWN_ROWS]:
        latents = mapping(row.get("latents"))
        rank = number(latents.get("rank"))
        rows.append([str(row.get("prompt", "")), str(latents.get("nearest", "")), str(latents.get("picture", "")),
                     "" if rank is None else "yes" if rank == 0 else f"no, {rank:.0f} others are nearer"])  # fmt: skip
    note = f"The first {len(rows)} of {len(run.drawn)} samples." if len(rows) < len(run.drawn) else ""
    return Table("", ["prompt", "nearest training picture shows", "picture", "as asked"], rows, note) if rows else None


def likelihood_curve(run: Run, color: int) -> list[Curve]:
    """Return how much each timestep adds to the bound, and to the difference that a caption makes; [] if not known."""
    curves = []
    for key, style in (("bound", "points"), ("captions", "dashes")):
        values = [number(value) for value in sequence(mapping(run.likelihood).get(key))]
        known = [(t, value) for t, value in enumerate(values, start=1) if value is not None and value > 0]
        if known:
            thin = [pair for place, pair in enumerate(known) if place < 10 or place % max(1, len(known) // 100) == 0]
            steps, shares = [float(t) for t, _ in thin], [value for _, value in thin]
            curves.append(Curve(steps, shares, color, "points" if style == "points" else "dashes"))
    return curves


def likelihood_figure(runs: list[Run]) -> str:
    """Return the curves of all runs that have them as an SVG, or an empty string."""
    curves = [curve for color, run in enumerate(runs) for curve in likelihood_curve(run, color)]
    return draw("likelihood by timestep", curves, x="timestep", y="share of the timestep") if curves else ""


def likelihood_table(run: Run) -> Table | None:
    """Return the means of a table that `latentdiff likelihood -o` wrote, or None if there is none."""
    rows = [mapping(row) for row in sequence(run.likelihood)]
    found = []
    for key, what in MEASURES.items():
        values = [value for row in rows if (value := number(row.get(key))) is not None]
        if len(values) > 1:
            half = INTERVAL * stdev(values) / math.sqrt(len(values))
            found.append([what, f"{fmean(values):.4g} ± {half:.2g}", str(len(values))])
    return Table("Likelihood", ["measure", "mean (90 % interval)", "pictures"], found) if found else None


def _figure(row: dict[str, Any]) -> list[str]:
    value, low, high = (_text(row.get(key), ".3g") for key in ("value", "low", "high"))
    counts = (_text(row.get(key), ".0f") for key in ("drawn", "real"))
    return [str(row.get("name", "?")), f"{value} ({low} to {high})", " against ".join(counts)]


def _agreement(row: dict[str, Any]) -> list[str]:
    text, low, high = (_text(row.get(key), ".1%") for key in ("top1", "low", "high"))
    if low != "?":  # evaluations of older versions have none
        text += f" ({low} to {high})"
    return [str(row.get("features", "?")), text, _text(row.get("chance"), ".2%"), _text(row.get("shuffled"), ".1%")]


def _text(value: Any, form: str) -> str:
    found = number(value)
    return "?" if found is None else format(found, form)
