"""Starting from an existing model, and validating it before the first step."""

import json

import pytest
import torch


@pytest.mark.slow
def test_training_goes_on_from_a_finished_model(train, weights, log, said, tmp_path):
    """Its VAE is kept, UNet and BERT start from its weights whatever sizes the recipe has, and its losses continue."""
    assert train("first", "train_latent.validate_first=true") == 0
    model = tmp_path / "first/model"
    parts = [f"vae.pretrained={model / 'vae'}", f"text_encoder.pretrained={model / 'text_encoder'}",
             f"unet.pretrained={model / 'unet'}", "unet.block_out_channels=[32,64]"]  # fmt: skip
    assert train("second", *parts, "train_latent.validate_first=true", "train_latent.learning_rate=1e-9") == 0
    before, after = (weights(tmp_path / name / "model/unet/diffusion_pytorch_model.safetensors")
                     for name in ("first", "second"))  # fmt: skip
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-5) for name in before)
    assert said("second").count("train_latent 0: validating before the first step") == 1
    first, second = log("first", "validation_loss"), log("second", "validation_loss")
    assert sorted(first) == sorted(second) == [0, 6]
    assert first[0] > first[6]
    assert second[0] == first[6]  # the same weights, pictures, noise and timesteps
    assert "warning: unet.pretrained" not in said("second")
    done = tmp_path / "second/model/done.json"  # as written by the version that recorded sizes without any meaning
    facts = json.loads(done.read_text())
    facts["facts"]["unet"] |= {"block_out_channels": [32, 64], "layers_per_block": 1}
    done.write_text(json.dumps(facts))
    again = [*parts, "train_latent.validate_first=true", "train_latent.learning_rate=1e-9"]
    assert train("second", *again) == 0
    assert "second/model: already done" in said("second")
    parts.pop(1)
    assert train("third", *parts, "diffusion.zero_terminal_snr=false") == 0
    assert "it does not know a new text encoder" in said("third")
    assert "it was trained with another noise schedule" in said("third")


@pytest.mark.slow
def test_a_run_of_an_older_version_goes_on(train, said, tmp_path):
    """Settings unknown to that version count as left out; step 0 is logged once."""
    assert train("run", "train_latent.validate_first=true", accident="kill at step", at=9) == -9  # latent step 3
    assert train("run", "train_latent.validate_first=true") == 0
    lines = [json.loads(line) for line in (tmp_path / "run/train_latent/log.jsonl").read_text().splitlines()]
    assert sum(line["step"] == 0 and "validation_loss" in line for line in lines) == 1
    done = tmp_path / "run/model/done.json"
    facts = json.loads(done.read_text())
    assert facts["facts"]["unet"].pop("pretrained", "") is None
    done.write_text(json.dumps(facts))
    assert train("run", "train_latent.validate_first=true") == 0
    assert "already done" in said("run")
    assert train("run", "unet.layers_per_block=2") == 1
    assert "was made with unet.layers_per_block=1, but it is now 2" in said("run")


def test_parts_that_do_not_fit(train, uninterrupted, said):
    run = uninterrupted("fp32")
    folder, vae = run / "model/unet", f"vae.pretrained={run / 'vae'}"
    assert train("second", vae, f"unet.pretrained={folder}", "text_encoder.width=64") == 1
    assert f"unet.pretrained={folder}: its context_dim is 32; this VAE and this text encoder need 64" in said("second")
    assert train("other", vae, f"unet.pretrained={folder}", "diffusion.prediction=x0") == 1
    assert f"unet.pretrained={folder}: it predicts v, but diffusion.prediction=x0; set it to v" in said("other")
    assert train("third", "vae.pretrained=builtin:emoji-46") == 1
    assert "unknown built-in model 'emoji-46'" in said("third")
