"""What is computed of pictures is kept batch by batch, and a killed evaluation goes on from there."""

import hashlib
import os
import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

Compute: TypeAlias = Callable[[NDArray[np.uint8]], dict[str, Tensor]]
NAME = re.compile(r"[0-9a-f]{20}\.(safetensors|\d+)")  # of a file; what is not complete ends in the writer's process


def kept(compute: Compute, folder: Path, facts: str) -> Compute:
    """Return `compute` with a memory in `folder`: pictures that it has seen are not seen again.

    A file is named after the pictures' bytes and `facts`, which tell apart all else that the result depends on. One
    that cannot be read is written again; where one cannot be written, a warning says so.
    """

    def remembering(pictures: NDArray[np.uint8]) -> dict[str, Tensor]:
        name = hashlib.sha256(f"{facts} {pictures.shape}".encode() + pictures.tobytes()).hexdigest()[:20]
        path = folder / f"{name}.safetensors"
        with suppress(OSError, SafetensorError):
            return load_file(path)
        found = compute(pictures)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(found, unfinished := path.with_suffix(f".{os.getpid()}"))
            os.replace(unfinished, path)
        except (OSError, SafetensorError) as error:
            warnings.warn(
                f"{folder}: not all is kept, so that a killed evaluation would lose it ({error})", stacklevel=2
            )
        return found

    return remembering


def forget(folder: Path) -> None:
    """Remove the files of `kept`, and the folder if nothing else is in it."""
    with suppress(OSError):
        for path in folder.iterdir():
            if NAME.fullmatch(path.name):
                path.unlink(missing_ok=True)
        folder.rmdir()
