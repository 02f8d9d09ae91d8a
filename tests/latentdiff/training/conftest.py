"""Small but real training runs: a folder of pictures, and processes that can be killed."""

import json
import multiprocessing
import os
import socket
import sys
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from safetensors import safe_open

from latentdiff.training.checkpoint import newest_checkpoint

sys.path.insert(0, str(Path(__file__).parent))  # so that subprocesses can import `scenario`, too
import scenario

SHAPES, COLOURS = ("circle", "square"), ("red", "green", "blue", "yellow", "black")
# Six steps per stage: checkpoints after the third and the sixth, the discriminator from the fourth on, and one and a
# half passes over the pictures.
SIX_STEPS = ("steps=6", "batch_size=6", "micro_batch_size=3", "warmup_steps=2", "log_every=3", "checkpoint_every=3",
             "validate_every=6")  # fmt: skip
SHORT = ("trackers=[]", "report=false", "train_vae.adversarial_start=4",
         *(f"{stage}.{setting}" for stage in ("train_vae", "train_latent") for setting in SIX_STEPS))  # fmt: skip


def draw(folder: Path, count: int) -> None:
    """Draw pictures of one shape each, with captions in metadata.jsonl."""
    random = np.random.default_rng(0)
    lines = []
    for number in range(count):
        shape, colour = SHAPES[number % 2], COLOURS[number % 5]
        image = Image.new("RGB", (40, 40), "white")
        x, y, size = random.integers(2, 16, 3)
        pen = ImageDraw.Draw(image)
        (pen.ellipse if shape == "circle" else pen.rectangle)((x, y, x + size + 6, y + size + 6), fill=colour)
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number:03}.png")
        lines.append(
            json.dumps({"file_name": f"{number:03}.png", "text": [f"a {colour} {shape}", f"{shape}, {colour}"]})
        )
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def _drawn(once, name, count, held_out):
    def fill(folder):
        draw(folder / "train", count)
        draw(folder / "validation", held_out)

    return once(name, fill)


@pytest.fixture(scope="session")
def pictures(once):
    """24 training pictures, 6 held out."""
    return _drawn(once, "pictures", 24, 6)


@pytest.fixture(scope="session")
def sixty(once):
    """54 training pictures, 6 held out."""
    return _drawn(once, "sixty", 54, 6)


@pytest.fixture(scope="session")
def server():
    """Fork server that has imported everything, so that a process starts in one second instead of five."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["scenario", "warm_up", "datasets", "tensorboard"])
    with pytest.MonkeyPatch.context() as patch:  # what it cannot import it leaves out in silence
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    process = context.Process(target=scenario.check_preloaded)
    process.start()
    process.join()
    assert process.exitcode == 0, "the fork server has not imported everything"
    return context


def _process(server, pictures, output, *overrides, environment=(), **accident):
    """Return a process, not yet started, that trains the short recipe."""
    settings = ["precision=fp32", "threads=1", f"data.source={pictures}", *SHORT, *overrides, f"output={output}"]
    common = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(pictures.parent / "cache")}
    return server.Process(target=scenario.run, args=(settings,),
                          kwargs={**accident, "environment": common | dict(environment)})  # fmt: skip


@pytest.fixture(scope="session")
def uninterrupted(once, server, pictures):
    """The folder of an uninterrupted run of both stages, in a precision."""

    def run(precision):
        def fill(folder):
            child = _process(server, pictures, folder, f"precision={precision}", "trackers=null")
            child.start()
            child.join(180)
            assert child.exitcode == 0, Path(f"{folder}.0.log").read_text()

        return once(f"uninterrupted-{precision}", fill)

    return run


@pytest.fixture
def start(server, pictures, tmp_path):
    """Start a training run in tmp_path/<name>; returns its processes."""

    def begin(name, *overrides, processes=1, environment=(), **accident):
        port = str(_free_port())
        children = []
        for rank in range(processes):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                     "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}  # fmt: skip
            ranks = ranks if processes > 1 else {}
            children.append(_process(server, pictures, tmp_path / name, *overrides,
                                     environment=ranks | dict(environment), **accident))  # fmt: skip
            children[-1].start()
        return children

    return begin


@pytest.fixture
def short():
    """The settings of the short recipe."""
    return SHORT


@pytest.fixture
def train(start, tmp_path):
    """Train to the end or to the simulated accident; returns the exit code, the worst one of several processes."""

    def run(name, *overrides, **accident):
        children = start(name, *overrides, **accident)
        for child in children:
            child.join(120)
            assert child.exitcode is not None, "still running"
        return max((child.exitcode for child in children), key=abs)

    return run


@pytest.fixture
def said(tmp_path):
    """What a training run wrote to its terminal."""
    return lambda name, rank=0: Path(f"{tmp_path / name}.{rank}.log").read_text()


@pytest.fixture
def state(tmp_path):
    """Every tensor of the newest checkpoint of a run: weights, averages, moments, counters."""

    def read(name, stage="train_latent"):
        checkpoint = newest_checkpoint(tmp_path / name / stage / "checkpoints", print)
        tensors = {
            f"{file}/{key}": tensor for file in checkpoint.names() for key, tensor in checkpoint.tensors(file).items()
        }
        return checkpoint.step, tensors

    return read


@pytest.fixture
def log(tmp_path):
    """One value by step, from the lines of log.jsonl that have it."""

    def read(name, value="loss", stage="train_latent"):
        lines = [json.loads(line) for line in (tmp_path / name / stage / "log.jsonl").read_text().splitlines()]
        return {line["step"]: line[value] for line in lines if value in line}

    return read


@pytest.fixture
def weights():
    """All tensors of a safetensors file."""

    def read(path):
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    return read


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
