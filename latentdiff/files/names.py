"""The original latent diffusion layout: its names for our tensors, and configs inferred from tensor shapes.

Names come without the prefix that tells UNet, VAE and text encoder apart. They follow from the config alone.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

from ..errors import LatentDiffError

Shapes = Mapping[str, Sequence[int]]
Layout = list[tuple[nn.Module, dict[str, str]]]  # models, each with its tensor names: ours to the file's

UNET, VAE_ = "model.diffusion_model.", "first_stage_model."
TEXT, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."

# Extensions of files that are never opened, and why.
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
NO_PICKLES = (
    "a pickle, which can run code: pickled weights are never opened; if you trust it, convert it to safetensors: "
    "python -c \"import sys, torch; from safetensors.torch import save_file; d = torch.load(sys.argv[1], 'cpu', "
    "weights_only=True); save_file({k: v.clone().contiguous() for k, v in d.get('state_dict', d).items() "
    "if hasattr(v, 'shape')}, sys.argv[2])\" model.ckpt model.safetensors"
)

# Names within a block, ours to theirs. Those of the UNet's transformers do not differ.
UNET_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
               "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
VAE_RESNET = {"conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
LDM_BERT = {"model.embed_tokens": "token_emb", "model.embed_positions": "pos_emb.emb", "model.layer_norm": "norm"}
LDM_BERT_LAYER = {  # layers alternate between attention and feed-forward: 2i and 2i + 1
    "self_attn_layer_norm": (0, "0"),
    "self_attn.q_proj": (0, "1.to_q"),
    "self_attn.k_proj": (0, "1.to_k"),
    "self_attn.v_proj": (0, "1.to_v"),
    "self_attn.out_proj": (0, "1.to_out"),
    "final_layer_norm": (1, "0"),
    "fc1": (1, "1.net.0.0"),
    "fc2": (1, "1.net.2"),
}
OPEN_CLIP_ENDS = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
}
OPEN_CLIP_LAYER = {  # queries, keys and values are stacked in one tensor
    **{f"self_attn.{x}_proj.{kind}": f"attn.in_proj_{kind}" for x in "qkv" for kind in ("weight", "bias")},
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}

# CLIP layouts: name, number of unused last layers (Stable Diffusion 2 skips one), and the tensors that imply the sizes.
EMBEDDINGS = "text_model.embeddings."
CLIPS = (
    ("clip_text_model", 0, f"{EMBEDDINGS}token_embedding.weight", f"{EMBEDDINGS}position_embedding.weight",
     "text_model.encoder.layers.", "mlp.fc1"),
    ("open_clip", 1, "token_embedding.weight", "positional_embedding", "transformer.resblocks.", "mlp.c_fc"),
)  # fmt: skip
# What third-party files hold besides the weights: averages, the tables of the schedule, unused layers.
IGNORED = (
    "model_ema.",
    *("betas", "alphas_cumprod", "sqrt_", "posterior_", "log_one_minus", "lvlb_weights", "logvar", "scale_factor"),
    "first_stage_model.loss.",
    *("cond_stage_model.logit_scale", f"{TEXT}text_projection.", f"{TEXT}{EMBEDDINGS}position_ids"),
    *(f"{OPEN_CLIP}{name}" for name in ("logit_scale", "text_projection", "transformer.resblocks.")),  # last layer
)
STABLE_DIFFUSION: dict[str, Any] = {  # scheduler_config.json of version 1.x
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}


def make_layout(unet: UNet, vae: VAE, text: nn.Module, text_layout: str) -> Layout:
    """Return UNet, VAE and text encoder with their tensor names in a single file; `text_layout` as in `text_names`."""
    named: list[tuple[nn.Module, str, dict[str, str]]] = [
        (unet, UNET, unet_names(unet.config)),
        (vae, VAE_, vae_names(vae.config)),
        (text, OPEN_CLIP if text_layout == "open_clip" else TEXT, text_names(text_layout, text.state_dict())),
    ]
    return [(model, {ours: prefix + theirs for ours, theirs in names.items()}) for model, prefix, names in named]


class Plan(NamedTuple):
    """What a file states or implies about the models in it."""

    unet: UNetConfig
    vae: VAEConfig
    text: dict[str, Any]  # transformers' config
    layout: str  # of the text encoder's names, as in `text_names`
    scheduler: dict[str, Any]  # contents of a `scheduler_config.json`
    tokenizer: dict[str, str]  # text of its files; empty for third-party files


def unet_names(config: UNetConfig) -> dict[str, str]:
    """Map our (diffusers') tensor names to the original's, such as `input_blocks.1.0.in_layers.0.weight`."""
    prefixes = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.attentions.0": "middle_block.1",
        **_block_names("mid_block.resnets.0", "middle_block.0", UNET_RESNET),
        **_block_names("mid_block.resnets.1", "middle_block.2", UNET_RESNET),
    }
    levels, layers = len(config.block_out_channels), config.layers_per_block
    for level in range(levels):  # plus a downsampler, for which the last level only reserves the index
        for layer in range(layers):
            theirs = f"input_blocks.{1 + level * (layers + 1) + layer}"
            prefixes |= _block_names(f"down_blocks.{level}.resnets.{layer}", f"{theirs}.0", UNET_RESNET)
            prefixes[f"down_blocks.{level}.attentions.{layer}"] = f"{theirs}.1"
        prefixes[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{(level + 1) * (layers + 1)}.0.op"
    for block, level in enumerate(reversed(range(levels))):
        for layer in range(layers + 1):
            theirs = f"output_blocks.{block * (layers + 1) + layer}"
            prefixes |= _block_names(f"up_blocks.{block}.resnets.{layer}", f"{theirs}.0", UNET_RESNET)
            prefixes[f"up_blocks.{block}.attentions.{layer}"] = f"{theirs}.1"
        after = 2 if level in config.attention_levels else 1  # the upsampler follows the last layer of the level
        prefixes[f"up_blocks.{block}.upsamplers.0.conv"] = f"{theirs}.{after}.conv"
    with torch.device("meta"):
        return _renamed(UNet(config).state_dict(), prefixes)


def vae_names(config: VAEConfig) -> dict[str, str]:
    """Map our (diffusers') tensor names to the original's, such as `encoder.down.0.block.0.norm1.weight`."""
    prefixes = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    levels = len(config.block_out_channels)
    for half, way in (("encoder", "down"), ("decoder", "up")):
        prefixes |= {f"{half}.{layer}": f"{half}.{layer}" for layer in ("conv_in", "conv_out")}
        prefixes[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        for index in range(2):
            prefixes |= _block_names(f"{half}.mid_block.resnets.{index}", f"{half}.mid.block_{index + 1}", VAE_RESNET)
        prefixes |= _block_names(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", VAE_ATTENTION)
        for block in range(levels):
            level = block if half == "encoder" else levels - 1 - block  # the original's up.0 is the finest
            here, there = f"{half}.{way}_blocks.{block}", f"{half}.{way}.{level}"
            for layer in range(config.layers_per_block + 1):
                prefixes |= _block_names(f"{here}.resnets.{layer}", f"{there}.block.{layer}", VAE_RESNET)
                prefixes |= _block_names(f"{here}.attentions.{layer}", f"{there}.attn.{layer}", VAE_ATTENTION)
            prefixes[f"{here}.{way}samplers.0.conv"] = f"{there}.{way}sample.conv"
    with torch.device("meta"):
        return _renamed(VAE(config).state_dict(), prefixes)


def text_names(layout: str, names: Iterable[str]) -> dict[str, str]:
    """Map transformers' tensor names of a text encoder to those after `cond_stage_model.transformer.`.

    Layouts: `bert` keeps its names; `clip_text_model` prefixes `text_model.`; `ldmbert`, LDM-text2im's own BERT, has
    those of x-transformers; `open_clip`, of Stable Diffusion 2, stacks q, k, v and is in `cond_stage_model.model.`.
    """
    names = list(names)
    if layout == "bert":
        return {name: name for name in names}
    if layout == "ldmbert":
        prefixes = {**LDM_BERT, "to_logits": "to_logits"}
        for layer in range(_count(names, "model.layers.")):
            for ours, (half, theirs) in LDM_BERT_LAYER.items():
                prefixes[f"model.layers.{layer}.{ours}"] = f"attn_layers.layers.{2 * layer + half}.{theirs}"
        return _renamed(names, prefixes)
    bare = {name: name.removeprefix("text_model.") for name in names}  # transformers 5 dropped this prefix
    if layout == "clip_text_model":
        return {name: f"text_model.{rest}" for name, rest in bare.items()}
    prefixes = dict(OPEN_CLIP_ENDS)
    for layer in range(_count(bare.values(), "encoder.layers.")):
        for ours, theirs in OPEN_CLIP_LAYER.items():
            prefixes[f"encoder.layers.{layer}.{ours}"] = f"transformer.resblocks.{layer}.{theirs}"
    renamed = _renamed(bare.values(), prefixes)
    return {name: renamed[rest] for name, rest in bare.items()}


def infer_plan(header: Mapping[str, str], shapes: Shapes, scale_factor: float) -> Plan:
    """Infer the models in a third-party file from its names, shapes and `modelspec.*` header entries, if any.

    Raise KeyError or IndexError if a tensor is missing or has too few dimensions.
    """
    under = {
        prefix: {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
        for prefix in (UNET, VAE_, TEXT, OPEN_CLIP)
    }
    if missing := [prefix for prefix in (UNET, VAE_) if not under[prefix]]:
        raise LatentDiffError(f"has no tensors named {missing[0]}…; expected UNet, VAE and text encoder in one file")
    layout, text = infer_text(under[TEXT] or under[OPEN_CLIP])
    side = header.get("modelspec.resolution", "").split("x")[0]
    pixels = int(side) if re.fullmatch("[0-9]{1,5}", side) else 256 if layout == "ldmbert" else 512
    vae = infer_vae(under[VAE_], pixels, scale_factor)
    unet = infer_unet(under[UNET], pixels // vae.downsampling)
    prediction = header.get("modelspec.prediction_type", "epsilon")
    scheduler = STABLE_DIFFUSION | {"prediction_type": "v_prediction" if prediction == "v" else prediction}
    return Plan(unet, vae, text, layout, scheduler, {})


def infer_unet(shapes: Shapes, sample_size: int) -> UNetConfig:
    """Infer the config from the tensor shapes.

    What shapes cannot tell is assumed to be as in Stable Diffusion: with linear projections, heads are 64 wide and
    attention runs in float32 (2.1 overflows otherwise); without, there are 8 heads.
    """
    count = _count(shapes, "input_blocks.")
    ends = [index for index in range(count) if f"input_blocks.{index}.0.op.weight" in shapes] + [count]
    firsts = [1, *(end + 1 for end in ends[:-1])]  # first ResBlock of each level
    is_linear = len(shapes["middle_block.1.proj_in.weight"]) == 2
    return UNetConfig(
        sample_size=sample_size,
        in_channels=shapes["input_blocks.0.0.weight"][1],
        out_channels=shapes["out.2.weight"][0],
        block_out_channels=tuple(shapes[f"input_blocks.{first}.0.out_layers.3.weight"][0] for first in firsts),
        layers_per_block=ends[0] - 1,
        attention_levels=tuple(i for i, first in enumerate(firsts) if f"input_blocks.{first}.1.norm.weight" in shapes),
        num_heads=None if is_linear else 8,
        transformer_layers=_count(shapes, "middle_block.1.transformer_blocks."),
        context_dim=shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
        linear_projection=is_linear,
        upcast_attention=is_linear,
    )


def infer_vae(shapes: Shapes, sample_size: int, scale_factor: float) -> VAEConfig:
    """Infer the config from the tensor shapes."""
    levels = range(_count(shapes, "encoder.down."))
    return VAEConfig(
        in_channels=shapes["encoder.conv_in.weight"][1],
        out_channels=shapes["decoder.conv_out.weight"][0],
        block_out_channels=tuple(shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in levels),
        layers_per_block=_count(shapes, "encoder.down.0.block."),
        latent_channels=shapes["decoder.conv_in.weight"][1],
        attention_levels=tuple(level for level in levels if f"encoder.down.{level}.attn.0.q.weight" in shapes),
        mid_attention="encoder.mid.attn_1.q.weight" in shapes,
        quant_convs=("quant_conv.weight" in shapes, "post_quant_conv.weight" in shapes),
        scale_factor=scale_factor,
        sample_size=sample_size,
    )


def infer_text(shapes: Shapes) -> tuple[str, dict[str, Any]]:
    """Infer the layout (as in `text_names`) and the transformers config from the tensor shapes."""
    if "token_emb.weight" in shapes:
        return "ldmbert", {
            "model_type": "ldmbert",
            "vocab_size": shapes["token_emb.weight"][0],
            "d_model": shapes["token_emb.weight"][1],
            "max_position_embeddings": shapes["pos_emb.emb.weight"][0],
            "encoder_layers": _count(shapes, "attn_layers.layers.") // 2,
            "encoder_ffn_dim": shapes["attn_layers.layers.1.1.net.0.0.weight"][0],
            "encoder_attention_heads": 8,
            "head_dim": shapes["attn_layers.layers.0.1.to_q.weight"][0] // 8,
        }
    for layout, unused, tokens, positions, layers, hidden in CLIPS:
        if tokens in shapes:
            vocab_size, width = shapes[tokens][0], shapes[tokens][1]
            return layout, {
                "model_type": "clip_text_model",
                "vocab_size": vocab_size,
                "hidden_size": width,
                "max_position_embeddings": shapes[positions][0],
                "num_hidden_layers": _count(shapes, layers) - unused,
                "num_attention_heads": max(1, width // 64),
                "intermediate_size": shapes[f"{layers}0.{hidden}.weight"][0],
                "hidden_act": "gelu" if layout == "open_clip" else "quick_gelu",
            }
    raise LatentDiffError("its text encoder is neither CLIP nor LDM's BERT, and no other can be inferred from shapes")


def _block_names(ours: str, theirs: str, layers: Mapping[str, str]) -> dict[str, str]:
    """Map a block, and those of its layers whose names differ."""
    return {ours: theirs, **{f"{ours}.{layer}": f"{theirs}.{name}" for layer, name in layers.items()}}


def _renamed(names: Iterable[str], prefixes: Mapping[str, str]) -> dict[str, str]:
    """Map every name by replacing its longest prefix in `prefixes`."""
    renamed = {}
    for name in names:
        parts = name.split(".")
        candidates = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        ours = next(prefix for prefix in candidates if prefix in prefixes)
        renamed[name] = prefixes[ours] + name[len(ours) :]
    return renamed


def _count(names: Iterable[str], prefix: str) -> int:
    """Count the different indices (or words) that follow a prefix."""
    return len({name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)})
