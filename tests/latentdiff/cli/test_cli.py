"""The command line: a user's mistake gives one line on stderr and exit code 1, never a traceback."""

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from latentdiff.cli import COMMANDS, app, plain_errors, run_stage
from latentdiff.config import load_config
from latentdiff.training import stages

ALL_HELP = """
import sys
from typer.testing import CliRunner
from latentdiff.cli import COMMANDS, app
for command in ("", "data", *COMMANDS):
    assert "Usage" in CliRunner().invoke(app, [*command.split(), "--help"]).output, command
print(*{"torch", "transformers", "numpy", "PIL", "datasets", "accelerate", "diffusers"} & set(sys.modules))
"""


@pytest.fixture
def invoke(tmp_path):
    def run(*arguments):
        return CliRunner().invoke(app, [*arguments])

    return run


@pytest.mark.parametrize("command", ["", "data", *COMMANDS])
def test_help(invoke, command):
    result = invoke(*command.split(), "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_help_imports_nothing_heavy():
    """It must be instant, and torch alone takes seconds to import."""
    done = subprocess.run([sys.executable, "-c", ALL_HELP], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("as_script", [False, True])
def test_train_latent_without_a_config_trains_the_demo(invoke, monkeypatch, as_script, tmp_path):
    trained, settings = [], ("--budget", "10m", f"output={tmp_path}")
    monkeypatch.setattr(stages, "train_latent", lambda config, run: trained.append((config, run.clock.elapsed() > 0)))
    if as_script:
        monkeypatch.setattr(sys, "argv", ["train_latent.py", *settings])
        with pytest.raises(SystemExit, match=r"^0$"):
            run_stage("train-latent")
    else:
        assert invoke("train-latent", *settings).exit_code == 0
    assert trained == [(load_config("demo", [f"output={tmp_path}", "budget=10m"]), True)]


def test_the_schema_is_json(invoke):
    assert "train_latent" in json.loads(invoke("schema").output)["properties"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "-c", "nothing"], ["nothing", "no such file", "recipes"]),
        (["train", "-c", "debug", "train_vae.stepz=3"], ["unknown key 'train_vae.stepz'", "did you mean 'steps'"]),
        (["train", "-c", "debug", "data.source=/no/such/folder"], ["/no/such/folder"]),
        (["train-latent", "-c", "debug"], ["no finished VAE", "train_vae.py", "vae.pretrained"]),
        (["train-latent", "-c", "debug", "vae.pretrained=/no/vae"], ["/no/vae", "no such folder"]),
        (
            ["train-vae", "-c", "debug", "train_vae.batch_size=0"],
            ["train_vae.batch_size=0"],
        ),
        (["train", "-c", "debug", "text_encoder.vocab_size=20"], ["vocab_size=20"]),
        (
            ["train", "-c", "debug", "data.image_size=64", "data.min_size=500"],
            ["none of the", "too small"],
        ),
        (["train", "-c", "debug", "data.caption_columns=[captoin]"], ["captoin", "text"]),
        (["train", "-c", "debug", "precision=fp16"], ["precision=fp16: not supported on a CPU"]),
        (["train", "-c", "debug", "train_vae.compile=true"], ["compile=true: not supported on a CPU"]),
        (["train", "-c", "debug", "unet.attention=xformers"], ["unet.attention=xformers: needs an NVIDIA GPU"]),
        (["train", "-c", "debug", "unet.attention=flash"], ["unet.attention", "'flash'", "'sdpa' or 'xformers'"]),
        (["train", "-c", "debug", "trackers=[tensorbord]"], ["tensorbord", "did you mean 'tensorboard'"]),
        (["train", "-c", "debug", "train_vae.perceptual_weights=/no/lpips"], ["/no/lpips"]),
        (["data", "check", "/no/such/folder"], ["/no/such/folder"]),
    ],
)
def test_mistakes(invoke, tmp_path, arguments, words):
    output = [] if arguments[0] == "data" else [f"output={tmp_path}"]
    result = invoke(*arguments, *output)
    assert result.exit_code == 1, result.output
    message = next(line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert all(word in message for word in words), message
    assert "Traceback" not in result.output


def test_an_output_that_cannot_be_written(invoke, tmp_path):
    (tmp_path / "file").write_text("")
    result = invoke("train", "-c", "debug", f"output={tmp_path / 'file' / 'run'}")
    assert result.exit_code == 1
    assert "error: output=" in result.stderr


def test_data_check_writes_what_training_reads(invoke, tmp_path):
    """Training accepts the quarantine list that `data check` writes."""
    source = tmp_path / "pictures"
    from PIL import Image

    source.mkdir()
    for number in range(30):
        Image.new("RGB", (40, 40), (number * 8, 0, 0)).save(source / f"{number}.png")
        (source / f"{number}.txt").write_text(f"red number {number}")
    (source / "broken.png").write_bytes(b"nothing")
    (source / "broken.txt").write_text("a broken one")
    result = invoke("data", "check", str(source), "-c", "debug", "--output", str(tmp_path / "check"))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "check" / "contact_sheet.png").is_file()
    quarantine = tmp_path / "check" / "quarantine.txt"
    assert quarantine.read_text().startswith("broken.png\t")
    settings = ["-c", "debug", f"data.source={source}", f"output={tmp_path / 'run'}", "threads=1",
                "train_vae.steps=1", "train_vae.warmup_steps=0", "data.max_broken=0"]  # fmt: skip
    result = invoke("train-vae", *settings, f"data.quarantine={quarantine}")
    assert result.exit_code == 0, result.output


def test_out_of_memory_suggests_what_needs_less(capsys):
    with pytest.raises(SystemExit), plain_errors():
        torch.empty(1 << 50)
    error = capsys.readouterr().err
    assert error.startswith("error: DefaultCPUAllocator: can't allocate memory: you tried to allocate 4503599627370496")
    assert "micro_batch_size" in error
    with pytest.raises(SystemExit), plain_errors():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    assert capsys.readouterr().err.startswith("error: CUDA out of memory. Training needs less memory with")
    with pytest.raises(RuntimeError, match="shape"), plain_errors():  # a bug of ours, not a user's mistake
        torch.zeros(2).view(3)
