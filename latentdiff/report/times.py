"""Where a run's time went, from the lines of its logs."""

from dataclasses import dataclass

from .run import STAGES, Run, Stage, mapping, number

PARTS = {"time_data": "steps: reading pictures", "time_model": "steps: forward and backward passes",
         "time_optimizer": "steps: optimizer", "time_other": "steps: the rest"}  # fmt: skip
VALIDATION, SAVING = "validation and previews", "checkpoints, restarts and the rest"


@dataclass(frozen=True)
class Spent:
    """Seconds of one part of a run."""

    stage: str
    part: str
    seconds: float


def times(run: Run) -> list[Spent]:
    """Return the parts of a run's time in order; a log without `seconds` has only those of its steps."""
    spent: list[Spent] = []
    clock = 0.0
    for name, stage in run.stages.items():
        batch = number(mapping(run.config.get(name)).get("batch_size"))
        began, ended = _span(stage)
        what = "start: imports, pictures, caches" if not spent else "between the stages: finishing the VAE, caches"
        if began is not None and began > clock:
            spent.append(Spent("", what, began - clock))
        parts = _steps(stage, batch) | {VALIDATION: _validation(stage)}
        if began is not None and ended is not None:
            parts[SAVING] = ended - began - sum(parts.values())
            clock = ended
        spent += [Spent(STAGES[name], part, seconds) for part, seconds in parts.items() if seconds > 0]
    end = number(run.end.get("seconds"))
    if end is not None and 0 < clock < end:
        spent.append(Spent("", "end: saving the model", end - clock))
    return spent


def _span(stage: Stage) -> tuple[float | None, float | None]:
    seconds = stage.series("seconds")[1]
    return (min(seconds), max(seconds)) if seconds else (None, None)


def _steps(stage: Stage, batch: float | None) -> dict[str, float]:
    """Seconds of the steps, by part: each line has the pictures per second since the last one, and shares."""
    parts, before = dict.fromkeys(PARTS.values(), 0.0), 0
    for line in stage.lines:
        rate = number(line.get("pictures_per_second"))
        if rate and rate > 0 and batch:
            for key, part in PARTS.items():
                parts[part] += (number(line.get(key)) or 0.0) * (line["step"] - before) * batch / rate
            before = line["step"]
    return parts


def _validation(stage: Stage) -> float:
    """Seconds between the lines of validations and the lines of training before them, if these are of the same step."""
    total, before = 0.0, None
    for line in stage.lines:
        now = number(line.get("seconds"))
        if now is not None and any(key.startswith("validation") for key in line):
            total += max(0.0, now - before[1]) if before and before[0] == line["step"] else 0.0
        before = (line["step"], now) if now is not None else before
    return total
