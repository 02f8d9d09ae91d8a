"""Loading and saving of text encoders: files are read here, and transformers only builds the model.

A config can only choose among the classes listed below; it can neither load code nor name another class.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertModel, BertTokenizerFast, CLIPTextModel, CLIPTokenizerFast
from transformers.utils import logging

from latentdiff.errors import LatentDiffError, raise_for_tensors, reraise_as
from latentdiff.files.tensors import CONFIG, FLOATS, ModelFiles, Stored, check_dtype, open_tensors, staged

from .errors import TextEncoderError

FILES = ModelFiles("text encoder", TextEncoderError, stem="model", single_first=True)
MODELS: dict[str, Any] = {"bert": BertModel, "clip_text_model": CLIPTextModel, "clip": CLIPTextModel}
TOKENIZERS: dict[str, Any] = {"bert": BertTokenizerFast, "clip": CLIPTokenizerFast}
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json")
# What is downloaded besides the weights.
NON_WEIGHTS = (*TOKENIZER_FILES, "config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
               "merges.txt", "model*.index*.json")  # fmt: skip
DROPOUTS = {"dropout", "activation_dropout", "attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"}

# Keys by which a config could load code, or become an untested kind of model.
BLOCKED = ("auto_map", "custom_pipelines", "trust_remote_code", "_attn_implementation", "_attn_implementation_internal",
           "transformers_weights", "quantization_config", "is_decoder", "add_cross_attention")  # fmt: skip
USED = ("embeddings.", "encoder.", "text_model.", "bert.", "final_layer_norm.")  # tensors that the features depend on
READ = (*USED, "pooler.", "model.", "to_logits.")  # the last two are LDM's; heads for other tasks are ignored


def find_folder(name: str | Path, variant: str | None = None, *, weights: Sequence[str] = ("model",)) -> Path:
    """Return the folder `name`; if there is none, download its configs, tokenizer and `weights` from the hub."""
    if name != "" and len(str(name)) < 4096 and Path(name).is_dir():
        return Path(name)
    looks_local = isinstance(name, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local or not 0 < len(str(name)) < 200:
        raise TextEncoderError(f"{name}: no such folder")
    with reraise_as(TextEncoderError):
        return fetch(str(name), NON_WEIGHTS, weights, variant)


def fetch(name: str, non_weights: Sequence[str], weights: Sequence[str], variant: str | None) -> Path:
    """Download `non_weights` patterns and safetensors that start with `weights` from the hub, never pickles or code."""
    from huggingface_hub import snapshot_download

    endings = ["*.safetensors"] if variant is None else [f"*.{variant}.safetensors", f"*.{variant}-*.safetensors"]
    allowed = [*non_weights, *(start + ending for start in weights for ending in endings)]
    missing = f"{name}: no such folder, and it cannot be fetched from the hub"
    with reraise_as(LatentDiffError, missing, Exception):  # from the hub, the network or the disk
        ignored = None if variant else "*.*.safetensors"
        folder = Path(snapshot_download(name, allow_patterns=allowed, ignore_patterns=ignored))
        parts = [path.parent for config in ("config.json", "*/config.json") for path in folder.glob(config)]
        if not all(any(part.glob("*.safetensors")) for part in parts):  # some part has only variants of its weights
            folder = Path(snapshot_download(name, allow_patterns=allowed))
    return folder


def load_model(
    folder: Path, dtype: torch.dtype, variant: str | None = None, model_class: Any = None,
    trained: Mapping[str, Stored] | None = None,
) -> tuple[nn.Module, str]:  # fmt: skip
    """Load a folder's model, by default of the class for its config; also return its kind, `bert` or `clip`.

    `trained` are tensors from elsewhere that replace the folder's or that it lacks.
    """
    with reraise_as(TextEncoderError, f"{folder}: cannot be opened", Exception):
        dtype, values = check_dtype(dtype), FILES.read_config(folder)
        source = FILES.find(folder, variant)
        tensors = {
            name: tensor
            for name, tensor in {**open_tensors(source), **(trained or {})}.items()
            if name.startswith(READ) and not name.endswith("position_ids")
        }  # checkpoints of 2022 store position_ids, which are not weights
        wrong = {name for name, tensor in tensors.items() if tensor.dtype not in FLOATS}
        raise_for_tensors(source, f"expected one of {', '.join(FLOATS)} as the dtype of", wrong)
        empty = new_model(values, len(tensors), folder / CONFIG, model_class)
        weights = {name: tensor.read(dtype) for name, tensor in tensors.items()}
        model, report = fill_model(empty, weights, dtype)
        # Heads for other tasks may be present and the pooler absent: the features use neither.
        raise_for_tensors(source, "lacks", {name for name in report["missing_keys"] if not name.startswith("pooler.")})
        extra = {name for name in report["unexpected_keys"] if name.startswith(USED)}
        raise_for_tensors(source, "not part of this text encoder:", extra)
    return model, "clip" if "clip" in str(values.get("model_type")) else "bert"


def new_model(values: Mapping[str, Any], max_layers: int, where: object, model_class: Any = None) -> Any:
    """Build a transformers config's model on the meta device, without dropout; `where` names the config in errors."""
    kind = str(values.get("model_type"))
    if model_class is None and kind not in MODELS:
        raise TextEncoderError(f"{where}: model_type {kind!r} is not supported; only {', '.join(MODELS)} are")
    model_class = model_class or MODELS[kind]
    inner = values.get("text_config")  # in the config of a complete CLIP
    text = inner if kind == "clip" and isinstance(inner, dict) else values
    if blocked := [key for key in BLOCKED if any(inner.get(key) for inner in (values, text, *_nested(values)))]:
        raise TextEncoderError(f"{where}: has {blocked[0]!r}, which is not allowed: it can load code or change models")
    for key in ("num_hidden_layers", "encoder_layers"):  # every layer is built, so a huge number would hang
        if not isinstance(layers := text.get(key, 0), int) or layers > max_layers:
            raise TextEncoderError(f"{where}: {key}={layers!r}; the file has only {max_layers} tensors")
    with reraise_as(TextEncoderError, f"{where}: cannot be used", Exception), torch.device("meta"):
        config = model_class.config_class.from_dict(dict(text))
        config.update(dict.fromkeys(DROPOUTS & vars(config).keys(), 0.0))
        return model_class(config)


def _nested(values: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield all objects within a config, at any depth."""
    waiting = list(values.values())
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            yield value
        if isinstance(value, Mapping | list | tuple):
            waiting += value.values() if isinstance(value, Mapping) else value


def fill_model(model: Any, weights: dict[str, Tensor], dtype: torch.dtype) -> tuple[Any, dict[str, set[str]]]:
    """Load weights into a model and create its other buffers; also return the missing and unexpected names."""
    with quiet():  # transformers also converts old tensor names
        return type(model).from_pretrained(
            None, config=model.config, state_dict=weights, dtype=dtype, output_loading_info=True
        )


def load_tokenizer(folder: str | Path, tokenizer: str | Path | None, kind: str) -> tuple[Any, bool]:
    """Load the given tokenizer, or else the model folder's; also return whether it lies in that folder itself."""
    beside = Path(folder).parent / "tokenizer"
    if tokenizer is None:
        tokenizer = beside if beside.is_dir() and not _has_tokenizer(Path(folder)) else folder
    source = find_folder(tokenizer, weights=())
    if not _has_tokenizer(source):
        raise TextEncoderError(f"{source}: no tokenizer found; expected one of {', '.join(TOKENIZER_FILES)}")
    with reraise_as(TextEncoderError, f"{source}: cannot be opened", Exception):
        loaded = TOKENIZERS[kind].from_pretrained(str(source), local_files_only=True)
    if not isinstance(loaded.model_max_length, int):
        raise TextEncoderError(f"{source}: model_max_length={loaded.model_max_length!r}: expected an integer")
    return loaded, source == Path(folder)


def save_model(
    model: nn.Module, folder: Path, use_attention_mask: bool, dtype: torch.dtype | None, variant: str | None
) -> None:
    """Write `config.json` and `model.safetensors`, including the pooler, so that stock loaders do not warn."""
    with reraise_as(TextEncoderError, f"{folder}: cannot be written", Exception), quiet():
        saved: Any = model if dtype is None else deepcopy(model).to(check_dtype(dtype))
        saved.config.use_attention_mask = use_attention_mask  # otherwise diffusers passes no mask to the encoder
        with FILES.staged(folder, variant) as staging:
            saved.save_pretrained(staging, variant=variant)


def begin_model(model: Any, folder: Path, use_attention_mask: bool, weights: Mapping[str, Tensor]) -> None:
    """Write `config.json` and only these weights: the ones that are not trained, if the rest is yet to be."""
    with reraise_as(TextEncoderError, f"{folder}: cannot be written", Exception):
        model.config.use_attention_mask = use_attention_mask
        with FILES.staged(folder, None) as staging:
            model.config.save_pretrained(staging)
            tensors = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
            save_file(tensors, staging / FILES.names(None)[0], metadata={"format": "pt"})


def save_tokenizer(tokenizer: Any, folder: Path, max_length: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, and for BERT `vocab.txt`, which transformers 4 reads."""
    tokenizer.model_max_length = max_length  # diffusers pads prompts to this length
    with reraise_as(TextEncoderError, f"{folder}: cannot be written", Exception), staged(folder) as staging:
        tokenizer.save_pretrained(str(staging))
        if isinstance(tokenizer, BertTokenizerFast):
            vocabulary = tokenizer.get_vocab()
            lines = sorted(vocabulary, key=vocabulary.__getitem__)
            (staging / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and reports; those that matter are raised as errors here."""
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
