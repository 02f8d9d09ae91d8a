"""What a run's folder holds, read so that missing and broken files become sentences in the report, never exceptions."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files.launches import last_launch

STAGES = {"train_vae": "VAE", "train_latent": "latent"}
PREVIEWS = {"train_vae": "reconstructions", "train_latent": "samples"}
RESULTS = (".", "evaluation", "model")  # where the results of `latentdiff evaluate` and `likelihood` are looked for
STEP = re.compile(r"step-(\d{1,15})\.png")
MAX_STEP = 2**53


@dataclass(frozen=True)
class Stage:
    """One stage's log."""

    lines: list[dict[str, Any]]  # in the order of steps

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Return the steps and values of the lines that have a finite number under `key`."""
        found = [(line["step"], value) for line in self.lines if (value := number(line.get(key))) is not None]
        return [step for step, _ in found], [value for _, value in found]

    def names(self) -> list[str]:
        """Return the names of everything with a finite number, in the order in which they first appear."""
        return list(dict.fromkeys(key for line in self.lines for key in line if number(line[key]) is not None))


@dataclass
class Run:
    """A run, or a model's folder without one, as far as it can be read."""

    folder: Path
    label: str
    problems: list[str] = field(default_factory=list)
    launches: list[dict[str, Any]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, Stage] = field(default_factory=dict)
    vae_report: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    likelihood: Any = None
    drawn: list[dict[str, Any]] = field(default_factory=list)

    @property
    def config(self) -> dict[str, Any]:
        """The config of the last launch that counts."""
        return mapping(last_launch(self.launches).get("config"))

    @property
    def end(self) -> dict[str, Any]:
        """How the last launch that counts ended; empty if it goes on, or died without a word."""
        return mapping(last_launch(self.launches).get("end"))

    def result(self, name: str) -> Path | None:
        """Return the file of a result, or None if there is none."""
        return next((path for place in RESULTS if (path := self.folder / place / name).is_file()), None)

    def previews(self, stage: str) -> list[tuple[int, Path]]:
        """Return the pictures that a stage wrote at its validations: step and file."""
        folder = self.folder / stage / PREVIEWS[stage]
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
        return sorted((int(found[1]), path) for path in paths if (found := STEP.fullmatch(path.name)))


def read_run(folder: Path, label: str) -> Run:
    """Read all but pictures and weights."""
    run = Run(folder, label)
    record = mapping(_json(run, "run.json"))
    run.launches = [launch for launch in sequence(record.get("launches")) if isinstance(launch, dict)]
    if not run.launches:
        run.problems.append("run.json is missing or holds no launch: how this was trained is not known.")
    run.data = mapping(_json(run, "data.json"))
    run.vae_report = mapping(_json(run, "vae/report.json"))
    run.stages = {name: Stage(lines) for name in STAGES
                  if (lines := _log(run, f"{name}/log.jsonl"))}  # fmt: skip
    if not run.stages:
        run.problems.append("There is no log of a training that can be read.")
    for name in ("evaluation.json", "likelihood.json"):
        if (path := run.result(name)) is not None:
            setattr(run, name.removesuffix(".json"), _json(run, path.relative_to(folder)))
    run.evaluation = mapping(run.evaluation)
    if (path := run.result("drawn.jsonl")) is not None:
        run.drawn = list(_objects(run, path.relative_to(folder)))
    return run


def has_ended(folder: Path) -> bool:
    """Whether the last launch of a run has ended by itself; one that was killed has not."""
    return bool(read_run(folder, "").end)


def mapping(value: Any) -> dict[str, Any]:
    """Return a JSON object as it is, and anything else as an empty one."""
    return value if isinstance(value, dict) else {}


def sequence(value: Any) -> list[Any]:
    """Return a JSON array as it is, and anything else as an empty one."""
    return value if isinstance(value, list) else []


def number(value: Any) -> float | None:
    """Return a finite number as a float, and anything else as None."""
    try:
        return float(value) if type(value) in (int, float) and math.isfinite(value) else None
    except OverflowError:
        return None


def _json(run: Run, name: str | Path) -> Any:
    path = run.folder / name
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        run.problems.append(f"{name} cannot be read ({type(error).__name__}); it was left out.")
        return None


def _objects(run: Run, name: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file with one on each line, and note how many lines are something else."""
    broken = 0
    try:
        with (run.folder / name).open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError):
                    value = None
                if isinstance(value, dict):
                    yield value
                else:
                    broken += bool(line.strip())
    except OSError as error:
        run.problems.append(f"{name} cannot be read to its end ({type(error).__name__}).")
    if broken:
        run.problems.append(f"{name}: {broken} line{'s are' if broken > 1 else ' is'} broken and left out.")


def _log(run: Run, name: str) -> list[dict[str, Any]]:
    if not (run.folder / name).is_file():
        return []
    lines, strange = [], 0
    for line in _objects(run, name):
        step = number(line.get("step"))
        if step is not None and 0 <= step <= MAX_STEP:
            lines.append(line | {"step": int(step)})
        else:
            strange += 1
    if strange:
        run.problems.append(f"{name}: {strange} line{'s have' if strange > 1 else ' has'} no step and were left out.")
    if not lines:
        run.problems.append(f"{name} holds no line that can be read.")
    infinite = sum(type(value) is float and not math.isfinite(value) for line in lines for value in line.values())
    if infinite:
        run.problems.append(f"{name}: {infinite} values are not finite and not drawn.")
    return sorted(lines, key=lambda line: line["step"])
