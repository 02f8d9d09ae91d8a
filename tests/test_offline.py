"""After installation no request leaves the machine: every connection is refused and logged."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from latentdiff.assets import pictures_folder

ROOT = Path(__file__).resolve().parents[1]

SPY = """
import os, socket

def refuse(*args, **kwargs):
    with open(os.environ["SPY_LOG"], "a") as log:
        print(args, file=log)
    raise OSError("network access is not allowed here")

original = socket.socket.connect

def connect(self, address):
    return original(self, address) if self.family == socket.AF_UNIX else refuse(address)

socket.socket.connect = socket.socket.connect_ex = connect
socket.getaddrinfo = socket.gethostbyname = socket.create_connection = refuse
"""


@pytest.fixture
def offline(tmp_path):
    """Return a function that runs a command offline and returns the addresses it requested and its output."""
    (tmp_path / "spy").mkdir()
    (tmp_path / "spy/sitecustomize.py").write_text(SPY)
    log = tmp_path / "requested"
    hidden = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")  # unset, as on a user's machine
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    environment |= {"PYTHONPATH": f"{tmp_path / 'spy'}:{ROOT}", "SPY_LOG": str(log), "HF_HOME": str(tmp_path / "hf"),
                    "HF_DATASETS_CACHE": str(tmp_path / "cache"), "ACCELERATE_USE_CPU": "1"}  # fmt: skip

    def run(program, *arguments):
        command = [str(Path(sys.executable).with_name(program)), *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return (log.read_text() if log.is_file() else ""), done.stdout + done.stderr

    return run


def test_the_spy_sees(offline, tmp_path):
    """A test of the test."""
    with pytest.raises(AssertionError, match="network access is not allowed here"):
        offline("python", "-c", "from urllib.request import urlopen; urlopen('https://nowhere.example')")
    assert "nowhere.example" in (tmp_path / "requested").read_text()


COMMANDS = """
from latentdiff.cli import app
app(["sample", "a 3d emoji of a red apple", "--steps", "2", "--output", "out"], standalone_mode=False)
for source in ("parquet", "jsonl"):
    app(["data", "check", source, "data.image_size=64", "--output", f"{source}-check"], standalone_mode=False)
"""


@pytest.mark.slow
def test_a_name_on_the_hub_is_requested(offline, tmp_path):
    """And the error says that it cannot be fetched."""
    with pytest.raises(AssertionError, match="cannot be fetched from the hub"):
        offline("latentdiff", "sample", "a red apple", "--model", "nobody/nothing")
    assert (tmp_path / "requested").read_text()


def test_sampling_and_opening_pictures(offline, tmp_path):
    """The model that ships; and `datasets` reports the use of its loaders to a server, even for local files."""
    for folder in ("parquet", "jsonl"):
        (tmp_path / folder).mkdir()
    shutil.copy(pictures_folder("builtin:emoji-mini") + "/validation.parquet", tmp_path / "parquet/train.parquet")
    lines = []
    for number in range(40):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(tmp_path / f"jsonl/{number}.png")
        lines.append(f'{{"file_name": "{number}.png", "text": "red {number}"}}\n')
    (tmp_path / "jsonl/metadata.jsonl").write_text("".join(lines))
    requested, output = offline("python", "-c", COMMANDS)
    assert not requested
    assert "pictures" in output
    assert (tmp_path / "out/grid.png").is_file()
    assert all((tmp_path / f"{source}-check/report.json").is_file() for source in ("parquet", "jsonl"))


@pytest.mark.slow
def test_training_and_evaluating(offline, tmp_path):
    """`accelerate launch train_latent.py` without a config: the recipe and the pictures that ship."""
    requested, output = offline(
        "accelerate", "launch", ROOT / "train_latent.py", "train_latent.steps=4", "train_latent.warmup_steps=1"
    )
    assert not requested
    assert (tmp_path / "runs/demo/model/model_index.json").is_file(), output
    requested, output = offline(
        "latentdiff", "evaluate", "--model", "runs/demo", "--concepts", "2", "-n", "1", "--steps", "2"
    )
    assert not requested
    assert "PSNR" in output
