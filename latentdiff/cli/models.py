"""`latentdiff sample`, `evaluate`, `inspect` and `export`: the commands that take a trained model."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from enum import StrEnum
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option, echo

from ..assets import ASSETS, EMOJI_STYLE
from ..errors import LatentDiffError, nearest
from ..sampling.settings import SamplingSettings
from .memory import keep_freed_memory

if TYPE_CHECKING:
    from ..sampling.pipeline import LatentPipeline
    from ..sections import DataConfig

FIELDS = SamplingSettings.model_fields
# Names that are typed like settings: of options here, and of a training's.
OPTIONS = ("n", "steps", "guidance", "negative", "model", "output", "file", "device", "precision", "budget", "config")
Precision = StrEnum("Precision", {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"})  # torch's names: ours
Format = StrEnum("Format", ["folder", "single"])

MODEL = "Model folder, training output, .safetensors file or Hugging Face Hub name; by default the model that ships."
Model = Annotated[str | None, Option("--model", "-m", help=MODEL)]
Device = Annotated[str | None, Option(help="cpu, cuda or mps; by default the best available.")]
PrecisionOption = Annotated[Precision | None, Option("--precision", help="Default: bf16 where it is fast, else fp32.")]


SAMPLES = "Folder for the grid and the PNGs, which are numbered on from those in it."
FEATURES = "Folder with a CLIP, DINOv2 or ViT of transformers, to compare pictures by its features, too."
NEGATIVE = "What to steer away from."
SAMPLER = "ddpm, ddim, euler, dpmpp_2m or dpmpp_2m_sde."
FIRST_SEED = "Seed of the first image; the others get seed + 1, ..."


def setting(name: str, *flags: str, help: str | None = None, **bounds: Any) -> Any:
    """Return the option for a field of SamplingSettings, by default with the field's description as its help."""
    return Option(*flags, help=help or FIELDS[name].description, **bounds)


def open_pipeline(model: str | None, device: str | None, precision: Precision | None) -> LatentPipeline:
    """Open the model that the options describe."""
    import torch

    from ..sampling.pipeline import LatentPipeline

    dtype = getattr(torch, precision.name) if precision else None
    pipe = LatentPipeline.from_pretrained(model, device=device, dtype=dtype)
    keep_freed_memory(pipe.device)
    return pipe


def sample(
    prompts: Annotated[list[str] | None, Argument(help="One or more prompts, each in quotes.")] = None,
    model: Model = None,
    file: Annotated[str | None, Option("--file", "-f", help="File with one prompt per line; - for stdin.")] = None,
    output: Annotated[Path, Option("--output", "-o", help=SAMPLES)] = Path("samples"),
    num_images: Annotated[int, setting("num_images", "--num-images", "-n")] = FIELDS["num_images"].default,
    seed: Annotated[int | None, setting("seed", help=f"{FIRST_SEED} Default: random.")] = FIELDS["seed"].default,
    num_steps: Annotated[int, setting("num_steps", "--steps")] = FIELDS["num_steps"].default,
    guidance_scale: Annotated[float, setting("guidance_scale", "--guidance")] = FIELDS["guidance_scale"].default,
    sampler: Annotated[str, setting("sampler", help=SAMPLER)] = FIELDS["sampler"].default,
    negative_prompt: Annotated[str, setting("negative_prompt", "--negative", help=NEGATIVE)] = FIELDS[
        "negative_prompt"
    ].default,
    height: Annotated[int | None, setting("height")] = FIELDS["height"].default,
    width: Annotated[int | None, setting("width")] = FIELDS["width"].default,
    device: Device = None,
    precision: PrecisionOption = None,
) -> Iterator[Path]:
    """Generate images from prompts: PNGs with metadata, and a grid.

    Example: latentdiff sample "a red apple" "a blue car" --model runs/mine --seed 0
    """
    requested = _prompts(prompts, file)
    from ..evaluation.grid import labeled_grid

    pipe = open_pipeline(model, device, precision)
    output.mkdir(parents=True, exist_ok=True)
    pictures = pipe.draw(
        requested, negative_prompt=negative_prompt, num_steps=num_steps, guidance_scale=guidance_scale, sampler=sampler,
        seed=seed, num_images=num_images, height=height, width=width,
    )  # fmt: skip
    captions, images = [prompt for prompt in requested for _ in range(num_images)], []
    for number, (image, caption) in enumerate(zip(pictures, captions, strict=True), start=_next_number(output)):
        plain = unicodedata.normalize("NFKD", caption).encode("ascii", "ignore").decode().lower()
        name = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:60] or "picture"
        image.save(path := output / f"{number:04d}-{name}.png")  # at once: an interrupted command keeps what is done
        images.append(image)
        yield path
    grid = labeled_grid(images, captions, columns=min(8, round(len(images) ** 0.5)))
    grid.save(path := output / "grid.png")
    yield path


def _next_number(folder: Path) -> int:
    """Return the number after those of the pictures in a folder, so that none is overwritten."""
    numbers = (re.match(r"\d{4,}(?=-)", path.name) for path in folder.glob("*.png"))
    return 1 + max((int(found[0]) for found in numbers if found), default=0)


def evaluate(
    overrides: Annotated[list[str] | None, Argument(help="Training data to override, as data.key=value.")] = None,
    model: Model = None,
    output: Annotated[Path, Option("--output", "-o", help="Folder for report and images.")] = Path("evaluation"),
    style: Annotated[str, Option(help="Regex to strip from captions; the rest is the concept.")] = EMOJI_STYLE,
    num_concepts: Annotated[int, Option("--concepts", min=2, help="Training concepts to test, picked by seed.")] = 128,
    num_images: Annotated[int, setting("num_images", "--num-images", "-n", min=1)] = 1,
    seed: Annotated[int, setting("seed", help=FIRST_SEED, min=0)] = 0,
    guidance_scale: Annotated[float, setting("guidance_scale", "--guidance", min=0)] = FIELDS["guidance_scale"].default,
    num_steps: Annotated[int, setting("num_steps", "--steps", min=1)] = FIELDS["num_steps"].default,
    features: Annotated[Path | None, Option(help=FEATURES)] = None,
    against: Annotated[str | None, Option(help="Another model, to compare on the same prompts and seeds.")] = None,
    device: Device = None,
    precision: PrecisionOption = None,
) -> Iterator[str]:
    """Measure a model: reconstruction, denoising, prompt fidelity, quality, variety, copies.

    The same command goes on after an interruption.

    Example: latentdiff evaluate --model runs/mine data.source=my-pictures
    """
    data = data_config(model, overrides or ())
    from ..evaluation.evaluate import evaluate
    from ..evaluation.networks import open_network

    output.mkdir(parents=True, exist_ok=True)  # fail now rather than after the evaluation
    settings = SamplingSettings(num_images=num_images, guidance_scale=guidance_scale, num_steps=num_steps, seed=seed)
    pipe = open_pipeline(model, device, precision)
    report = evaluate(
        pipe, data, settings, style=style, num_concepts=num_concepts, output=output,
        network=None if features is None else open_network(features, pipe.device),
        against=None if against is None else (against, open_pipeline(against, device, precision)),
        say=lambda line: echo(line, err=True),
    )  # fmt: skip
    yield from report.lines()
    report.write(output)
    yield f"report and images written to {output}"


def inspect(
    name: Annotated[str, Argument(help="Model folder, training output or .safetensors file.")],
) -> Iterator[str]:
    """Show what a model or file contains, and whether all weights are finite.

    Example: latentdiff inspect runs/mine
    """
    from ..files.inspect import describe

    yield from describe(name)


def export(
    source: Annotated[str, Argument(help="Training output, model folder or .safetensors file.")],
    output: Annotated[Path, Argument(help="Folder to write; with --format single, a .safetensors file.")],
    format: Annotated[Format, Option(help="folder: diffusers layout; single: original LDM layout.")] = Format.folder,
    precision: Annotated[Precision, Option(help="Precision of the weights.")] = Precision.float32,
    variant: Annotated[str | None, Option(help="Suffix for the names of the weight files, such as fp16.")] = None,
    shard_gb: Annotated[float | None, Option(help="Split weight files larger than this many GB.")] = None,
    license: Annotated[str, Option(help="License of the weights for the model card, as the Hub spells it.")] = "other",
    data: Annotated[str, Option(help="What the model card says about the training images and their license.")] = "",
    experts_apart: Annotated[bool, Option("--experts-apart", help="Write a folder for each expert.")] = False,
    push: Annotated[str | None, Option(help="Also upload the folder to this Hub repository, owner/name.")] = None,
) -> Iterator[object]:
    """Export a model for sharing: weights, configs and a model card.

    Example: latentdiff export runs/mine my-model --precision bf16
    """
    if push and format is Format.single:
        raise LatentDiffError("--push uploads a folder and cannot be combined with --format single")
    if shard_gb is not None and not 0 < shard_gb < 1e6:
        raise LatentDiffError(f"--shard-gb {shard_gb}: expected a positive number below 1e6")
    import torch

    from ..files.export import export_model, push_folder

    written = export_model(
        source, output, single=format is Format.single, dtype=getattr(torch, precision.name), variant=variant,
        max_shard_bytes=None if shard_gb is None else int(shard_gb * 1e9), license=license, data=data,
        experts_apart=experts_apart,
    )  # fmt: skip
    yield written
    if push:
        yield push_folder(written, push)


def _prompts(given: list[str] | None, file: str | None) -> list[str]:
    prompts = list(given or ())
    for prompt in prompts:
        if _is_setting(prompt):
            raise LatentDiffError(f"{prompt!r}: a setting, not a prompt; settings are options here, like --steps 50, "
                                  "and a prompt that reads so goes into a --file")  # fmt: skip
    if file is not None:
        from ..data.texts import decode, lines_of

        try:
            text = decode(sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes())
        except (OSError, UnicodeError) as error:
            raise LatentDiffError(f"--file {file}: cannot be read ({error})") from None
        prompts += [line.strip() for line in lines_of(text) if line.strip()]
    if not prompts:
        raise LatentDiffError('no prompts: give some, as in latentdiff sample "a red apple", or use --file')
    return prompts


def _is_setting(text: str) -> bool:
    """Whether a prompt is the name of a setting, perhaps misspelt, with a value, as the commands that train take it."""
    from ..config import Config

    path, equals, _ = text.lower().partition("=")
    section, dot, name = path.rpartition(".")
    if dot:
        return bool(equals) and section in Config.model_fields
    known = [*FIELDS, *OPTIONS]
    return bool(equals) and (name in known or ("_" in name and bool(nearest(name, known))))


def data_config(model: str | None, overrides: Sequence[str]) -> DataConfig:
    """Return the data settings of a model's training: from the recipe if the model ships, else from its run.json."""
    from ..config import load_config, parse_config, with_overrides
    from ..files.launches import last_launch
    from ..files.open import find_model, read_json

    for override in overrides:
        if not override.startswith("data."):
            raise LatentDiffError(f"{override!r}: only data.key=value is allowed here")
        if override.startswith("data.image_size="):
            raise LatentDiffError(f"{override!r}: images are evaluated at the model's own size")
    folder = find_model(model).resolve()
    if folder.parent == ASSETS:
        data = load_config(folder.name, overrides).data
        if not glob(data.source) and not any(override.startswith("data.source=") for override in overrides):
            raise LatentDiffError(f"{folder.name}: its training pictures do not ship; give data.source=FOLDER, or get "
                                  f"them to {data.source} as docs/recipes.md says")  # fmt: skip
        return data
    record = folder.parent / "run.json"
    try:
        recorded = dict(last_launch(read_json(record, "")["launches"])["config"]["data"])
    except (LatentDiffError, LookupError, TypeError):
        if not any(override.startswith("data.source=") for override in overrides):
            raise LatentDiffError(f"{model}: no record of its training data; give data.source=FOLDER") from None
        recorded = {}
    recorded.pop("image_size", None)  # which would be checked against the default VAE
    return parse_config(with_overrides({"data": recorded}, overrides), str(record)).data
