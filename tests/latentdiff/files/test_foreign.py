"""Weights of other programs: named for what they are, or read under the names that some give to the same tensors."""

import pytest
import torch
from safetensors.torch import save_file

from latentdiff import LatentDiffError, LatentPipeline
from latentdiff.files.foreign import kind_of, usual_names
from latentdiff.files.inspect import describe

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
UNET, VAE = "model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.encoder.conv_in.weight"
FOREIGN = [
    ([f"lora_unet_{BLOCK.replace('.', '_')}_to_q.lora_down.weight"], "LoRA"),
    ([f"unet.{BLOCK}.to_q.lora_A.weight"], "LoRA"),
    ([f"unet.{BLOCK}.processor.to_q_lora.down.weight", "x.lora.up.weight"], "LoRA"),
    (["lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a"], "LoRA"),
    (["emb_params"], "textual inversion"),
    (["<my-cat>"], "textual inversion"),
    (["control_model.input_blocks.0.0.weight"], "ControlNet"),
    (["controlnet_cond_embedding.conv_in.weight", "controlnet_down_blocks.0.weight"], "ControlNet"),
    (["encoder.conv_in.weight", "decoder.conv_in.weight"], "VAE alone"),
    ([VAE], "VAE alone"),
    ([UNET], "UNet alone"),
    (["down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"], "UNet alone"),
    (["text_model.embeddings.token_embedding.weight"], "text encoder alone"),
    (["bert.embeddings.word_embeddings.weight"], "text encoder alone"),
    ([UNET, VAE, "conditioner.embedders.0.transformer.x"], "Stable Diffusion XL"),
    (["double_blocks.0.img_attn.qkv.weight"], "FLUX"),
    (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "Stable Diffusion 3"),
    (["RRDB_trunk.0.RDB1.conv1.weight", "conv_first.weight"], "upscaler"),
    (["body.0.rdb1.conv1.weight", "conv_first.weight"], "upscaler"),
    ([UNET, VAE, "model.diffusion_model.label_emb.weight"], "upscaler"),
]


@pytest.mark.parametrize(("names", "kind"), FOREIGN)
def test_what_a_file_is_is_said(tmp_path, names, kind):
    assert kind in kind_of(names)
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(2) for name in names}, path)
    with pytest.raises(LatentDiffError) as refused:
        LatentPipeline.from_pretrained(path, device="cpu")
    assert str(refused.value).startswith(f"{path}: this is a")
    assert kind in str(refused.value)
    assert any(kind in line for line in describe(path))


def test_complete_models_are_none_of_them():
    text = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    assert kind_of([UNET, VAE, text]) is None
    assert kind_of([UNET, VAE, text, "model_ema.decay", "alphas_cumprod"]) is None


def test_other_names_for_the_same_tensors():
    text, attention = "cond_stage_model.transformer.", "first_stage_model.decoder.mid.attn_1."
    found = usual_names(dict.fromkeys([
        f"{text}embeddings.token_embedding.weight", f"{text}encoder.layers.0.mlp.fc1.bias",
        f"{text}final_layer_norm.bias", f"{attention}to_q.weight", f"{attention}to_out.0.bias",
        f"{attention}norm.weight", UNET,
    ]))  # fmt: skip
    assert list(found) == [
        f"{text}text_model.embeddings.token_embedding.weight", f"{text}text_model.encoder.layers.0.mlp.fc1.bias",
        f"{text}text_model.final_layer_norm.bias", f"{attention}q.weight", f"{attention}proj_out.bias",
        f"{attention}norm.weight", UNET,
    ]  # fmt: skip
    bert = dict.fromkeys([f"{text}embeddings.word_embeddings.weight"])
    assert usual_names(bert) == bert


def test_inspect_names_tensors_that_are_not_finite(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"good": torch.ones(3), "bad": torch.tensor([1.0, torch.nan]), "worse": torch.tensor([torch.inf]),
               "numbers": torch.arange(3)}, path)  # fmt: skip
    assert "    not finite: 2 of the tensors: bad, worse" in describe(path)
