"""How commands end: a user's mistake is one line, never a traceback."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from ..errors import LatentDiffError


@contextmanager
def plain_errors() -> Iterator[None]:
    """A user's mistake is one line and exit code 1; a stop that was asked for is 128 + the signal."""
    said, code = "", 1
    try:
        yield
        return
    except BrokenPipeError:  # `latentdiff ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (LatentDiffError, OSError) as error:  # such as a full disk, a folder that went away
        code = getattr(error, "exit_code", 1)
        if code == 1 or os.environ.get("RANK", "0") == "0":  # every process stops, one says so
            said = str(error)
    except RuntimeError as error:
        on_cpu = str(error).find("DefaultCPUAllocator")  # which has no error class of its own
        if type(error).__name__ != "OutOfMemoryError" and on_cpu < 0:  # torch's, known by name: torch loads for seconds
            raise
        reason = str(error)[max(0, on_cpu) :].split(". ")[0]
        said = (
            f"{reason}. A training takes less with train_latent.micro_batch_size=1 (or train_vae...) and "
            "train_latent.gradient_checkpointing=true (`latentdiff plan` estimates it); drawing with a smaller size, "
            "or --precision bf16"
        )
    except KeyboardInterrupt:
        code = 130
    if said:
        typer.echo(f"error: {said}" if code == 1 else said, err=True)
    raise SystemExit(code)
