"""`latentdiff ...`: the table of commands, and the same commands for train_vae.py and train_latent.py.

A command is a function that returns the lines to print, one by one. Nothing heavy is imported before it runs, so that
its help appears at once.
"""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Annotated

import typer

from .. import __version__
from ..installation import check_installation
from . import models, training
from .errors import plain_errors

COMMANDS: dict[str, Callable[..., Iterable[object]]] = {
    "train": training.stage("train", "Run what is missing of: VAE training, latent cache, latent training."),
    "train-vae": training.stage("train_vae", "Train the autoencoder."),
    "encode": training.stage("encode", "Fill the cache of latents, and of a frozen encoder's text features."),
    "train-latent": training.stage("train_latent", "Train the UNet on the cached latents.", recipe="demo"),
    "plan": training.plan,
    "data check": training.data_check,
    "sample": models.sample,
    "evaluate": models.evaluate,
    "inspect": models.inspect,
    "export": models.export,
    "schema": training.schema,
}
FIRST_STEP = 'First step: latentdiff sample "a 3d emoji of a red apple"'


def _group(text: str | None = None) -> typer.Typer:
    return typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, help=text,
                       context_settings={"help_option_names": ["-h", "--help"]})  # fmt: skip


def _printing(command: Callable[..., Iterable[object]]) -> Callable[..., None]:
    @wraps(command)
    def run(**options: object) -> None:
        with plain_errors():
            check_installation()
            for line in command(**options):
                typer.echo(line)

    return run


app = _group(f"Train your own text-to-image latent diffusion model.\n\n{FIRST_STEP}")
data = _group("Look at pictures before training on them.")
app.add_typer(data, name="data")
for name, function in COMMANDS.items():
    (data if name.startswith("data ") else app).command(name.split()[-1])(_printing(function))


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """The command `latentdiff`."""
    app()


def run_stage(name: str) -> None:
    """One of the commands as a script of its own, for `accelerate launch`."""
    script = _group()
    script.command()(_printing(COMMANDS[name]))
    script()
