"""LDM-text2im's own BERT: diffusers keeps its class, and this is one of the few places that may ask for it."""

from __future__ import annotations

from pathlib import Path

import torch

from latentdiff.errors import LatentDiffError
from text_encoder import TextEncoder, TextEncoderError
from text_encoder.files import load_tokenizer, quiet


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
        LatentDiffError: a file is missing or damaged, or a tensor is missing or misshapen.
    """
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise LatentDiffError(f"{folder / 'config.json'}: no such file; expected the 'bert' folder of an LDM pipeline")
    try:
        with quiet():
            config = LDMBertConfig.from_pretrained(
                folder, local_files_only=True, dropout=0.0, activation_dropout=0.0, attention_dropout=0.0
            )
            model, report = LDMBertModel.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
        if missing := sorted(report["missing_keys"]):
            raise LatentDiffError(f"{folder}: the weights lack {len(missing)} tensors: {', '.join(missing[:3])}")
        loaded, _ = load_tokenizer(folder, tokenizer, "bert")
    except (OSError, RuntimeError, TextEncoderError) as error:
        raise LatentDiffError(f"{folder}: cannot be opened ({str(error).strip().splitlines()[0]})") from error
    return TextEncoder(model.eval(), loaded, min(77, config.max_position_embeddings), use_attention_mask=False).eval()
