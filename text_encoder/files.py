"""Text encoders on disk, through transformers: what is opened, what is refused, what is written.

Only two classes are ever built, by name from the list below. A config cannot bring code or another class along.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BertModel, BertTokenizerFast, CLIPTextModel, CLIPTokenizerFast, PretrainedConfig
from transformers.utils import logging

from .errors import TextEncoderError

MODELS: dict[str, Any] = {"bert": BertModel, "clip_text_model": CLIPTextModel, "clip": CLIPTextModel}
TOKENIZERS: dict[str, Any] = {"bert": BertTokenizerFast, "clip": CLIPTokenizerFast}
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json")
DROPOUTS = {"bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"), "clip": ("attention_dropout",)}

# Keys by which a config could have code loaded, or become another kind of model than the one that is tested.
REFUSED = (
    "auto_map",
    "custom_pipelines",
    "trust_remote_code",
    "_attn_implementation",
    "_attn_implementation_internal",
    "transformers_weights",
    "quantization_config",
    "is_decoder",
    "add_cross_attention",
)
OURS = ("embeddings.", "encoder.", "text_model.", "bert.", "final_layer_norm.")  # tensors that features pass through


def load_model(name: str | Path, dtype: torch.dtype, variant: str | None = None) -> tuple[nn.Module, str]:
    """The model behind a folder or hub name, and its kind, `bert` or `clip`.

    Raises:
        TextEncoderError: as `TextEncoder.from_pretrained`.
    """
    local = _is_local(name)
    if local and not (Path(name) / "config.json").is_file():
        raise TextEncoderError(f"{Path(name) / 'config.json'}: no such file; a text encoder's folder has one")
    with _errors_of(name):
        values, _ = PretrainedConfig.get_config_dict(str(name), local_files_only=local)
        refused = [key for key in REFUSED if values.get(key)]
        model_type = str(values.get("model_type"))
    if refused:
        raise TextEncoderError(
            f"{name}: its config has {refused[0]!r}, which is refused: foreign code, or another model"
        )
    if model_type not in MODELS:
        raise TextEncoderError(f"{name}: model_type {model_type!r} is not supported; only {', '.join(MODELS)} are")
    kind = "bert" if model_type == "bert" else "clip"
    no_dropout: dict[str, Any] = dict.fromkeys(DROPOUTS[kind], 0.0)
    if local:
        variant = _find_variant(Path(name), variant)
    options = {
        "variant": variant,
        "use_safetensors": True,
        "local_files_only": local,
        "output_loading_info": True,
        **no_dropout,
    }
    with _errors_of(name), quiet():
        model, report = MODELS[model_type].from_pretrained(str(name), dtype=dtype, **options)
    # Heads that other tasks need may be too many, and the pooler may be missing: features use neither.
    if missing := sorted(key for key in report["missing_keys"] if not key.startswith("pooler.")):
        raise TextEncoderError(f"{name}: the weights lack {len(missing)} tensors: {', '.join(missing[:3])}")
    if extra := sorted(key for key in report["unexpected_keys"] if key.startswith(OURS)):
        raise TextEncoderError(f"{name}: the weights have {len(extra)} tensors too many: {', '.join(extra[:3])}")
    return model, kind


def load_tokenizer(name: str | Path, tokenizer: str | Path | None, kind: str) -> tuple[Any, bool]:
    """The tokenizer, and whether it lies in the model's own folder.

    Raises:
        TextEncoderError: as `TextEncoder.from_pretrained`.
    """
    source = tokenizer
    if source is None:
        beside = Path(name).parent / "tokenizer"
        source = beside if _is_local(name) and not _has_tokenizer(Path(name)) and beside.is_dir() else name
    local = _is_local(source)
    if local and not _has_tokenizer(Path(source)):
        raise TextEncoderError(f"{source}: no tokenizer there; expected one of {', '.join(TOKENIZER_FILES)}")
    with _errors_of(source):
        loaded = TOKENIZERS[kind].from_pretrained(str(source), local_files_only=local)
    if not isinstance(loaded.model_max_length, int):
        raise TextEncoderError(f"{source}: model_max_length={loaded.model_max_length!r}: expected a whole number")
    return loaded, source == name


def save_model(
    model: nn.Module,
    folder: Path,
    use_attention_mask: bool,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
) -> None:
    """Write `config.json` and `model.safetensors`, pooler and all: stock loaders shall have nothing to complain of."""
    saved: Any = model if dtype is None else deepcopy(model).to(dtype)
    saved.config.use_attention_mask = use_attention_mask  # without it diffusers passes no mask to the encoder
    with _errors_of(folder, "written"), quiet():
        folder.mkdir(parents=True, exist_ok=True)  # transformers would log a failure and go on
        saved.save_pretrained(folder, variant=variant)


def save_tokenizer(tokenizer: Any, folder: Path, max_length: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, and for BERT `vocab.txt`, which transformers 4 reads."""
    tokenizer.model_max_length = max_length  # diffusers pads prompts to it
    with _errors_of(folder, "written"):
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(str(folder))
        if isinstance(tokenizer, BertTokenizerFast):
            vocabulary = tokenizer.get_vocab()
            lines = sorted(vocabulary, key=vocabulary.__getitem__)
            (folder / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _find_variant(folder: Path, variant: str | None) -> str | None:
    """The variant of the weights to open, after a look at the files: transformers follows an index anywhere.

    Raises:
        TextEncoderError: no weights, or an index that names what is not a file of the folder.
    """
    files = sorted(path.name for path in folder.iterdir())
    pattern = r"model(?:\.(\w+))?\.safetensors|model\.safetensors\.index(?:\.(\w+))?\.json"
    found = {match[1] or match[2] for name in files if (match := re.fullmatch(pattern, name))}
    if variant is None and None not in found and len(found) == 1:
        (variant,) = found
    if variant not in found:
        others = ", ".join(name for name in files if name.endswith((".safetensors", ".bin", ".json")))
        advice = (
            "; pickled .bin files are never opened: re-save them as safetensors" if "pytorch_model.bin" in files else ""
        )
        what = f"model.{variant}.safetensors" if variant else "model.safetensors"
        raise TextEncoderError(f"{folder / what}: no such file; the folder has {others}{advice}")
    index = folder / f"model.safetensors.index{f'.{variant}' if variant else ''}.json"
    if index.is_file():
        with _errors_of(index):
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        for name in names:
            if not re.fullmatch(r"[\w.-]+\.safetensors", str(name)) or not (folder / name).is_file():
                raise TextEncoderError(f"{index}: names {name!r}, which is no .safetensors file in the same folder")
    return variant


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and reports: its remarks become our errors where they matter."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _errors_of(name: str | Path, what: str = "opened") -> Iterator[None]:
    """Whatever a library makes of a bad file, in one line that names the file."""
    try:
        yield
    except TextEncoderError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TextEncoderError(f"{name}: cannot be {what} ({reason})") from error


def _is_local(name: str | Path) -> bool:
    if name != "" and len(str(name)) < 4096 and Path(name).is_dir():
        return True
    looks_local = isinstance(name, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local or not 0 < len(str(name)) < 200:
        raise TextEncoderError(f"{name}: no such folder")
    return False


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / file).is_file() for file in TOKENIZER_FILES)
