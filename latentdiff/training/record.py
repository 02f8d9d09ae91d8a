"""The record of a run, `run.json`: each launch with its config, versions and device, and how it ended; its report."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import latentdiff

from .stopped import Stopped

LIBRARIES = ("torch", "accelerate", "transformers", "tokenizers", "datasets", "safetensors", "numpy", "pillow")
RECORD = "run.json"


def begin_record(folder: Path, facts: dict[str, Any]) -> None:
    """Append a launch to run.json: `facts` such as its config, and the versions, command and commit."""
    record = {
        "command": sys.argv,
        "time": now(),
        **facts,
        "versions": {"latentdiff": latentdiff.__version__, **{name: version(name) for name in LIBRARIES}},
        "python": platform.python_version(),
        "git": _git_state(),
    }
    write_json(folder / RECORD, {"launches": [*_launches(folder), record]})


def end_record(
    folder: Path, error: BaseException | None, seconds: float, say: Callable[[str], None], *, report: bool,
    trained: Iterable[str] = (),
) -> None:  # fmt: skip
    """Add to the last launch in run.json how it ended, and write the run's report; if that fails, only warn.

    `trained` are the stages that it began or went on with. A run that failed before it ever trained, such as one whose
    pictures do not exist, has no report.
    """
    end = {"outcome": _outcome(error), "message": str(error or ""), "time": now(), "seconds": seconds,
           "trained": sorted(trained)}  # fmt: skip
    try:
        if launches := _launches(folder):
            write_json(folder / RECORD, {"launches": [*launches[:-1], launches[-1] | {"end": end}]})
        if report and (error is None or any(folder.glob("*/log.jsonl"))):
            from ..report.page import write_report

            say(f"report: {write_report([folder])}")
    except (Exception, KeyboardInterrupt) as problem:  # whatever it is, the training has its own outcome
        say(f"warning: the report could not be written ({type(problem).__name__}: {problem})")


def write_json(path: Path, values: object) -> None:
    """Write a JSON file as a whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def now() -> str:
    """Return the date and time in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _outcome(error: BaseException | None) -> str:
    if error is None:
        return "finished"
    asked = isinstance(error, KeyboardInterrupt) or (isinstance(error, Stopped) and error.exit_code != 1)
    return "stopped" if asked else "failed"


def _launches(folder: Path) -> list[dict[str, Any]]:
    try:
        return list(json.loads((folder / RECORD).read_text(encoding="utf-8"))["launches"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _git_state() -> str | None:
    """Commit of the running checkout, with `-dirty` if files were changed; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
