"""Real trainings, small: a folder of pictures, and processes that can be killed."""

import json
import multiprocessing
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from safetensors import safe_open

from latentdiff.training.checkpoint import newest_checkpoint

sys.path.insert(0, str(Path(__file__).parent))  # so that `scenario` can be imported in the processes, too
import scenario

SHAPES, COLOURS = ("circle", "square"), ("red", "green", "blue", "yellow", "black")


def draw(folder: Path, count: int) -> None:
    """Pictures of one shape each, with captions in metadata.jsonl."""
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


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """24 pictures to train on, 6 held out."""
    folder = tmp_path_factory.mktemp("pictures")
    draw(folder / "train", 24)
    draw(folder / "validation", 6)
    return folder


@pytest.fixture(scope="session")
def server():
    """Starts processes from a clean one that has imported everything: a second instead of five each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["scenario", "datasets", "tensorboard"])
    return context


@pytest.fixture
def start(server, pictures, tmp_path):
    """Start trainings into tmp_path/<name>; returns their processes."""

    def begin(name, *overrides, processes=1, **accident):
        settings = ["precision=fp32", "threads=1", f"data.source={pictures}", *overrides, f"output={tmp_path / name}"]
        port = str(_free_port())
        children = []
        for rank in range(processes):
            environment = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1",
                           "HF_DATASETS_CACHE": str(pictures.parent / "cache")}  # fmt: skip
            if processes > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                                "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
                                "MASTER_PORT": port}  # fmt: skip
            environment |= accident.get("environment", {})
            arguments = {**accident, "environment": environment}
            children.append(server.Process(target=scenario.run, args=(settings,), kwargs=arguments))
            children[-1].start()
        return children

    return begin


@pytest.fixture
def train(start, tmp_path):
    """Run a training to its end, or to its accident; returns the exit code, the worst one of several processes."""

    def run(name, *overrides, **accident):
        children = start(name, *overrides, **accident)
        for child in children:
            child.join(120)
            assert child.exitcode is not None, "still running"
        return max((child.exitcode for child in children), key=abs)

    return run


@pytest.fixture
def said(tmp_path):
    """What a training wrote to its terminal."""
    return lambda name, rank=0: Path(f"{tmp_path / name}.{rank}.log").read_text()


@pytest.fixture
def state(tmp_path):
    """Every tensor of the newest checkpoint of a training: weights, averages, moments, counters."""

    def read(name, stage="train_latent"):
        checkpoint = newest_checkpoint(tmp_path / name / stage / "checkpoints", print)
        tensors = {
            f"{file}/{key}": tensor for file in checkpoint.names() for key, tensor in checkpoint.tensors(file).items()
        }
        return checkpoint.step, tensors

    return read


@pytest.fixture
def log(tmp_path):
    """The lines of log.jsonl that have a value."""

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
