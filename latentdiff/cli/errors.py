"""How commands fail and warn: a user's mistake is reported in one line, never as a traceback."""

import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import typer

from ..errors import LatentDiffError

OURS = ("latentdiff.", "unet.", "vae.", "text_encoder.")
PACKAGE = Path(__file__).parents[1]


def visible(text: str) -> str:
    """Escape control characters but newlines: names and headers in strangers' files must not reach the terminal."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", lambda found: found[0].encode("unicode_escape").decode(), text)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show our warnings without file and line, which say nothing to users of the command line."""
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(
            message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
            line: str | None = None,
        ) -> None:  # fmt: skip
            if category.__module__.startswith(OURS) or Path(filename).is_relative_to(PACKAGE):
                typer.echo(visible(f"warning: {message}"), err=True)
            else:
                others(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn a user's mistake into one line and exit code 1, and a requested stop into 128 + the signal number.

    Our own warnings become one line each.
    """
    message, code = "", 1
    try:
        with _plain_warnings():
            yield
        return
    except BrokenPipeError:  # `latentdiff ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (LatentDiffError, OSError) as error:  # such as a full disk or a deleted folder
        code = getattr(error, "exit_code", 1)
        if code == 1 or os.environ.get("RANK", "0") == "0":  # every process stops, only rank 0 reports it
            message = str(error)
    except RuntimeError as error:
        on_cpu = str(error).find("DefaultCPUAllocator")  # running out of CPU memory has no error class of its own
        if type(error).__name__ != "OutOfMemoryError" and on_cpu < 0:  # by name: importing torch takes seconds
            raise
        reason = str(error)[max(0, on_cpu) :].split(". ")[0]
        message = (
            f"{reason}. Training needs less memory with train_latent.micro_batch_size=1 (or train_vae...) and "
            "train_latent.gradient_checkpointing=true (`latentdiff plan` estimates how much); sampling, with a smaller "
            "size or --precision bf16"
        )
    except KeyboardInterrupt:
        code = 130
    if message:
        typer.echo(visible(f"error: {message}" if code == 1 else message), err=True)
    raise SystemExit(code)
