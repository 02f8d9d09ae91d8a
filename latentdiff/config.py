"""The configuration of a run: one typed YAML file for all stages, with a clear one-line error for every mistake.

A file holds only what differs from the defaults. `section.key=value` on the command line overrides it.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

import yaml
from pydantic import Field, ValidationError, model_validator

from text_encoder import TextEncoderError
from unet import UNetError
from vae import VAEError

from . import sections
from .diffusion.process import check_prediction, check_weighting
from .diffusion.samplers import SAMPLERS
from .errors import LatentDiffError, nearest
from .sections import values as kinds

# train_configs/ in a checkout is latentdiff/recipes/ in an installed package (see setup.cfg).
PACKAGE = Path(__file__).parent
RECIPES = PACKAGE / "recipes" if (PACKAGE / "recipes").is_dir() else PACKAGE.parent / "train_configs"
INTEGER = "tag:yaml.org,2002:int"
MAX_DEPTH, MAX_VALUES, MAX_BYTES = 20, 10_000, 1 << 20  # of a YAML file; the parser is slow
SECTION_OF = {VAEError: "vae", TextEncoderError: "text_encoder", UNetError: "unet"}


class Config(sections.Section):
    """The configuration of a run."""

    output: kinds.PathText = "runs/unnamed"
    """Output folder; everything that the run writes goes there."""
    seed: kinds.Count = 0
    """Determines everything random: weights at the start, the order of pictures, noise, timesteps."""
    budget: kinds.Duration | None = None
    """Wall-clock time from launch to the finished model, such as `90s`, `10m` or `1h30m`. The numbers of steps follow
    from the measured speed, and `steps` on the command line bounds them. None: as many as `steps` says."""
    budget_share: Annotated[float, Field(gt=0, lt=1)] = 0.35
    """Share for the VAE, if `latentdiff train` trains one, of what is left of the budget when its training begins."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of forward and backward passes; weights and optimizer state are float32. auto: the launcher's, or else
    bf16 where it is fast and fp32 elsewhere."""
    threads: kinds.Positive | None = None
    """CPU threads per process; None: the machine's cores divided by its processes."""
    workers: kinds.Count = 0
    """Worker processes, per training process, that read and decode pictures."""
    trackers: tuple[str, ...] | None = None
    """`tensorboard`, `wandb` or other trackers of accelerate; None: tensorboard if installed."""
    report: bool = True
    """Write `report.html` at the end of every launch, whether it finished, was stopped or failed."""
    data: sections.DataConfig = sections.DataConfig()
    vae: sections.VAESection = sections.VAESection()
    text_encoder: sections.TextEncoderSection = sections.TextEncoderSection()
    unet: sections.UNetSection = sections.UNetSection()
    diffusion: sections.DiffusionSection = sections.DiffusionSection()
    train_vae: sections.TrainVAESection = sections.TrainVAESection()
    train_latent: sections.TrainLatentSection = sections.TrainLatentSection()
    validation: sections.ValidationSection = sections.ValidationSection()

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        validation, train_vae, image_size = self.validation, self.train_vae, self.data.image_size
        try:
            vae = self.vae.build(image_size)
            if not self.vae.pretrained and image_size % vae.downsampling:
                raise ValueError(f"data.image_size={image_size}: expected a multiple of {vae.downsampling}, "
                                 "the VAE's downsampling factor")  # fmt: skip
            self.text_encoder.build()
            self.unet.edges(self.diffusion.num_timesteps)
            if not self.unet.brings_sizes():
                latent_size = max(1, image_size // vae.downsampling)
                self.unet.build(vae.latent_channels, self.text_encoder.width, latent_size)
            check_prediction(self.diffusion.prediction, self.diffusion.build())
            check_weighting(self.diffusion.weighting, self.diffusion.prediction)
        except LatentDiffError as error:
            raise ValueError(f"{SECTION_OF.get(type(error), 'diffusion')}: {error}") from None
        if self.unet.experts is not None and self.train_latent.compile:
            raise ValueError(
                "train_latent.compile=true: not supported with unet.experts, which differ from step to step"
            )
        if self.text_encoder.pretrained is None and not self.text_encoder.train:
            raise ValueError(
                "text_encoder.train=false: a new BERT must be trained; only a pretrained one can be frozen"
            )
        if validation.sampler not in SAMPLERS:
            raise ValueError(f"validation.sampler={validation.sampler!r}: choose one of {', '.join(SAMPLERS)}")
        if validation.num_steps > self.diffusion.num_timesteps:
            raise ValueError(f"validation.num_steps={validation.num_steps} is more than "
                             f"diffusion.num_timesteps={self.diffusion.num_timesteps}")  # fmt: skip
        min_size = 3 * 2**train_vae.discriminator_layers
        if train_vae.adversarial_weight and image_size < min_size:
            raise ValueError(f"train_vae.discriminator_layers={train_vae.discriminator_layers} needs pictures of "
                             f"at least {min_size} px; data.image_size is {image_size}")  # fmt: skip
        for name, train in (("train_vae", train_vae), ("train_latent", self.train_latent)):
            if train.batch_size % (train.micro_batch_size or 1):
                raise ValueError(f"{name}.batch_size={train.batch_size} is not a multiple of "
                                 f"{name}.micro_batch_size={train.micro_batch_size}")  # fmt: skip
            if train.warmup_steps > train.steps:
                raise ValueError(f"{name}.warmup_steps={train.warmup_steps} is more than {name}.steps={train.steps}; "
                                 f"set {name}.warmup_steps, too")  # fmt: skip
        return self


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Load a YAML file, or a recipe that ships with the package, and apply overrides.

    Args:
        path: file or name of a recipe; None: `emoji-64`. A recipe's validation prompts describe its own pictures, so
            they are dropped if an override sets `data.source`.
        overrides: `section.key=value`, the value as YAML; text and paths as typed, `null` unsets them.

    Raises:
        LatentDiffError: if the file is missing or not valid YAML, or a key or value is unknown, wrong or inconsistent.
    """
    name = "emoji-64" if path is None else str(path)
    text, is_recipe = _read(name)
    where = f"recipe {name}" if is_recipe else name
    values = _from_yaml(text, where) or {}
    if not isinstance(values, dict):
        raise LatentDiffError(f"{where}: expected sections such as `data:`, not a {type(values).__name__}")
    if is_recipe and any(override.startswith("data.source=") for override in overrides):
        values.get("validation", {}).pop("prompts", None)  # held-out captions are used instead
    budgets = [override for override in overrides if override.startswith("budget=")]
    if with_overrides({"budget": values.get("budget")}, budgets)["budget"] is not None:
        # Warm-up is a share of the recipe's steps, so a number given here is a bound and does not take their place.
        overrides = [re.sub(r"^(train_vae|train_latent)\.steps=", r"\1.max_steps=", text) for text in overrides]
    return parse_config(with_overrides(values, overrides), f"{where} and the command line" if overrides else where)


def with_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply overrides `section.key=value` to nested dictionaries in place, and return them."""
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path.strip():
            raise LatentDiffError(f"{override!r}: expected section.key=value, such as train_latent.steps=1000")
        *parents, key = path.strip().split(".")
        inner = values
        for parent in parents:
            if inner.get(parent) is None:
                inner[parent] = {}
            inner = inner[parent]
            if not isinstance(inner, dict):
                raise LatentDiffError(f"{override!r}: {parent} is {inner!r}, not a section")
        inner[key] = text if _is_text([*parents, key], text) else _from_yaml(text, repr(override))
    return values


def _is_text(path: Sequence[str], value: str) -> bool:
    """Whether a value on the command line is taken as typed: `photos #2` is a folder, and so is `2024-05-01`."""
    fields: Any = Config.model_fields
    for parent in path[:-1]:
        section = fields[parent].annotation if parent in fields else None
        fields = getattr(section, "model_fields", {})
    return value not in ("", "null", "Null", "NULL") and path[-1] in fields and _takes_text(fields[path[-1]].annotation)


def _takes_text(annotation: Any) -> bool:
    """Whether a type has texts only, and None."""
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _takes_text(members[0])
    if origin in (Union, UnionType):
        return all(_takes_text(member) for member in members if member is not type(None))
    return annotation is str or (origin is Literal and all(isinstance(member, str) for member in members))


def parse_config(values: Mapping[str, Any], where: str = "config") -> Config:
    """Create a config from nested dictionaries, as read from YAML or JSON; errors begin with `where`."""
    try:
        return Config.model_validate(_to_tuples(values))
    except ValidationError as error:
        raise LatentDiffError("\n".join(f"{where}: {_format_error(entry)}" for entry in error.errors())) from None


def recipes() -> list[str]:
    """Return the names of the recipes that ship with the package."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def _read(name: str) -> tuple[str, bool]:
    file, names = Path(name), recipes()
    try:
        if file.is_file():
            if (size := file.stat().st_size) > MAX_BYTES:
                raise LatentDiffError(f"{file}: {size:,} bytes is too large; expected at most {MAX_BYTES:,}")
            return file.read_text(encoding="utf-8"), False
        if name and name not in names and file.is_dir():
            raise LatentDiffError(f"{file}: is a folder; expected a YAML file or the name of a recipe")
    except (OSError, UnicodeDecodeError) as error:
        raise LatentDiffError(f"{file}: cannot be read ({error})") from None
    if name in names:
        return (RECIPES / f"{name}.yaml").read_text(encoding="utf-8"), True
    listed = f"the recipes are {', '.join(names)}"
    raise LatentDiffError(f"{name or repr(name)}: no such file or recipe; {listed}{nearest(file.stem, names)}")


class _Loader(yaml.SafeLoader):
    """YAML with decimal numbers only: to YAML 1.1, 010 is 8 and 1:30 is 90."""


_Loader.yaml_implicit_resolvers = {
    first: [entry for entry in entries if entry[0] != INTEGER]
    for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(INTEGER, re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))


def _from_yaml(text: str, where: str) -> Any:
    try:
        depth = number = 0
        for event in yaml.parse(text, _Loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise LatentDiffError(f"{where}: lists and sections are nested more than {MAX_DEPTH} deep")
            if (number := number + isinstance(event, yaml.NodeEvent)) > MAX_VALUES:
                break
        if number > MAX_VALUES or _num_values(yaml.compose(text, _Loader), {}, where) > MAX_VALUES:
            raise LatentDiffError(f"{where}: has more than {MAX_VALUES:,} values, aliases (*name) spelled out")
        return _Loader(text).get_single_data()
    except LatentDiffError:  # a ValueError as well
        raise
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-45
        raise LatentDiffError(f"{where}: not valid YAML ({' '.join(str(error).split())})") from None


def _num_values(node: yaml.Node | None, known: dict[int, float], where: str) -> float:
    """Count the values of a document with each alias replaced by what it stands for; infinite if one is in itself.

    Raises LatentDiffError if a key is there twice, as one of the two would be lost.
    """
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = math.inf
        inside = list(chain(*node.value)) if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + sum(_num_values(inner, known, where) for inner in inside)
        keys = Counter(str(key.value) for key in inside[::2]) if isinstance(node, yaml.MappingNode) else Counter[str]()
        if twice := [key for key, count in keys.items() if count > 1 and key != "<<"]:
            line = node.start_mark.line + 1
            raise LatentDiffError(
                f"{where}: the key {twice[0]!r} is there twice in the section that begins in line {line}"
            )
    return known[id(node)]


def _to_tuples(value: Any) -> Any:
    """Convert lists to tuples, which frozen sections hold, and an empty section (`data:`) to one without changes."""
    if isinstance(value, Mapping):
        known = {name for name, field in Config.model_fields.items() if isinstance(field.default, sections.Section)}
        return {key: {} if inner is None and key in known else _to_tuples(inner) for key, inner in value.items()}
    return tuple(map(_to_tuples, value)) if isinstance(value, list) else value


def _format_error(entry: Any) -> str:
    """Format a pydantic error as one line: the dotted path, the value, what is allowed, the closest name."""
    parts = [str(part) for part in entry["loc"]]
    path = ".".join(part for part in parts if part not in ("tuple", "int", "str", "float"))
    if entry["type"] == "extra_forbidden":
        section: Any = Config.model_fields[parts[0]].annotation if len(parts) > 1 else Config
        known = section.model_fields
        return f"unknown key {path!r}{nearest(parts[-1], known)} (allowed: {', '.join(known)})"
    if entry["type"] == "value_error" and not parts:  # of the whole config; the message names the settings
        return str(entry["ctx"]["error"])
    if entry["type"] == "missing":  # of a list with a fixed number of values
        return f"{path.rpartition('.')[0]}={entry['input']!r}: expected more values"
    message = entry["msg"].removeprefix("Input ").removeprefix("should be ").removeprefix("Value error, ")
    return f"{path}={entry['input']!r}: expected {message}"
