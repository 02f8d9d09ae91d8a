"""`latentdiff report`: one page about a run, or several compared."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from typer import Argument, Option


def report(
    runs: Annotated[list[Path], Argument(metavar="RUN [OTHER...]", help="Outputs of trainings, or models' folders.")],
    output: Annotated[Path | None, Option("--output", "-o", help="File to write; default: RUN/report.html.")] = None,
    watch: Annotated[bool, Option("--watch", help="Write it again and again until the first run has ended.")] = False,
    every: Annotated[float, Option(min=1, help="Seconds between two writings under --watch.")] = 30,
) -> Iterator[str]:
    """Write one self-contained page: what was trained, how it went, what came out.

    Example: latentdiff report runs/mine
    """
    from ..report.page import write_report
    from ..report.run import has_ended

    folders = [run.expanduser() for run in runs]
    running = watch and not has_ended(folders[0])
    yield f"report written to {write_report(folders, output, every if running else None)}"
    while running:
        time.sleep(every)
        running = not has_ended(folders[0])
        write_report(folders, output, every if running else None)
