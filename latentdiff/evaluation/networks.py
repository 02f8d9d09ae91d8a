"""Feature networks that the user has: a folder with a CLIP, DINOv2 or ViT of transformers, opened offline."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    CLIPModel,
    CLIPTokenizerFast,
    CLIPVisionModelWithProjection,
    Dinov2Model,
    ViTModel,
)

from text_encoder.files import BLOCKED, TOKENIZER_FILES, quiet

from ..data.cache import weights_digest
from ..data.shards import digest
from ..errors import LatentDiffError, check_choice, raise_for_tensors, reraise_as
from ..files.tensors import CONFIG, read_json

MODELS: dict[str, Any] = {"clip": CLIPModel, "clip_vision_model": CLIPVisionModelWithProjection, "dinov2": Dinov2Model,
                          "vit": ViTModel}  # fmt: skip
WEIGHTS, PROCESSOR = "model.safetensors", "preprocessor_config.json"
BATCH = 32


@dataclass(frozen=True)
class FeatureNetwork:
    """A network that maps pictures, and with CLIP's text tower also texts, to features."""

    name: str
    model: Any
    processor: Any
    tokenizer: Any | None  # None: has no text tower
    clip: bool  # its features are in CLIP's common space of pictures and texts

    @cached_property
    def digest(self) -> str:
        """What the features depend on besides the pictures."""
        return digest({"weights": weights_digest(self.model), "dtype": str(self.model.dtype),
                       "config": self.model.config.to_json_string(), "processor": self.processor.to_json_string(),
                       "tokenizer": self.tokenizer and self.tokenizer.backend_tokenizer.to_str()})  # fmt: skip

    @torch.no_grad()
    def images(self, pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Return the features of uint8 pictures (H, W, 3): (B, D) float32 on the CPU.

        CLIP's are unit vectors in the space shared with texts, the others the class token after the last norm.
        """
        pixels = self.processor(list(pictures), return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        pixels = pixels.to(self.model.device, self.model.dtype)
        if not self.clip:
            return self.model(pixels).last_hidden_state[:, 0].float().cpu()
        if isinstance(self.model, CLIPModel):
            tokens = self.model.vision_model(pixels).pooler_output
            return _unit(self.model.visual_projection(tokens))
        return _unit(self.model(pixels).image_embeds)

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Return CLIP's features of texts, (B, D) unit vectors; longer ones are cut off as CLIP does."""
        assert self.tokenizer is not None
        found = []
        for start in range(0, len(prompts), BATCH):
            tokens = self.tokenizer(list(prompts[start : start + BATCH]), padding=True, truncation=True,
                                    max_length=self.model.config.text_config.max_position_embeddings,
                                    return_tensors="pt").to(self.model.device)  # fmt: skip
            pooled = self.model.text_model(tokens.input_ids, tokens.attention_mask).pooler_output
            found.append(_unit(self.model.text_projection(pooled)))
        return torch.cat(found)


def open_network(path: Path, device: torch.device) -> FeatureNetwork:
    """Open a folder as transformers saves it, or the `model.safetensors` in one.

    Raises LatentDiffError if it is another kind of model, or a file is missing. Nothing is downloaded or unpickled.
    """
    folder = path.parent if path.name == WEIGHTS else path
    if not folder.is_dir():
        raise LatentDiffError(f"--features {path}: no such folder; expected one with {CONFIG}, {WEIGHTS}, {PROCESSOR}")
    config = read_json(folder / CONFIG, f"a feature network has {CONFIG}, {WEIGHTS} and {PROCESSOR}")
    kind = str(config.get("model_type"))
    with reraise_as(LatentDiffError, f"{folder / CONFIG}: cannot be used", LatentDiffError):
        check_choice("model_type", kind, MODELS)
    if blocked := [key for key in BLOCKED if config.get(key)]:
        raise LatentDiffError(f"{folder / CONFIG}: has {blocked[0]!r}, which is not allowed: it can load code")
    if not (folder / PROCESSOR).is_file():
        raise LatentDiffError(f"{folder / PROCESSOR}: no such file; it says how pictures are resized and normalized")
    tokenizer = None
    with reraise_as(LatentDiffError, f"{folder}: cannot be opened", Exception), quiet():
        model, report = MODELS[kind].from_pretrained(
            folder, use_safetensors=True, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
        processor = AutoImageProcessor.from_pretrained(
            folder, use_fast=False, local_files_only=True, trust_remote_code=False
        )
        if kind == "clip" and any((folder / file).is_file() for file in TOKENIZER_FILES):
            tokenizer = CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
    raise_for_tensors(folder, "lacks", {name for name in report["missing_keys"] if not name.startswith("pooler.")})
    name = folder.resolve().name
    return FeatureNetwork(name, model.eval().to(device), processor, tokenizer, kind.startswith("clip"))


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.float().cpu(), dim=-1)
