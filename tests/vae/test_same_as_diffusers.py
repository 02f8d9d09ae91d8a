"""The same weights give the same outputs and gradients as diffusers' AutoencoderKL, in both directions."""

import json

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from vae import VAE, VAEConfig

DOWN, ATTENTION_DOWN, UP, ATTENTION_UP = (
    "DownEncoderBlock2D",
    "AttnDownEncoderBlock2D",
    "UpDecoderBlock2D",
    "AttnUpDecoderBlock2D",
)
CASES = {
    "kl_f8": {"block_out_channels": (32, 64, 64, 64), "layers_per_block": 2},
    "kl_f4": {"block_out_channels": (32, 64, 96), "layers_per_block": 2, "latent_channels": 3, "scaling_factor": 1.0},
    "kl_f16_with_attention": {
        "block_out_channels": (16, 16, 32, 32, 64),
        "down_block_types": (DOWN,) * 4 + (ATTENTION_DOWN,),
        "up_block_types": (ATTENTION_UP,) + (UP,) * 4,
        "latent_channels": 16,
    },
    "plain": {
        "block_out_channels": (32, 48),
        "mid_block_add_attention": False,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "shift_factor": 0.1,
        "latent_channels": 8,
        "layers_per_block": 3,
    },
    "f1_grey": {"block_out_channels": (32,), "in_channels": 1, "out_channels": 1, "force_upcast": False},
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def build(name: str) -> AutoencoderKL:
    options = {"norm_num_groups": 8, **CASES[name]}
    levels = len(options["block_out_channels"])
    return AutoencoderKL(**{"down_block_types": (DOWN,) * levels, "up_block_types": (UP,) * levels, **options}).eval()


@pytest.fixture(params=CASES, ids=str)
def pair(request, tmp_path):
    """diffusers' model, saved by diffusers, and ours, loaded from the same folder."""
    theirs = build(request.param)
    theirs.save_pretrained(tmp_path / "theirs")
    return theirs, VAE.from_pretrained(tmp_path / "theirs")


def pixels_for(config: VAEConfig):
    return torch.rand(2, config.in_channels, 3 * config.downsampling, 2 * config.downsampling) * 2 - 1


def test_outputs(pair, relative_error):
    theirs, ours = pair
    pixels = pixels_for(ours.config)
    with torch.no_grad():
        expected, found = theirs.encode(pixels).latent_dist, ours.posterior(pixels)
        assert relative_error(found.mean, expected.mean) < 1e-5
        assert relative_error(found.logvar, expected.logvar) < 1e-5
        assert relative_error(ours.decode_z(expected.mean), theirs.decode(expected.mean).sample) < 1e-5
        assert relative_error(ours(pixels)[0], theirs(pixels).sample) < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("name", CASES)
def test_every_gradient(name, dtype, tolerance, tmp_path, check_gradients):
    """Through a posterior sample, so that both means and log-variances get gradients."""
    build(name).save_pretrained(tmp_path)
    theirs, ours = (
        AutoencoderKL.from_pretrained(tmp_path, torch_dtype=dtype),
        VAE.from_pretrained(tmp_path, dtype=dtype),
    )
    pixels = pixels_for(ours.config).to(dtype)
    expected = theirs.encode(pixels).latent_dist
    noise = torch.randn_like(expected.mean)
    loss = theirs.decode(expected.mean + expected.std * noise).sample.square().mean() + expected.kl().mean() * 1e-3
    loss.backward()
    reconstruction, found = ours(pixels, noise)
    (reconstruction.square().mean() + found.kl().mean() * 1e-3).backward()
    check_gradients(ours, theirs, tolerance)


def test_scaling_is_that_of_diffusers_pipelines(pair, relative_error):
    theirs, ours = pair
    pixels = pixels_for(ours.config)
    factor, shift = theirs.config.scaling_factor, theirs.config.shift_factor or 0.0
    with torch.no_grad():
        latents = (theirs.encode(pixels).latent_dist.mode() - shift) * factor
        assert relative_error(ours.encode(pixels), latents) < 1e-5
        assert relative_error(ours.decode(latents), theirs.decode(latents / factor + shift).sample) < 1e-5


def test_diffusers_opens_what_we_save(pair, tmp_path):
    theirs, ours = pair
    ours.save_pretrained(tmp_path / "ours")
    again, info = AutoencoderKL.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    ignored = {"_name_or_path", "_diffusers_version", "_use_default_values", "sample_size"}
    expected, found = ({k: v for k, v in m.config.items() if k not in ignored} for m in (theirs, again))
    assert json.dumps(found, sort_keys=True) == json.dumps(expected, sort_keys=True)


def test_config_round_trip(pair):
    config = pair[1].config
    assert VAEConfig.from_diffusers(config.to_diffusers()) == config


def test_files_of_2022_name_attention_otherwise(tmp_path):
    """Stable Diffusion 1.x on the hub still uses query, key, value and proj_attn."""
    build("kl_f8").save_pretrained(tmp_path)
    expected = VAE.from_pretrained(tmp_path).state_dict()
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(tmp_path / WEIGHTS)
    for new, old in former.items():
        tensors = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): t for name, t in tensors.items()}
    assert any("query" in name for name in tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    found = VAE.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
