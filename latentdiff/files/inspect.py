"""`latentdiff inspect`: what a model or file contains, read from configs and headers, and one tensor at a time."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..assets import INDEX
from ..errors import LatentDiffError, one_line, several
from .experts import read_edges, unet_folders
from .foreign import kind_of
from .open import find_model, read_json
from .single_file import MAX_HEADER
from .tensors import FLOATS, Stored, open_file
from .unfinished import newest_average, unfinished_run

SHOWN_KEYS = (
    *("_class_name", "architectures", "block_out_channels", "layers_per_block", "latent_channels", "scaling_factor"),
    *("cross_attention_dim", "sample_size", "hidden_size", "num_hidden_layers", "vocab_size", "prediction_type"),
    *("beta_schedule", "num_train_timesteps", "timestep_spacing", "rescale_betas_zero_snr"),
)
LIMIT = 60  # characters shown of a header value


def describe(name: str | Path) -> list[str]:
    """Describe a model folder, a training output or a `.safetensors` file, line by line."""
    path = Path(name)
    if path.suffix == ".safetensors" and path.is_file():
        return [str(path), *describe_file(path, alone=True)]
    folder = find_model(name)
    if (run := unfinished_run(folder)) is not None:
        return [f"{run}: its model is not finished", *_describe_unfinished(run)]
    lines = [str(folder)]
    if (folder / INDEX).is_file():
        lines[0] += f": {one_line(read_json(folder / INDEX, '').get('_class_name'))}"
    lines += _describe_bands(folder)
    for part in (folder, *_folders(folder)):
        lines += _describe_part(part)
    if len(lines) == 1:
        raise LatentDiffError(f"{folder}: not a model; found neither {INDEX} nor .safetensors files")
    return lines


def describe_file(path: Path, *, alone: bool = False) -> list[str]:
    """Describe the tensors, parameter counts, dtypes and metadata of one safetensors file, part of a folder or alone.

    Its tensors are read one at a time, to name those with values that are not finite.
    """
    tensors, header = open_file(path, limit=MAX_HEADER)
    counts: Counter[str] = Counter()
    for tensor in tensors.values():
        counts[tensor.dtype] += math.prod(tensor.shape)
    totals = ", ".join(f"{count:,} {dtype}" for dtype, count in counts.most_common())
    mib = path.stat().st_size / 2**20
    wrong = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    finite = "" if wrong or not tensors else ", all finite"
    lines = [f"  {path.name}: {len(tensors)} tensors, {totals or 'empty'}, {mib:,.1f} MiB{finite}"]
    if alone and (kind := kind_of(tensors)) is not None:
        lines.append(f"    this is {kind}")
    if wrong:
        lines.append(f"    not finite: {len(wrong)} of the tensors: {several(wrong)}")
    for key, value in sorted(header.items()):
        shown = value if len(value) <= LIMIT else f"{value[:LIMIT]}… ({len(value):,} characters)"
        lines.append(f"    {one_line(key)}: {one_line(shown)}")
    return lines


def _is_finite(tensor: Stored) -> bool:
    return tensor.dtype not in FLOATS or bool(tensor.file.get_tensor(tensor.name).isfinite().all())


def _describe_unfinished(run: Path) -> Iterator[str]:
    """Describe what there is of a run's model, and the checkpoint that stands in for the rest."""
    yield from _describe_bands(run / "model")
    for part in _folders(run / "model") or [run / "vae"]:
        yield from _describe_part(part)
    try:
        average = newest_average(run)
    except LatentDiffError as missing:
        yield str(missing)
        return
    yield f"{average.file.parent.relative_to(run)}/: the averaged weights of {average.progress}"
    yield from describe_file(average.file)
    yield from average.damages


def _describe_bands(model: Path) -> Iterator[str]:
    """Say which UNet is for which timesteps, if there are several."""
    if (edges := read_edges(model)) is not None:
        bands = zip(unet_folders(model, len(edges) - 1), pairwise(edges), strict=True)
        yield "experts: " + ", ".join(f"{path.name}/ for t = {a} to {b - 1}" for path, (a, b) in bands)


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _describe_part(part: Path) -> Iterator[str]:
    configs = [part / file for file in ("config.json", "scheduler_config.json") if (part / file).is_file()]
    weights = sorted(part.glob("*.safetensors"))
    if configs or weights:
        yield f"{part.name}/"
    for config in configs:
        values: dict[str, Any] = read_json(config, "")
        yield "  " + ", ".join(f"{key} {json.dumps(values[key])}" for key in SHOWN_KEYS if values.get(key) is not None)
    for path in weights:
        yield from describe_file(path)
