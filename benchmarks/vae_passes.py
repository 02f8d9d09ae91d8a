"""Our VAE against diffusers' AutoencoderKL: encode, decode, one step of training."""

from __future__ import annotations

import sys
from typing import Any

import torch
from diffusers import AutoencoderKL
from side_by_side import TRAINING, Contest, Inputs, Step, parse, run

from vae import VAE

ENCODE, DECODE = "encode", "decode"
LATENTS = 32  # height and width of the latents

SIZES: dict[str, dict[str, Any]] = {
    "small": {"block_out_channels": (64, 128, 256), "layers_per_block": 1},  # for a laptop: 128 pixels, f = 4
    "sd1": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},  # kl-f8: 256 pixels, f = 8
}


def build(size: str) -> AutoencoderKL:
    torch.manual_seed(0)
    levels = len(SIZES[size]["block_out_channels"])
    types = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    return AutoencoderKL(**SIZES[size], **types)


def inputs(size: str, batch: int) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    pixels = LATENTS * 2 ** (len(SIZES[size]["block_out_channels"]) - 1)
    return {
        "pixels": torch.rand(batch, 3, pixels, pixels, generator=generator) * 2 - 1,
        "latents": torch.randn(batch, 4, LATENTS, LATENTS, generator=generator),
    }


def forward(side: str, task: str, model: Any, inputs: Inputs) -> Step:
    """Return one pass. On both sides, latents are scaled, and training reconstructs from the posterior's mode."""
    pixels, latents = inputs["pixels"], inputs["latents"]
    if side == "ours":
        return {
            ENCODE: lambda: model.encode(pixels),
            DECODE: lambda: model.decode(latents),
            TRAINING: lambda: model(pixels)[0],
        }[task]
    scale = model.config.scaling_factor
    return {
        ENCODE: lambda: model.encode(pixels).latent_dist.mode() * scale,
        DECODE: lambda: model.decode(latents / scale).sample,
        TRAINING: lambda: model(pixels).sample,
    }[task]


if __name__ == "__main__":
    contest = Contest(VAE, AutoencoderKL, (ENCODE, DECODE, TRAINING), build, inputs, forward)
    sys.exit(run(contest, parse(__doc__ or "", tuple(SIZES), batch=2)))
