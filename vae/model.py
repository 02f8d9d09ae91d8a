"""The KL autoencoder of latent diffusion (arXiv 2112.10752), with diffusers' parameter names and folder layout.

Three quantities, told apart by name: `pixels` in [-1, 1]; `z`, the unscaled latents of the encoder; and `latents`,
`scale_factor * (z - shift_factor)`, which the UNet denoises. Only this file converts between the last two.

Shapes: B batch, H W pixels, h w = H/f W/f latents, c latent channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from latentdiff.files.pretrained import Pretrained
from latentdiff.norms import GroupNorm

from .blocks import NORM_EPS, Attention, Downsample, Level, ResBlock, Upsample
from .config import FILES, VAEConfig
from .distribution import DiagonalGaussian
from .errors import VAEError


def make_level(config: VAEConfig, level: int, in_width: int, num_layers: int) -> Level:
    """Build the ResBlocks of one level, with attention if the config says so."""
    width, groups = config.block_out_channels[level], config.norm_groups
    resnets = [ResBlock(width if i else in_width, width, groups) for i in range(num_layers)]
    return Level(resnets, [Attention(width, groups) for _ in resnets] if level in config.attention_levels else [])


def make_middle(config: VAEConfig) -> Level:
    """Build the middle: ResBlock, attention if the config says so, ResBlock."""
    width, groups = config.block_out_channels[-1], config.norm_groups
    attentions = [Attention(width, groups)] if config.mid_attention else []
    return Level([ResBlock(width, width, groups), ResBlock(width, width, groups)], attentions)


class Encoder(nn.Module):
    """Encoder from pixels (B, in_channels, H, W) to moments of z, (B, 2c, h, w): means, then log-variances."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            block = make_level(config, level, widths[max(level - 1, 0)], config.layers_per_block)
            if level < len(widths) - 1:
                block.downsamplers.append(Downsample(width))
            self.down_blocks.append(block)
        self.mid_block = make_middle(config)
        self.conv_norm_out = GroupNorm(config.norm_groups, widths[-1], eps=NORM_EPS, silu=True)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, 2c, h, w)."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(self.conv_norm_out(x))


class Decoder(nn.Module):
    """Decoder from z (B, c, h, w) to pixels (B, out_channels, H, W)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[last], 3, padding=1)
        self.mid_block = make_middle(config)
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            block = make_level(config, level, widths[min(level + 1, last)], config.layers_per_block + 1)
            if level > 0:
                block.upsamplers.append(Upsample(widths[level]))
            self.up_blocks.append(block)
        self.conv_norm_out = GroupNorm(config.norm_groups, widths[0], eps=NORM_EPS, silu=True)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Map (B, c, h, w) to (B, out_channels, H, W)."""
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x))


class VAE(Pretrained):
    """Autoencoder: `vae.encode(pixels)`, `vae.decode(latents)`; raises VAEError if a shape or dtype does not match."""

    files, config_class = FILES, VAEConfig
    known_facts = ("decoder_likelihood", "decoder_log_scale")  # measured when a training ends, see training/vae_finish
    config: VAEConfig

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if config.quant_convs[0] else nn.Identity()
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.quant_convs[1] else nn.Identity()
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, pixels: Tensor, noise: Tensor | None = None) -> tuple[Tensor, DiagonalGaussian]:
        """Reconstruct pixels through a sample from the posterior, or its mode if `noise` is None; for training.

        Args:
            pixels: (B, in_channels, H, W) in [-1, 1].
            noise: standard normal, (B, c, h, w).

        Returns:
            The reconstruction (B, out_channels, H, W) and the posterior over z.
        """
        posterior = self.posterior(pixels)
        if noise is not None and noise.shape != posterior.mean.shape:
            raise VAEError(f"noise has shape {tuple(noise.shape)}; expected {tuple(posterior.mean.shape)}")
        return self.decode_z(posterior.mode() if noise is None else posterior.reparameterize(noise)), posterior

    def posterior(self, pixels: Tensor) -> DiagonalGaussian:
        """Return q(z | pixels), (B, c, h, w), for pixels (B, in_channels, H, W) in [-1, 1]."""
        return self.posterior_from(self.encoder_output(pixels))

    def latent_posterior(self, pixels: Tensor) -> DiagonalGaussian:
        """Return the same posterior over latents instead of z, (B, c, h, w), as a latent cache stores it."""
        return self.scale_posterior(self.posterior(pixels))

    def encoder_output(self, pixels: Tensor) -> Tensor:
        """Return the encoder's output, (B, 2c, h, w), which `posterior_from` turns into the posterior of the pixels.

        It does not change when the latents are normalized by folding (`vae.normalize`).
        """
        self._check(pixels, "pixels", self.config.in_channels, self.config.downsampling)
        return self.encoder(pixels.to(memory_format=torch.channels_last))

    def posterior_from(self, encoder_output: Tensor) -> DiagonalGaussian:
        """Return the posterior over z, (B, c, h, w), that belongs to an `encoder_output`."""
        return DiagonalGaussian.from_moments(self.quant_conv(encoder_output.to(memory_format=torch.channels_last)))

    def scale_posterior(self, z: DiagonalGaussian) -> DiagonalGaussian:
        """Convert a posterior over z to that over latents."""
        return DiagonalGaussian(self.scale(z.mean), z.logvar + 2.0 * math.log(self.config.scale_factor))

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels (B, in_channels, H, W) in [-1, 1] as latents (B, c, h, w), the scaled mode of the posterior."""
        return self.scale(self.posterior(pixels).mode())

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, c, h, w) to pixels (B, out_channels, H, W), roughly in [-1, 1] but not clipped."""
        self._check(latents, "latents", self.config.latent_channels, 1)
        return self.decode_z(self.unscale(latents))

    def decode_z(self, z: Tensor) -> Tensor:
        """Decode z (B, c, h, w) to pixels (B, out_channels, H, W)."""
        self._check(z, "z", self.config.latent_channels, 1)
        return self.decoder(self.post_quant_conv(z.to(memory_format=torch.channels_last)))

    def scale(self, z: Tensor) -> Tensor:
        """Convert z to latents."""
        return self.config.scale_factor * (z - self.config.shift_factor)

    def unscale(self, latents: Tensor) -> Tensor:
        """Convert latents to z."""
        return latents / self.config.scale_factor + self.config.shift_factor

    def enable_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute ResBlocks and attention in the backward pass instead of storing their activations."""
        for layer in self.modules():
            if isinstance(layer, Level):
                layer.gradient_checkpointing = enabled

    def _check(self, x: Tensor, name: str, channels: int, multiple: int) -> None:
        if x.dim() != 4 or x.shape[1] != channels or not x.numel():
            raise VAEError(f"{name} has shape {tuple(x.shape)}; expected (B, {channels}, height, width)")
        if x.shape[2] % multiple or x.shape[3] % multiple:
            raise VAEError(f"{name} has height and width {tuple(x.shape[2:])}; both must be multiples of {multiple}")
        weights = self.decoder.conv_in.weight.dtype
        if x.dtype != weights and not (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
            raise VAEError(f"{name} is {x.dtype} and the weights are {weights}: cast one of them or use autocast")
