"""A stopped run is a model: killed, terminated or out of disk at steps of either stage, then opened."""

import json
import shutil

import pytest
import torch
from equality import same
from typer.testing import CliRunner

from latentdiff.cli import app
from latentdiff.errors import UnfinishedModelWarning
from latentdiff.files.open import open_model
from latentdiff.training.checkpoint import newest_checkpoint

SAMPLE = ["sample", "a red circle", "--steps", "2", "--seed", "0"]
FROZEN = ("text_encoder.pretrained=builtin:emoji-256", "text_encoder.train=false", "text_encoder.max_length=16")
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
plain = pytest.mark.filterwarnings("default::latentdiff.errors.UnfinishedModelWarning")


def tensors(name):
    """Every tensor of a model."""
    opened = open_model(name, device=torch.device("cpu"), dtype=torch.float32)
    parts = {"vae": opened.vae, "unet": opened.unet, "text_encoder": opened.text_encoder}
    found = {f"{part}.{key}": tensor for part, model in parts.items() for key, tensor in model.state_dict().items()}
    assert any("pooler" in name for name in found)  # which is not trained
    return found


def unfinished(name, step):
    with pytest.warns(UnfinishedModelWarning, match=f"of {step}"):
        return tensors(name)


@plain
@pytest.mark.parametrize(
    ("accident", "at", "words"),
    [pytest.param("kill at step", 2, "nothing has been trained yet", marks=pytest.mark.slow),
     ("kill at step", 5, "its VAE is still being trained: step 3 of 6"),
     pytest.param("terminate", 2, "its VAE is still being trained: step 2 of 6", marks=pytest.mark.slow),
     pytest.param("full disk", 19, "its VAE is still being trained: step 3 of 6", marks=pytest.mark.slow),
     pytest.param("kill at step", 8, "its VAE is finished, but latent training has no checkpoint yet",
                  marks=pytest.mark.slow),
     ("kill at step", 10, "the averaged weights of step 3 of 6"),
     ("terminate", 11, "the averaged weights of step 5 of 6"),
     pytest.param("kill while saving", 45, None, marks=pytest.mark.slow), ("full disk", 48, None)],
)  # fmt: skip
def test_sample_draws_or_says_what_is_missing(train, tmp_path, accident, at, words):
    run, drawn = tmp_path / "run", tmp_path / "drawn"
    assert train("run", accident=accident, at=at) != 0
    result = CliRunner().invoke(app, [*SAMPLE, "-m", str(run), "-o", str(drawn)])
    draws = (run / "vae/done.json").exists() and any((run / "train_latent/checkpoints").glob("step-*"))
    kind = "warning" if draws else "error"
    (line,) = [line for line in result.stderr.splitlines() if line.startswith(("warning: ", "error: "))]
    assert line.startswith(f"{kind}: {run}: {'its model is not finished; ' if draws else words}")
    assert (words or "the averaged weights of step ") in line
    assert "Traceback" not in result.output
    assert result.exit_code == (0 if draws else 1)
    assert len(list(drawn.glob("*.png"))) == (2 if draws else 0)


@pytest.mark.parametrize("settings", [(), pytest.param(FROZEN, marks=pytest.mark.slow)], ids=["trained", "frozen"])
def test_a_checkpoint_is_what_the_run_would_save(train, uninterrupted, tmp_path, settings):
    """All tensors are those of a run of that many steps, whose last checkpoint equals its finished model, too."""
    for name in ("short", "killed"):
        shutil.copytree(uninterrupted("fp32") / "vae", tmp_path / name / "vae")
    assert train("short", *settings, "train_latent.steps=3", stage="train_latent") == 0
    finished = tensors(tmp_path / "short")
    assert train("killed", *settings, stage="train_latent", accident="kill at step", at=5) == -9
    assert same(unfinished(tmp_path / "killed", "step 3 of 6"), finished)
    (tmp_path / "short/model/model_index.json").unlink()  # as after a kill while the model was saved
    assert same(unfinished(tmp_path / "short", "step 3 of 3"), finished)
    one, other = (tmp_path / name / "model" for name in ("short", "killed"))
    for file in ("scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json", "tokenizer/vocab.txt",
                 "unet/config.json", "vae/config.json"):  # fmt: skip
        assert (one / file).read_bytes() == (other / file).read_bytes(), file


@pytest.mark.slow
def test_the_last_checkpoint_of_a_run_is_its_model(uninterrupted, tmp_path):
    """In bf16, whose averages are in float32 like all saved weights; a damaged checkpoint is not the last one."""
    run = shutil.copytree(uninterrupted("bf16"), tmp_path / "run")
    finished = tensors(run)
    (run / "model/model_index.json").unlink()
    assert same(unfinished(run, "step 6 of 6"), finished)
    path = newest_checkpoint(run / "train_latent/checkpoints", print).path / "model-weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert not same(unfinished(run, "step 3 of 6; step-00000006: model-weights.safetensors is truncated"), finished)


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, FSDP], ids=["DDP", "FSDP"])
def test_two_processes(train, uninterrupted, tmp_path, environment):
    """What is not trained is written whole where every process has a part of it."""
    shutil.copytree(uninterrupted("fp32") / "vae", tmp_path / "run" / "vae")
    options = {"stage": "train_latent", "processes": 2, "environment": environment}
    assert train("run", **options, accident="terminate", at=4) == 143
    stopped, finished = unfinished(tmp_path / "run", "step 4 of 6"), tensors(uninterrupted("fp32"))
    untrained = [name for name in finished if name.startswith("vae.") or "pooler" in name]
    assert same({n: stopped[n] for n in untrained}, {n: finished[n] for n in untrained})
    assert train("run", **options) == 0
    assert tensors(tmp_path / "run").keys() == finished.keys()


def test_settings_that_are_refused_leave_the_model_as_it_is(train, said, uninterrupted, tmp_path):
    """The VAE beside a checkpoint must be the one of its latents."""
    shutil.copytree(uninterrupted("fp32") / "vae", tmp_path / "run" / "vae")
    assert train("run", stage="train_latent", accident="terminate", at=2) == 143
    before = unfinished(tmp_path / "run", "step 2 of 6")
    other = f"vae.pretrained={uninterrupted('bf16')}"
    assert train("run", other, stage="train_latent") == 1
    assert "this run started with vae." in said("run")
    assert same(unfinished(tmp_path / "run", "step 2 of 6"), before)


@plain
def test_every_command_takes_a_stopped_run(train, pictures, uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted("fp32") / "vae", run / "vae")
    assert train("run", stage="train_latent", accident="kill at step", at=5) == -9
    opened = unfinished(run, "step 3 of 6")

    def invoke(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result

    invoke("export", run, tmp_path / "exported")
    assert same(tensors(tmp_path / "exported"), opened)
    assert "these are the averaged weights of step 3 of 6" in (tmp_path / "exported/README.md").read_text()
    report = tmp_path / "report"
    result = invoke("evaluate", "-m", run, "-o", report, "--concepts", 2, "-n", 1, "--steps", 1, "--style", "^x")
    assert "the averaged weights of step 3 of 6" in result.stderr
    assert json.loads((report / "evaluation.json").read_text())["vae"]["num_pictures"] == 6  # the run's held-out ones
    assert "the averaged weights of step 3 of 6" in invoke("inspect", run).output


@pytest.mark.slow
def test_parts_of_runs_as_pretrained(train, said, uninterrupted, tmp_path):
    """A run's folder stands for its finished part; what is still being trained is refused in words."""
    finished = uninterrupted("fp32")
    parts = [f"{part}.pretrained={finished}" for part in ("vae", "unet", "text_encoder")]
    assert train("second", *parts, "train_latent.learning_rate=1e-9") == 0
    assert "warning: unet.pretrained" not in said("second")
    one, other = tensors(finished), tensors(tmp_path / "second")
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)
    assert train("stopped", accident="terminate", at=4) == 143
    for name in ("stopped", "stopped/vae"):
        assert train("third", f"vae.pretrained={tmp_path / name}") == 1
        assert f"pretrained={tmp_path / name}: its VAE is still being trained: step 4 of 6" in said("third")
    assert train("stopped", accident="terminate", at=6) == 143
    for part in ("unet", "text_encoder"):
        for name in ("stopped", f"stopped/model/{part}"):
            assert train("third", parts[0], f"{part}.pretrained={tmp_path / name}") == 1
            assert f"{part}.pretrained={tmp_path / name}: the model of this run is not finished" in said("third")
