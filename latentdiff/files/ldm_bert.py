"""LDM-text2im's own BERT, whose class comes from diffusers; only modules of this folder may import diffusers."""

from pathlib import Path
from typing import Any

import torch

from text_encoder import TextEncoder
from text_encoder.files import load_model, load_tokenizer


def load_ldm_bert(
    folder: str | Path, tokenizer: str | Path | None = None, *, dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """Open the `bert` folder of an LDM-text2im pipeline; its tokenizer is by default in `tokenizer` beside it.

    As in that pipeline, the encoder has no attention mask and no dropout, and prompts have 77 tokens.
    """
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel

    model, _ = load_model(Path(folder), dtype, model_class=LDMBertModel)
    loaded, _ = load_tokenizer(folder, tokenizer, "bert")
    config: Any = model.config
    return TextEncoder(model, loaded, min(77, config.max_position_embeddings), use_attention_mask=False).eval()
