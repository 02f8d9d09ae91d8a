"""Saving is all or nothing, for weights, for what transformers writes, and for the small files beside them."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from latentdiff import LatentDiffError
from latentdiff.config import load_config
from latentdiff.files import pretrained
from latentdiff.files import tensors as engine
from latentdiff.files.export import save_model
from latentdiff.files.tensors import read_json, staged
from text_encoder import TextEncoder, TextEncoderConfig, TextEncoderError, train_tokenizer
from unet import UNet, UNetConfig, UNetError
from vae import VAE, VAEConfig


def new_text_encoder():
    tokenizer = train_tokenizer(["a red apple"] * 3, vocab_size=60, max_length=8)
    return TextEncoder.new(TextEncoderConfig(width=8, num_layers=1, num_heads=2), tokenizer)


def new_unet():
    return UNet(UNetConfig(block_out_channels=(16, 32), layers_per_block=1, context_dim=8, norm_groups=8,
                           attention_levels=(0,)))  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_weights_first_and_an_index_last(tmp_path, monkeypatch):
    moved, replace = [], engine.os.replace
    monkeypatch.setattr(engine.os, "replace", lambda old, new: (moved.append(Path(new).name), replace(old, new)))
    new_unet().save_pretrained(tmp_path, max_shard_bytes=20_000)
    assert len(moved) > 4
    assert all(name.endswith(".safetensors") for name in moved[:-2])
    assert moved[-2:] == ["config.json", "diffusion_pytorch_model.safetensors.index.json"]


@pytest.mark.parametrize("size", [None, 20_000])
def test_a_full_disk_changes_nothing(tmp_path, monkeypatch, size):
    """The previous model is still there, as a single file or as shards, and opens."""
    new_unet().save_pretrained(tmp_path, max_shard_bytes=size)
    before, written = contents(tmp_path), []

    def save(tensors, path, metadata):
        written.append(path)
        path.write_bytes(b"half")
        if len(written) > 1:
            full_disk()

    monkeypatch.setattr(pretrained, "save_file", save)
    with pytest.raises(UNetError, match=r"cannot be written \(.*No space left on device"):
        new_unet().save_pretrained(tmp_path, max_shard_bytes=20_000)
    assert len(written) == 2
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    UNet.from_pretrained(tmp_path)


def test_a_text_encoder_is_complete_or_not_written(tmp_path, monkeypatch):
    """This includes what transformers and the tokenizer write."""
    encoder = new_text_encoder()
    encoder.save_pretrained(tmp_path / "text_encoder")
    before = contents(tmp_path)
    write_text = Path.write_text
    monkeypatch.setattr(Path, "write_text", lambda self, *args, **more: full_disk())  # of vocab.txt, the last file
    with pytest.raises(TextEncoderError, match=r"tokenizer: cannot be written \(.*No space left on device"):
        encoder.save_pretrained(tmp_path / "text_encoder")
    monkeypatch.setattr(Path, "write_text", write_text)
    monkeypatch.setattr(type(encoder.model), "save_pretrained", lambda self, folder, **_: save_half(folder))
    with pytest.raises(TextEncoderError, match=r"text_encoder: cannot be written \(.*No space left on device"):
        new_text_encoder().save_pretrained(tmp_path / "text_encoder")
    assert contents(tmp_path) == before


def save_half(folder):
    (folder / "model.safetensors").write_bytes(b"half")
    full_disk()


def test_a_text_encoder_replaces_the_one_before(tmp_path):
    """transformers prefers a single file and diffusers the index, so nothing of an earlier save may be left."""
    first, second = new_text_encoder(), new_text_encoder()
    first.model.save_pretrained(tmp_path / "text_encoder", max_shard_size="2KB")
    assert len(list((tmp_path / "text_encoder").glob("model*"))) > 2
    first.save_pretrained(tmp_path / "text_encoder", dtype=torch.float16, variant="fp16")
    second.save_pretrained(tmp_path / "text_encoder")
    names = sorted(path.name for path in (tmp_path / "text_encoder").iterdir())
    assert names == ["config.json", "model.fp16.safetensors", "model.safetensors"]
    found = TextEncoder.from_pretrained(tmp_path / "text_encoder")
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in found.state_dict().items())


def test_text_encoders_prefer_a_single_file_to_an_index(tmp_path):
    """As in transformers; see test_weight_shards.py for UNet and VAE."""
    first, second = new_text_encoder(), new_text_encoder()
    first.save_pretrained(tmp_path / "text_encoder")
    second.model.save_pretrained(tmp_path / "shards", max_shard_size="2KB")
    for file in (tmp_path / "shards").glob("model*"):
        file.rename(tmp_path / "text_encoder" / file.name)
    found = TextEncoder.from_pretrained(tmp_path / "text_encoder")
    assert all(torch.equal(tensor, first.state_dict()[name]) for name, tensor in found.state_dict().items())


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    left = tmp_path / ".partial-"
    left.mkdir()
    (left / "diffusion_pytorch_model.safetensors").write_bytes(b"half")
    unet = new_unet()
    unet.save_pretrained(tmp_path, max_shard_bytes=20_000)
    assert not left.exists()
    assert not (tmp_path / "diffusion_pytorch_model.safetensors").exists()
    UNet.from_pretrained(tmp_path)


def test_other_files_of_the_folder_stay(tmp_path):
    (tmp_path / "mine.json").write_text("{}")
    with staged(tmp_path, "one.txt") as staging:
        (staging / "one.txt").write_text("whole")
        assert sorted(path.name for path in tmp_path.iterdir()) == [".partial-one.txt", "mine.json"]
    assert contents(tmp_path) == {"mine.json": b"{}", "one.txt": b"whole"}


def test_a_model_folder_has_its_index_last(tmp_path, monkeypatch):
    """A folder without one is not a model, so a failed save is never opened."""
    parts = {"vae": VAE(VAEConfig(block_out_channels=(8,), norm_groups=8)), "unet": new_unet(),
             "text_encoder": new_text_encoder(), "process": load_config("debug").diffusion.process()}  # fmt: skip
    save_model(tmp_path, **parts)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    monkeypatch.setattr(TextEncoder, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_model(tmp_path, **parts)
    assert not (tmp_path / "model_index.json").exists()


def test_damaged_json(tmp_path):
    for text, message in (
        ('{"a": 1, "a": 2}', r"not valid JSON \(it has the key 'a' twice\)"),
        ("3", "expected a JSON object, found int"),
    ):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(LatentDiffError, match=rf"x\.json: {message}"):
            read_json(tmp_path / "x.json", "")
    with pytest.raises(LatentDiffError, match=r"y\.json: no such file; it says how"):
        read_json(tmp_path / "y.json", "it says how")


def test_integer_weights_are_rejected(tmp_path):
    encoder = new_text_encoder()
    encoder.save_pretrained(tmp_path / "text_encoder")
    tensors = encoder.model.state_dict()
    name = "embeddings.word_embeddings.weight"
    save_file({**tensors, name: tensors[name].int()}, tmp_path / "text_encoder/model.safetensors")
    with pytest.raises(TextEncoderError, match=f"expected one of BF16, F16, F32, F64 as the dtype of 1 tensor: {name}"):
        TextEncoder.from_pretrained(tmp_path / "text_encoder")
