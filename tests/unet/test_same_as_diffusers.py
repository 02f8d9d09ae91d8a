"""The same weights give the same outputs and gradients as diffusers' UNet2DConditionModel, in both directions."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel

from unet import UNet, UNetConfig

CROSS_DOWN, PLAIN_DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"
SD_TYPES = {
    "down_block_types": (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, PLAIN_DOWN),
    "up_block_types": (PLAIN_UP, CROSS_UP, CROSS_UP, CROSS_UP),
}
CASES = {
    "sd1": {**SD_TYPES, "block_out_channels": (32, 64, 96, 96), "attention_head_dim": 8, "cross_attention_dim": 24},
    "sd2": {
        **SD_TYPES,
        "block_out_channels": (32, 64, 128, 128),
        "attention_head_dim": (1, 2, 4, 4),
        "use_linear_projection": True,
        "cross_attention_dim": 48,
    },
    "sd2.1": {
        **SD_TYPES,
        "block_out_channels": (32, 64, 64, 64),
        "attention_head_dim": [2, 4, 4, 4],
        "use_linear_projection": True,
        "upcast_attention": True,
        "cross_attention_dim": 16,
    },
    "ldm_text2im": {**SD_TYPES, "block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 80, "sample_size": 32},
    "two_levels_inpainting": {
        "down_block_types": (CROSS_DOWN, CROSS_DOWN),
        "up_block_types": (CROSS_UP, CROSS_UP),
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "in_channels": 9,
        "cross_attention_dim": 20,
        "norm_eps": 1e-6,
    },
    "deep_attention_inside": {
        "down_block_types": (PLAIN_DOWN, CROSS_DOWN, CROSS_DOWN),
        "up_block_types": (CROSS_UP, CROSS_UP, PLAIN_UP),
        "block_out_channels": (32, 48, 64),
        "norm_num_groups": 16,
        "layers_per_block": 3,
        "transformer_layers_per_block": 2,
        "attention_head_dim": 4,
        "cross_attention_dim": 24,
        "out_channels": 8,
    },
    "one_level": {
        "down_block_types": (CROSS_DOWN,),
        "up_block_types": (CROSS_UP,),
        "block_out_channels": (32,),
        "attention_head_dim": 4,
        "cross_attention_dim": 8,
    },
    "attention_in_the_middle_only": {
        "down_block_types": (PLAIN_DOWN, PLAIN_DOWN),
        "up_block_types": (PLAIN_UP, PLAIN_UP),
        "block_out_channels": (32, 64),
        "cross_attention_dim": 8,
    },
}


@pytest.fixture(scope="module", params=CASES, ids=str)
def pair(request, tmp_path_factory):
    """diffusers' model, saved by diffusers, and ours, loaded from the same folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("theirs")
    theirs = UNet2DConditionModel(**{"sample_size": 16, "norm_num_groups": 8, **CASES[request.param]}).eval()
    theirs.save_pretrained(folder)
    return theirs, UNet.from_pretrained(folder)


def inputs(config: UNetConfig, height: int = 16, width: int = 16):
    x = torch.randn(2, config.in_channels, height, width)
    return x, torch.tensor([3, 981]), torch.randn(2, 7, config.context_dim)


def test_outputs_and_every_gradient(pair, relative_error, check_gradients):
    theirs, ours = pair
    x, t, context = inputs(ours.config)
    expected, found = theirs(x, t, context).sample, ours(x, t, context)
    assert relative_error(found, expected) < 1e-5
    expected.square().mean().backward()
    found.square().mean().backward()
    check_gradients(ours, theirs, 1e-4)


@pytest.mark.parametrize(("height", "width"), [(13, 9), (3, 2), (8, 24)])
def test_any_size(pair, relative_error, height, width):
    """Sizes not divisible by 2: upsampling must return to the size of the skip connection, not double."""
    theirs, ours = pair
    x, t, context = inputs(ours.config, height, width)
    with torch.no_grad():
        assert relative_error(ours(x, t, context), theirs(x, t, context).sample) < 1e-5


def test_diffusers_opens_what_we_save(pair, tmp_path):
    theirs, ours = pair
    ours.save_pretrained(tmp_path / "ours")
    again, info = UNet2DConditionModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    state = again.state_dict()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(state[name], tensor), name
    ignored = {"_name_or_path", "_diffusers_version", "_use_default_values"}
    expected, found = ({k: v for k, v in m.config.items() if k not in ignored} for m in (theirs, again))
    assert json.dumps(found, sort_keys=True) == json.dumps(expected, sort_keys=True)


def test_config_round_trip(pair):
    config = pair[1].config
    assert UNetConfig.from_diffusers(config.to_diffusers()) == config


def test_a_single_pixel(tmp_path, relative_error):
    """GroupNorm over one pixel magnifies rounding, so this size is compared in float64."""
    theirs = UNet2DConditionModel(sample_size=16, norm_num_groups=8, **CASES["sd1"]).eval()
    theirs.save_pretrained(tmp_path)
    ours, theirs = UNet.from_pretrained(tmp_path, dtype=torch.float64), theirs.double()
    x, t, context = inputs(ours.config, 1, 1)
    with torch.no_grad():
        expected = theirs(x.double(), t, context.double()).sample
        assert relative_error(ours(x.double(), t, context.double()), expected) < 1e-10


@pytest.mark.slow
def test_full_size_sd1(tmp_path, relative_error):
    theirs = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval()
    theirs.save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    x, t, context = torch.randn(1, 4, 64, 64), torch.tensor([500]), torch.randn(1, 77, 768)
    with torch.no_grad():
        expected = theirs(x, t, context).sample
        del theirs
        ours = UNet.from_pretrained(tmp_path)
        assert relative_error(ours(x, t, context), expected) < 1e-5
    ours.save_pretrained(tmp_path / "ours")
    again = UNet2DConditionModel.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
