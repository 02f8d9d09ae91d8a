"""`UNetConfig`, and its conversion from and to the `config.json` of diffusers' UNet2DConditionModel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latentdiff.errors import check_levels, check_positive_int
from latentdiff.files.tensors import ModelFiles

from .errors import UNetError

FILES = ModelFiles("UNet", UNetError)

# Keys of UNet2DConditionModel that affect the computation but are the same in SD 1.x, SD 2.x and LDM-text2im. Any other
# value is a different network, hence an error that names the key.
UNSET = ("reverse_transformer_layers_per_block", "encoder_hid_dim", "encoder_hid_dim_type", "num_attention_heads",
         "class_embed_type", "addition_embed_type", "addition_time_embed_dim", "num_class_embeds", "time_embedding_dim",
         "time_embedding_act_fn", "timestep_post_act", "time_cond_proj_dim", "projection_class_embeddings_input_dim",
         "mid_block_only_cross_attention", "cross_attention_norm")  # fmt: skip
OFF = ("center_input_sample", "only_cross_attention", "dual_cross_attention", "resnet_skip_time_act",
       "class_embeddings_concat")  # fmt: skip
FIXED: dict[str, Any] = {
    **dict.fromkeys(UNSET),
    **dict.fromkeys(OFF, False),
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "dropout": 0.0,
    "act_fn": "silu",
    "addition_embed_type_num_heads": 64,
    "resnet_time_scale_shift": "default",
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
}

# Without and with attention to earlier steps. diffusers has none, and its error for an unknown type keeps it from
# leaving out weights and drawing without them.
MID_TYPES = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2DTrajectoryAttn")
MAX_HISTORY = 16  # earlier steps

# Keys that vary, with diffusers' default for each.
VARYING: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "use_linear_projection": False,
    "upcast_attention": False,
    "mid_block_type": MID_TYPES[0],
    "trajectory_attention": 0,  # ours
}

DOWN_TYPES = ("DownBlock2D", "CrossAttnDownBlock2D")  # without and with attention
UP_TYPES = ("UpBlock2D", "CrossAttnUpBlock2D")

# diffusers' name of a setting -> ours.
NAMES = {
    **{name: name for name in ("sample_size", "in_channels", "out_channels", "block_out_channels", "layers_per_block")},
    "norm_num_groups": "norm_groups",
    "norm_eps": "norm_eps",
    "cross_attention_dim": "context_dim",
    "transformer_layers_per_block": "transformer_layers",
    "use_linear_projection": "linear_projection",
    "upcast_attention": "upcast_attention",
}


@dataclass(frozen=True)
class UNetConfig:
    """Architecture of a UNet, by default SD 1.x (860M parameters); raises UNetError for invalid values."""

    sample_size: int | None = 32  # height and width of the latents it is trained on; the network itself ignores it
    in_channels: int = 4  # channels of x
    out_channels: int = 4  # channels of the prediction
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)  # width of each level, outermost first
    layers_per_block: int = 2  # ResBlocks per down level; up levels have one more
    attention_levels: tuple[int, ...] = (0, 1, 2)  # levels with self- and cross-attention; the middle always has them
    num_heads: int | tuple[int, ...] | None = 8  # for all levels, or one per level; None: width // 64
    transformer_layers: int = 1  # blocks per spatial transformer
    context_dim: int = 768  # text feature width D
    linear_projection: bool = False  # enter and leave transformers by linear layers (SD 2.x), not 1x1 convolutions
    norm_groups: int = 32  # groups of every GroupNorm
    norm_eps: float = 1e-5  # epsilon of the ResBlocks' GroupNorms
    trajectory_attention: int = 0  # earlier steps that every transformer block attends to, see trajectory.py
    upcast_attention: bool = False  # attention in float32 whatever the model's dtype (SD 2.1 overflows in float16)

    def __post_init__(self) -> None:
        for name in ("block_out_channels", "attention_levels", "num_heads"):  # lists in JSON and YAML
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        for name in ("block_out_channels", "attention_levels"):
            if not isinstance(getattr(self, name), tuple):
                raise UNetError(f"{name}={getattr(self, name)!r} is not supported; expected a list of integers")
        for name in ("in_channels", "out_channels", "context_dim", "norm_groups"):
            check_positive_int(UNetError, name, getattr(self, name))
        for name in ("layers_per_block", "transformer_layers"):
            check_positive_int(UNetError, name, getattr(self, name), at_most=100)
        if self.sample_size is not None:
            check_positive_int(UNetError, "sample_size", self.sample_size)
        for name in ("linear_projection", "upcast_attention"):
            if not isinstance(getattr(self, name), bool):
                raise UNetError(f"{name}={getattr(self, name)!r} is not supported; expected true or false")
        if type(history := self.trajectory_attention) is not int or not 0 <= history <= MAX_HISTORY:
            raise UNetError(f"trajectory_attention={history!r} is not supported; expected 0 to {MAX_HISTORY} steps")
        if not isinstance(self.norm_eps, float) or not 0 < self.norm_eps < 1:
            raise UNetError(f"norm_eps={self.norm_eps!r} is not supported; expected a float in (0, 1) such as 1e-5")
        if not self.block_out_channels:
            raise UNetError("block_out_channels is empty: give one width per level, such as (320, 640, 1280, 1280)")
        for width in self.block_out_channels:
            check_positive_int(UNetError, "block_out_channels", width)
            if width % self.norm_groups:
                raise UNetError(f"block_out_channels has {width}, not divisible by norm_groups={self.norm_groups}")
        if self.block_out_channels[0] % 2:  # the timestep features are half sines, half cosines
            raise UNetError(f"block_out_channels[0] is {self.block_out_channels[0]}; expected an even number")
        levels = range(len(self.block_out_channels))
        if wrong := [level for level in self.attention_levels if type(level) is not int or level not in levels]:
            raise UNetError(f"attention_levels has {wrong[0]!r}; the levels are 0 to {levels[-1]}")
        if isinstance(self.num_heads, tuple) and len(self.num_heads) != len(self.block_out_channels):
            raise UNetError(f"num_heads has {len(self.num_heads)} entries for {len(self.block_out_channels)} levels")
        for width, heads in zip(self.block_out_channels, self.heads_per_level, strict=True):
            check_positive_int(UNetError, "num_heads", heads)
            if width % heads:
                raise UNetError(f"num_heads={heads} does not divide the level's width {width}")
        # Canonical forms, so that equal networks have equal configs.
        heads_per_level = self.heads_per_level
        object.__setattr__(self, "num_heads", heads_per_level[0] if len(set(heads_per_level)) == 1 else heads_per_level)
        object.__setattr__(self, "attention_levels", tuple(sorted(set(self.attention_levels))))

    @property
    def heads_per_level(self) -> tuple[int, ...]:
        """Attention heads of each level, outermost first; the middle block has as many as the last level."""
        if self.num_heads is None:
            return tuple(max(1, width // 64) for width in self.block_out_channels)
        if isinstance(self.num_heads, tuple):
            return self.num_heads
        return (self.num_heads,) * len(self.block_out_channels)

    @classmethod
    def from_diffusers(cls, values: Mapping[str, Any]) -> UNetConfig:
        """Convert the contents of a diffusers `unet/config.json`; raise UNetError naming the first unsupported key."""
        if (name := values.get("_class_name", "UNet2DConditionModel")) != "UNet2DConditionModel":
            raise UNetError(f"_class_name is {name!r}; only 'UNet2DConditionModel' is supported")
        known = {key: _canonical(key, value) for key, value in values.items() if not key.startswith("_")}
        if unknown := sorted(known.keys() - FIXED.keys() - VARYING.keys()):
            raise UNetError(f"unknown key {unknown[0]!r} in the UNet config")
        get = {**VARYING, **known}.__getitem__
        history = get("trajectory_attention")
        for key, only in {**FIXED, "mid_block_type": MID_TYPES[bool(history)]}.items():
            value = known.get(key, only)
            if value != only or isinstance(value, bool) != isinstance(only, bool):
                raise UNetError(f"{key}={value!r} is not supported; only {only!r} is")
        depths = "layers_per_block", "transformer_layers_per_block"
        attention = check_levels(UNetError, get, DOWN_TYPES, UP_TYPES, *depths)
        check_positive_int(UNetError, "cross_attention_dim", get("cross_attention_dim"))
        heads = get("attention_head_dim")  # despite its name, the number of heads: a mistake diffusers keeps
        if heads is None:
            raise UNetError("attention_head_dim=None is not supported; expected the number of heads, or one per level")
        num_heads = tuple(heads) if isinstance(heads, list | tuple) else heads
        return cls(**{ours: get(name) for name, ours in NAMES.items()}, attention_levels=attention,
                   num_heads=num_heads, trajectory_attention=history)  # fmt: skip

    def to_diffusers(self) -> dict[str, Any]:
        """Return the contents of a diffusers `unet/config.json`; the inverse of `from_diffusers`."""
        flags = [level in self.attention_levels for level in range(len(self.block_out_channels))]
        heads = self.heads_per_level
        return {
            "_class_name": "UNet2DConditionModel",  # no _diffusers_version: diffusers changes sample_size for old ones
            **FIXED,
            **{name: getattr(self, ours) for name, ours in NAMES.items()},
            "block_out_channels": list(self.block_out_channels),
            "down_block_types": [DOWN_TYPES[flag] for flag in flags],
            "up_block_types": [UP_TYPES[flag] for flag in flags[::-1]],
            "attention_head_dim": heads[0] if len(set(heads)) == 1 else list(heads),
            "mid_block_type": MID_TYPES[self.trajectory_attention > 0],
            **({"trajectory_attention": self.trajectory_attention} if self.trajectory_attention else {}),
        }


# Equivalent forms that diffusers accepts: one value repeated for every level, null for false.
PER_LEVEL = ("layers_per_block", "cross_attention_dim", "transformer_layers_per_block", "only_cross_attention")
ALIASES = {("act_fn", "swish"): "silu", ("mid_block_only_cross_attention", False): None,
           ("use_linear_projection", None): False, ("upcast_attention", None): False}  # fmt: skip


def _canonical(key: str, value: Any) -> Any:
    if key in PER_LEVEL and isinstance(value, list | tuple) and value and all(entry == value[0] for entry in value):
        return value[0]
    return ALIASES.get((key, value), value) if isinstance(value, str | bool | None) else value
