"""The commands of README and docs run as they stand there, but for what takes hours: recipes are made small."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_HERE = ("pip ", "source ")  # they change the environment that the tests run in; CI installs by them
SMALL = ("trackers=[]", "train_vae.steps=4", "train_latent.steps=4", "train_vae.warmup_steps=1",
         "train_latent.warmup_steps=1", "train_vae.adversarial_start=5", "data.max_broken=0.5")  # fmt: skip
TRAININGS = r"train_vae\.py|train_latent\.py|latentdiff (train|train-vae|encode|train-latent)\b"


def commands(page: Path) -> list[str]:
    """The lines of a page's bash blocks, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    lines = [shlex.join(shlex.split(line, comments=True)) for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def small(line: str, name: str) -> str:
    """The same command, hours shorter: the recipe `debug`, an output of its own, two processes instead of eight."""
    line = line.replace("latentdiff evaluate", "latentdiff evaluate --concepts 4")
    if not re.search(TRAININGS, line):
        return line.replace("runs/emoji-64", "runs/mine")
    line = re.sub(r"--config [\w.-]+", "--config debug", line.replace("--num_processes 8", "--num_processes 2"))
    line = re.sub(r" (output|data\.source|train_latent\.\w+)=\S+", "", line)
    line += f" data.source=my-pictures output=runs/line-{name} {shlex.join(SMALL)}"
    if re.search(r"train_latent\.py|train-latent|encode", line) and "vae.pretrained" not in line:
        line += " vae.pretrained=runs/mine/vae"
    return line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"^make ([a-z-]+)|`make (?:PYTHON=\S+ )?([a-z-]+)`", page.read_text(), re.MULTILINE)
    assert {first or second for first, second in named} <= set(targets)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert "://" in link or (page.parent / link).exists(), link


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What a clone has at its top, and a folder of pictures: one place for all pages, as a reader would have."""
    place = tmp_path_factory.mktemp("checkout")
    for name in ("train_vae.py", "train_latent.py", "train_configs", "examples", "benchmarks", "constraints.txt"):
        (place / name).symlink_to(ROOT / name)
    (place / "my-pictures").mkdir()
    for number in range(40):
        Image.effect_noise((72, 72), 50).convert("RGB").save(place / f"my-pictures/{number}.png")
        (place / f"my-pictures/{number}.txt").write_text(f"a red picture, number {number}")
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }

    def run(line: str) -> str:
        done = subprocess.run(["bash", "-c", line], cwd=place, env=environment, capture_output=True, text=True,
                              timeout=900, check=False)  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout + done.stderr

    run(small("latentdiff train", "0").replace("runs/line-0", "runs/mine") + " --config debug")  # that pages speak of
    return run


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands(checkout, page):
    for number, line in enumerate(commands(page)):
        if not line.startswith((*NOT_HERE, "make ")):
            assert "done already" not in checkout(small(line, f"{page.stem}-{number}"))
