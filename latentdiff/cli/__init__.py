"""`latentdiff ...`: every stage as a command, and the same entry for train_vae.py and train_latent.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import __version__
from ..config import Config, load_config
from .errors import plain_errors
from .evaluate import app as evaluate_app
from .models import app as models_app

ConfigFile = Annotated[str, typer.Option("--config", "-c", help="YAML file, or the name of a recipe such as emoji-64.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, as many as wanted.")]

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False,
                  context_settings={"help_option_names": ["-h", "--help"]},
                  help="Train your own text-to-image latent diffusion model.")  # fmt: skip
data_app = typer.Typer(no_args_is_help=True, help="Look at pictures before training on them.")
app.add_typer(data_app, name="data")
app.add_typer(models_app)
app.add_typer(evaluate_app)


def main() -> None:
    """The command `latentdiff`."""
    app()


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def run_stage(stage: Callable[[Config], Any], recipe: str = "emoji-64") -> None:
    """A script with `--config` (`recipe` without it) and overrides that runs one stage."""

    def command(overrides: Overrides = None, config: ConfigFile = recipe) -> None:
        with plain_errors():
            stage(load_config(config, overrides or ()))

    command.__doc__ = sys.modules[stage.__module__].__doc__ if not stage.__doc__ else stage.__doc__.split("\n")[0]
    script = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    script.command()(command)
    script()


@app.command("train")
def _train(overrides: Overrides = None, config: ConfigFile = "emoji-64") -> None:
    """Run what is missing of: VAE training, latent cache, latent training.

    Example: latentdiff train --config emoji-64 data.source=my-pictures output=runs/mine
    """
    from ..training.stages import train

    with plain_errors():
        typer.echo(train(load_config(config, overrides or ())))


@app.command("train-vae")
def _train_vae(overrides: Overrides = None, config: ConfigFile = "emoji-64") -> None:
    """Train the autoencoder.

    Example: latentdiff train-vae --config emoji-64 data.source=my-pictures output=runs/mine
    """
    from ..training.stages import train_vae

    with plain_errors():
        typer.echo(train_vae(load_config(config, overrides or ())))


@app.command("encode")
def _encode(overrides: Overrides = None, config: ConfigFile = "emoji-64") -> None:
    """Fill the cache of latents, and of text features where the text encoder is frozen.

    Example: latentdiff encode --config emoji-64 data.source=my-pictures output=runs/mine
    """
    from ..training.stages import encode

    with plain_errors():
        encode(load_config(config, overrides or ()))


@app.command("train-latent")
def _train_latent(overrides: Overrides = None, config: ConfigFile = "emoji-64") -> None:
    """Train the UNet on the cached latents.

    Example: latentdiff train-latent --config emoji-64 data.source=my-pictures output=runs/mine
    """
    from ..training.stages import train_latent

    with plain_errors():
        typer.echo(train_latent(load_config(config, overrides or ())))


@data_app.command("check")
def _data_check(
    source: Annotated[str, typer.Argument(help="Folder, Parquet or tar files, hub name, or builtin:emoji-mini.")],
    overrides: Overrides = None,
    config: ConfigFile = "emoji-64",
    output: Annotated[
        Path, typer.Option(help="Where the report, the contact sheet and the quarantine list go.")
    ] = Path("data-check"),
) -> None:
    """Count, measure and open every picture; write a report, a contact sheet and a quarantine list.

    Example: latentdiff data check my-pictures --config emoji-64
    """
    from ..data.check import check_source

    with plain_errors():
        loaded = load_config(config, [*(overrides or ()), f"data.source={json.dumps(source)}"])
        for line in check_source(loaded.data, output, _tokenizer(loaded)).lines():
            typer.echo(line)


def _tokenizer(config: Config) -> Any:
    """The one that training would use."""
    from text_encoder import TextEncoder, train_tokenizer

    from ..assets import part_folder
    from ..data.sources import open_source

    section = config.text_encoder
    if section.pretrained:
        folder = part_folder(section.pretrained, "text_encoder")
        encoder = TextEncoder.from_pretrained(folder, max_length=section.max_length)
        encoder.tokenizer.model_max_length = section.max_length
        return encoder.tokenizer
    captions = [caption for several in open_source(config.data)[0].all_captions() for caption in several]
    return train_tokenizer(captions, vocab_size=section.vocab_size, max_length=section.max_length)


@app.command("schema")
def _schema() -> None:
    """Print the JSON schema of the configuration, for editors.

    Example: latentdiff schema
    """
    typer.echo(json.dumps(Config.model_json_schema(), indent=2))
