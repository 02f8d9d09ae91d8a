"""Feature networks of transformers, made here: tiny and random, saved and opened offline."""

import json

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from latentdiff import LatentDiffError
from latentdiff.evaluation.networks import open_network

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
MADE = {
    "clip": lambda: CLIPModel(CLIPConfig(projection_dim=8, text_config={**SIZES, "vocab_size": 60},
                                         vision_config={**SIZES, "image_size": 28, "patch_size": 14})),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SIZES, image_size=28, patch_size=14)),
    "vit": lambda: ViTModel(ViTConfig(**SIZES, image_size=28, patch_size=14)),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A saved network, which normalizes pixels to [-1, 1] and does not resize."""

    def make(kind):
        MADE[kind]().save_pretrained(tmp_path / kind)
        processor = {"image_processor_type": "CLIPImageProcessor", "do_resize": False, "do_center_crop": False,
                     "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip
        (tmp_path / kind / "preprocessor_config.json").write_text(json.dumps(processor))
        return tmp_path / kind

    return make


@pytest.mark.parametrize("kind", MADE)
def test_features_are_those_of_transformers(folder, kind):
    path = folder(kind)
    pictures = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 3), dtype=np.uint8)
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    network = open_network(path / "model.safetensors", torch.device("cpu"))
    with torch.no_grad():
        if kind == "clip":
            model = CLIPModel.from_pretrained(path).eval()
            ids = torch.zeros(3, 4, dtype=torch.long)
            expected = model(input_ids=ids, pixel_values=pixels).image_embeds
        else:
            model = type(MADE[kind]()).from_pretrained(path).eval()
            expected = model(pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(network.images(list(pictures)), expected, atol=1e-5, rtol=1e-5)
    assert (network.name, network.clip, network.tokenizer) == (kind, kind == "clip", None)


@pytest.mark.parametrize("change", [{"image_mean": [0.4] * 3}, {"do_resize": True}])
def test_another_processor_has_another_digest(folder, change):
    path = folder("vit")
    before, processor = open_network(path, torch.device("cpu")).digest, path / "preprocessor_config.json"
    assert open_network(path, torch.device("cpu")).digest == before
    processor.write_text(json.dumps(json.loads(processor.read_text()) | change))
    assert open_network(path, torch.device("cpu")).digest != before


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [("config.json", {"model_type": "bert"}, "unknown model_type 'bert': choose one of clip"),
     ("config.json", {"auto_map": {"AutoModel": "evil.Model"}}, "has 'auto_map', which is not allowed"),
     ("config.json", {"num_hidden_layers": 2}, r"lacks \d+ tensors"),
     ("preprocessor_config.json", None, "no such file; it says how pictures are resized"),
     ("model.safetensors", None, "cannot be opened")],
)  # fmt: skip
def test_what_is_rejected(folder, file, change, message):
    """Above all: layers that the file lacks would be random, and pickles are not opened in place of safetensors."""
    path = folder("vit")
    if change is None:
        (path / file).rename(path / "pytorch_model.bin")
    else:
        (path / file).write_text(json.dumps({**json.loads((path / file).read_text()), **change}))
    with pytest.raises(LatentDiffError, match=message):
        open_network(path, torch.device("cpu"))
