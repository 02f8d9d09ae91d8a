"""Which curves are drawn together: one panel for each quantity that a stage logged, with all runs in it."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from .curves import Curve, Mark, draw
from .run import Run, Stage

TITLES = {"loss": "loss", "l1": "absolute error (l1)", "l2": "squared error (l2)", "perceptual": "perceptual loss",
          "kl": "KL divergence, nats per picture", "norm": "norm of the gradient", "psnr": "held-out PSNR, dB",
          "ssim": "held-out SSIM", "pictures_per_second": "pictures per second",
          "structural_loss": "held-out structural loss",
          "right_captions": "share of samples nearest to a picture with their caption",
          "loss_unconditional": "held-out loss without captions"}  # fmt: skip
COUNTS = {"skipped": "steps skipped", "broken": "broken pictures"}  # so far; said in words
HELD_OUT, BAND = "validation_", "_band_"
NOT_DRAWN = ("step", "right_captions_of", "seconds", "time_data", "time_model", "time_optimizer", "time_other", "spike",
             *COUNTS)  # fmt: skip


@dataclass(frozen=True)
class Panel:
    """A titled figure."""

    title: str
    svg: Markup


def panels(name: str, runs: Sequence[Run]) -> list[Panel]:
    """Return the panels of a stage, of its loss first; [] if no run has logged anything."""
    stages = [(color, stage) for color, run in enumerate(runs) if (stage := run.stages.get(name)) is not None]
    keys = list(dict.fromkeys(key for _, stage in stages for key in stage.names() if key not in NOT_DRAWN))
    drawn = list(dict.fromkeys(_quantity(key) for key in keys if BAND not in key))
    found = []
    for quantity in sorted(drawn, key=lambda quantity: quantity != "loss"):
        curves = [curve for color, stage in stages for curve in _curves(stage, quantity, color)]
        marks = [mark for color, stage in stages for mark in _marks(stage, color)] if quantity == "loss" else []
        if curves:
            title = TITLES.get(quantity, quantity.replace("_", " "))
            found.append(_panel(f"{name} {title}", title, curves, marks))
    for color, stage in stages:
        bands = sorted((key for key in stage.names() if key.startswith(f"{HELD_OUT}loss{BAND}")), key=_band)
        curves = [Curve(*stage.series(key), color, opacity=1 - 0.8 * place / max(1, len(bands)))
                  for place, key in enumerate(bands)]  # fmt: skip
        if curves:
            of = f", {runs[color].label}" if len(stages) > 1 else ""
            title = f"held-out loss by timestep{of}: from the least noise (full color) to the most (faint)"
            found.append(_panel(f"{name} bands {color}", title, curves, []))
    return found


def _panel(name: str, title: str, curves: list[Curve], marks: list[Mark]) -> Panel:
    return Panel(title, Markup(draw(name, curves, marks)))


def _quantity(key: str) -> str:
    """Return what a key measures: training and held-out values of the same are drawn together."""
    return key.removeprefix(HELD_OUT).removesuffix("_raw")


def _curves(stage: Stage, quantity: str, color: int) -> list[Curve]:
    kinds = ((quantity, "smooth"), (f"{HELD_OUT}{quantity}", "points"), (f"{HELD_OUT}{quantity}_raw", "dashes"))
    drawn = []
    for key, style in kinds:
        steps, values = stage.series(key)
        if steps:
            drawn.append(Curve(steps, values, color, style))  # type: ignore[arg-type]
    return drawn


def _marks(stage: Stage, color: int) -> list[Mark]:
    return [Mark(line["step"], kind, color) for line in stage.lines
            for kind in ("resumed", "stopped", "spike") if kind in line]  # fmt: skip


def _band(key: str) -> int:
    text = key.rpartition("_")[2]
    return int(text) if text.isdecimal() and len(text) < 10 else 0
