"""A run whose model is not finished: what opens, what is said about the rest, and that nothing is written."""

import json
import os
import shutil
import warnings

import pytest
import torch
from typer.testing import CliRunner

from latentdiff import LatentDiffError, LatentPipeline
from latentdiff.cli import app, plain_errors
from latentdiff.config import load_config
from latentdiff.errors import UnfinishedModelWarning
from latentdiff.files import unfinished
from latentdiff.files.export import begin_model, save_model
from latentdiff.files.open import open_model
from latentdiff.files.unfinished import AGAIN, find_part
from latentdiff.training.checkpoint import save_checkpoint
from latentdiff.training.manifest import DamagedCheckpoint
from text_encoder import TextEncoder, train_tokenizer
from unet import UNet
from vae import VAE

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


@pytest.fixture(scope="module")
def parts():
    config = load_config("debug")
    tokenizer = train_tokenizer(["a red apple", "a blue car"] * 2, vocab_size=100, max_length=16)
    encoder = TextEncoder.new(config.text_encoder.build(), tokenizer)
    unet = UNet(config.unet.build(4, encoder.context_dim, 16))
    return {"vae": VAE(config.vae.build(32)), "unet": unet, "text_encoder": encoder,
            "process": config.diffusion.process()}  # fmt: skip


def averages(parts, trains_text=True):
    """The tensors of a checkpoint's averages."""
    tensors = {f"unet.{name}": tensor for name, tensor in parts["unet"].state_dict().items()}
    if trains_text:
        text = parts["text_encoder"].model
        tensors |= {f"text_encoder.model.{n}": p.detach() for n, p in text.named_parameters() if "pooler" not in n}
    return tensors


def save(run, step, tensors, metadata):
    save_checkpoint(run / "train_latent/checkpoints", step, {"model-ema": tensors}, metadata)


def begin(run, parts):
    frozen = {name: p for name, p in parts["text_encoder"].model.named_parameters() if "pooler" in name}
    begin_model(run / "model", vae=parts["vae"], unet=parts["unet"], text_encoder=parts["text_encoder"],
                frozen=frozen, process=parts["process"])  # fmt: skip


@pytest.fixture(scope="module")
def saved(parts, tmp_path_factory):
    run = tmp_path_factory.mktemp("saved") / "mine"
    (run / "vae").mkdir(parents=True)
    data = {"source": "builtin:emoji-mini", "image_size": 32}
    (run / "run.json").write_text(json.dumps({"launches": [{"config": {"data": data}}]}))
    (run / "vae/done.json").write_text("{}")
    begin(run, parts)
    for step in (200, 300):
        save(run, step, averages(parts), {"steps": 2000})
    return run


@pytest.fixture
def run(saved, tmp_path):
    """A run that was stopped at step 300 of 2000 of its latent training, with an older checkpoint of step 200."""
    return shutil.copytree(saved, tmp_path / "mine")


def error(name):
    with pytest.raises(LatentDiffError) as caught:
        open_model(name, **CPU)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ["mine", "mine/model", "."])
def test_it_opens_by_every_name(run, parts, monkeypatch, name):
    monkeypatch.chdir(run / "model" if name == "." else run.parent)
    with pytest.warns(UnfinishedModelWarning, match=r"its model is not finished; .* of step 300 of 2000$") as caught:
        pipe = LatentPipeline.from_pretrained(name, **CPU)
    assert [warning.filename for warning in caught] == [__file__]  # the line that opens it
    for part in ("vae", "unet", "text_encoder"):
        assert same(getattr(pipe, part), parts[part]), part
    assert not pipe.unet.training
    assert pipe("a red apple", num_steps=1, progress=False)[0].size == (32, 32)


def test_other_precisions(run, parts):
    with pytest.warns(UnfinishedModelWarning):
        pipe = LatentPipeline.from_pretrained(run, device="cpu", dtype=torch.bfloat16)
    assert torch.equal(pipe.unet.conv_in.weight, parts["unet"].conv_in.weight.bfloat16())
    assert {p.dtype for part in (pipe.vae, pipe.unet, pipe.text_encoder) for p in part.parameters()} == {torch.bfloat16}


def test_opening_writes_nothing(run):
    """A training may be going on in the run."""

    def files():
        return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in [run, *run.rglob("*")]}

    before = files()
    with pytest.warns(UnfinishedModelWarning):
        open_model(run, **CPU)
    CliRunner().invoke(app, ["inspect", str(run)])
    assert files() == before


def test_a_finished_model_comes_first(run, parts):
    """Also if its training goes on for more steps; beginning again leaves it alone."""
    save_model(run / "model", **parts)
    before = (run / "model/unet/diffusion_pytorch_model.safetensors").stat()
    begin(run, parts)
    assert (run / "model/unet/diffusion_pytorch_model.safetensors").stat() == before
    assert same(open_model(run, **CPU).unet, parts["unet"])


def test_a_save_that_was_killed(run, parts):
    """All files of the final model but the index: the checkpoint counts, and beginning again deletes the weights."""
    save_model(run / "model", **parts)
    (run / "model/model_index.json").unlink()
    tensors = averages(parts)
    tensors["unet.conv_in.bias"] = tensors["unet.conv_in.bias"] + 1
    save(run, 400, tensors, {})  # as checkpoints of older versions, it does not know the last step
    with pytest.warns(UnfinishedModelWarning, match=r"of step 400$"):
        opened = open_model(run, **CPU)
    assert torch.equal(opened.unet.conv_in.bias, tensors["unet.conv_in.bias"])
    begin(run, parts)
    assert not (run / "model/unet/diffusion_pytorch_model.safetensors").exists()


@pytest.mark.parametrize("at", [pytest.param(at, marks=pytest.mark.slow) if at % 2 == 0 else at for at in range(1, 9)])
def test_a_disk_that_is_full_while_the_model_is_saved(run, parts, monkeypatch, at):
    """Or begun once more: what is there still fits the checkpoint."""
    moved = []

    def replace(source, target):
        moved.append(target)
        if len(moved) == at:
            raise OSError(28, "No space left on device")
        os.rename(source, target)

    for write in (lambda: begin(run, parts), lambda: save_model(run / "model", **parts)):
        moved.clear()
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            with pytest.raises(LatentDiffError, match="No space left on device"):
                write()
        with pytest.warns(UnfinishedModelWarning, match="of step 300 of 2000$"):
            opened = open_model(run, **CPU)
        assert all(same(getattr(opened, part), parts[part]) for part in ("vae", "unet", "text_encoder"))


def truncate(run, step):
    path = run / f"train_latent/checkpoints/step-{step:08d}/model-ema.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def test_damaged_checkpoints(run):
    truncate(run, 300)
    with pytest.warns(
        UnfinishedModelWarning, match=r"of step 200 of 2000; step-00000300: .* is truncated .*; using step"
    ):
        open_model(run, **CPU)
    truncate(run, 200)
    message = error(run)
    assert message.startswith(f"{run}: step-00000300: model-ema.safetensors is truncated")
    assert message.endswith("there is no intact checkpoint; give the training command again to start this stage over")


@pytest.mark.parametrize("function", ["newest_checkpoint", "open_file", "_read_unet"])
def test_a_checkpoint_that_is_deleted_meanwhile(run, monkeypatch, function):
    """By a training that goes on: the other one is taken; nothing is lost once the file is open."""
    original, newest = getattr(unfinished, function), run / "train_latent/checkpoints/step-00000300"

    def deletes(*arguments):
        if function == "newest_checkpoint" and newest.exists():
            shutil.rmtree(newest)
            raise DamagedCheckpoint("facts.json is missing")
        shutil.rmtree(newest, ignore_errors=True)
        return original(*arguments)

    monkeypatch.setattr(unfinished, function, deletes)
    step = 300 if function == "_read_unet" else 200
    with pytest.warns(UnfinishedModelWarning, match=f"of step {step} of 2000$"):
        open_model(run, **CPU)


@pytest.mark.parametrize("file", unfinished.BEGUN)
def test_a_run_of_an_older_version(run, file):
    (run / "model" / file).unlink()
    assert error(run).endswith(
        f"model/{file}: no such file, as in runs of older versions; give the training command again, which writes it"
    )


def test_what_is_missing(run):
    """In the order in which a run gets it, backwards."""
    shutil.rmtree(run / "train_latent")
    assert error(run) == f"{run}: its VAE is finished, but latent training has no checkpoint yet; {AGAIN}"
    shutil.rmtree(run / "vae")  # as with vae.pretrained
    assert error(run) == f"{run}: its VAE is finished, but latent training has no checkpoint yet; {AGAIN}"
    shutil.rmtree(run / "model")
    save_checkpoint(run / "train_vae/checkpoints", 100, {"vae-ema": {}}, {"steps": 500})
    expected = f"its VAE is still being trained: step 100 of 500; {AGAIN}"
    for name in (run, run / "model"):
        assert error(name) == f"{run}: {expected}"
    for name in (run, run / "vae", run / "model"):
        with pytest.raises(LatentDiffError) as caught:
            find_part(str(name), "vae")
        assert str(caught.value) == f"vae.pretrained={name}: {expected}"
        (run / "vae").mkdir(exist_ok=True)
    (run / "train_vae/checkpoints/step-00000100/facts.json").write_text("{}")
    assert "its VAE is still being trained, and step-00000100: facts.json is truncated" in error(run)
    shutil.rmtree(run / "train_vae")
    assert error(run) == f"{run}: nothing has been trained yet, as it has no checkpoint; {AGAIN}"


def test_weights_that_do_not_fit(run, parts):
    """They are checked before anything is allocated."""
    tensors = averages(parts)
    save(run, 301, {name: tensor for name, tensor in tensors.items() if name != "unet.conv_in.bias"}, {})
    assert "step-00000301/model-ema.safetensors: lacks 1 tensor: conv_in.bias" in error(run)
    save(run, 302, {**tensors, "unet.extra": torch.zeros(1)}, {})
    assert "unexpected for this UNet: 1 tensor: extra" in error(run)
    save(run, 303, {**tensors, "unet.conv_in.bias": torch.zeros(3)}, {})
    assert "conv_in.bias has shape [3]; the config says [" in error(run)
    save(run, 304, {**tensors, "unet.conv_in.bias": torch.zeros(16, dtype=torch.int64)}, {})
    assert "conv_in.bias " in error(run)
    save(run, 305, {**tensors, "text_encoder.model.encoder.extra": torch.zeros(1)}, {})
    assert "not part of this text encoder: 1 tensor: encoder.extra" in error(run)
    config = run / "model/unet/config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "block_out_channels": [10**9] * len(values["block_out_channels"])}))
    assert str(config) in error(run)


@pytest.mark.parametrize("part", ["vae", "unet", "text_encoder"])
def test_parts_of_runs_and_models(run, parts, part, monkeypatch):
    """A part is found in the folder of a run or a model, or is that folder; a Hub name stays as it is."""
    monkeypatch.chdir(run.parent)
    assert find_part("google/bert_uncased", part) == "google/bert_uncased"
    assert find_part("bert-base-uncased", part) == "bert-base-uncased"
    assert find_part("builtin:emoji-256", part).endswith(f"emoji-256/{part}")
    save_model(run / "vae-and-others", **parts)
    assert find_part("mine/vae-and-others", part) == f"mine/vae-and-others/{part}"
    assert find_part(f"mine/vae-and-others/{part}", part) == f"mine/vae-and-others/{part}"
    if part == "vae":
        assert find_part("mine", part) == "mine/vae"
        assert find_part("mine/vae", part) == "mine/vae"
        assert find_part("mine/model", part) == "mine/vae"
        shutil.rmtree(run / "vae")
        assert find_part("mine", part) == "mine/model/vae"  # the run uses a VAE from elsewhere
    else:
        for name in ("mine", "mine/model", f"mine/model/{part}"):
            with pytest.raises(
                LatentDiffError, match=rf"{part}.pretrained={name}: .* `latentdiff export \S+mine FOLDER`"
            ):
                find_part(name, part)
        save_model(run / "model", **parts)
        assert find_part("mine", part) == f"mine/model/{part}"
    shutil.rmtree(run / f"vae-and-others/{part}")
    with pytest.raises(LatentDiffError, match=rf"{part}.pretrained=mine/vae-and-others: .*/{part}: no such folder"):
        find_part("mine/vae-and-others", part)


def test_a_part_alone(run, parts):
    assert error(run / "model/vae").endswith("give a folder with model_index.json instead")
    parts["vae"].save_pretrained(run / "vae")
    assert error(run / "vae") == f"{run / 'vae'}: a VAE alone, which is one part of a model; give {run} instead"
    save_model(run.parent / "other", **parts)
    assert error(run.parent / "other/unet").endswith(
        f"a UNet alone, which is one part of a model; give {run.parent / 'other'} instead"
    )
    assert "every model folder has one" in error(run / "train_latent")


def test_a_new_clip_text_model(run, parts):
    """All of its weights are trained: the folder has none."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                            num_attention_heads=2, max_position_embeddings=16, eos_token_id=3)  # fmt: skip
    encoder = TextEncoder(CLIPTextModel(config), parts["text_encoder"].tokenizer, 16, use_attention_mask=False)
    from text_encoder.files import begin_model, load_model

    begin_model(encoder.model, run / "model/text_encoder", False, {})
    trained = {f"text_encoder.model.{name}": p.detach() for name, p in encoder.model.named_parameters()}
    save(run, 400, {**averages(parts, trains_text=False), **trained}, {})
    tensors, _ = unfinished.open_file(run / "train_latent/checkpoints/step-00000400/model-ema.safetensors")
    prefix = "text_encoder.model."
    found, kind = load_model(run / "model/text_encoder", torch.float32, trained={
        name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)})  # fmt: skip
    assert kind == "clip"
    assert same(found, encoder.model)


@pytest.mark.filterwarnings("default::latentdiff.errors.UnfinishedModelWarning")
@pytest.mark.parametrize("command", ["sample a --steps 1 -o drawn -m mine", "export mine exported"])
def test_one_line_on_the_command_line(run, monkeypatch, command):
    monkeypatch.chdir(run.parent)
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 0, result.output
    expected = "warning: mine: its model is not finished; these are the averaged weights of step 300 of 2000"
    assert [line for line in result.stderr.splitlines() if "it/s" not in line and "pictures" not in line] == [expected]


@pytest.mark.filterwarnings("default::latentdiff.errors.UnfinishedModelWarning")
def test_export(run, monkeypatch, parts):
    monkeypatch.chdir(run.parent)
    assert CliRunner().invoke(app, ["export", "mine", "mine/model"]).exit_code == 1  # which the training will write
    assert CliRunner().invoke(app, ["export", "mine", "exported"]).exit_code == 0
    assert same(open_model("exported", **CPU).unet, parts["unet"])
    card = (run.parent / "exported/README.md").read_text()
    assert "The training is not finished: these are the averaged weights of step 300 of 2000." in card


def test_inspect(run):
    def lines():
        result = CliRunner().invoke(app, ["inspect", str(run)])
        assert result.exit_code == 0
        return result.output.splitlines()

    found = lines()
    assert found[0] == f"{run}: its model is not finished"
    for words in ("scheduler/", "text_encoder/", "unet/", "vae/"):
        assert words in found
    assert "train_latent/checkpoints/step-00000300/: the averaged weights of step 300 of 2000" in found
    assert any(line.startswith("  model-ema.safetensors: ") for line in found)
    truncate(run, 300)
    assert "using step-00000200" in lines()[-1]
    for folder in ("train_latent", "model"):
        shutil.rmtree(run / folder)
    (run / "vae/config.json").write_text('{"_class_name": "AutoencoderKL", "latent_channels": 4}')
    assert lines() == [
        f"{run}: its model is not finished", "vae/", '  _class_name "AutoencoderKL", latent_channels 4',
        f"{run}: its VAE is finished, but latent training has no checkpoint yet; {AGAIN}",
    ]  # fmt: skip


def test_warnings_of_others_are_left_alone(capsys):
    """Ours are shown without file and line, and control characters do not reach the terminal."""
    with warnings.catch_warnings(record=True) as others:
        warnings.simplefilter("default")
        with plain_errors():
            warnings.warn("not ours", UserWarning, stacklevel=1)
            warnings.warn("ours \x1b[31m", UnfinishedModelWarning, stacklevel=1)
            warnings.warn_explicit("from our code", RuntimeWarning, unfinished.__file__, 1)
    assert [str(warning.message) for warning in others] == ["not ours"]
    assert capsys.readouterr().err == "warning: ours \\x1b[31m\nwarning: from our code\n"
