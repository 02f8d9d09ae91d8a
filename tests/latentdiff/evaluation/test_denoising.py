"""Denoising errors that are known in closed form."""

import pytest
import torch

from latentdiff import LatentPipeline, Schedule
from latentdiff.evaluation.denoising import denoising_errors
from text_encoder import TextEncoder, TextEncoderConfig, train_tokenizer
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig


@pytest.mark.parametrize("zero_terminal_snr", [True, False])
def test_the_error_of_a_model_that_predicts_zero_is_sigma_squared(zero_terminal_snr):
    """v = 0 predicts x0 = alpha x_t, off by alpha sigma eps - sigma^2 x0: sigma^2 for latents of variance 1."""
    tokenizer = train_tokenizer(["a red apple"] * 5, vocab_size=40, max_length=8)
    schedule = Schedule.named(zero_terminal_snr=zero_terminal_snr)
    pipe = LatentPipeline(
        vae=VAE(VAEConfig(block_out_channels=(8, 16), latent_channels=4, norm_groups=4, layers_per_block=1)),
        unet=UNet(
            UNetConfig(
                block_out_channels=(16, 16),
                attention_levels=(1,),
                num_heads=1,
                context_dim=32,
                norm_groups=8,
                layers_per_block=1,
            )
        ),
        text_encoder=TextEncoder.new(TextEncoderConfig(width=32, num_layers=1), tokenizer),
        schedule=schedule,
    )
    latents = torch.randn(100, 4, 16, 16)
    captions = ["a red apple"] * 100
    found = denoising_errors(pipe, latents, captions, levels=(0.5, 1.0, 4.0, 8.0))
    for error, requested in zip(found, (0.5, 1.0, 4.0, 8.0), strict=True):
        assert error.level == pytest.approx(requested, rel=0.02)
        sigma_squared = error.level**2 / (1 + error.level**2)
        assert error.error == pytest.approx(sigma_squared, rel=0.02)
        assert error.error == pytest.approx(error.without_caption)
    # A network that predicts the exact v at one level if it sees the caption, and 0 otherwise.
    caption_keys = pipe.unet.project_context(pipe.text_encoder(["a red apple"]))[0][0]
    t = int((schedule.sigma / schedule.alpha - 4.0).abs().argmin())
    alpha, sigma = float(schedule.alpha[t]), float(schedule.sigma[t])
    parts = iter((slice(0, 64), slice(0, 64), slice(64, 100), slice(64, 100)))  # with the caption, then without

    class Oracle:
        project_context, project_time = pipe.unet.project_context, pipe.unet.project_time

        def __call__(self, x, shifts, keys):
            x0 = latents[next(parts)]
            sees = torch.allclose(keys[0][0][:1], caption_keys, atol=1e-5)
            return (alpha * x - x0) / sigma if sees else torch.zeros_like(x)

    pipe.network = Oracle()
    (error,) = denoising_errors(pipe, latents, captions, levels=(4.0,))
    assert error.error < 1e-6
    assert error.without_caption == pytest.approx(sigma**2, rel=0.02)
