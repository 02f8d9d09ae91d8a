"""A process that has imported what the commands need, and runs each of them in a fork of itself; it reads and writes
lines of JSON. Started by test_refusals.py.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path

import diffusers  # noqa: F401 (these are imported once, so that a fork shows what a command itself takes)
import pyarrow.parquet  # noqa: F401

from latentdiff import config  # noqa: F401
from latentdiff.cli import main
from latentdiff.data import check  # noqa: F401
from latentdiff.evaluation import grid  # noqa: F401
from latentdiff.files import foreign, inspect  # noqa: F401
from latentdiff.sampling import pipeline  # noqa: F401
from latentdiff.training import stages  # noqa: F401


def run(arguments: list[str], folder: Path) -> dict[str, object]:
    """Run a command; return its exit code, what it wrote, its seconds and its largest memory in MiB."""
    began, child = time.monotonic(), os.fork()
    if child == 0:
        command(arguments, folder)
    _, status, usage = os.wait4(child, 0)
    seconds, written = time.monotonic() - began, [(folder / name).read_text() for name in ("stdout", "stderr")]
    return {"code": os.waitstatus_to_exitcode(status), "stdout": written[0], "stderr": written[1],
            "seconds": seconds, "cpu": usage.ru_utime + usage.ru_stime, "MiB": usage.ru_maxrss / 1024}  # fmt: skip


def command(arguments: list[str], folder: Path) -> None:
    """Be the command line; never returns."""
    code = 0
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    try:
        if arguments:
            sys.argv = ["latentdiff", *arguments]
            main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:  # a bug, which the test will show
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    for line in sys.stdin:
        answer = run(json.loads(line), Path(sys.argv[1]))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
