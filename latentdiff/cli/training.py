"""The commands of a training: its stages, and what to ask before them."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

ConfigFile = Annotated[str, Option("--config", "-c", help="YAML file, or the name of a recipe such as emoji-64.")]
Overrides = Annotated[list[str] | None, Argument(help="section.key=value, as many as wanted.")]
DEFAULT = "emoji-64"


def stage(function: str, about: str, recipe: str = DEFAULT) -> Callable[..., Iterator[object]]:
    """The command that runs a function of latentdiff/training/stages.py.

    Args:
        function: its name.
        about: what it does, for the help.
        recipe: what is trained without `--config`.
    """

    def command(overrides: Overrides = None, config: ConfigFile = recipe) -> Iterator[object]:
        from ..config import load_config
        from ..training import stages

        made = getattr(stages, function)(load_config(config, overrides or ()))
        if isinstance(made, Path) and os.environ.get("RANK", "0") == "0":  # of several processes one says so
            yield made

    example = f"latentdiff {function.replace('_', '-')} --config emoji-64 data.source=my-pictures output=runs/mine"
    command.__doc__ = f"{about}\n\nExample: {example}"
    return command


def plan(
    overrides: Overrides = None,
    config: ConfigFile = DEFAULT,
    device: Annotated[str, Option(help="A GPU by name, such as h100, or cpu: this machine.")] = "cpu",
    num_devices: Annotated[int, Option("--devices", help="How many of them.")] = 1,
    dataset_size: Annotated[int | None, Option("--pictures", help="In the data set, for the cache's size.")] = None,
    mfu: Annotated[float | None, Option(help="Share of the peak FLOP/s that training reaches.")] = None,
) -> Iterator[str]:
    """Parameters, FLOPs, and estimates of memory and time for a training, before it is launched.

    Example: latentdiff plan --config emoji-256 --device h100 --devices 8
    """
    from ..config import load_config
    from ..plan import plan

    loaded = load_config(config, overrides or ())
    yield from plan(loaded, device=device, num_devices=num_devices, dataset_size=dataset_size, mfu=mfu).lines()


def data_check(
    source: Annotated[str, Argument(help="Folder, Parquet or tar files, hub name, or builtin:emoji-mini.")],
    overrides: Overrides = None,
    config: ConfigFile = DEFAULT,
    output: Annotated[Path, Option(help="For the report, a contact sheet, a quarantine list.")] = Path("data-check"),
) -> Iterator[str]:
    """Count, measure and open every picture; write a report, a contact sheet and a quarantine list.

    Example: latentdiff data check my-pictures --config emoji-64
    """
    from ..config import load_config
    from ..data.check import check_source
    from ..data.sources import open_source
    from ..training.stages import open_text_encoder

    loaded = load_config(config, [*(overrides or ()), f"data.source={json.dumps(source)}"])
    tokenizer = open_text_encoder(loaded, open_source(loaded.data)[0]).tokenizer  # what training would use
    tokenizer.model_max_length = loaded.text_encoder.max_length
    yield from check_source(loaded.data, output, tokenizer).lines()


def schema() -> Iterator[str]:
    """Print the JSON schema of the configuration, for editors.

    Example: latentdiff schema
    """
    from ..config import Config

    yield json.dumps(Config.model_json_schema(), indent=2)
