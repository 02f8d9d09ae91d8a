"""What is computed of pictures is kept batch by batch, and a killed evaluation goes on from there."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files.tensors import staged

Compute: TypeAlias = Callable[[NDArray[np.uint8]], dict[str, Tensor]]


def kept(compute: Compute, folder: Path, facts: Sequence[str]) -> Compute:
    """Return `compute` with a memory in `folder`: pictures that it has seen are not seen again.

    A file is named after the pictures' bytes and `facts`, which name all else that the result depends on. One that
    cannot be read is written again. Raises LatentDiffError if one cannot be written.
    """

    def remembering(pictures: NDArray[np.uint8]) -> dict[str, Tensor]:
        hasher = hashlib.sha256("\n".join([*facts, str(pictures.shape)]).encode())
        hasher.update(pictures.tobytes())
        path = folder / f"{hasher.hexdigest()[:20]}.safetensors"
        try:
            return load_file(path)
        except (OSError, SafetensorError):
            found = compute(pictures)
        with staged(folder, path.name) as staging:
            save_file(found, staging / path.name)
        return found

    return remembering
