"""`latentdiff ema`: the command that computes an EMA of another width from the snapshots of a run."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option, echo

from ..assets import EMOJI_STYLE
from ..errors import LatentDiffError
from .models import data_config, open_pipeline

if TYPE_CHECKING:
    from ..config import Config
    from ..training.rebuild import Series

Pick = StrEnum("Pick", ["validation", "fidelity"])
WIDTHS = (0.03, 0.04, 0.05, 0.07, 0.1, 0.14, 0.2)  # that --pick compares by default, as far as they can be reached


def ema(
    run: Annotated[Path, Argument(help="Output of a training with train_latent.ema_snapshots.")],
    overrides: Annotated[list[str] | None, Argument(help="Data to pick by, if it has moved: data.key=value.")] = None,
    sigma_rel: Annotated[list[float] | None, Option(help="Width of the EMA; several with --pick.")] = None,
    pick: Annotated[Pick | None, Option(help="validation: lowest loss; fidelity: most samples as asked.")] = None,
    output: Annotated[Path | None, Option("--output", "-o", help="Folder; default: model/ of the run.")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the model in that folder.")] = False,
    style: Annotated[str, Option(help="With fidelity: regex to strip from captions.")] = EMOJI_STYLE,
) -> Iterator[str]:
    """Compute an EMA of another width from a run's snapshots, and write the model with it.

    Example: latentdiff ema runs/mine --pick validation --output mine-best
    """
    if pick is None and len(sigma_rel or ()) != 1:
        raise LatentDiffError("give one --sigma-rel, such as 0.07, or --pick validation to compare several")
    from ..training.rebuild import check_output, read_series, write_average

    folder = check_output(run, output, overwrite=overwrite)
    series = read_series(run)
    widths = list(sigma_rel or _reachable(series))
    missed = {width: series.mixture(width).missed for width in widths}  # raises if it is too much
    yield from (f"left out: {reason}" for reason in series.reasons())
    figures: dict[float, dict[str, float]] = {widths[0]: {}}
    if pick is not None:
        figures = {}
        for width, found in zip(widths, _measure(run, series, widths, pick, overrides or [], style), strict=True):
            figures[width] = found
            columns = "".join(f"  {name} {value:.5g}" for name, value in found.items())
            yield f"sigma_rel {width:<6g} profile missed by {missed[width]:5.2%}{columns}"
    ranked = sorted(figures, key=lambda width: next(iter(figures[width].values()), 0.0))
    best = ranked[-1] if pick is Pick.fidelity else ranked[0]
    write_average(run, series, best, figures[best], folder)
    yield (f"the EMA of width {best:g} at step {series.step} (profile missed by {missed[best]:.2%}) is written to "
           f"{folder}")  # fmt: skip


def _reachable(series: Series) -> list[float]:
    """Return the default widths that the snapshots reach."""
    from ..training.profiles import reachable

    low, high = reachable(series.profiles, series.step) or (1.0, 0.0)
    return [width for width in WIDTHS if low <= width <= high] or [WIDTHS[0]]  # which is refused with the reason


def _measure(
    run: Path, series: Series, widths: list[float], pick: Pick, overrides: list[str], style: str
) -> Iterator[dict[str, float]]:
    """Return the figures of each width, the one to pick by first, as they are measured."""
    from ..training.rebuild import fidelities, validation_losses

    averages = (series.average(series.mixture(width)) for width in widths)
    if pick is Pick.validation:
        return validation_losses(_config(run, overrides), averages)
    data = data_config(str(run), overrides)
    return fidelities(open_pipeline(str(run), None, None), data, style, averages, lambda line: echo(line, err=True))


def _config(run: Path, overrides: list[str]) -> Config:
    """Return the config of a run's last launch."""
    from ..config import parse_config, with_overrides
    from ..files.launches import last_launch
    from ..files.open import read_json

    data_config(str(run), overrides)  # raises unless only data is overridden
    try:
        recorded = dict(last_launch(read_json(run / "run.json", "every run has one")["launches"])["config"])
    except (LookupError, TypeError):
        raise LatentDiffError(f"{run / 'run.json'}: has no record of a training") from None
    settings = ["train_latent.ema_snapshots=0", "trackers=[]", "report=false", f"output={run}"]
    return parse_config(with_overrides(recorded, [*overrides, *settings]), str(run / "run.json"))
