"""LDM-text2im's own BERT gives the features that its pipeline computes."""

import pytest
import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from safetensors.torch import load_file, save_file

from latentdiff import LatentDiffError
from latentdiff.files.ldm_bert import load_ldm_bert
from text_encoder import train_tokenizer


@pytest.fixture
def folder(tmp_path):
    tokenizer = train_tokenizer(["a red apple", "a green apple", "the face"] * 3, vocab_size=80, max_length=77)
    config = LDMBertConfig(
        vocab_size=len(tokenizer),
        encoder_layers=2,
        encoder_ffn_dim=64,
        encoder_attention_heads=2,
        head_dim=16,
        d_model=32,
    )
    LDMBertModel(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "bert"


@pytest.mark.filterwarnings("ignore")  # diffusers' old class under a new transformers
def test_features(folder):
    encoder = load_ldm_bert(folder)
    prompts = ["a red apple", ""]
    tokens = encoder.tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    expected = LDMBertModel.from_pretrained(folder).eval()(tokens.input_ids)[0]  # as LDMTextToImagePipeline calls it
    assert torch.equal(encoder(prompts), expected)
    assert encoder(prompts).shape == (2, 77, 32)
    encoder.train()
    assert torch.equal(encoder(prompts), encoder(prompts))  # the dropout of 0.1 in its config is off


@pytest.mark.filterwarnings("ignore")
def test_damaged_folders(folder, tmp_path):
    with pytest.raises(LatentDiffError, match=r"config\.json: no such file"):
        load_ldm_bert(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layer_norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LatentDiffError, match="lacks 1 tensor: model"):
        load_ldm_bert(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(LatentDiffError, match=r"model\.safetensors: no such file"):
        load_ldm_bert(folder)
