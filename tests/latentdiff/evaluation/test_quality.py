"""Figures of sets of pictures as `latentdiff evaluate` reports them: FID, rFID, CLIP score; when they are left out."""

import json

import numpy as np
import pytest
import scipy.linalg
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizerFast

from latentdiff.evaluation.comparison import reconstruction_figures
from latentdiff.evaluation.gallery import Gallery
from latentdiff.evaluation.networks import FeatureNetwork, open_network
from latentdiff.evaluation.quality import PictureSet, clip_scores, set_figures
from vae.normalize import LatentStatistics

PROMPTS = ["a red apple", "a blue car", "a tree", "two green birds"]


def features(count, shift=0.0, size=6):
    """Return two kinds of features of as many pictures."""
    random = np.random.default_rng(count)
    return {name: torch.from_numpy(shift + scale * random.normal(size=(count, size)))
            for name, scale in (("vae", 1.0), ("clip", 0.7))}  # fmt: skip


def pictures(count, shift=0.0):
    """Return a set of pictures, two of each concept."""
    return PictureSet(features(count, shift), list(range(count)), [number // 2 for number in range(count)])


def fid(x, y):
    """The Fréchet distance of normal distributions with the means and covariances of the features, by scipy."""
    covariances = [np.cov(each.numpy(), rowvar=False) for each in (x, y)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    means = [each.numpy().mean(0) for each in (x, y)]
    return ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)


@pytest.mark.slow
def test_fid():
    """Of all pictures, with a warning below 10,000."""
    real, drawn = pictures(2400), pictures(2000, shift=0.3)
    figures, left_out = set_figures(real, drawn, 0, manifold=False)
    found = {figure.name: figure for figure in figures if "Fréchet" in figure.name}
    assert found.keys() == {"vae: Fréchet distance", "clip: Fréchet distance"}
    for name in real.features:
        figure = found[f"{name}: Fréchet distance"]
        assert figure.value == pytest.approx(fid(real.features[name], drawn.features[name]), abs=1e-6)
        assert figure.low < figure.value < figure.high
        assert (figure.real, figure.drawn) == (2400, 2000)
    assert left_out == ["Fréchet distance: with fewer than 10,000 pictures it is too large; compare it only with "
                        "others of as many"]  # fmt: skip


def test_fid_is_left_out_below_2000_pictures():
    figures, (reason,) = set_figures(pictures(100), pictures(64), 0, manifold=False)
    assert [figure.name for figure in figures] == ["vae: kernel distance (KID)", "clip: kernel distance (KID)"]
    assert reason.startswith("Fréchet distance (FID): 64 drawn and 100 real; below 2,000")


@pytest.mark.slow
def test_rfid():
    """Of the VAE's reconstructions, in the same features, and CMMD where these are CLIP's."""
    count, size = 2000, 2
    latents = torch.randn(count, size, 4, 4, generator=torch.Generator().manual_seed(0))
    own, again = features(count), features(count, shift=0.1)
    gallery = Gallery(list(range(count)), latents, torch.zeros(count, 3, 32, 32), LatentStatistics(size),
                      torch.zeros(3, count), {"clip": own["clip"]}, {"clip": again["clip"]})  # fmt: skip
    network = FeatureNetwork("clip", None, None, None, clip=True)
    figures, _ = reconstruction_figures(gallery, ["a", "b"] * (count // 2), network)
    found = {figure.name: figure.value for figure in figures}
    assert found.keys() == {"clip: kernel distance (KID)", "clip: CMMD", "clip: Fréchet distance"}
    assert found["clip: Fréchet distance"] == pytest.approx(fid(own["clip"], again["clip"]), abs=1e-6)


def test_clip_scores(tmp_path):
    """Those of transformers' own forward pass, each prompt against each picture, less its learned scale."""
    vocabulary = [*map(chr, range(97, 123)), *(f"{chr(code)}</w>" for code in range(97, 123)), "<start>", "<end>"]
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(vocabulary), "max_position_embeddings": 12, "eos_token_id": len(vocabulary) - 1,
            "bos_token_id": len(vocabulary) - 2, "pad_token_id": len(vocabulary) - 1}  # fmt: skip
    vision = {**tower, "image_size": 28, "patch_size": 14}
    CLIPModel(CLIPConfig(projection_dim=8, text_config=text, vision_config=vision)).save_pretrained(tmp_path)
    CLIPTokenizerFast({token: index for index, token in enumerate(vocabulary)}, [], bos_token="<start>",
                      eos_token="<end>", pad_token="<end>", unk_token="<end>").save_pretrained(tmp_path)  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(
        {"image_processor_type": "CLIPImageProcessor", "do_resize": False, "do_center_crop": False,
         "image_mean": [0.5] * 3, "image_std": [0.5] * 3}))  # fmt: skip
    levels = np.random.default_rng(0).integers(0, 256, (4, 28, 28, 3), dtype=np.uint8)

    network = open_network(tmp_path, torch.device("cpu"))
    found = clip_scores(network, network.images(list(levels)), PROMPTS)

    model, tokenizer = CLIPModel.from_pretrained(tmp_path).eval(), CLIPTokenizerFast.from_pretrained(tmp_path)
    tokens = tokenizer(PROMPTS, padding=True, truncation=True, max_length=12, return_tensors="pt")
    with torch.no_grad():
        output = model(**tokens, pixel_values=torch.from_numpy(levels).permute(0, 3, 1, 2) / 127.5 - 1)
        expected = 100 * output.logits_per_image / model.logit_scale.exp()
    own, others = found.values()
    torch.testing.assert_close(own, expected.diagonal(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(others, expected[torch.arange(4), [2, 3, 0, 1]], atol=1e-4, rtol=1e-5)
