"""The configuration of a run: one YAML file for all stages, typed, with one clear error for whatever is wrong in it.

A file holds only what differs from the defaults below. `section.key=value` on the command line overrides it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self, get_args

import yaml
from pydantic import ValidationError, model_validator

from text_encoder import TextEncoderError
from unet import UNetError
from vae import VAEError

from .diffusion.process import check_prediction
from .diffusion.samplers import SAMPLERS
from .errors import LatentDiffError
from .sections import (
    Count,
    DataConfig,
    DiffusionSection,
    Positive,
    Section,
    TextEncoderSection,
    TrainLatentSection,
    TrainVAESection,
    UNetSection,
    VAESection,
    ValidationSection,
)

# train_configs/ of a checkout is latentdiff/recipes/ in an installed package (setup.cfg).
PACKAGE = Path(__file__).parent
RECIPES = PACKAGE / "recipes" if (PACKAGE / "recipes").is_dir() else PACKAGE.parent / "train_configs"
RECIPE = "recipe "  # how messages name one


class Config(Section):
    """A whole run."""

    output: str = "runs/unnamed"
    """Folder of the run: everything it writes lies there."""
    seed: Count = 0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the passes; weights and optimizer are float32. auto: bf16 where the device computes in it."""
    threads: Positive | None = None
    """CPU threads a process; None: the machine's cores over the processes on it."""
    workers: Count = 0
    """Processes that read and decode pictures, each process's own."""
    trackers: tuple[str, ...] | None = None
    """`tensorboard`, `wandb`, or others that accelerate knows; None: tensorboard where it is installed."""
    data: DataConfig = DataConfig()
    vae: VAESection = VAESection()
    text_encoder: TextEncoderSection = TextEncoderSection()
    unet: UNetSection = UNetSection()
    diffusion: DiffusionSection = DiffusionSection()
    train_vae: TrainVAESection = TrainVAESection()
    train_latent: TrainLatentSection = TrainLatentSection()
    validation: ValidationSection = ValidationSection()

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        try:
            vae = self.vae.build(self.data.image_size)
            factor = vae.downsampling
            if not self.vae.pretrained and self.data.image_size % factor:
                raise ValueError(f"data.image_size={self.data.image_size}: expected a multiple of {factor}, "
                                 "the VAE's downsampling")  # fmt: skip
            self.text_encoder.build()
            if not self.unet.pretrained:
                self.unet.build(vae.latent_channels, self.text_encoder.width, max(1, self.data.image_size // factor))
            check_prediction(self.diffusion.prediction, self.diffusion.build())
        except VAEError as error:
            raise ValueError(f"vae: {error}") from None
        except TextEncoderError as error:
            raise ValueError(f"text_encoder: {error}") from None
        except UNetError as error:
            raise ValueError(f"unet: {error}") from None
        except LatentDiffError as error:
            raise ValueError(f"diffusion: {error}") from None
        if self.validation.sampler not in SAMPLERS:
            raise ValueError(f"validation.sampler={self.validation.sampler!r}: choose one of {', '.join(SAMPLERS)}")
        if self.validation.num_steps > self.diffusion.num_timesteps:
            raise ValueError(f"validation.num_steps={self.validation.num_steps} is more than "
                             f"diffusion.num_timesteps={self.diffusion.num_timesteps}")  # fmt: skip
        if self.train_vae.adversarial_weight and self.data.image_size < (
            least := 3 * 2**self.train_vae.discriminator_layers
        ):
            raise ValueError(f"train_vae.discriminator_layers={self.train_vae.discriminator_layers} needs pictures of "
                             f"{least} px; data.image_size is {self.data.image_size}")  # fmt: skip
        if self.text_encoder.pretrained is None and not self.text_encoder.train:
            raise ValueError("text_encoder.train=false: a new BERT has to be trained; name a pretrained one to freeze")
        for name, section in (("train_vae", self.train_vae), ("train_latent", self.train_latent)):
            micro = section.micro_batch_size
            if micro is not None and section.batch_size % micro:
                raise ValueError(f"{name}.batch_size={section.batch_size} is not a multiple of "
                                 f"{name}.micro_batch_size={micro}")  # fmt: skip
            if section.warmup_steps > section.steps:
                raise ValueError(
                    f"{name}.warmup_steps={section.warmup_steps} is more than {name}.steps={section.steps}"
                )
        return self


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, or the recipe of that name that comes with the package, and apply overrides.

    Args:
        path: file, or name of a recipe such as `emoji-64`; None: `emoji-64`. Its validation prompts are about its own
            pictures, and do not count where an override names `data.source`.
        overrides: `section.key=value`, the value as YAML.

    Raises:
        LatentDiffError: no such file or recipe, no YAML, an unknown key, a wrong type or value, two that do not fit.
    """
    where, text = _read(path or "emoji-64")
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise LatentDiffError(f"{where}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise LatentDiffError(f"{where}: holds a {type(values).__name__}; expected sections such as `data:`")
    if where.startswith(RECIPE) and any(override.startswith("data.source=") for override in overrides):
        values.get("validation", {}).pop("prompts", None)  # held-out captions are drawn instead
    return parse_config(with_overrides(values, overrides), f"{where} and the command line" if overrides else where)


def with_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The same dictionary, changed by `section.key=value`, the value as YAML.

    Raises:
        LatentDiffError: not of that form.
    """
    for override in overrides:
        _override(values, override)
    return values


def parse_config(values: Mapping[str, Any], where: str = "config") -> Config:
    """A config from nested dictionaries, as YAML or JSON give them.

    Raises:
        LatentDiffError: as `load_config`; the message begins with `where`.
    """
    try:
        return Config.model_validate(_tuples(values))
    except ValidationError as error:
        raise LatentDiffError("\n".join(f"{where}: {_explain(entry)}" for entry in error.errors())) from None


def recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def _read(path: str | Path) -> tuple[str, str]:
    file = Path(path)
    try:
        if file.is_file():
            return str(file), file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LatentDiffError(f"{file}: cannot be read ({error})") from None
    if str(path) in (names := recipes()):
        return f"{RECIPE}{path}", (RECIPES / f"{path}.yaml").read_text(encoding="utf-8")
    near = get_close_matches(file.stem, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise LatentDiffError(f"{path}: no such file; the recipes that come with latentdiff are {', '.join(names)}{hint}")


def _override(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise LatentDiffError(f"{override!r}: expected section.key=value, such as train_latent.steps=1000")
    *sections, key = path.strip().split(".")
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        inner = values[section]
        if not isinstance(inner, dict):
            raise LatentDiffError(f"{override!r}: {section} holds {inner!r}, not a section")
        values = inner
    try:
        values[key] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise LatentDiffError(f"{override!r}: the value is not valid YAML") from None


def _tuples(value: Any) -> Any:
    """Lists as tuples, which is what frozen sections hold; an empty section (`data:`) as one without changes."""
    if isinstance(value, Mapping):
        sections = {name for name, field in Config.model_fields.items() if isinstance(field.default, Section)}
        return {key: {} if inner is None and key in sections else _tuples(inner) for key, inner in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _explain(entry: Any) -> str:
    """One of pydantic's complaints in one line: the dotted path, the value, what is allowed, the nearest name."""
    parts = [str(part) for part in entry["loc"]]
    path = ".".join(part for part in parts if part not in ("tuple", "int", "str", "float"))
    if entry["type"] == "extra_forbidden":
        known = list(_fields(parts[:-1]))
        near = get_close_matches(parts[-1], known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"unknown key {path!r}{hint} (allowed: {', '.join(known)})"
    if entry["type"] == "value_error":
        return str(entry["ctx"]["error"])
    message = entry["msg"].removeprefix("Input ").removeprefix("should be ").removeprefix("Value error, ")
    return f"{path}={entry['input']!r}: expected {message}"


def _fields(path: Sequence[str]) -> Mapping[str, Any]:
    model: Any = Config
    for name in path:
        annotation = model.model_fields[name].annotation
        model = next((kind for kind in (annotation, *get_args(annotation)) if hasattr(kind, "model_fields")), model)
    fields: Mapping[str, Any] = model.model_fields
    return fields
