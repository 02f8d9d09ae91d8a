"""How commands end: a user's mistake is one line, never a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import typer

from text_encoder import TextEncoderError
from unet import UNetError
from vae import VAEError

from ..errors import LatentDiffError


@contextmanager
def plain_errors() -> Iterator[None]:
    """A user's mistake is one line and exit code 1; a stop that was asked for is 128 + the signal."""
    try:
        yield
    except (LatentDiffError, VAEError, UNetError, TextEncoderError) as error:
        code = getattr(error, "exit_code", 1)
        if code == 1 or os.environ.get("RANK", "0") == "0":  # every process stops, one says so
            typer.echo(f"error: {error}" if code == 1 else str(error), err=True)
        raise SystemExit(code) from None
    except BrokenPipeError:  # `latentdiff ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except RuntimeError as error:
        on_cpu = str(error).find("DefaultCPUAllocator")  # which has no error class of its own
        if not isinstance(error, torch.OutOfMemoryError) and on_cpu < 0:
            raise
        reason = str(error)[max(0, on_cpu) :].split(". ")[0]
        typer.echo(f"error: {reason}. A training takes less with train_latent.micro_batch_size=1 (or train_vae...) and "
                   "train_latent.gradient_checkpointing=true (`latentdiff plan` estimates it); drawing with a smaller "
                   "size, or --precision bf16", err=True)  # fmt: skip
        raise SystemExit(1) from None
    except OSError as error:  # a full disk, a folder that went away
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
