"""The best average is kept beside the last."""

import json

import pytest
from equality import same

from latentdiff import LatentPipeline

# Ten validations; a rate so high that the held-out loss falls and then rises.
SETTINGS = ("train_latent.steps=40", "train_latent.validate_every=4", "train_latent.checkpoint_every=6",
            "train_latent.log_every=40", "train_latent.learning_rate=1e-2", "train_latent.warmup_steps=10",
            "validation.num_steps=1")  # fmt: skip
KILLS = (("kill at step", 15), ("kill while saving", 4), ("kill at step", 10), ("kill at step", 17))


@pytest.fixture
def latent(train, uninterrupted, sixty):
    def run(name, *settings, **accident):
        given = (f"vae.pretrained={uninterrupted('fp32')}", f"data.source={sixty}", *SETTINGS, *settings)
        return train(name, *given, stage="train_latent", **accident)

    return run


@pytest.fixture
def model(weights, tmp_path):
    def read(name, folder):
        return {f"{part}/{key}": tensor for part in ("unet/diffusion_pytorch_model", "text_encoder/model")
                for key, tensor in weights(tmp_path / name / folder / f"{part}.safetensors").items()}  # fmt: skip

    return read


@pytest.mark.slow
@pytest.mark.parametrize("kills", [(), KILLS])
def test_the_best_average_is_kept_beside_the_last(kills, latent, model, log, said, tmp_path):
    """Against a run that ends where the loss was lowest; and again with kills, one of them while it is written."""
    assert latent("run") == 0
    losses = log("run", "validation_loss_unconditional")
    best = min(losses, key=losses.__getitem__)
    assert len(losses) == 10
    assert 4 < best < 40
    sentence = f"the held-out loss without captions was lowest at step {best} of 40, after {best * 6 / 54:.1f} passes"
    assert sentence in said("run")
    assert latent("shorter", f"train_latent.steps={best}", "train_latent.keep_best=false") == 0
    assert same(model("run", "model-best"), model("shorter", "model"))
    assert not same(model("run", "model-best"), model("run", "model"))
    assert not (tmp_path / "shorter" / "model-best").exists()
    assert log("shorter", "validation_loss_unconditional") == {}
    assert LatentPipeline.from_pretrained(tmp_path / "run" / "model-best")("a red circle", num_steps=1, seed=0)
    assert [path.name for path in (tmp_path / "run" / "train_latent" / "best").iterdir()] == [f"step-{best:08}"]

    if not kills:
        return
    for accident, at in kills:
        assert latent("killed", accident=accident, at=at) == -9
    assert latent("killed") == 0
    assert log("killed", "validation_loss_unconditional") == losses
    assert same(model("killed", "model-best"), model("run", "model-best"))


@pytest.mark.slow
def test_keep_best_may_change_while_a_run_goes_on(latent, log, tmp_path):
    """What was the best stays known; while it is off, nothing is measured."""

    def record(step):
        path = tmp_path / "run" / "train_latent" / "checkpoints" / f"step-{step:08}" / "facts.json"
        return json.loads(path.read_text())["best"]

    assert latent("run", "train_latent.steps=12") == 0
    first = record(12)
    assert latent("run", "train_latent.steps=20", "train_latent.keep_best=false") == 0
    assert record(20) == first
    assert latent("run", "train_latent.steps=28") == 0
    losses = log("run", "validation_loss_unconditional")
    assert list(losses) == [4, 8, 12, 24, 28]
    lowest = min(losses, key=losses.__getitem__)
    assert record(28) == {"step": lowest, "loss": losses[lowest]}
    kept = {path.name for path in (tmp_path / "run" / "train_latent" / "best").iterdir()}
    assert kept == {f"step-{lowest:08}", f"step-{first['step']:08}"}  # the checkpoint before refers to that one
