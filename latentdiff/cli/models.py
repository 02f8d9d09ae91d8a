"""`latentdiff sample`, `export`, `inspect` and `plan`: the commands for a model that is there, or is to be."""

from __future__ import annotations

import re
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..diffusion.samplers import SAMPLERS
from ..errors import LatentDiffError
from .errors import plain_errors

if TYPE_CHECKING:
    import torch
    from PIL import Image

MODEL = "A model's folder, a training's output, a .safetensors file, or a hub name; by default the model that ships."
Model = Annotated[str | None, typer.Option("--model", "-m", help=MODEL)]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps; by default the best there is.")]

app = typer.Typer()


class Precision(StrEnum):
    """Of weights."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"

    def dtype(self) -> torch.dtype:
        """torch's name."""
        import torch

        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.value]


class Format(StrEnum):
    """Of an exported model."""

    folder = "folder"
    single = "single"


@app.command("sample")
def _sample(
    prompts: Annotated[list[str] | None, typer.Argument(help="What to draw.")] = None,
    model: Model = None,
    file: Annotated[str | None, typer.Option("--file", "-f", help="A prompt a line; - reads standard input.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pictures and a grid.")] = Path(
        "samples"
    ),
    num_images: Annotated[int, typer.Option("--num-images", "-n", help="Pictures a prompt.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Of the first picture; the next have seed + 1, ...")] = None,
    num_steps: Annotated[int, typer.Option("--steps", help="Network evaluations.")] = 25,
    guidance_scale: Annotated[
        float, typer.Option("--guidance", help="How strongly to follow prompts; 1 is off.")
    ] = 5.0,
    sampler: Annotated[str, typer.Option(help=", ".join(SAMPLERS))] = "dpmpp_2m",
    negative_prompt: Annotated[str, typer.Option("--negative", help="What to steer away from.")] = "",
    height: Annotated[int | None, typer.Option(help="Pixels; by default as in training.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    device: Device = None,
    precision: Annotated[Precision | None, typer.Option(help="By default bf16 where that is fast.")] = None,
) -> None:
    """Draw prompts: PNGs with the recipe in their metadata, and a labelled grid.

    Example: latentdiff sample "a red apple" "a blue car" --model runs/mine --seed 0
    """
    with plain_errors():
        wanted = _prompts(prompts, file)
        output.mkdir(parents=True, exist_ok=True)
        from ..evaluation.grid import labelled_grid
        from ..sampling.pipeline import LatentPipeline

        pipe = LatentPipeline.from_pretrained(model, device=device, dtype=precision.dtype() if precision else None)
        images = pipe(
            wanted,
            negative_prompt=negative_prompt,
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            sampler=sampler,
            seed=seed,
            num_images=num_images,
            height=height,
            width=width,
        )
        captions = [prompt for prompt in wanted for _ in range(num_images)]
        for number, (image, caption) in enumerate(zip(images, captions, strict=True), start=1):
            name = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:60] or "picture"
            typer.echo(save_picture(image, output / f"{number:04d}-{name}.png"))
        columns = min(8, max(1, round(len(images) ** 0.5)))
        labelled_grid(images, captions, columns=columns).save(output / "grid.png")
        typer.echo(output / "grid.png")


@app.command("inspect")
def _inspect(
    name: Annotated[str, typer.Argument(help="A model's folder, a training's output, or a .safetensors file.")],
) -> None:
    """Say what a file is: sizes, parameters, configuration, prediction type. No weights are loaded.

    Example: latentdiff inspect runs/mine
    """
    from ..files.inspect import describe

    with plain_errors():
        for line in describe(name):
            typer.echo(line)


@app.command("export")
def _export(
    source: Annotated[str, typer.Argument(help="A training's output, a model's folder, or a .safetensors file.")],
    output: Annotated[Path, typer.Argument(help="Folder, or file for --format single.")],
    format: Annotated[
        Format, typer.Option(help="folder: diffusers' layout; single: the original one.")
    ] = Format.folder,
    precision: Annotated[Precision, typer.Option(help="Of the weights.")] = Precision.fp32,
    variant: Annotated[str | None, typer.Option(help="Put this in the weight files' names, such as fp16.")] = None,
    shard_gb: Annotated[float | None, typer.Option(help="Split weight files above so many GB.")] = None,
    licence: Annotated[str, typer.Option(help="Of the weights, as the hub spells it; for the card.")] = "other",
    data: Annotated[str, typer.Option(help="What the model card says of the pictures and their licence.")] = "",
    push: Annotated[str | None, typer.Option(help="Also upload the folder to this name on the hub.")] = None,
) -> None:
    """Write a model for others: weights, configuration and a model card.

    Example: latentdiff export runs/mine my-model --precision bf16
    """
    with plain_errors():
        from ..files.export import export_model, push_folder

        if push and format is Format.single:
            raise LatentDiffError("--push uploads a folder: leave out --format single")
        if shard_gb is not None and not 0 < shard_gb < 1e6:
            raise LatentDiffError(f"--shard-gb {shard_gb}: expected a number above 0")
        written = export_model(
            source,
            output,
            single=format is Format.single,
            dtype=precision.dtype(),
            variant=variant,
            max_shard_bytes=None if shard_gb is None else int(shard_gb * 1e9),
            licence=licence,
            data=data,
        )
        typer.echo(written)
        if push:
            typer.echo(push_folder(written, push))


@app.command("plan")
def _plan(
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, as many as wanted.")] = None,
    config: Annotated[str, typer.Option("--config", "-c", help="YAML file, or the name of a recipe.")] = "emoji-64",
    device: Annotated[str, typer.Option(help="A GPU by name, such as h100, or cpu: this machine.")] = "cpu",
    num_devices: Annotated[int, typer.Option("--devices", help="How many of them.")] = 1,
    dataset_size: Annotated[
        int | None, typer.Option("--pictures", help="In the data set, for the cache's size.")
    ] = None,
    mfu: Annotated[float | None, typer.Option(help="Share of the peak FLOP/s that training reaches.")] = None,
) -> None:
    """Parameters, FLOPs, and estimates of memory and time for a training, before it is launched.

    Example: latentdiff plan --config emoji-256 --device h100 --devices 8
    """
    with plain_errors():
        from ..config import load_config
        from ..plan import plan

        loaded = load_config(config, overrides or ())
        for line in plan(loaded, device=device, num_devices=num_devices, dataset_size=dataset_size, mfu=mfu).lines():
            typer.echo(line)


def save_picture(image: Image.Image, path: Path) -> Path:
    """Write a PNG with the picture's recipe in its metadata."""
    from PIL.PngImagePlugin import PngInfo

    facts = PngInfo()
    for key, value in image.info.items():
        if isinstance(key, str) and isinstance(value, str):
            facts.add_text(key, value)
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
