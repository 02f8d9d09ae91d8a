"""A small pipeline with random weights, and a measure of the difference between images."""

import warnings

import diffusers
import numpy as np
import pytest
import torch

from latentdiff import LatentPipeline
from latentdiff.config import load_config
from text_encoder import TextEncoder, train_tokenizer
from unet import UNet
from vae import VAE

CAPTIONS = ["a red apple", "a blue car on the road", "an emoji of a smiling face", "a green apple with sunglasses"]


def new_pipeline() -> LatentPipeline:
    torch.manual_seed(0)
    config = load_config("debug")
    encoder = TextEncoder.new(config.text_encoder.build(), train_tokenizer(CAPTIONS * 2, vocab_size=200, max_length=16))
    unet = UNet(config.unet.build(4, encoder.context_dim, 16))
    for parameter in unet.parameters():
        if not parameter.any():  # a new UNet predicts zero for every input
            torch.nn.init.normal_(parameter, std=0.1)
    return LatentPipeline(vae=VAE(config.vae.build(32)), unet=unet, text_encoder=encoder,
                          schedule=config.diffusion.build())  # fmt: skip


@pytest.fixture(scope="module")
def pipe():
    return new_pipeline()


@pytest.fixture
def new_pipe():
    """Make a pipeline that a test may change."""
    return new_pipeline


@pytest.fixture
def open_stock():
    """Open a folder with stock diffusers, without warnings or progress bars."""

    def open_folder(folder, kind=diffusers.DiffusionPipeline):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipeline = kind.from_pretrained(folder, use_safetensors=True)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return open_folder


@pytest.fixture
def largest_difference():
    """Return the largest difference between two images, in levels of 255."""

    def measure(a, b) -> int:
        return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())

    return measure
