"""The commands in README and docs run as written, except that recipes that take hours are shrunk."""

import os
import pydoc
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from latentdiff.config import Config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHERS = [ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
NOT_HERE = ("pip ", "source ")  # they would change the environment of the tests; CI runs them
SMALL = ("trackers=[]", "train_vae.steps=4", "train_latent.steps=4", "train_vae.warmup_steps=1",
         "train_latent.warmup_steps=1", "train_vae.adversarial_start=5", "data.max_broken=0.5")  # fmt: skip
TRAININGS = r"train_vae\.py|train_latent\.py|latentdiff (train|train-vae|encode|train-latent)\b"


def commands(page: Path) -> list[str]:
    """Return the lines of a page's bash blocks, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    lines = [shlex.join(shlex.split(line, comments=True)) for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def small(line: str, name: str) -> str:
    """Shrink a command: the recipe `debug`, an output of its own, two processes instead of eight, few concepts."""
    line = re.sub(r"(latentdiff evaluate\b.*?)( --concepts \d+|$)", r"\1 --concepts 4", line)
    line = line.replace("python examples/four_families", "python examples/four_families --scale 0.002")
    if not re.search(TRAININGS, line):
        return re.sub(r"runs/emoji-\d+", "runs/mine", line)
    line = re.sub(r"--config [\w.-]+", "--config debug", line.replace("--num_processes 8", "--num_processes 2"))
    line = re.sub(r" (output|data\.source|train_latent\.\w+)=\S+", "", line)
    line += f" data.source=my-pictures output=runs/line-{name} {shlex.join(SMALL)}"
    if re.search(r"train_latent\.py|train-latent|encode", line) and "vae.pretrained" not in line:
        line += " vae.pretrained=runs/mine/vae"
    return line


@pytest.mark.parametrize("page", PAGES + OTHERS, ids=lambda page: str(page.relative_to(ROOT)))
def test_make_targets_exist(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"^make ([a-z-]+)|`make (?:PYTHON=\S+ )?([a-z-]+)`", page.read_text(), re.MULTILINE)
    assert {first or second for first, second in named} <= set(targets)


@pytest.mark.parametrize("page", PAGES + OTHERS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert "://" in link or (page.parent / link).exists(), link


def in_navigation(entries: list) -> list[str]:
    """Return the pages in a navigation of mkdocs.yml, nested or not, titled or not."""
    pages = []
    for entry in entries:
        (entry,) = entry.values() if isinstance(entry, dict) else (entry,)
        pages += in_navigation(entry) if isinstance(entry, list) else [entry]
    return pages


def test_the_site_has_every_page():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    pages = [str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]]
    assert sorted(in_navigation(site["nav"])) == sorted(pages)


def test_the_api_reference_names_what_exists():
    names = [name for page in PAGES for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE)]
    assert "latentdiff.sampling.pipeline.LatentPipeline" in names
    for name in names:
        assert pydoc.locate(name), name


@pytest.mark.slow
def test_site(tmp_path):
    """It builds without a warning, fetches nothing from elsewhere, and explains every setting of a run."""
    for needed in ("mkdocs", "material", "mkdocstrings_handlers.python", "latex2mathml"):
        pytest.importorskip(needed)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False,
                          env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    for page in tmp_path.rglob("*.html"):
        assert not re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=.?(?:https?:)?//", page.read_text()), page
    formulas = (tmp_path / "mathematics.html").read_text()
    assert "<math" in formulas
    assert "arithmatex" not in formulas
    reference = (tmp_path / "api/configuration.html").read_text()
    for name, section in Config.model_fields.items():
        for key in getattr(section.annotation, "model_fields", [name]):
            assert f"<code>{key}</code>" in reference, (name, key)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """Return a function that runs commands in a clone with a folder of pictures, shared by all pages."""
    place = tmp_path_factory.mktemp("checkout")
    for name in ("train_vae.py", "train_latent.py", "train_configs", "examples", "benchmarks", "constraints.txt"):
        (place / name).symlink_to(ROOT / name)
    (place / "my-pictures").mkdir()
    for number in range(40):
        Image.effect_noise((72, 72), 50).convert("RGB").save(place / f"my-pictures/{number}.png")
        (place / f"my-pictures/{number}.txt").write_text(f"a red picture, number {number}")
    shutil.copy(place / "my-pictures/0.png", place / "picture.png")
    (place / "emoji").mkdir()
    Image.effect_noise((256, 256), 50).convert("RGB").save(place / "emoji/any.png")
    names, styles = [f"thing {number // 4}" for number in range(40)], ["3d", "color", "flat", "noto"] * 10
    texts = [f"a {style} emoji of a {name}" for name, style in zip(names, styles, strict=True)]
    images = [{"bytes": (place / "emoji/any.png").read_bytes(), "path": None}] * 40
    pq.write_table(pa.table({"image": images, "text": texts, "name": names, "style": styles}),
                   place / "emoji/train.parquet")  # fmt: skip
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

    mine = small("latentdiff train", "0").replace("runs/line-0", "runs/mine")  # which the pages use
    run(f"{mine} --config debug train_latent.steps=24 train_latent.ema_snapshots=24")
    run("cp -r runs/mine runs/other; cp -r runs/mine runs/old")
    return run


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands(checkout, page):
    for number, line in enumerate(commands(page)):
        if not line.startswith((*NOT_HERE, "make ")):
            assert "already done" not in checkout(small(line, f"{page.stem}-{number}"))
