"""`latentdiff evaluate`: what a finished model is worth, measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cli_errors import plain_errors
from .cli_models import Device, Model, Precision
from .errors import LatentDiffError
from .shipped import ASSETS, EMOJI_STYLE

if TYPE_CHECKING:
    from .sections import DataConfig

app = typer.Typer()


@app.command("evaluate")
def _evaluate(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="data.key=value, over what the model's training was told.")
    ] = None,
    model: Model = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the report and the pictures.")] = Path(
        "evaluation"
    ),
    style: Annotated[
        str, typer.Option(help="Regular expression to leave out of captions; equal rests are one concept.")
    ] = EMOJI_STYLE,
    num_concepts: Annotated[int, typer.Option("--concepts", help="Training concepts to draw.")] = 64,
    num_images: Annotated[int, typer.Option("--num-images", "-n", help="Pictures of each.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of concepts.")] = 0,
    guidance_scale: Annotated[float, typer.Option("--guidance", help="1 is off.")] = 5.0,
    num_steps: Annotated[int, typer.Option("--steps", help="Network evaluations.")] = 25,
    device: Device = None,
    precision: Annotated[Precision | None, typer.Option(help="By default bf16 where that is fast.")] = None,
) -> None:
    """Measure a model: its VAE, how well it denoises held-out pictures, and whether it draws what is asked.

    Example: latentdiff evaluate --model runs/mine data.source=my-pictures
    """
    with plain_errors():
        data = _data_of(model, overrides or ())
        from .evaluation.model import evaluate
        from .pipeline import LatentPipeline

        pipe = LatentPipeline.from_pretrained(model, device=device, dtype=precision.dtype() if precision else None)
        report = evaluate(
            pipe,
            data,
            output,
            style=style,
            num_concepts=num_concepts,
            choice=seed,
            say=lambda line: typer.echo(line, err=True),
            num_images=num_images,
            guidance_scale=guidance_scale,
            num_steps=num_steps,
        )
        for line in report.lines():
            typer.echo(line)
        typer.echo(f"report and pictures in {output}")


def _data_of(model: str | None, overrides: Sequence[str]) -> DataConfig:
    """The pictures a model was trained on: as the recipe of one that ships says, or as its run recorded.

    Raises:
        LatentDiffError: neither is known, and `data.source` is not given; or an override is wrong.
    """
    from .config import load_config, parse_config, with_overrides
    from .weights.open_model import find_model, read_json

    if stray := [override for override in overrides if not override.startswith("data.")]:
        raise LatentDiffError(f"{stray[0]!r}: only data.key=value counts here")
    folder = find_model(model)
    if folder.parent == ASSETS:
        return load_config(folder.name, overrides).data
    record = folder.parent / "run.json"
    if not record.is_file() and not any(override.startswith("data.source=") for override in overrides):
        raise LatentDiffError(f"{model}: does not say what it was trained on; give data.source=FOLDER")
    values = {}
    if record.is_file():
        values = {"data": read_json(record, "")["launches"][-1]["config"]["data"]}
    return parse_config(with_overrides(values, overrides), str(record)).data
