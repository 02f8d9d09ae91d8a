"""The commands for training: its stages, and what to run before them."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from .memory import keep_freed_memory

ConfigFile = Annotated[str, Option("--config", "-c", help="YAML file or recipe name, such as emoji-64.")]
Overrides = Annotated[list[str] | None, Argument(help="Settings to override, as section.key=value.")]
Budget = Annotated[str | None, Option(help="Wall-clock time until the model is finished: 90s, 10m or 1h30m.")]
DEFAULT = "emoji-64"


def stage(function: str, summary: str, recipe: str = DEFAULT) -> Callable[..., Iterator[object]]:
    """Return the command that runs a function of latentdiff/training/stages.py, by default on `recipe`."""

    def command(overrides: Overrides = None, config: ConfigFile = recipe, budget: Budget = None) -> Iterator[object]:
        from ..config import load_config
        from ..training import stages
        from ..training.launch import launched, process_start
        from ..training.stopped import stops_between_steps

        loaded = load_config(config, _settings(overrides, budget))
        with stops_between_steps(loaded.output), launched(loaded, None, process_start()) as run:
            keep_freed_memory(run.device)
            result = getattr(stages, function)(loaded, run)
        if isinstance(result, Path) and os.environ.get("RANK", "0") == "0":  # rank 0 prints for all processes
            yield result

    example = f"latentdiff {function.replace('_', '-')} --config emoji-64 data.source=my-pictures output=runs/mine"
    command.__doc__ = f"{summary}\n\nExample: {example}"
    return command


def _settings(overrides: list[str] | None, budget: str | None) -> list[str]:
    return [*(overrides or ()), *([f"budget={budget}"] if budget else ())]


def plan(
    overrides: Overrides = None,
    config: ConfigFile = DEFAULT,
    device: Annotated[str, Option(help="GPU name, such as h100, or cpu for this machine.")] = "cpu",
    num_devices: Annotated[int, Option("--devices", help="Number of devices.")] = 1,
    dataset_size: Annotated[int | None, Option("--pictures", help="Training images; counted under a budget.")] = None,
    mfu: Annotated[float | None, Option(help="Share of peak FLOP/s that training reaches, 0 to 1.")] = None,
    budget: Budget = None,
) -> Iterator[str]:
    """Count a run's parameters and FLOPs; estimate its memory and time, or what a budget buys.

    Example: latentdiff plan --config emoji-256 --device h100 --devices 8
    """
    from ..config import load_config
    from ..plan import plan

    loaded = load_config(config, _settings(overrides, budget))
    yield from plan(loaded, device=device, num_devices=num_devices, dataset_size=dataset_size, mfu=mfu).lines()


def data_check(
    source: Annotated[str, Argument(help="Folder, Parquet or tar files, Hub name, or builtin:emoji-mini.")],
    overrides: Overrides = None,
    config: ConfigFile = DEFAULT,
    output: Annotated[Path, Option(help="Output folder of these three files.")] = Path("data-check"),
) -> Iterator[str]:
    """Check every image; write a report, contact sheet and quarantine list.

    Example: latentdiff data check my-pictures --config emoji-64
    """
    from ..config import load_config
    from ..data.check import check_source
    from ..data.left_out import LeftOut
    from ..data.sources import open_source
    from ..training.stages import open_text_encoder

    loaded = load_config(config, [*(overrides or ()), f"data.source={source}"])
    train = open_source(loaded.data, LeftOut())[0]  # what is left out is part of the report
    tokenizer = open_text_encoder(loaded, train).tokenizer  # the one that training would use
    tokenizer.model_max_length = loaded.text_encoder.max_length
    yield from check_source(loaded.data, output, tokenizer).lines()


def schema() -> Iterator[str]:
    """Print the JSON schema of the configuration, for editors.

    Example: latentdiff schema
    """
    from ..config import Config

    yield json.dumps(Config.model_json_schema(), indent=2)
