"""A model and pictures to evaluate."""

import numpy as np
import pytest
from PIL import Image

from latentdiff import LatentPipeline
from latentdiff.assets import part_folder
from latentdiff.config import load_config
from text_encoder import TextEncoder, train_tokenizer
from unet import UNet
from vae import VAE


@pytest.fixture(scope="module")
def pipe():
    """A trained VAE of 64 px; UNet and BERT are untrained, as none of what is tested depends on them."""
    config = load_config("debug", ["unet.block_out_channels=[16, 32]"])
    encoder = TextEncoder.new(config.text_encoder.build(), train_tokenizer(["a"] * 2, vocab_size=60, max_length=16))
    vae = VAE.from_pretrained(part_folder("builtin:emoji-64", "vae"))
    unet = UNet(config.unet.build(vae.config.latent_channels, encoder.context_dim, 8))
    return LatentPipeline(vae=vae, unet=unet, text_encoder=encoder, schedule=config.diffusion.build())


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """40 pictures of 20 things, one of them broken, and 2 held-out ones."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(42):
        split = folder / ("train" if number < 40 else "validation")
        split.mkdir(exist_ok=True)
        small = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((64, 64), Image.Resampling.BICUBIC).save(split / f"{number:02}.png")
        (split / f"{number:02}.txt").write_text(f"a {'drawing' if number % 2 else 'photo'} of thing {number // 2}")
    (folder / "train/06.png").write_bytes(b"not a picture")
    return folder
