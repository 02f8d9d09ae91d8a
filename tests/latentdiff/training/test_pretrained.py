"""Starting from a model that is there, and a look at it before the first step."""

import torch


def test_training_goes_on_from_a_finished_model(train, weights, log, said, tmp_path):
    """Its VAE as it is; UNet and BERT from its weights, whatever sizes the recipe says; its losses where they ended."""
    assert train("first", "train_latent.validate_first=true") == 0
    model = tmp_path / "first/model"
    parts = [f"vae.pretrained={model / 'vae'}", f"text_encoder.pretrained={model / 'text_encoder'}",
             f"unet.pretrained={model / 'unet'}", "unet.block_out_channels=[32,64]"]  # fmt: skip
    assert train("second", *parts, "train_latent.validate_first=true", "train_latent.learning_rate=1e-9") == 0
    before, after = (weights(tmp_path / name / "model/unet/diffusion_pytorch_model.safetensors")
                     for name in ("first", "second"))  # fmt: skip
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-5) for name in before)
    first, second = log("first", "validation_loss"), log("second", "validation_loss")
    assert sorted(first) == sorted(second) == [0, 20]
    assert first[0] > first[20]
    assert second[0] == first[20]  # the same weights, pictures, noise and timesteps


def test_parts_that_do_not_fit(train, said, tmp_path):
    assert train("first") == 0
    folder = tmp_path / "first/model/unet"
    assert train("second", f"vae.pretrained={tmp_path / 'first/vae'}", f"unet.pretrained={folder}",
                 "text_encoder.width=64") == 1  # fmt: skip
    assert f"unet.pretrained={folder}: its context_dim is 32; this VAE and this text encoder need 64" in said("second")
    assert train("third", "vae.pretrained=builtin:emoji-46") == 1
    assert "unknown built-in model 'emoji-46'" in said("third")
