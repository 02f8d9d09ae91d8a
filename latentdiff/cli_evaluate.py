"""`latentdiff evaluate`: what a finished model is worth, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_errors import plain_errors
from .cli_models import Device, Model, Precision

app = typer.Typer()


@app.command("evaluate")
def _evaluate(
    model: Model = None,
    data: Annotated[str, typer.Option(help="The pictures it was trained on, as data.source.")] = "builtin:emoji-mini",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the report and the pictures.")] = Path(
        "evaluation"
    ),
    style: Annotated[
        str, typer.Option(help="Regular expression to leave out of captions; equal rests are one concept.")
    ] = r"^an? (3d|noto) emoji of ",
    num_concepts: Annotated[int, typer.Option("--concepts", min=2, help="Training concepts to draw.")] = 64,
    num_images: Annotated[int, typer.Option("--num-images", "-n", min=1, help="Pictures of each.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of concepts.")] = 0,
    guidance_scale: Annotated[float, typer.Option("--guidance", help="1 is off.")] = 5.0,
    num_steps: Annotated[int, typer.Option("--steps", help="Network evaluations.")] = 25,
    device: Device = None,
    precision: Annotated[Precision | None, typer.Option(help="By default bf16 where that is fast.")] = None,
) -> None:
    """Measure a model: its VAE, how well it denoises held-out pictures, and whether it draws what is asked.

    Example: latentdiff evaluate --model runs/mine --data my-pictures
    """
    with plain_errors():
        from .evaluation.model import evaluate
        from .pipeline import LatentPipeline
        from .sections import DataConfig

        pipe = LatentPipeline.from_pretrained(model, device=device, dtype=precision.dtype() if precision else None)
        report = evaluate(
            pipe,
            DataConfig(source=data),
            output,
            style=style,
            say=lambda line: typer.echo(line, err=True),
            num_concepts=num_concepts,
            num_images=num_images,
            seed=seed,
            guidance_scale=guidance_scale,
            num_steps=num_steps,
        )
        for line in report.lines():
            typer.echo(line)
        typer.echo(f"report and pictures in {output}")
