"""The page: sections from one or several runs, rendered by report.html.j2 and written as a whole or not at all."""

import os
import shlex
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import latentdiff

from ..errors import LatentDiffError, one_line
from ..files.card import without_folders
from .card import card_html
from .panels import COUNTS, Panel, panels
from .pictures import Series, embed
from .results import Table, drawn_table, evaluation_tables, likelihood_figure, likelihood_table
from .run import STAGES, Run, mapping, read_run
from .times import Spent, times

MAX_RUNS = 8  # there are as many colors
PICTURE_BYTES = 4_000_000  # of all data URIs
GRIDS = {"concepts.png": "Samples above their nearest training pictures",
         "combinations.png": "New combinations above the held-out pictures",
         "copies.png": "Samples most like a training picture, above it"}  # fmt: skip
SHARES = {"train_latent": 0.6, "train_vae": 0.2, "concepts.png": 0.08, "combinations.png": 0.06, "copies.png": 0.06}
NAME = "report.html"

T = TypeVar("T")


def write_report(folders: Sequence[Path], output: Path | None = None, refresh: float | None = None) -> Path:
    """Write the report of runs, by default into the first one's folder, and return its path.

    `refresh`: seconds after which a browser shall load the page again.

    Raises:
        LatentDiffError: a folder does not exist, there are too many, or the page cannot be written.
    """
    if len(folders) > MAX_RUNS:
        raise LatentDiffError(f"{len(folders)} runs: a report compares at most {MAX_RUNS}")
    for folder in folders:
        if not folder.is_dir():
            raise LatentDiffError(f"{folder}: no such folder; expected the output of a training, or a model's folder")
    output = output or folders[0] / NAME
    runs = [read_run(folder, label) for folder, label in zip(folders, _labels(folders), strict=True)]
    page = render(runs, refresh)
    partial = output.with_name(output.name + ".partial")
    try:
        partial.write_text(page, encoding="utf-8", errors="backslashreplace")
        os.replace(partial, output)
    except OSError as error:
        raise LatentDiffError(f"{output}: cannot be written ({error.strerror}); choose another --output") from None
    return output


def render(runs: Sequence[Run], refresh: float | None = None) -> str:
    """Return the page as HTML."""
    views = [_view(run, len(runs)) for run in runs]
    curves = {title: _guarded(runs[0], title, list[Panel](), partial(panels, name, runs))
              for name, title in STAGES.items()}  # fmt: skip
    likelihood = _guarded(runs[0], "likelihood", "", lambda: likelihood_figure(list(runs)))
    environment = Environment(loader=PackageLoader("latentdiff.report", ""), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True, undefined=StrictUndefined)  # fmt: skip
    return environment.get_template("report.html.j2").render(
        views=views, grids=GRIDS, curves=curves, likelihood=Markup(likelihood), refresh=refresh,
        version=latentdiff.__version__, now=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
    )  # fmt: skip


def _view(run: Run, count: int) -> dict[str, Any]:
    """Return what the template shows of one run."""
    limits = {name: int(share * PICTURE_BYTES / count) for name, share in SHARES.items()}
    files = {name: [(0, path)] for name in GRIDS if (path := run.result(name)) is not None}
    files |= {name: run.previews(name) for name in STAGES}
    pictures = {name: _guarded(run, name, Series([], []), partial(embed, found, limits[name]))
                for name, found in files.items()}  # fmt: skip
    return {
        "run": run,
        "outcome": _guarded(run, "outcome", "", lambda: _outcome(run)),
        "launches": _guarded(
            run, "launches", list[dict[str, str]](), lambda: [_launch(launch) for launch in run.launches]
        ),
        "config": _guarded(run, "config", "", lambda: _yaml(run.config)),
        "prompts": _guarded(run, "prompts", list[str](), lambda: _prompts(run)),
        "pictures": pictures,
        "quality": _guarded(run, "reconstruction quality", dict[int, str](), lambda: _quality(run)),
        "counts": _guarded(run, "counts", list[str](), lambda: _counts(run)),
        "times": _guarded(run, "times", list[Spent](), lambda: times(run)),
        "tables": _guarded(run, "evaluation", list[Table](), lambda: list(evaluation_tables(run))),
        "drawn": _guarded(run, "samples and their neighbors", None, lambda: drawn_table(run)),
        "likelihood": _guarded(run, "likelihood", None, lambda: likelihood_table(run)),
        "card": Markup(_guarded(run, "model card", "", lambda: card_html(run))),
    }


def _guarded(run: Run, what: str, otherwise: T, make: Callable[[], T]) -> T:
    """Return what `make` does, or `otherwise` and a sentence in the report if the run's files are too broken for it."""
    try:
        return make()
    except Exception as error:  # files of strangers can be broken in any way, and the rest of the report can be read
        run.problems.append(f"{what}: cannot be shown ({type(error).__name__}: {one_line(error)}).")
        return otherwise


def _labels(folders: Sequence[Path]) -> list[str]:
    """Return the folders' names, numbered where two are the same."""
    names = [folder.resolve().name or str(folder) for folder in folders]
    return [f"{name} ({place})" if names.count(name) > 1 else name for place, name in enumerate(names, start=1)]


def _outcome(run: Run) -> str:
    """Say how the last launch ended, without the local path of the run."""
    if not run.launches:
        return ""
    if not run.end:
        return "No end is recorded: it is still running, or it was killed."
    message = str(run.end.get("message") or "").replace(str(run.folder.resolve()), run.label)
    output = str(run.config.get("output") or "")
    return f"{run.end.get('outcome')}: {message.replace(output, run.label) if output else message}".rstrip(": ")


def _launch(launch: dict[str, Any]) -> dict[str, str]:
    """Return the facts of a launch by name, without local paths."""
    command = [str(word) for word in launch.get("command") or []]
    program = Path(command[0]).name if command else ""
    words = ["latentdiff" if program == "__main__.py" else program, *map(_word, command[1:])] if command else []
    versions = ", ".join(f"{name} {value}" for name, value in mapping(launch.get("versions")).items())
    end = mapping(launch.get("end"))
    facts = {"started": launch.get("time"), "ended": f"{end.get('time')}, {end.get('outcome')}" if end else None,
             "command": shlex.join(words), "device": launch.get("device"), "precision": launch.get("precision"),
             "processes": launch.get("processes"), "threads": launch.get("threads"), "Python": launch.get("python"),
             "versions": versions, "commit": launch.get("git")}  # fmt: skip
    return {name: str(value) for name, value in facts.items() if value not in (None, "")}


def _word(word: str) -> str:
    key, sign, value = word.partition("=")
    return f"{key}={without_folders(value)}" if sign else str(without_folders(word))


def _yaml(config: dict[str, Any]) -> str:
    shown = {key: without_folders(value) for key, value in config.items() if key != "output"}
    return yaml.safe_dump(shown, sort_keys=False, width=110, allow_unicode=True) if shown else ""


def _prompts(run: Run) -> list[str]:
    prompts = mapping(run.config.get("validation")).get("prompts")
    return [str(prompt) for prompt in prompts] if isinstance(prompts, list) else []


def _quality(run: Run) -> dict[int, str]:
    """Return PSNR and SSIM of held-out reconstructions by step."""
    stage = run.stages.get("train_vae")
    psnr, ssim = ({}, {}) if stage is None else (
        dict(zip(*stage.series(f"validation_{name}"), strict=True)) for name in ("psnr", "ssim"))  # fmt: skip
    return {step: f"PSNR {psnr[step]:.2f} dB, SSIM {ssim[step]:.3f}" for step in psnr.keys() & ssim.keys()}


def _counts(run: Run) -> list[str]:
    """Say how many steps were skipped and pictures broken in each stage that had any."""
    found = [(STAGES[name], what, stage.series(key)[1]) for name, stage in run.stages.items()
             for key, what in COUNTS.items()]  # fmt: skip
    return [f"{stage} training: {values[-1]:.0f} {what}." for stage, what, values in found if values and values[-1]]
