"""Our UNet against diffusers' UNet2DConditionModel: one prediction, one step of a sampler, one step of training."""

from __future__ import annotations

import sys
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from side_by_side import TRAINING, Contest, Inputs, Step, parse, run

from unet import UNet

FORWARD, CACHED = "forward", "forward, cached"  # cached: keys, values and time projections are precomputed
LATENTS, TOKENS = 32, 77  # height and width of the latents, length of the text

SIZES: dict[str, dict[str, Any]] = {
    "small": {  # for a laptop, 25 million parameters
        "block_out_channels": (96, 192, 256),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": (3, 6, 8),  # number of heads, each 32 wide
        "cross_attention_dim": 256,
    },
    "sd1": {"cross_attention_dim": 768},  # the rest is diffusers' default
}


def build(size: str) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(sample_size=LATENTS, **SIZES[size])


def inputs(size: str, batch: int) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(batch, 4, LATENTS, LATENTS, generator=generator),
        "context": torch.randn(batch, TOKENS, SIZES[size]["cross_attention_dim"], generator=generator),
        "step": torch.tensor(500),  # sampling uses one timestep for all
        "t": torch.randint(1000, (batch,), generator=generator),  # training uses one for each
    }


def forward(side: str, task: str, model: Any, inputs: Inputs) -> Step:
    x, context = inputs["x"], inputs["context"]
    t = inputs["t"] if task == TRAINING else inputs["step"]
    if side != "ours":
        return lambda: model(x, t, context).sample
    if task != CACHED:
        return lambda: model(x, t, context)
    with torch.no_grad():
        shifts, keys_values = model.project_time(t[None]), model.project_context(context)
    return lambda: model(x, [shift[:1] for shift in shifts], keys_values)


if __name__ == "__main__":
    contest = Contest(UNet, UNet2DConditionModel, (FORWARD, CACHED, TRAINING), build, inputs, forward)
    sys.exit(run(contest, parse(__doc__ or "", tuple(SIZES), batch=4)))
