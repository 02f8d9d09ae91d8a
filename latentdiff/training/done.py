"""The record of a finished stage, `done.json` in the folder that it wrote."""

import json
import math
import os
from pathlib import Path
from typing import Any

from ..errors import LatentDiffError
from .fingerprint import first_difference
from .launch import Launch

ORIGIN = "ema.json"  # in a model that `latentdiff ema` has written: what it was computed from


def find_done(
    folder: Path, settings: dict[str, Any], run: Launch, *, steps: int = 0, budget: float | None = None
) -> dict[str, Any] | None:
    """Return the record of a stage that took at least `steps` or, with a budget in seconds, that had it; else None.

    Raises LatentDiffError if the stage was run with other settings.
    """
    try:
        done: dict[str, Any] = json.loads((folder / "done.json").read_text(encoding="utf-8"))
        before, taken = done["facts"], done["steps"]
    except (OSError, ValueError, KeyError):
        return None
    difference = first_difference(before, {name: now for name, now in settings.items() if name != "precision"})
    if difference is not None:
        name, previous, new = difference
        raise LatentDiffError(
            f"{folder}: was made with {name}={previous!r}, but it is now {new!r}; choose another `output`, "
            "or delete the folder and its checkpoints to start over"
        )
    if budget is None:
        return done if taken >= steps else None
    return done if (done.get("budget") or math.inf) >= budget else None


def mark_done(folder: Path, settings: dict[str, Any], steps: int | None, run: Launch, *, shared: bool = False) -> None:
    """Record that a stage is finished; `shared`: what is left of the budget is for another stage."""
    if run.is_main:
        partial = folder / "done.json.partial"
        seconds = run.clock.elapsed() if shared else 0.0
        record = {"steps": steps, "budget": run.budget, "seconds": seconds, "facts": settings}
        partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, folder / "done.json")
    run.accelerator.wait_for_everyone()
