"""The model card: what the model is, how it was made, how good it is. Only what is known from its files."""

import json
import re
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml
from torch import nn

from ..diffusion.process import Process

HEADER = (Path(__file__).parent / "card.md").read_text(encoding="utf-8")


def model_card(
    parts: Mapping[str, nn.Module],
    process: Process,
    *,
    title: str,
    image_size: int,
    run: Path | None = None,
    license: str = "other",
    data: str = "",
) -> str:
    """The card as Markdown.

    Args:
        parts: `vae`, `unet` and `text_encoder`.
        process: how the model denoises.
        title: its name.
        image_size: pixels along one side.
        run: output of the training, for recipe, seed, versions and figures.
        license: of the weights, as the hub spells licenses.
        data: what is to be said of the pictures and their license.
    """
    launch = _last_launch(run)
    prompts = launch.get("config", {}).get("validation", {}).get("prompts") or ["what to draw"]
    encoder = type(getattr(parts["text_encoder"], "model", parts["text_encoder"])).__name__.removesuffix("Model")
    text = HEADER.format(
        license=json.dumps(license), title=title, name=title, size=image_size, encoder=encoder, prompt=prompts[0]
    )
    text += "\n## Parts\n\n| part | parameters |\n|---|---|\n"
    for name, part in parts.items():
        text += f"| {name} | {sum(parameter.numel() for parameter in part.parameters()):,} |\n"
    curve = process.schedule.name
    text += (
        f"\n{process.schedule.num_timesteps} timesteps, {curve.name if curve else 'its own'} noise schedule"
        f"{', zero terminal SNR' if process.schedule.has_zero_terminal_snr else ''}; the UNet predicts "
        f"{process.prediction}.\n"
    )
    if launch:
        text += _training(launch) + _figures(run)
    return text + f"\n## Data and license\n\n{data or 'Not stated by whoever exported this model.'}\n"


def _training(launch: Mapping[str, Any]) -> str:
    """Recipe, seed and versions; paths and host names of the machine stay there."""
    config = {key: _without_folders(value) for key, value in launch["config"].items()
              if key not in ("output", "trackers", "workers")}  # fmt: skip
    versions = ", ".join(f"{name} {version}" for name, version in launch.get("versions", {}).items())
    recipe = yaml.safe_dump(config, sort_keys=False, width=110)
    return (
        f"\n## Training\n\nSeed {config.get('seed')}, {config.get('precision')} precision; "
        f"{versions or 'versions unknown'}. The whole configuration:\n\n```yaml\n{recipe}```\n"
    )


def _without_folders(value: Any) -> Any:
    """Paths, wherever they are in a config, as their last part."""
    if isinstance(value, Mapping):
        return {key: _without_folders(inner) for key, inner in value.items()}
    is_path = isinstance(value, str) and re.match(r"[/~.\\]|[A-Za-z]:[/\\]", value)
    return PureWindowsPath(value).name if is_path else value


def _figures(run: Path | None) -> str:
    lines = []
    for stage in ("train_vae", "train_latent"):
        last = _last_validation(run, stage)
        lines += [f"| {stage} | {key.removeprefix('validation_')} | {value:.4g} |" for key, value in last.items()]
    if not lines:
        return ""
    table = "\n".join(lines)
    head = "\n## Figures\n\nOn pictures held out of training, at the last validation.\n\n"
    return f"{head}| stage | figure | value |\n|---|---|---|\n{table}\n"


def _last_launch(run: Path | None) -> dict[str, Any]:
    try:
        values = json.loads((run / "run.json").read_text(encoding="utf-8")) if run else {}
        launches = values.get("launches") or [{}]
        return launches[-1] if isinstance(launches[-1], dict) else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _last_validation(run: Path | None, stage: str) -> dict[str, float]:
    """The newest figures of a stage's log that are of validation."""
    found: dict[str, float] = {}
    try:
        lines = (run / stage / "log.jsonl").read_text(encoding="utf-8").splitlines() if run else []
        for line in lines:
            values = json.loads(line)
            chosen = {key: value for key, value in values.items() if key.startswith("validation")}
            found = {"step": values["step"], **chosen} if chosen else found
    except (OSError, ValueError, KeyError):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, int | float)}
