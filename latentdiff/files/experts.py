"""The UNets of a model on disk: `unet/`, or `unet/`, `unet_1/`, ... with a `bands.json` beside them for experts.

Stock diffusers would open `unet/` alone and draw most steps with a UNet that was not trained for them. So the
`model_index.json` of such a model names a pipeline that diffusers does not have.
"""

import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from unet import Denoiser, Experts, UNet
from unet.experts import edges_of

from ..errors import LatentDiffError, one_line, reraise_as
from .tensors import CONFIG, read_json, staged, to_json

BANDS = "bands.json"
PIPELINE = "TimestepExpertsPipeline"  # in model_index.json


def unet_folders(model: Path, number: int) -> list[Path]:
    """Return the folders of a number of UNets."""
    return [model / (f"unet_{index}" if index else "unet") for index in range(number)]


def read_edges(model: Path) -> tuple[int, ...] | None:
    """Return the edges 0, ..., T of the bands of a model's experts; None if it has a single UNet.

    Raises LatentDiffError unless there is a folder for each band, and no more.
    """
    path = model / BANDS
    if not path.is_file():
        return None
    edges: Any = read_json(path, "").get("edges")
    is_list = isinstance(edges, list) and len(edges) > 2 and all(type(edge) is int for edge in edges)
    if not is_list or edges[0] != 0 or any(below >= above for below, above in pairwise(edges)):
        raise LatentDiffError(f"{path}: edges={one_line(edges)}: expected increasing timesteps from 0 to the number of "
                              "timesteps, at least three")  # fmt: skip
    folders = unet_folders(model, len(edges) - 1)
    wrong = {**dict.fromkeys((each for each in folders if not each.is_dir()), "no such folder"),
             **dict.fromkeys(_further(model, len(folders)), "one folder too many")}  # fmt: skip
    for folder, what in wrong.items():
        raise LatentDiffError(f"{folder}: {what}; {path} has {len(folders)} bands, each with a UNet of its own")
    return tuple(edges)


def open_unet(
    folder: Path, *, device: torch.device | None = None, dtype: torch.dtype | None = None, variant: str | None = None
) -> Denoiser:
    """Open `unet/` of a model, with the other experts if there are any; raise LatentDiffError if something is wrong."""
    edges = read_edges(folder.parent) if folder.name == "unet" else None
    if edges is None:
        return UNet.from_pretrained(folder, device=device, dtype=dtype, variant=variant)
    folders = unet_folders(folder.parent, len(edges) - 1)
    unets = [UNet.from_pretrained(each, device=device, dtype=dtype, variant=variant) for each in folders]
    for each, unet in zip(folders, unets, strict=True):
        if unet.config != unets[0].config:
            raise LatentDiffError(f"{each / CONFIG}: differs from {folders[0] / CONFIG}; experts have one shape")
    return Experts(unets, edges).eval()


def save_unet(
    unet: Denoiser, model: Path, *, dtype: torch.dtype | None, variant: str | None, max_shard_bytes: int | None
) -> None:
    """Write a model's UNet or experts, in place of those that were there."""
    members = begin_unet(unet, model)
    for folder, each in zip(unet_folders(model, len(members)), members, strict=True):
        each.save_pretrained(folder, dtype=dtype, variant=variant, max_shard_bytes=max_shard_bytes)


def begin_unet(unet: Denoiser, model: Path) -> list[UNet]:
    """Write the bands of experts and remove what they do not need; return the UNets that are to be written."""
    members = unet.members if isinstance(unet, Experts) else [unet]
    with reraise_as(LatentDiffError, f"{model}: cannot be written", OSError):
        if (model / BANDS).is_file():
            for folder in _further(model, len(members)):
                shutil.rmtree(folder)
            (model / BANDS).unlink()
    if (edges := edges_of(unet)) is not None:
        with staged(model, BANDS) as staging:
            (staging / BANDS).write_text(to_json({"edges": list(edges)}), encoding="utf-8")
    return members


def begin_configs(unet: Denoiser, model: Path) -> None:
    """Write all but the weights, which checkpoints will hold; also delete weights of a save that was killed."""
    members = begin_unet(unet, model)
    for folder, each in zip(unet_folders(model, len(members)), members, strict=True):
        with UNet.files.staged(folder, None) as staging:
            (staging / CONFIG).write_text(to_json(each.config.to_diffusers()), encoding="utf-8")


def _further(model: Path, number: int) -> list[Path]:
    """The folders of UNets beyond a number of them."""
    found = [path for path in model.glob("unet_*") if re.fullmatch(r"unet_\d+", path.name) and path.is_dir()]
    return sorted(path for path in found if path not in unet_folders(model, number))
