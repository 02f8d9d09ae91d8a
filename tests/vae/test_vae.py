"""The VAE on its own: sizes, scaling, memory layout, compilation, checkpointing, invalid inputs and files."""

import json
import math

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from vae import VAE, VAEConfig, VAEError

SMALL = VAEConfig(
    block_out_channels=(16, 32), latent_channels=3, norm_groups=8, layers_per_block=1, attention_levels=(1,)
)
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def vae() -> VAE:
    return VAE(SMALL).eval()


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 12, 8) * 2 - 1


def test_parameter_count_of_kl_f8():
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in VAE(VAEConfig()).parameters()) == 83_653_863


def test_latents_and_raw_code(pixels, relative_error):
    """Only the VAE applies scale_factor and shift_factor: latents = s (z - m), and likewise the posterior over them."""
    vae = VAE(VAEConfig(**{**vars(SMALL), "scale_factor": 0.5, "shift_factor": 0.25})).eval()
    with torch.no_grad():
        z, latents = vae.posterior(pixels), vae.latent_posterior(pixels)
        assert torch.equal(vae.encode(pixels), latents.mode())
        assert relative_error(latents.mean, 0.5 * (z.mean - 0.25)) < 1e-6
        assert relative_error(latents.std, 0.5 * z.std) < 1e-6
        noise = torch.randn_like(z.mean)
        assert relative_error(vae.unscale(latents.reparameterize(noise)), z.reparameterize(noise)) < 1e-6
        assert relative_error(vae.decode(vae.scale(z.mean)), vae.decode_z(z.mean)) < 1e-5
        assert vae.encode(pixels).shape == (2, 3, 6, 4)


@pytest.mark.parametrize("opened", [False, True], ids=["new", "from_pretrained"])
def test_channels_last_end_to_end(vae, pixels, tmp_path, opened):
    if opened:
        vae.save_pretrained(tmp_path)
        vae = VAE.from_pretrained(tmp_path)
    maps = []
    for layer in vae.modules():
        if isinstance(layer, torch.nn.Conv2d):
            assert layer.weight.is_contiguous(memory_format=torch.channels_last)
            layer.register_forward_hook(lambda layer, args, out: maps.extend((args[0], out)))
    with torch.no_grad():
        vae(pixels)
    assert len(maps) > 40
    assert all(tensor.stride(1) == 1 for tensor in maps)  # not contiguous: the mean is half of the moments


def test_compiles_without_graph_break(vae, pixels):
    compiled = torch.compile(vae, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(pixels)[0], vae(pixels)[0])


def test_gradient_checkpointing_recomputes_the_same(vae, pixels):
    def gradients() -> list[torch.Tensor]:
        vae.zero_grad()
        vae(pixels, torch.ones(2, 3, 6, 4))[0].square().mean().backward()
        return [parameter.grad for parameter in vae.parameters()]

    calls = []
    handle = vae.encoder.mid_block.resnets[0].register_forward_pre_hook(lambda *_: calls.append(1))
    expected = gradients()
    vae.enable_gradient_checkpointing()
    found = gradients()
    handle.remove()
    assert len(calls) == 1 + 2  # with checkpointing, forward ran again in the backward pass
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(vae, pixels, relative_error, dtype):
    with torch.no_grad():
        expected = vae(pixels)[0]
        found = vae.to(dtype)(pixels.to(dtype))[0]
    assert found.dtype == dtype
    assert relative_error(found, expected) < (5e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda vae: vae.encode(torch.zeros(1, 4, 8, 8)), r"pixels has shape \(1, 4, 8, 8\); expected \(B, 3, height"),
        (lambda vae: vae.encode(torch.zeros(3, 8, 8)), r"pixels has shape \(3, 8, 8\)"),
        (lambda vae: vae.encode(torch.zeros(1, 3, 7, 8)), r"height and width \(7, 8\); both must be multiples of 2"),
        (lambda vae: vae.encode(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)), r"pixels is torch\.uint8"),
        (lambda vae: vae.encode(torch.zeros(1, 3, 0, 8)), r"pixels has shape \(1, 3, 0, 8\)"),
        (lambda vae: vae.decode(torch.zeros(1, 4, 8, 8)), r"latents has shape \(1, 4, 8, 8\); expected \(B, 3"),
        (lambda vae: vae.decode(torch.zeros(1, 3, 8, 8).half()), r"latents is torch\.float16 and the weights are"),
        (lambda vae: vae.decode(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)), r"latents is torch\.uint8"),
        (lambda vae: vae.decode_z(torch.zeros(1, 4, 8, 8)), r"z has shape"),
        (lambda vae: vae(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)), r"noise has shape \(1, 3, 8, 8\)"),
    ],
)
def test_wrong_inputs(vae, call, message):
    with pytest.raises(VAEError, match=message):
        call(vae)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents_mean": [0.0]}, r"latents_mean=\[0\.0\] is not supported; only None is"),
        ({"act_fn": "relu"}, "act_fn='relu'"),
        ({"down_block_types": ["DownEncoderBlock2D", "KDownBlock2D"]}, "down_block_types has 'KDownBlock2D'"),
        ({"up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]}, "does not mirror"),
        ({"up_block_types": None}, "up_block_types=None is not supported; expected a list"),
        ({"block_out_channels": [16, 32, 32]}, "2 down_block_types for 3 block_out_channels"),
        ({"block_out_channels": [16, 33]}, "block_out_channels has 33, not divisible by norm_groups=8"),
        ({"layers_per_block": 0}, "layers_per_block=0"),
        ({"scaling_factor": 0}, "scale_factor=0 is not supported; expected a number between 0 and"),
        ({"scaling_factor": math.nan}, "scale_factor=nan"),
        ({"scaling_factor": math.inf}, "scale_factor=inf"),
        ({"shift_factor": math.nan}, "shift_factor=nan"),
        ({"sample_size": "x"}, "sample_size='x'"),
        ({"layers_per_block": 10**9}, "layers_per_block=1000000000"),
        ({"layers_per_block": 65}, "levels x layers_per_block is 130; expected at most 128"),
        ({"scaling_factor": "1"}, "scale_factor='1'"),
        ({"mid_block_add_attention": "yes"}, "mid_attention='yes'"),
        ({"use_quant_conv": 1}, "quant_convs=1"),
        ({"_class_name": "VQModel"}, "_class_name is 'VQModel'; only 'AutoencoderKL' is"),
        ({"learned_variance": 1.0}, "unknown key 'learned_variance'"),
    ],
)
def test_unsupported_configs_are_refused_by_name(vae, tmp_path, changes, message):
    vae.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(VAEError, match=message) as caught:
        VAE.from_pretrained(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("decoder.conv_in.bias"), r"lacks 1 tensor: decoder\.conv_in\.bias"),
        (lambda w: w.update(extra=torch.zeros(1)), "unexpected for this VAE: 1 tensor: extra"),
        (
            lambda w: w.update({"quant_conv.bias": torch.zeros(5)}),
            r"quant_conv\.bias has shape \[5\]; the config says \[6\]",
        ),
        (lambda w: w.update({"quant_conv.bias": torch.zeros(6).long()}), r"quant_conv\.bias is I64"),
    ],
    ids=["missing", "extra", "misshapen", "integers"],
)
def test_wrong_tensors(vae, tmp_path, change, message):
    vae.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(VAEError, match=message):
        VAE.from_pretrained(tmp_path)


def test_configs_in_code():
    for options, message in (
        ({"quant_convs": (True,)}, "quant_convs="),
        ({"quant_convs": True}, "quant_convs=True is not supported; expected a list"),
        ({"attention_levels": (4,)}, "attention_levels has 4; the levels are 0 to 3"),
        ({"block_out_channels": ()}, "block_out_channels is empty"),
    ):
        with pytest.raises(VAEError, match=message):
            VAEConfig(**options)


def test_a_giant_config_is_refused_before_it_is_allocated(vae, tmp_path):
    vae.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "block_out_channels": [16, 320_000]}))
    with pytest.raises(VAEError, match="the config says"):
        VAE.from_pretrained(tmp_path)


def test_a_missing_key_takes_diffusers_default(tmp_path):
    """Checkpoints from 2022 have few keys."""
    AutoencoderKL(block_out_channels=(32,)).save_pretrained(tmp_path)
    expected = VAE.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(
        '{"_class_name": "AutoencoderKL", "_diffusers_version": "0.2.2", "block_out_channels": [32]}'
    )
    assert VAE.from_pretrained(tmp_path).config == expected.config


def test_autocast(vae, pixels, relative_error):
    """Layers run in bfloat16; the KL, a sum over the entire image, is still in float32."""
    with torch.no_grad():
        expected, exact = vae(pixels)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, posterior = vae(pixels)
            again = vae.decode(vae.encode(pixels))
    assert posterior.mean.dtype == torch.bfloat16
    assert relative_error(found, expected) < 5e-2
    assert relative_error(again, expected) < 5e-2
    assert posterior.kl().dtype == posterior.kl(posterior).dtype == posterior.log_prob(pixels[:, :, ::2, ::2]).dtype
    assert posterior.kl().dtype == torch.float32
    assert relative_error(posterior.kl(), exact.kl()) < 2e-2


def test_missing_and_damaged_files(vae, tmp_path):
    with pytest.raises(VAEError, match="no such folder"):
        VAE.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(VAEError, match=r"config\.json: no such file"):
        VAE.from_pretrained(tmp_path)
    vae.save_pretrained(tmp_path)
    path = tmp_path / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(VAEError, match="damaged or not a safetensors file"):
        VAE.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(VAEError, match="no such file"):
        VAE.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(VAEError, match="not valid JSON"):
        VAE.from_pretrained(tmp_path)
