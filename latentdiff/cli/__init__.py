"""The `latentdiff` command line; train_vae.py and train_latent.py each run one of its commands.

A command is a function that yields the lines to print. It imports torch only when it runs, so that `--help` is instant.
"""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Annotated

import typer

from .. import __version__
from ..installation import check_installation
from . import ema, likelihood, models, report, training
from .errors import plain_errors, visible

COMMANDS: dict[str, Callable[..., Iterable[object]]] = {
    "train": training.stage("train", "Run all three stages, or resume a run that was stopped."),
    "train-vae": training.stage("train_vae", "Stage 1: train the VAE."),
    "encode": training.stage("encode", "Stage 2: cache latents, and a frozen text encoder's features."),
    "train-latent": training.stage("train_latent", "Stage 3: train the UNet on the cached latents.", recipe="demo"),
    "plan": training.plan,
    "data check": training.data_check,
    "sample": models.sample,
    "evaluate": models.evaluate,
    "likelihood": likelihood.likelihood,
    "ema": ema.ema,
    "report": report.report,
    "inspect": models.inspect,
    "export": models.export,
    "schema": training.schema,
}
FIRST_STEP = """\
First step: sample from the model that ships with latentdiff.

  latentdiff sample "a 3d emoji of a red apple"

Then train on your own images, a folder with a caption in a .txt file beside each image.

  latentdiff data check my-pictures
  latentdiff train --config emoji-64 data.source=my-pictures output=runs/mine
  latentdiff sample "a red apple" --model runs/mine

Each command has its own help: latentdiff sample --help"""


def _group(text: str | None = None) -> typer.Typer:
    return typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, help=text,
                       context_settings={"help_option_names": ["-h", "--help"]})  # fmt: skip


def _printing(command: Callable[..., Iterable[object]]) -> Callable[..., None]:
    @wraps(command)
    def run(**options: object) -> None:
        with plain_errors():
            check_installation()
            for line in command(**options):
                typer.echo(visible(str(line)))

    return run


app = _group(f"Train your own text-to-image latent diffusion model.\n\n{FIRST_STEP}")
data = _group("Check a dataset before training on it.")
app.add_typer(data, name="data")
for name, function in COMMANDS.items():
    (data if name.startswith("data ") else app).command(name.split()[-1])(_printing(function))


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run the `latentdiff` command."""
    app()


def run_stage(name: str) -> None:
    """Run one command as a script of its own, for `accelerate launch`."""
    script = _group()
    script.command()(_printing(COMMANDS[name]))
    script()
