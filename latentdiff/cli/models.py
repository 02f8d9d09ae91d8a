"""`latentdiff sample`, `evaluate`, `inspect` and `export`: the commands for a model that is there."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option, echo

from ..assets import ASSETS, EMOJI_STYLE
from ..errors import LatentDiffError
from ..sampling.settings import SamplingSettings

if TYPE_CHECKING:
    from PIL import Image

    from ..sampling.pipeline import LatentPipeline
    from ..sections import DataConfig

FIELDS = SamplingSettings.model_fields
Precision = StrEnum("Precision", {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"})  # torch's name, and ours
Format = StrEnum("Format", ["folder", "single"])

MODEL = "A model's folder, a training's output, a .safetensors file, or a hub name; by default the model that ships."
Model = Annotated[str | None, Option("--model", "-m", help=MODEL)]
Device = Annotated[str | None, Option(help="cpu, cuda, mps; by default the best there is.")]
PassPrecision = Annotated[Precision | None, Option("--precision", help="By default bf16 where that is fast.")]


def setting(name: str, *flags: str, **bounds: Any) -> Any:
    """The option for a field of SamplingSettings, which says what it means."""
    return Option(*flags, help=FIELDS[name].description, **bounds)


def open_pipeline(model: str | None, device: str | None, precision: Precision | None) -> LatentPipeline:
    """The model that the options name, where and as they say."""
    import torch

    from ..sampling.pipeline import LatentPipeline

    dtype = getattr(torch, precision.name) if precision else None
    return LatentPipeline.from_pretrained(model, device=device, dtype=dtype)


def sample(
    prompts: Annotated[list[str] | None, Argument(help="What to draw.")] = None,
    model: Model = None,
    file: Annotated[str | None, Option("--file", "-f", help="A prompt a line; - reads standard input.")] = None,
    output: Annotated[Path, Option("--output", "-o", help="Folder for the pictures and a grid.")] = Path("samples"),
    num_images: Annotated[int, setting("num_images", "--num-images", "-n")] = FIELDS["num_images"].default,
    seed: Annotated[int | None, setting("seed")] = FIELDS["seed"].default,
    num_steps: Annotated[int, setting("num_steps", "--steps")] = FIELDS["num_steps"].default,
    guidance_scale: Annotated[float, setting("guidance_scale", "--guidance")] = FIELDS["guidance_scale"].default,
    sampler: Annotated[str, setting("sampler")] = FIELDS["sampler"].default,
    negative_prompt: Annotated[str, setting("negative_prompt", "--negative")] = FIELDS["negative_prompt"].default,
    height: Annotated[int | None, setting("height")] = FIELDS["height"].default,
    width: Annotated[int | None, setting("width")] = FIELDS["width"].default,
    device: Device = None,
    precision: PassPrecision = None,
) -> Iterator[Path]:
    """Draw prompts: PNGs with the recipe in their metadata, and a labelled grid.

    Example: latentdiff sample "a red apple" "a blue car" --model runs/mine --seed 0
    """
    wanted = _prompts(prompts, file)
    output.mkdir(parents=True, exist_ok=True)
    from ..evaluation.grid import labelled_grid

    images = open_pipeline(model, device, precision)(
        wanted, negative_prompt=negative_prompt, num_steps=num_steps, guidance_scale=guidance_scale, sampler=sampler,
        seed=seed, num_images=num_images, height=height, width=width,
    )  # fmt: skip
    captions = [prompt for prompt in wanted for _ in range(num_images)]
    for number, (image, caption) in enumerate(zip(images, captions, strict=True), start=1):
        name = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:60] or "picture"
        yield save_picture(image, output / f"{number:04d}-{name}.png")
    grid = labelled_grid(images, captions, columns=min(8, round(len(images) ** 0.5)))
    yield save_picture(grid, output / "grid.png")


def evaluate(
    overrides: Annotated[list[str] | None, Argument(help="data.key=value, over what its training was told.")] = None,
    model: Model = None,
    output: Annotated[Path, Option("--output", "-o", help="For the report and the pictures.")] = Path("evaluation"),
    style: Annotated[str, Option(help="Pattern to leave out of captions; equal rests are one concept.")] = EMOJI_STYLE,
    num_concepts: Annotated[int, Option("--concepts", min=2, help="Training concepts, chosen by the seed.")] = 64,
    num_images: Annotated[int, setting("num_images", "--num-images", "-n", min=1)] = 2,
    seed: Annotated[int, setting("seed", min=0)] = 0,
    guidance_scale: Annotated[float, setting("guidance_scale", "--guidance", min=0)] = FIELDS["guidance_scale"].default,
    num_steps: Annotated[int, setting("num_steps", "--steps", min=1)] = FIELDS["num_steps"].default,
    device: Device = None,
    precision: PassPrecision = None,
) -> Iterator[str]:
    """Measure a model: its VAE, how well it denoises held-out pictures, and whether it draws what is asked.

    Example: latentdiff evaluate --model runs/mine data.source=my-pictures
    """
    data = _data_of(model, overrides or ())
    from ..evaluation.evaluate import evaluate

    output.mkdir(parents=True, exist_ok=True)  # refused now where it cannot be made
    settings = SamplingSettings(num_images=num_images, guidance_scale=guidance_scale, num_steps=num_steps, seed=seed)
    report = evaluate(open_pipeline(model, device, precision), data, settings, style=style, num_concepts=num_concepts,
                      say=lambda line: echo(line, err=True))  # fmt: skip
    yield from report.lines()
    report.write(output)
    yield f"report and pictures in {output}"


def inspect(
    name: Annotated[str, Argument(help="A model's folder, a training's output, or a .safetensors file.")],
) -> Iterator[str]:
    """Say what a file is: sizes, parameters, configuration, prediction type. No weights are loaded.

    Example: latentdiff inspect runs/mine
    """
    from ..files.inspect import describe

    yield from describe(name)


def export(
    source: Annotated[str, Argument(help="A training's output, a model's folder, or a .safetensors file.")],
    output: Annotated[Path, Argument(help="Folder, or file for --format single.")],
    format: Annotated[Format, Option(help="folder: diffusers' layout; single: the original one.")] = Format.folder,
    precision: Annotated[Precision, Option(help="Of the weights.")] = Precision.float32,
    variant: Annotated[str | None, Option(help="Put this in the weight files' names, such as fp16.")] = None,
    shard_gb: Annotated[float | None, Option(help="Split weight files above so many GB.")] = None,
    license: Annotated[str, Option(help="Of the weights, as the hub spells it; for the card.")] = "other",
    data: Annotated[str, Option(help="What the model card says of the pictures and their license.")] = "",
    push: Annotated[str | None, Option(help="Also upload the folder to this name on the hub.")] = None,
) -> Iterator[object]:
    """Write a model for others: weights, configuration and a model card.

    Example: latentdiff export runs/mine my-model --precision bf16
    """
    if push and format is Format.single:
        raise LatentDiffError("--push uploads a folder: leave out --format single")
    if shard_gb is not None and not 0 < shard_gb < 1e6:
        raise LatentDiffError(f"--shard-gb {shard_gb}: expected a number above 0")
    import torch

    from ..files.export import export_model, push_folder

    written = export_model(
        source, output, single=format is Format.single, dtype=getattr(torch, precision.name), variant=variant,
        max_shard_bytes=None if shard_gb is None else int(shard_gb * 1e9), license=license, data=data,
    )  # fmt: skip
    yield written
    if push:
        yield push_folder(written, push)


def save_picture(image: Image.Image, path: Path) -> Path:
    """Write a PNG with the picture's recipe in its metadata."""
    from PIL.PngImagePlugin import PngInfo

    facts = PngInfo()
    for key, value in image.info.items():
        facts.add_text(str(key), value)
    image.save(path, pnginfo=facts)
    return path


def _prompts(given: list[str] | None, file: str | None) -> list[str]:
    """Prompts from the arguments, then from a file.

    Raises:
        LatentDiffError: there are none, or the file cannot be read.
    """
    prompts = list(given or ())
    if file is not None:
        try:
            text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise LatentDiffError(f"--file {file}: cannot be read ({error})") from None
        prompts += [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise LatentDiffError('nothing to draw: give prompts, as in latentdiff sample "a red apple", or --file')
    return prompts


def _data_of(model: str | None, overrides: Sequence[str]) -> DataConfig:
    """The pictures a model was trained on: as the recipe of one that ships says, or as its run recorded.

    Raises:
        LatentDiffError: neither is known, and `data.source` is not given; or an override is wrong.
    """
    from ..config import load_config, parse_config, with_overrides
    from ..files.open import find_model, read_json

    for override in overrides:
        if not override.startswith("data."):
            raise LatentDiffError(f"{override!r}: only data.key=value counts here")
        if override.startswith("data.image_size="):
            raise LatentDiffError(f"{override!r}: pictures are measured at the size that the model has")
    folder = find_model(model).resolve()
    if folder.parent == ASSETS:
        return load_config(folder.name, overrides).data
    record = folder.parent / "run.json"
    try:
        known = dict(read_json(record, "")["launches"][-1]["config"]["data"])
    except (LatentDiffError, LookupError, TypeError):
        if not any(override.startswith("data.source=") for override in overrides):
            raise LatentDiffError(f"{model}: does not say what it was trained on; give data.source=FOLDER") from None
        known = {}
    known.pop("image_size", None)  # it would have to suit the default VAE
    return parse_config(with_overrides({"data": known}, overrides), str(record)).data
