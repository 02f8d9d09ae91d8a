"""Which CPUs compute in bfloat16 by default, and which attention runs where."""

import pytest
import torch
from PIL import Image

from latentdiff import LatentDiffError, LatentPipeline
from latentdiff.config import load_config
from latentdiff.device import check_attention, computes_in_bf16, multiplies_bf16, without_tf32
from latentdiff.training.stages import new_unet
from unet import UNetError


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [
        ({"cpu_name": "Intel Xeon", "amx_bf16": True, "avx512_bf16": True}, True),
        ({"cpu_name": "Intel Xeon", "amx_bf16": False, "avx512_bf16": True}, False),  # half the speed of float32
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, True),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": False}, False),
        ({"architecture": "aarch64"}, False),
    ],
)
def test_multiplies_bf16(cpu, expected):
    assert multiplies_bf16(cpu) is expected


@pytest.mark.parametrize("found", [True, False])
def test_this_cpu_is_queried(monkeypatch, found):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "Intel Xeon", "amx_bf16": found})
    assert computes_in_bf16(torch.device("cpu")) is found


def test_what_is_encoded_is_not_rounded_to_tf32():
    """A picture's latents were rounded to ten bits on NVIDIA GPUs, where PyTorch lets convolutions use TF32."""
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    seen = []
    pipe = LatentPipeline.from_pretrained(device="cpu")
    pipe.vae.encoder.register_forward_hook(lambda *_: seen.append([flag.allow_tf32 for flag in flags]))
    before = [flag.allow_tf32 for flag in flags]
    pipe.encode(Image.new("RGB", (64, 64)), size=(64, 64))
    assert (before[1], seen) == (True, [[False, False]])
    assert [flag.allow_tf32 for flag in flags] == before
    with pytest.raises(KeyError), without_tf32():
        raise KeyError
    assert [flag.allow_tf32 for flag in flags] == before


def test_xformers_needs_an_nvidia_gpu():
    check_attention("xformers", torch.device("cuda"))
    check_attention("sdpa", torch.device("cpu"))
    with pytest.raises(LatentDiffError, match="attention=xformers: needs an NVIDIA GPU, not cpu; choose sdpa"):
        LatentPipeline.from_pretrained(device="cpu", attention="xformers")
    with pytest.raises(UNetError, match="'flash' is unknown; choose 'sdpa' or 'xformers'"):
        LatentPipeline.from_pretrained(device="cpu", attention="flash")


@pytest.mark.parametrize("pretrained", [(), ("unet.pretrained=builtin:emoji-256",)])
def test_a_run_trains_with_the_attention_that_its_config_names(xformers, relative_error, pretrained):
    parts = LatentPipeline.from_pretrained(device="cpu")
    x, t = torch.randn(2, parts.unet.config.in_channels, 8, 8), torch.tensor([3, 500])
    context = torch.randn(2, 5, parts.text_encoder.context_dim)

    def output(name):
        torch.manual_seed(0)
        config = load_config("emoji-64", [f"unet.attention={name}", *pretrained])
        unet = new_unet(config, parts.vae, parts.text_encoder)
        torch.nn.init.normal_(unet.conv_out.weight)
        return unet(x, t, context).detach()

    expected = output("sdpa")
    assert not xformers
    assert relative_error(output("xformers"), expected) < 1e-5
    assert xformers
