"""`latentdiff evaluate`: what a finished model is worth, measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..assets import ASSETS, EMOJI_STYLE
from ..errors import LatentDiffError
from .errors import plain_errors
from .models import Device, Model, Precision

if TYPE_CHECKING:
    from ..sections import DataConfig

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
    num_concepts: Annotated[int, typer.Option("--concepts", min=2, help="Training concepts to draw.")] = 64,
    num_images: Annotated[int, typer.Option("--num-images", "-n", min=1, help="Pictures of each.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Chooses the concepts; of the first picture, then counting up.")] = 0,
    guidance_scale: Annotated[float, typer.Option("--guidance", min=0, help="1 is off.")] = 5.0,
    num_steps: Annotated[int, typer.Option("--steps", min=1, help="Network evaluations.")] = 25,
    device: Device = None,
    precision: Annotated[Precision | None, typer.Option(help="By default bf16 where that is fast.")] = None,
) -> None:
    """Measure a model: its VAE, how well it denoises held-out pictures, and whether it draws what is asked.

    Example: latentdiff evaluate --model runs/mine data.source=my-pictures
    """
    with plain_errors():
        data = _data_of(model, overrides or ())
        from ..evaluation.evaluate import evaluate
        from ..sampling.pipeline import LatentPipeline
        from ..sampling.settings import Recipe

        output.mkdir(parents=True, exist_ok=True)  # refused now where it cannot be made
        pipe = LatentPipeline.from_pretrained(model, device=device, dtype=precision.dtype() if precision else None)
        recipe = Recipe(num_images=num_images, guidance_scale=guidance_scale, num_steps=num_steps, seed=seed)
        report = evaluate(pipe, data, recipe, style=style, num_concepts=num_concepts,
                          say=lambda line: typer.echo(line, err=True))  # fmt: skip
        for line in report.lines():
            typer.echo(line)
        report.write(output)
        typer.echo(f"report and pictures in {output}")


def _data_of(model: str | None, overrides: Sequence[str]) -> DataConfig:
    """The pictures a model was trained on: as the recipe of one that ships says, or as its run recorded.

    Raises:
        LatentDiffError: neither is known, and `data.source` is not given; or an override is wrong.
    """
    from ..config import load_config, parse_config, with_overrides
    from ..files.open import find_model, read_json

    if stray := [override for override in overrides if not override.startswith("data.")]:
        raise LatentDiffError(f"{stray[0]!r}: only data.key=value counts here")
    if sizes := [override for override in overrides if override.startswith("data.image_size=")]:
        raise LatentDiffError(f"{sizes[0]!r}: pictures are measured at the size that the model has")
    folder = find_model(model).resolve()
    if folder.parent == ASSETS:
        return load_config(folder.name, overrides).data
    record = folder.parent / "run.json"
    values: dict[str, Any] = {"data": {}}
    try:
        values["data"] |= read_json(record, "")["launches"][-1]["config"]["data"]
    except (LatentDiffError, LookupError, TypeError):
        if not any(override.startswith("data.source=") for override in overrides):
            raise LatentDiffError(f"{model}: does not say what it was trained on; give data.source=FOLDER") from None
    values["data"].pop("image_size", None)  # it would have to suit the default VAE
    return parse_config(with_overrides(values, overrides), str(record)).data
