"""The Python blocks in README and docs run; the one in docs/parts.md gives the output of diffusers."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import BertModel, BertTokenizerFast

from latentdiff import LatentPipeline, Schedule
from text_encoder import TextEncoder, TextEncoderConfig, train_tokenizer
from unet import UNet
from vae import VAE

README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.fixture
def folder(tmp_path):
    """A small model with a BERT, whose UNet and VAE were saved by diffusers."""
    tokenizer = train_tokenizer(["a red apple", "a green car"] * 5, vocab_size=60, max_length=8)
    TextEncoder.new(TextEncoderConfig(width=32, num_layers=1), tokenizer).save_pretrained(tmp_path / "text_encoder")
    UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
        layers_per_block=1,
    ).save_pretrained(tmp_path / "unet")
    AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    ).save_pretrained(tmp_path / "vae")
    return tmp_path


def python_blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


@pytest.mark.filterwarnings("ignore:prompt .* knows none of its words")
@pytest.mark.filterwarnings("ignore::text_encoder.TokenOverflowWarning")  # this model's prompts have only 8 tokens
@pytest.mark.parametrize("page", ["README.md", pytest.param("docs/using.md", marks=pytest.mark.slow)])
def test_drawing(folder, tmp_path, monkeypatch, page):
    """Run a page's LatentPipeline code, with a small model as `runs/mine` and as the one that ships."""
    LatentPipeline(
        vae=VAE.from_pretrained(folder / "vae"),
        unet=UNet.from_pretrained(folder / "unet"),
        text_encoder=TextEncoder.from_pretrained(folder / "text_encoder"),
        schedule=Schedule.named(),
    ).save_pretrained(tmp_path / "runs/mine/model")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in python_blocks(README.parent / page):
        exec(block.replace("from_pretrained()", 'from_pretrained("runs/mine")'), names)
    assert len(names["images"]) == (2 if page == "README.md" else 4)


def test_python_block(folder, relative_error, capsys):
    (block,) = python_blocks(README.parent / "docs/parts.md")
    names = {"folder": str(folder)}
    exec(block, names)
    assert len(capsys.readouterr().out.splitlines()) == 25
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=BertModel.from_pretrained(folder / "text_encoder"),
        tokenizer=BertTokenizerFast.from_pretrained(folder / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(folder / "unet"),
        scheduler=DPMSolverMultistepScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="trailing",
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 25, "guidance_scale": 5.0, "output_type": "latent"}
    expected = pipeline("a red apple", latents=names["x"].clone(), **arguments).images
    assert relative_error(names["step"].x, expected) < 1e-4
    with torch.no_grad():
        pixels = pipeline.vae.decode(expected / pipeline.vae.config.scaling_factor).sample
    assert relative_error(names["pixels"], pixels) < 1e-4


def test_the_map_names_every_file():
    """Nobody finds a file that is missing from the map."""
    text = README.read_text()
    for package in ("latentdiff", "unet", "vae", "text_encoder"):
        for path in (README.parent / package).rglob("*.py"):
            name = path.relative_to(README.parent)
            if path.stem not in ("__init__", "errors"):
                assert f"`{name}`" in text or f"`{name.parent}/`" in text, name
