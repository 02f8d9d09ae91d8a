"""Weights of other programs: what a file holds that is no complete model, and other names for the same tensors."""

import re
from collections.abc import Collection, Mapping
from typing import TypeVar

from .names import EMBEDDINGS, TEXT, UNET, VAE_

Value = TypeVar("Value")
WHOLE = "expected UNet, VAE and text encoder in one file"

# What a file is by the names of its tensors: the first pattern that is found in any of them says it.
KINDS = (
    (r"lora_(unet|te\d?)_|\.lora_(down|up|[AB])\.|\.lora\.(down|up)\.|\.(hada_w\d|lokr_w\d|oft_blocks|dora_scale)",
     "a LoRA, which changes a model: merge it into its model first, with the program that made it"),
    (r"^(emb_params|string_to_param.*|clip_[lg])$|^<.*>$", "a textual inversion embedding, not a model"),
    (r"^control_model\.|(^|\.)input_hint_block\.|^controlnet_|\.controlnet_cond_embedding\.",
     "a ControlNet, not a model"),
    (r"^ip_adapter\.|^image_proj\.", "an IP-Adapter, not a model"),
    (r"double_blocks\.\d+\.img_|single_transformer_blocks\.", "a FLUX transformer, which is not supported"),
    (r"joint_blocks\.\d+\.", "a Stable Diffusion 3 transformer, which is not supported"),
    (r"^conditioner\.embedders\.|\.label_emb\.0\.2\.|^add_embedding\.",
     "a Stable Diffusion XL model, which is not supported"),
    (r"^model\.diffusion_model\.label_emb\.weight$|^class_embedding\.weight$",
     "a Stable Diffusion upscaler, which is not supported"),
    (r"RRDB_trunk|(^|\.)RDB\d\.|\.rdb\d\.conv\d|^upconv1\.|^conv_up1\.|^upsample\.0\.weight$|\.residual_group\.",
     "an upscaler for pictures, not a model"),
)  # fmt: skip
# The same, where it is part of a whole: only if the others are missing.
PARTS = (
    (r"^(first_stage_model\.)?(encoder|decoder)\.(conv_in|down|up|mid)", "a VAE alone"),
    (r"^(model\.diffusion_model\.)?(input_blocks\.0\.0|middle_block\.\d)|^down_blocks\.\d", "a UNet alone"),
    (r"^(cond_stage_model\.\w+\.)?(text_model\.|token_embedding|bert\.|embeddings\.|transformer\.resblocks|encoder\.layer)",
     "a text encoder alone"),
)  # fmt: skip

# Other names for the tensors of Stable Diffusion: of text encoders without `text_model.`, and of the VAE's attention.
BARE_TEXT = re.compile(rf"{re.escape(TEXT)}(embeddings|encoder|final_layer_norm)\.")
VAE_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "query": "q", "key": "k", "value": "v",
                 "proj_attn": "proj_out"}  # fmt: skip
VAE_NAME = re.compile(rf"({re.escape(VAE_)}.*\.attn(?:_1|\.\d+)\.)({'|'.join(map(re.escape, VAE_ATTENTION))})\.(\w+)$")


def kind_of(names: Collection[str]) -> str | None:
    """Return what a file holds, by the names of its tensors, if it is a known kind that is no complete model."""
    for pattern, kind in KINDS:
        if any(map(re.compile(pattern).search, names)):
            return kind
    if all(any(name.startswith(prefix) for name in names) for prefix in (UNET, VAE_)):
        return None
    return next((f"{kind}; {WHOLE}" for pattern, kind in PARTS if any(map(re.compile(pattern).search, names))), None)


def usual_names(tensors: Mapping[str, Value]) -> dict[str, Value]:
    """Return tensors under the names that Stable Diffusion gives them, where a program has left its own.

    A tensor whose usual name is taken keeps its own, and is refused as one too many.
    """
    found = dict(tensors)
    if f"{TEXT}{EMBEDDINGS.removeprefix('text_model.')}token_embedding.weight" in found:
        found = {BARE_TEXT.sub(rf"{TEXT}text_model.\1.", name): value for name, value in found.items()}
    usual = {
        name: VAE_NAME.sub(lambda match: f"{match[1]}{VAE_ATTENTION[match[2]]}.{match[3]}", name) for name in found
    }
    return {name if usual[name] in found else usual[name]: value for name, value in found.items()}
