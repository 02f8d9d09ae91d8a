"""What must hold on an NVIDIA GPU: `make test-gpu`. LATENTDIFF_TEST_DEVICE=cpu tries the tests without one."""

import os
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from latentdiff import LatentPipeline, norms
from latentdiff.config import load_config
from latentdiff.data.sources import open_source
from latentdiff.training.latent import LatentTraining
from latentdiff.training.launch import launch
from latentdiff.training.logging import MetricLogger
from latentdiff.training.stages import make_caches, new_unet, open_text_encoder
from latentdiff.training.vae import VAETraining
from text_encoder import TextEncoder, train_tokenizer
from unet import UNet
from vae import VAE

DEVICE = os.environ.get("LATENTDIFF_TEST_DEVICE", "cuda")
ON_GPU = DEVICE == "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
CAPTIONS = ["a red apple", "a blue car on the road", "an emoji of a smiling face"]


@pytest.fixture(autouse=True)
def _exact():
    """No TF32 in what compares."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextmanager
def no_waiting():
    """Raise where the host waits for the device."""
    if not ON_GPU:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode does not see everything
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="module")
def pipe():
    """A pipeline in emoji-256's shape, smaller, with random weights, none of them zero."""
    torch.manual_seed(0)
    config = load_config("emoji-256", ["unet.block_out_channels=[96, 192]", "unet.attention_levels=[1]"])
    tokenizer = train_tokenizer(CAPTIONS * 2, vocab_size=200, max_length=24)
    encoder = TextEncoder.new(config.text_encoder.build(), tokenizer)
    vae = VAE(config.vae.build(256))
    unet = UNet(config.unet.build(vae.config.latent_channels, encoder.context_dim, 32))
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return LatentPipeline(vae=vae, unet=unet, text_encoder=encoder, schedule=config.diffusion.build())


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(folder)
    return folder


def unet_inputs(unet, dtype):
    generator = torch.Generator().manual_seed(1)
    x, context = (
        torch.randn(2, 4, 32, 32, generator=generator),
        torch.randn(2, 24, unet.config.context_dim, generator=generator),
    )
    return x.to(DEVICE, dtype), torch.tensor([3, 700], device=DEVICE), context.to(DEVICE, dtype)


def test_unet_equals_diffusers_and_the_cpu(folder, relative_error):
    exact = None
    for dtype in (torch.float32, torch.bfloat16):
        ours = UNet.from_pretrained(folder / "unet", device=DEVICE, dtype=dtype)
        theirs = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype).to(DEVICE)
        x, t, context = unet_inputs(ours, dtype)
        with torch.no_grad():
            found, expected = ours(x, t, context), theirs(x, t, context).sample
        if exact is None:
            on_cpu = UNet.from_pretrained(folder / "unet", device="cpu")
            with torch.no_grad():
                exact = on_cpu(x.cpu(), t.cpu(), context.cpu())
            assert relative_error(found.cpu(), exact) < 1e-4
            assert relative_error(found, expected) < 1e-4
        else:
            assert relative_error(found.cpu(), exact) <= 1.5 * relative_error(expected.cpu(), exact)


def test_vae_equals_diffusers_and_the_cpu(folder, relative_error):
    pixels = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(2)) * 2 - 1
    exact = None
    for dtype in (torch.float32, torch.bfloat16):
        ours = VAE.from_pretrained(folder / "vae", device=DEVICE, dtype=dtype)
        theirs = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype).to(DEVICE)
        with torch.no_grad():
            found = ours.decode(ours.encode(pixels.to(DEVICE, dtype)))
            latents = theirs.encode(pixels.to(DEVICE, dtype)).latent_dist.mode()
            expected = theirs.decode(latents).sample
        if exact is None:
            on_cpu = VAE.from_pretrained(folder / "vae", device="cpu")
            with torch.no_grad():
                exact = on_cpu.decode(on_cpu.encode(pixels))
            assert relative_error(found.cpu(), exact) < 1e-4
            assert relative_error(found, expected) < 1e-4
        else:
            assert relative_error(found.cpu(), exact) <= 1.5 * relative_error(expected.cpu(), exact)


def test_pictures_equal_those_of_the_cpu(folder):
    settings = {"num_steps": 4, "seed": 3, "progress": False}
    one, other = (
        np.stack([np.asarray(image).astype(int) for image in
                  LatentPipeline.from_pretrained(folder, device=device, dtype=torch.float32)(CAPTIONS, **settings)])
        for device in (DEVICE, "cpu")
    )  # fmt: skip
    assert (np.abs(one - other) <= 1).mean() >= 0.999


@pytest.mark.skipif(not ON_GPU, reason="Triton's kernels run on an NVIDIA GPU")
def test_the_norms_kernels_are_used():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert norms.kernels_for(torch.device("cuda", 0)).__name__.endswith("triton_kernels")


@pytest.mark.parametrize(
    "shape", [(4, 96, 32, 32, 32), (2, 288, 32, 17, 13), (2, 64, 16, 128, 128), (1, 1280, 32, 8, 8)]
)
@pytest.mark.parametrize("silu", [False, True])
def test_norms_in_bfloat16(shape, silu):
    """Against float64, at most 1.2 times the error of PyTorch's own."""
    batch, width, groups, height, across = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, width, height, across, generator=generator).add(0.5).bfloat16().to(DEVICE)
    upstream = torch.randn(batch, width, height, across, generator=generator).bfloat16().to(DEVICE)
    weight, bias = (torch.randn(width, generator=generator).bfloat16().float().to(DEVICE) for _ in range(2))

    def run(function, x, weight, bias):
        inputs = [each.detach().requires_grad_() for each in (x, weight, bias)]
        y = function(*inputs)
        return y, *torch.autograd.grad(y, inputs, upstream.to(y.dtype))

    def pytorch(x, weight, bias):
        y = torch.nn.functional.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), 1e-5)
        return torch.nn.functional.silu(y) if silu else y

    def ours(x, weight, bias):
        return norms.half_group_norm(x, weight, bias, groups, 1e-5, silu, norms.kernels_for(x.device))

    exact = run(pytorch, x.double(), weight.double(), bias.double())
    for name, mine, other, truth in zip(("y", "dx", "dweight", "dbias"), run(ours, x, weight, bias),
                                        run(pytorch, x, weight, bias), exact, strict=True):  # fmt: skip
        error, allowed = ((each.double() - truth).abs().max().item() for each in (mine, other))
        assert error <= max(1.2 * allowed, 2**-9 * truth.abs().max().item()), name


@pytest.mark.skipif(not ON_GPU, reason="xformers' attention runs on an NVIDIA GPU")
def test_xformers_equals_sdpa(folder, relative_error):
    pytest.importorskip("xformers.ops")
    unet = UNet.from_pretrained(folder / "unet", device=DEVICE, dtype=torch.bfloat16)
    inputs = unet_inputs(unet, torch.bfloat16)
    results = []
    for backend in ("sdpa", "xformers"):
        unet.set_attention_backend(backend)
        unet.zero_grad()
        output = unet(*inputs)
        output.float().square().mean().backward()
        results.append((output.detach(), unet.conv_in.weight.grad.clone()))
    for one, other in zip(*results, strict=True):
        assert relative_error(other, one) < 0.02


def test_a_sampling_loop_never_waits_for_the_device(folder):
    """Between its first and last step; what is created once happens in the first."""
    opened = LatentPipeline.from_pretrained(folder, device=DEVICE, dtype=torch.bfloat16 if ON_GPU else torch.float32)
    list(opened.stream("a red apple", num_steps=2, seed=0))
    steps = opened.stream(["a red apple", "a blue car"], num_steps=6, seed=0)
    next(steps)
    with no_waiting():
        for _ in range(4):
            next(steps)
    assert next(steps).x.isfinite().all()


@pytest.fixture
def drawing(folder):
    """The model in half precision, as it is drawn with on a GPU."""
    return LatentPipeline.from_pretrained(folder, device=DEVICE, dtype=torch.bfloat16 if ON_GPU else torch.float32)


def test_graphs_draw_what_the_unet_draws(drawing):
    for options in ({}, {"guidance_scale": 1.0}, {"guidance_interval": (0.3, 5.0), "sampler": "ddpm"}):
        graphed = [last(drawing.stream(CAPTIONS, num_steps=5, seed=3, **options)) for _ in range(2)]
        assert bool(drawing.graphs.recorded) == ON_GPU
        network, drawing.network = drawing.network, drawing.unet
        eager = last(drawing.stream(CAPTIONS, num_steps=5, seed=3, **options))
        drawing.network = network
        for each in graphed:
            assert (each - eager).abs().max() <= 0.02 * eager.abs().max()


def test_two_prompts_interleaved(drawing):
    alone = [last(drawing.stream(prompt, num_steps=5, seed=3)) for prompt in CAPTIONS[:2]]
    both = list(zip(*(drawing.stream(prompt, num_steps=5, seed=3) for prompt in CAPTIONS[:2]), strict=True))[-1]
    for one, step in zip(alone, both, strict=True):
        assert torch.equal(one, step.x)


@pytest.mark.skipif(not ON_GPU, reason="graphs are recorded on an NVIDIA GPU")
def test_graphs_follow_the_model(drawing):
    """Weights that change in place are used, others are recorded anew, and hooks run."""
    before = last(drawing.stream("a red apple", num_steps=3, seed=3))
    recorded = len(drawing.graphs.recorded)
    bias = drawing.unet.conv_out.bias.detach().clone()
    with torch.no_grad():
        drawing.unet.conv_out.bias += 1
    changed = last(drawing.stream("a red apple", num_steps=3, seed=3))
    assert not torch.equal(before, changed)
    assert len(drawing.graphs.recorded) == recorded
    drawing.unet.conv_out.bias = torch.nn.Parameter(bias)
    again = last(drawing.stream("a red apple", num_steps=3, seed=3))
    assert torch.equal(again, before)
    assert len(drawing.graphs.recorded) > recorded
    calls = []
    drawing.unet.conv_in.register_forward_hook(lambda *_: calls.append(1))
    last(drawing.stream("a red apple", num_steps=3, seed=3))
    assert len(calls) == 3


def last(steps):
    return list(steps)[-1].x


def test_a_training_step_never_waits_for_the_device(tmp_path):
    run = launch(load_config("debug", [f"output={tmp_path}", "trackers=[]", "workers=0"]))
    sources = open_source(run.config.data)
    encoder = open_text_encoder(run.config, sources[0]).to(run.device)
    vae = VAE(run.config.vae.build(run.config.data.image_size)).to(run.device)
    caches = make_caches(run, sources, vae, encoder)
    unet = new_unet(run.config, vae, encoder).to(run.device)
    log = MetricLogger(run, tmp_path, "steps", 0, 100, 8)
    for task in (LatentTraining(run, tmp_path / "latent", sources, vae, unet, encoder, caches),
                 VAETraining(run, tmp_path / "vae", sources, vae.requires_grad_(True))):  # fmt: skip
        batches = list(task.batches(0, 16))  # the discriminator joins at step 11
        for step in (11, 12, 13):  # as it is, recorded, replayed
            task.train_step(batches[step - 1], step, log)
        with no_waiting():
            results = [task.train_step(batches[step - 1], step, log) for step in (14, 15)]
        assert all(finite.item() == 1 for _, finite in results)


def train(folder, *overrides):
    command = [sys.executable, "-m", "latentdiff", "train", "--config", "debug", f"output={folder}", "trackers=[]"]
    return subprocess.Popen([*command, *overrides], stderr=subprocess.PIPE, text=True)


def test_kill_and_resume(tmp_path):
    overrides = ("train_vae.steps=12", "train_latent.steps=400", "train_latent.checkpoint_every=10")
    first = train(tmp_path, *overrides)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("train_latent/checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert not list(tmp_path.glob("model/unet/*.safetensors"))
    second = train(tmp_path, *overrides)
    output = second.communicate(timeout=120)[1]
    assert second.returncode == 0, output
    assert "train_latent: going on from step" in output
    assert LatentPipeline.from_pretrained(tmp_path, device=DEVICE)("a red apple", num_steps=2, progress=False)


@pytest.mark.skipif(not ON_GPU, reason="compiled training is for GPUs")
def test_compiled_with_a_discriminator(tmp_path):
    overrides = ("train_vae.compile=true", "train_vae.steps=14", "train_vae.validate_every=14", "train_latent.steps=2")
    process = train(tmp_path, *overrides)
    output = process.communicate(timeout=200)[1]
    assert process.returncode == 0, output
