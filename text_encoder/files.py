"""Text encoders on disk: what is opened, what is refused, what is written. Files are read here, transformers builds.

Only two classes are ever built, by name from the list below. A config cannot bring code or another class along.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertModel, BertTokenizerFast, CLIPTextModel, CLIPTokenizerFast
from transformers.utils import logging

from latentdiff.errors import LatentDiffError, complain, errors_of
from latentdiff.files.tensors import CONFIG, FLOATS, ModelFiles, check_dtype, open_tensors, staged

from .errors import TextEncoderError

FILES = ModelFiles("text encoder", TextEncoderError, stem="model", single_first=True)
MODELS: dict[str, Any] = {"bert": BertModel, "clip_text_model": CLIPTextModel, "clip": CLIPTextModel}
TOKENIZERS: dict[str, Any] = {"bert": BertTokenizerFast, "clip": CLIPTokenizerFast}
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json")
# What is downloaded beside the weights.
TEXTS = (*TOKENIZER_FILES, "config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
         "merges.txt", "model*.index*.json")  # fmt: skip
DROPOUTS = {"dropout", "activation_dropout", "attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"}

# Keys by which a config could have code loaded, or become another kind of model than the one that is tested.
REFUSED = ("auto_map", "custom_pipelines", "trust_remote_code", "_attn_implementation", "_attn_implementation_internal",
           "transformers_weights", "quantization_config", "is_decoder", "add_cross_attention")  # fmt: skip
OURS = ("embeddings.", "encoder.", "text_model.", "bert.", "final_layer_norm.")  # tensors that features pass through
READ = (*OURS, "pooler.", "model.", "to_logits.")  # the last two are LDM's; heads that other tasks need are left alone


def find_folder(name: str | Path, variant: str | None = None, *, weights: Sequence[str] = ("model",)) -> Path:
    """The folder that a name means; from the hub, its configs, its tokenizer and weights of these names are downloaded.

    Raises:
        TextEncoderError: as `TextEncoder.from_pretrained`.
    """
    if name != "" and len(str(name)) < 4096 and Path(name).is_dir():
        return Path(name)
    looks_local = isinstance(name, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local or not 0 < len(str(name)) < 200:
        raise TextEncoderError(f"{name}: no such folder")
    with errors_of(TextEncoderError):
        return fetch(str(name), TEXTS, weights, variant)


def fetch(name: str, texts: Sequence[str], weights: Sequence[str], variant: str | None) -> Path:
    """The folder of a name on the hub, downloaded or in the cache: what is needed of it; no pickles, no code.

    Args:
        name: on the hub.
        texts: patterns of the files that are no weights.
        weights: what the names of weight files begin with.
        variant: of the weights; None: the plain ones, or where a folder has none of them its only variant.

    Raises:
        LatentDiffError: it cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    endings = ["*.safetensors"] if variant is None else [f"*.{variant}.safetensors", f"*.{variant}-*.safetensors"]
    kept = [*texts, *(start + ending for start in weights for ending in endings)]
    missing = f"{name}: no such folder, and it cannot be fetched from the hub"
    with errors_of(LatentDiffError, missing, Exception):  # the hub's own, the network's, the disk's
        plain = None if variant else "*.*.safetensors"
        folder = Path(snapshot_download(name, allow_patterns=kept, ignore_patterns=plain))
        parts = [path.parent for config in ("config.json", "*/config.json") for path in folder.glob(config)]
        if not all(any(part.glob("*.safetensors")) for part in parts):
            folder = Path(snapshot_download(name, allow_patterns=kept))
    return folder


def load_model(
    folder: Path, dtype: torch.dtype, variant: str | None = None, model_class: Any = None
) -> tuple[nn.Module, str]:
    """The model in a folder, of one of the classes known here or of the one given; and its kind, `bert` or `clip`.

    Raises:
        TextEncoderError: as `TextEncoder.from_pretrained`.
    """
    with errors_of(TextEncoderError, f"{folder}: cannot be opened", Exception):
        dtype, values = check_dtype(dtype), FILES.read_config(folder)
        source = FILES.find(folder, variant)
        tensors = {
            name: tensor
            for name, tensor in open_tensors(source).items()
            if name.startswith(READ) and not name.endswith("position_ids")
        }  # files of 2022 have these tables
        wrong = {name for name, tensor in tensors.items() if tensor.dtype not in FLOATS}
        complain(source, f"has, and not as {', '.join(FLOATS)},", wrong)
        empty = new_model(values, len(tensors), folder / CONFIG, model_class)
        weights = {name: tensor.read(dtype) for name, tensor in tensors.items()}
        model, report = fill_model(empty, weights, dtype)
        # Heads that other tasks need may be too many, and the pooler may be missing: features use neither.
        complain(source, "lacks", {name for name in report["missing_keys"] if not name.startswith("pooler.")})
        extra = {name for name in report["unexpected_keys"] if name.startswith(OURS)}
        complain(source, "has, and this text encoder has not,", extra)
    return model, "clip" if "clip" in str(values.get("model_type")) else "bert"


def new_model(values: Mapping[str, Any], most_layers: int, where: object, model_class: Any = None) -> Any:
    """The model of a transformers config, without dropout and without memory for its weights.

    Args:
        values: of the config.
        most_layers: refuses more, because every one is built.
        where: they are from, for errors.
        model_class: None: the one that the config names, of those known here.

    Raises:
        TextEncoderError: the config cannot be used, or has what is refused.
    """
    kind = str(values.get("model_type"))
    if model_class is None and kind not in MODELS:
        raise TextEncoderError(f"{where}: model_type {kind!r} is not supported; only {', '.join(MODELS)} are")
    model_class = model_class or MODELS[kind]
    inner = values.get("text_config")  # where the whole of CLIP is in one folder
    text = inner if kind == "clip" and isinstance(inner, dict) else values
    if refused := [key for key in REFUSED if values.get(key) or text.get(key)]:
        raise TextEncoderError(f"{where}: has {refused[0]!r}, which is refused: foreign code, or another model")
    for key in ("num_hidden_layers", "encoder_layers"):
        if not isinstance(layers := text.get(key, 0), int) or layers > most_layers:
            raise TextEncoderError(f"{where}: {key}={layers!r}; the file has {most_layers} tensors")
    with errors_of(TextEncoderError, f"{where}: cannot be used", Exception), torch.device("meta"):
        config = model_class.config_class.from_dict(dict(text))
        config.update(dict.fromkeys(DROPOUTS & vars(config).keys(), 0.0))
        return model_class(config)


def fill_model(model: Any, weights: dict[str, Tensor], dtype: torch.dtype) -> tuple[Any, dict[str, set[str]]]:
    """A model with these weights and the tables that are in no file; and which names were missing, or unexpected."""
    with quiet():  # transformers knows the names of former versions
        return type(model).from_pretrained(
            None, config=model.config, state_dict=weights, dtype=dtype, output_loading_info=True
        )


def load_tokenizer(folder: str | Path, tokenizer: str | Path | None, kind: str) -> tuple[Any, bool]:
    """The tokenizer of a model's folder, or the one given; and whether it lies in the folder.

    Raises:
        TextEncoderError: as `TextEncoder.from_pretrained`.
    """
    beside = Path(folder).parent / "tokenizer"
    if tokenizer is None:
        tokenizer = beside if beside.is_dir() and not _has_tokenizer(Path(folder)) else folder
    place = find_folder(tokenizer, weights=())
    if not _has_tokenizer(place):
        raise TextEncoderError(f"{place}: no tokenizer there; expected one of {', '.join(TOKENIZER_FILES)}")
    with errors_of(TextEncoderError, f"{place}: cannot be opened", Exception):
        loaded = TOKENIZERS[kind].from_pretrained(str(place), local_files_only=True)
    if not isinstance(loaded.model_max_length, int):
        raise TextEncoderError(f"{place}: model_max_length={loaded.model_max_length!r}: expected a whole number")
    return loaded, place == Path(folder)


def save_model(
    model: nn.Module, folder: Path, use_attention_mask: bool, dtype: torch.dtype | None, variant: str | None
) -> None:
    """Write `config.json` and `model.safetensors`, pooler and all: stock loaders shall have nothing to complain of."""
    with errors_of(TextEncoderError, f"{folder}: cannot be written", Exception), quiet():
        saved: Any = model if dtype is None else deepcopy(model).to(check_dtype(dtype))
        saved.config.use_attention_mask = use_attention_mask  # without it diffusers passes no mask to the encoder
        with FILES.staged(folder, variant) as staging:
            saved.save_pretrained(staging, variant=variant)


def save_tokenizer(tokenizer: Any, folder: Path, max_length: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, and for BERT `vocab.txt`, which transformers 4 reads."""
    tokenizer.model_max_length = max_length  # diffusers pads prompts to it
    with errors_of(TextEncoderError, f"{folder}: cannot be written", Exception), staged(folder) as staging:
        tokenizer.save_pretrained(str(staging))
        if isinstance(tokenizer, BertTokenizerFast):
            vocabulary = tokenizer.get_vocab()
            lines = sorted(vocabulary, key=vocabulary.__getitem__)
            (staging / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


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


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / file).is_file() for file in TOKENIZER_FILES)
