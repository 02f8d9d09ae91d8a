"""`VAEConfig`, and its conversion from and to the `config.json` of diffusers' AutoencoderKL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latentdiff.errors import check_levels, check_positive_int
from latentdiff.files.tensors import ModelFiles

from .errors import VAEError

# Keys of AutoencoderKL with a single supported value, and keys that vary, with diffusers' default for each.
FIXED: dict[str, Any] = {"act_fn": "silu", "latents_mean": None, "latents_std": None}
VARYING: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "sample_size": 32, "scaling_factor": 0.18215,
    "down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"], "block_out_channels": [64],
    "layers_per_block": 1, "norm_num_groups": 32, "shift_factor": None, "force_upcast": True,
    "use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True,
}  # fmt: skip

DOWN_TYPES = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")  # without and with attention
UP_TYPES = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")

# diffusers' name of a setting -> ours.
NAMES = {
    **{name: name for name in ("in_channels", "out_channels", "block_out_channels", "layers_per_block")},
    **{name: name for name in ("latent_channels", "sample_size", "force_upcast")},
    "mid_block_add_attention": "mid_attention",
    "norm_num_groups": "norm_groups",
    "scaling_factor": "scale_factor",
}

NAMES_IN_2022 = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def current_name(name: str) -> str:
    """Return a tensor's current name; checkpoints of 2022 such as Stable Diffusion 1.x name attention differently."""
    parts = name.split(".")
    return ".".join(NAMES_IN_2022.get(part, part) for part in parts) if "attentions" in parts else name


FILES = ModelFiles("VAE", VAEError, current_name=current_name)


@dataclass(frozen=True)
class VAEConfig:
    """Architecture of an autoencoder, by default LDM's kl-f8 (84M parameters); raises VAEError for invalid values."""

    in_channels: int = 3  # channels of the input pixels
    out_channels: int = 3  # channels of the reconstructed pixels
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)  # width of each level; f = 2 ** (levels - 1)
    layers_per_block: int = 2  # ResBlocks per level of the encoder; one more in the decoder
    latent_channels: int = 4  # channels of the latents
    attention_levels: tuple[int, ...] = ()  # levels with attention (the lowest ones in LDM's f16 and f32)
    mid_attention: bool = True  # attention at the lowest resolution, between two ResBlocks
    quant_convs: tuple[bool, bool] = (True, True)  # 1x1 convolutions after the encoder and before the decoder
    norm_groups: int = 32  # groups of every GroupNorm
    scale_factor: float = 0.18215  # latents = scale_factor * (z - shift_factor)
    shift_factor: float = 0.0  # ignored by diffusers' Stable Diffusion pipelines
    sample_size: int | tuple[int, ...] | None = 256  # size of the training images; the network itself ignores it
    force_upcast: bool = False  # this VAE overflows in float16, so diffusers must run it in float32

    def __post_init__(self) -> None:
        for name in ("block_out_channels", "attention_levels", "quant_convs", "sample_size"):  # lists in JSON and YAML
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        for name in ("block_out_channels", "attention_levels", "quant_convs"):
            if not isinstance(getattr(self, name), tuple):
                raise VAEError(f"{name}={getattr(self, name)!r} is not supported; expected a list")
        for name in ("in_channels", "out_channels", "latent_channels", "norm_groups"):
            check_positive_int(VAEError, name, getattr(self, name))
        check_positive_int(VAEError, "layers_per_block", self.layers_per_block, at_most=100)
        for size in self.sample_size if isinstance(self.sample_size, tuple) else (self.sample_size,):
            if size is not None:
                check_positive_int(VAEError, "sample_size", size)
        for name in ("mid_attention", "force_upcast"):
            _check_bool(name, getattr(self, name))
        if len(self.quant_convs) != 2:
            raise VAEError(
                f"quant_convs={self.quant_convs!r} is not supported; expected one each for encoder and decoder"
            )
        for value in self.quant_convs:
            _check_bool("quant_convs", value)
        for name, lowest in (("scale_factor", 0.0), ("shift_factor", -1e6)):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not lowest < value < 1e6:
                raise VAEError(f"{name}={value!r} is not supported; expected a number between {lowest:g} and 1e+06")
        if not self.block_out_channels:
            raise VAEError("block_out_channels is empty: give one width per level, such as (128, 256, 512, 512)")
        for width in self.block_out_channels:
            check_positive_int(VAEError, "block_out_channels", width)
            if width % self.norm_groups:
                raise VAEError(f"block_out_channels has {width}, not divisible by norm_groups={self.norm_groups}")
        levels = range(len(self.block_out_channels))
        if wrong := [level for level in self.attention_levels if type(level) is not int or level not in levels]:
            raise VAEError(f"attention_levels has {wrong[0]!r}; the levels are 0 to {levels[-1]}")
        object.__setattr__(self, "attention_levels", tuple(sorted(set(self.attention_levels))))  # canonical

    @property
    def downsampling(self) -> int:
        """Downsampling factor f: pixels per latent along each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_diffusers(cls, values: Mapping[str, Any]) -> VAEConfig:
        """Convert the contents of a diffusers `vae/config.json`; raise VAEError naming the first unsupported key."""
        if (name := values.get("_class_name", "AutoencoderKL")) != "AutoencoderKL":
            raise VAEError(f"_class_name is {name!r}; only 'AutoencoderKL' is supported")
        known = {key: value for key, value in values.items() if not key.startswith("_")}
        if unknown := sorted(known.keys() - FIXED.keys() - VARYING.keys()):
            raise VAEError(f"unknown key {unknown[0]!r} in the VAE config")
        for key, only in FIXED.items():
            value = known.get(key, only)
            if value != only and (key, value) != ("act_fn", "swish"):  # swish is the old name of silu
                raise VAEError(f"{key}={value!r} is not supported; only {only!r} is")
        get = {**VARYING, **known}.__getitem__
        attention = check_levels(VAEError, get, DOWN_TYPES, UP_TYPES, "layers_per_block")
        return cls(
            **{ours: get(name) for name, ours in NAMES.items()},
            attention_levels=attention,
            quant_convs=(get("use_quant_conv"), get("use_post_quant_conv")),
            shift_factor=0.0 if get("shift_factor") is None else get("shift_factor"),
        )

    def to_diffusers(self) -> dict[str, Any]:
        """Return the contents of a diffusers `vae/config.json`; the inverse of `from_diffusers`."""
        flags = [level in self.attention_levels for level in range(len(self.block_out_channels))]
        return {
            "_class_name": "AutoencoderKL",
            **FIXED,
            **{name: getattr(self, ours) for name, ours in NAMES.items()},
            "block_out_channels": list(self.block_out_channels),
            "down_block_types": [DOWN_TYPES[flag] for flag in flags],
            "up_block_types": [UP_TYPES[flag] for flag in flags[::-1]],
            "use_quant_conv": self.quant_convs[0],
            "use_post_quant_conv": self.quant_convs[1],
            "shift_factor": self.shift_factor or None,
            "sample_size": list(self.sample_size) if isinstance(self.sample_size, tuple) else self.sample_size,
        }


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise VAEError(f"{name}={value!r} is not supported; expected true or false")
