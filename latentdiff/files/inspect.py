"""What is this file? Sizes, parameters, configs, prediction type, read from headers; no weights are loaded."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..assets import INDEX
from ..errors import LatentDiffError
from .open import find_model, read_json
from .single_file import MAX_HEADER
from .tensors import open_file

# Keys of the configs that say most, by part.
TELLING = (
    *("_class_name", "architectures", "block_out_channels", "layers_per_block", "latent_channels", "scaling_factor"),
    *("cross_attention_dim", "sample_size", "hidden_size", "num_hidden_layers", "vocab_size", "prediction_type"),
    *("beta_schedule", "num_train_timesteps", "timestep_spacing", "rescale_betas_zero_snr"),
)
LONG = 60  # letters of a header value that are shown


def describe(name: str | Path) -> list[str]:
    """Lines about a model's folder, a training's output or a `.safetensors` file.

    Raises:
        LatentDiffError: nothing of that name, or it is damaged.
    """
    path = Path(name)
    if path.suffix == ".safetensors" and path.is_file():
        return [str(path), *describe_file(path)]
    folder = find_model(name)
    lines = [str(folder)]
    if (folder / INDEX).is_file():
        lines[0] += f": {read_json(folder / INDEX, '').get('_class_name')}"
    parts = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    for part in parts:
        lines += _describe_part(part)
    if len(lines) == 1:
        raise LatentDiffError(f"{folder}: neither a model's folder ({INDEX}) nor one with .safetensors files")
    return lines


def describe_file(path: Path) -> list[str]:
    """Tensors, parameters, dtypes and header of one safetensors file.

    Raises:
        LatentDiffError: damaged, or no safetensors file.
    """
    tensors, header = open_file(path, limit=MAX_HEADER)
    numbers: Counter[str] = Counter()
    for tensor in tensors.values():
        numbers[tensor.dtype] += math.prod(tensor.shape)
    kinds = ", ".join(f"{count:,} {dtype}" for dtype, count in numbers.most_common())
    mib = path.stat().st_size / 2**20
    lines = [f"  {path.name}: {len(tensors)} tensors, {kinds or 'empty'}, {mib:,.1f} MiB"]
    for key, value in sorted(header.items()):
        lines.append(f"    {key}: {value if len(value) <= LONG else value[:LONG] + f'… ({len(value):,} letters)'}")
    return lines


def _describe_part(part: Path) -> Iterator[str]:
    configs = [part / file for file in ("config.json", "scheduler_config.json") if (part / file).is_file()]
    weights = sorted(part.glob("*.safetensors"))
    if configs or weights:
        yield f"{part.name}/"
    for config in configs:
        values: dict[str, Any] = read_json(config, "")
        yield "  " + ", ".join(f"{key} {json.dumps(values[key])}" for key in TELLING if values.get(key) is not None)
    for path in weights:
        yield from describe_file(path)
