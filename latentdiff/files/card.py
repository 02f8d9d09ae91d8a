"""The model card: what a model is, how it was trained and how good it is, as far as its files tell."""

import json
import re
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml

from ..diffusion.process import Process
from .launches import last_launch

HEADER = (Path(__file__).parent / "card.md").read_text(encoding="utf-8")


def model_card(
    parameters: Mapping[str, int],
    encoder: str,
    process: Process,
    *,
    title: str,
    image_size: int,
    run: Path | None = None,
    progress: str | None = None,
    license: str = "other",
    data: str = "",
    timesteps: range | None = None,
) -> str:
    """Return the card as Markdown.

    `parameters` are their numbers by part, and `encoder` is the class of the text encoder's network.
    `run` is the training output that has the recipe, seed, versions and metrics; `progress` of an unfinished one is a
    step, such as "step 300 of 2000"; `timesteps` are those that the UNet is for, if it is one of several experts.
    """
    launch = _last_launch(run)
    prompts = launch.get("config", {}).get("validation", {}).get("prompts") or ["your prompt"]
    text = HEADER.format(
        license=json.dumps(license),
        title=title,
        name=title,
        size=image_size,
        encoder=encoder.removesuffix("Model"),
        prompt=json.dumps(prompts[0], ensure_ascii=False),
    )
    text += "\n## Components\n\n| component | parameters |\n|---|---|\n"
    for name, count in parameters.items():
        text += f"| {name} | {count:,} |\n"
    curve = process.schedule.name
    text += (
        f"\n{process.schedule.num_timesteps} timesteps, {curve.name if curve else 'custom'} noise schedule"
        f"{', zero terminal SNR' if process.schedule.has_zero_terminal_snr else ''}; the UNet predicts "
        f"{process.prediction}.\n"
    )
    if timesteps is not None:
        text += (f"\nOne of several experts: this UNet is for timesteps {timesteps[0]} to {timesteps[-1]} only, and "
                 "alone it draws nothing good.\n")  # fmt: skip
    if progress:
        text += f"\nThe training is not finished: these are the averaged weights of {progress}.\n"
    if launch:
        text += _training(launch) + _metrics(run)
    return text + f"\n## Data and license\n\n{data or 'Not stated when this model was exported.'}\n"


def _training(launch: Mapping[str, Any]) -> str:
    """Format the recipe, seed and versions, without paths and host names of the machine."""
    config = {key: without_folders(value) for key, value in launch["config"].items()
              if key not in ("output", "trackers", "workers", "report")}  # fmt: skip
    versions = ", ".join(f"{name} {version}" for name, version in launch.get("versions", {}).items())
    recipe = yaml.safe_dump(config, sort_keys=False, width=110)
    return (
        f"\n## Training\n\nSeed {config.get('seed')}, {config.get('precision')} precision; "
        f"{versions or 'versions unknown'}. The full configuration:\n\n```yaml\n{recipe}```\n"
    )


def without_folders(value: Any) -> Any:
    """Reduce every path in a config to its last component."""
    if isinstance(value, Mapping):
        return {key: without_folders(inner) for key, inner in value.items()}
    is_path = isinstance(value, str) and re.match(r"[/~.\\]|[A-Za-z]:[/\\]", value)
    return PureWindowsPath(value).name if is_path else value


def _metrics(run: Path | None) -> str:
    lines = []
    for stage in ("train_vae", "train_latent"):
        last = _last_validation(run, stage)
        lines += [f"| {stage} | {key.removeprefix('validation_')} | {value:.4g} |" for key, value in last.items()]
    if not lines:
        return ""
    table = "\n".join(lines)
    head = "\n## Metrics\n\nOn held-out images, at the last validation.\n\n"
    return f"{head}| stage | metric | value |\n|---|---|---|\n{table}\n"


def _last_launch(run: Path | None) -> dict[str, Any]:
    try:
        values = json.loads((run / "run.json").read_text(encoding="utf-8")) if run else {}
        return last_launch(values.get("launches") or [])
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _last_validation(run: Path | None, stage: str) -> dict[str, float]:
    """Return the metrics of the last validation in a stage's log, or nothing if it has none or is damaged."""
    last: dict[str, float] = {}
    try:
        lines = (run / stage / "log.jsonl").read_text(encoding="utf-8").splitlines() if run else []
        for line in lines:
            values = json.loads(line)
            chosen = {key: value for key, value in values.items() if key.startswith("validation")}
            last = {"step": values["step"], **chosen} if chosen else last
    except (OSError, ValueError, KeyError):
        return {}
    return {key: value for key, value in last.items() if isinstance(value, int | float)}
