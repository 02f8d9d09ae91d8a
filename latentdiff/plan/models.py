"""The three models of a run and their training batches on PyTorch's meta device: shapes without memory."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from text_encoder import TextEncoder
from text_encoder.files import MODELS
from unet import Denoiser, UNet, UNetConfig
from unet.experts import new_denoiser
from vae import VAE, VAEConfig

from ..config import Config
from ..data.batches import CachedBatch, Chain, LatentBatch, RawBatch, Tokens
from ..errors import LatentDiffError
from ..files.open import read_json
from ..files.unfinished import find_part


@dataclass(frozen=True)
class Vocabulary:
    """Stand-in for a tokenizer, with what a text encoder needs before there is text."""

    size: int
    model_max_length: int
    pad_token_id: int = 0

    def __len__(self) -> int:
        return self.size


@dataclass(frozen=True)
class Models:
    """The three models of a run, and in `notes` what had to be assumed about them."""

    vae: VAE
    text_encoder: TextEncoder
    unet: Denoiser
    image_size: int  # pixels per side
    notes: tuple[str, ...] = ()

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of the latents of one picture, (c, h, w)."""
        size = self.image_size // self.vae.config.downsampling
        return self.vae.config.latent_channels, size, size

    def tokens(self, batch: int) -> Tokens:
        """Return the tokenized captions of a batch."""
        length = self.text_encoder.max_length
        with torch.device("meta"):
            return Tokens(torch.zeros(batch, length, dtype=torch.int64), torch.ones(batch, length, dtype=torch.bool))

    def images(self, batch: int) -> Tensor:
        """Return the pictures of a batch, (B, H, W, 3) uint8."""
        return torch.empty(batch, self.image_size, self.image_size, 3, dtype=torch.uint8, device="meta")

    def noise(self, batch: int) -> Tensor:
        """Return the noise or the latents of a batch, (B, c, h, w)."""
        return torch.empty(batch, *self.latent_shape, device="meta")

    def latent_batch(self, batch: int, *, cached: bool, caches_text: bool, chained: bool = False) -> LatentBatch:
        """Return a micro-batch of latent training, half of it with chains if the UNet attends to earlier steps."""
        t, text = torch.zeros(batch, dtype=torch.int64, device="meta"), self.tokens(batch)
        captions: Tokens | Tensor = text
        if caches_text:
            width = self.text_encoder.context_dim
            captions = torch.empty(*text.tokens.shape, width, dtype=torch.float16, device="meta")
        chain, half, history = None, batch // 2, self.unet.config.trajectory_attention
        if chained and history:
            times = torch.zeros(half, history, dtype=torch.int64, device="meta")
            chain = Chain(times[:, 0], times, torch.empty(half, history, *self.latent_shape, device="meta"))
        if cached:
            return CachedBatch(self.noise(batch), self.noise(batch), t, captions, [], chain)
        return RawBatch(self.images(batch), self.noise(batch), self.noise(batch), t, captions, [], chain)

    def cast(self, dtype: torch.dtype) -> Models:
        """Return copies for sampling: weights in another dtype, without gradients."""
        vae, text, unet = copy.deepcopy((self.vae, self.text_encoder, self.unet))
        for model in (vae, text, unet):
            model.to(dtype).eval().requires_grad_(False)
        unet.enable_gradient_checkpointing(False)
        return Models(vae, text, unet, self.image_size)


def build_models(config: Config) -> Models:
    """Build the models of a config; of pretrained ones, only the configs are read."""
    notes: list[str] = []
    with torch.device("meta"):
        known = _read_config("vae", config.vae.pretrained)
        vae = VAE(VAEConfig.from_diffusers(known) if known else config.vae.build(config.data.image_size))
        text = _build_text_encoder(config, notes)
        if config.data.image_size % (factor := vae.config.downsampling):
            raise LatentDiffError(f"data.image_size={config.data.image_size}: expected a multiple of {factor}")
        size = config.data.image_size // factor
        trained, channels = config.unet.experts_from or config.unet.pretrained, vae.config.latent_channels
        known = _read_config("unet", trained)
        sizes = UNetConfig.from_diffusers(known) if known else config.unet.build(channels, text.context_dim, size)
        unet = new_denoiser(sizes, config.unet.edges(config.diffusion.num_timesteps))
        if isinstance(unet, UNet) and (wanted := config.unet.trajectory_attention) and not sizes.trajectory_attention:
            unet.add_trajectory_attention(wanted)
    return Models(vae, text, unet, config.data.image_size, tuple(notes))


def _read_config(part: str, pretrained: str | None) -> Any:
    if not pretrained:
        return None
    return read_json(Path(find_part(pretrained, part)) / "config.json", f"{part}.pretrained={pretrained} needs it")


def _build_text_encoder(config: Config, notes: list[str]) -> TextEncoder:
    from transformers import BertConfig, BertModel, PretrainedConfig

    section = config.text_encoder
    if not section.pretrained:
        notes.append(f"text_encoder.vocab_size={section.vocab_size} is an upper limit; captions may yield fewer")
        return TextEncoder.new(section.build(), Vocabulary(section.vocab_size, section.max_length))
    try:  # a folder or an earlier download; the network is not used
        folder = find_part(section.pretrained, "text_encoder")
        values, _ = PretrainedConfig.get_config_dict(folder, local_files_only=True)
        kind: Any = MODELS[str(values.get("model_type"))]
        sizes = kind.config_class.from_dict(values.get("text_config", values))
    except (OSError, KeyError):
        notes.append(f"{section.pretrained} is not on this machine; BERT-base is assumed instead")
        kind, sizes = BertModel, BertConfig()
    return TextEncoder(kind(sizes), Vocabulary(sizes.vocab_size, section.max_length), section.max_length)
