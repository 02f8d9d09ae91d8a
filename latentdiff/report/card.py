"""The model card of a run as HTML: the one beside its model, or one made from configs and headers alone."""

import math
from pathlib import Path

from markdown_it import MarkdownIt

from ..files.card import model_card
from ..files.experts import read_edges, unet_folders
from ..files.scheduler import SAVED, read_scheduler
from ..files.tensors import CONFIG, open_file, read_json
from .run import Run, number

PARTS = ("vae", "unet", "text_encoder")


def card_html(run: Run) -> str:
    """Return the card; "" if there is no model yet. HTML in it stays text, and pictures from elsewhere are not shown.

    Raises LatentDiffError if files of the model are broken.
    """
    path = run.result("README.md")
    if path is not None:
        text = path.read_text(encoding="utf-8", errors="replace")
    elif (run.folder / "model" / "model_index.json").is_file():
        text = _made(run.folder)
    else:
        return ""
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    return str(markdown.render(_without_head(text)))


def _made(folder: Path) -> str:
    model = folder / "model"
    edges = read_edges(model)
    unets = unet_folders(model, len(edges) - 1 if edges else 1)
    counts = {part: sum(map(_parameters, unets if part == "unet" else [model / part])) for part in PARTS}
    configs = {part: read_json(model / part / CONFIG, "every part has one") for part in PARTS}
    levels = len(configs["vae"].get("block_out_channels") or [0])
    size = int(number(configs["unet"].get("sample_size")) or 0) * 2 ** (levels - 1)
    encoder = str((configs["text_encoder"].get("architectures") or ["text"])[0])
    scheduler = model / "scheduler" / "scheduler_config.json"
    process = read_scheduler(read_json(scheduler, "it defines how the model denoises"), scheduler, SAVED)
    return model_card(counts, encoder, process, title=folder.resolve().name, image_size=size, run=folder)


def _parameters(folder: Path) -> int:
    """Count the parameters of a part by the headers of its files."""
    files = [open_file(path)[0] for path in sorted(folder.glob("*.safetensors"))]
    return sum(math.prod(tensor.shape) for tensors in files for tensor in tensors.values())


def _without_head(text: str) -> str:
    """Drop the metadata for the Hub between two lines of three hyphens."""
    if text.startswith("---\n") and "\n---\n" in text[4:]:
        return text[text.index("\n---\n", 4) + 5 :]
    return text
