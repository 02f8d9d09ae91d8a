"""LDM-text2im's own BERT: diffusers keeps its class, and this is one of the few places that may ask for it."""

from pathlib import Path
from typing import Any

import torch

from text_encoder import TextEncoder
from text_encoder.files import load_model, load_tokenizer


def load_ldm_bert(
    folder: str | Path, tokenizer: str | Path | None = None, *, dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """Open the `bert` folder of an LDM-text2im pipeline (LDMBertModel).

    Args:
        folder: with `config.json` and `model.safetensors`.
        tokenizer: folder of its BERT tokenizer; by default `tokenizer` beside it.
        dtype: of the weights.

    Returns:
        The encoder, without attention mask and without dropout, as that pipeline runs it; prompts have 77 tokens.

    Raises:
        TextEncoderError: a file is missing or damaged, or a tensor is missing or misshapen.
    """
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel

    model, _ = load_model(Path(folder), dtype, model_class=LDMBertModel)
    loaded, _ = load_tokenizer(folder, tokenizer, "bert")
    config: Any = model.config
    return TextEncoder(model, loaded, min(77, config.max_position_embeddings), use_attention_mask=False).eval()
