"""Malicious files: rejected in one line, quickly and with little memory, and nothing in them is executed."""

import json
import pickle
import random
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from latentdiff import LatentDiffError
from text_encoder import TextEncoder, TextEncoderConfig, TextEncoderError, train_tokenizer
from unet import UNet, UNetConfig, UNetError
from unet import config as unet_config
from vae import VAE, VAEConfig, VAEError
from vae import config as vae_config

WEIGHTS = "diffusion_pytorch_model.safetensors"
KINDS = {
    "unet": (UNet, UNetError, lambda: UNet(UNetConfig(block_out_channels=(4,), layers_per_block=1, context_dim=4,
                                                      norm_groups=2, attention_levels=(0,), num_heads=1))),
    "vae": (VAE, VAEError, lambda: VAE(VAEConfig(block_out_channels=(4,), layers_per_block=1, norm_groups=2))),
}  # fmt: skip


@pytest.fixture(params=KINDS)
def kind(request, tmp_path):
    """The class, its error, and a folder with a small valid model."""
    cls, error, new = KINDS[request.param]
    new().save_pretrained(tmp_path / "model")
    return cls, error, tmp_path / "model"


class Touch:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def rejected(cls, error, folder: Path) -> str:
    """Return the error message, after checking its length and the time and memory it took."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(error) as caught:
        cls.from_pretrained(folder)
    assert time.perf_counter() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000
    return str(caught.value)


def with_header(header: bytes, body: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def test_a_pickle_with_another_extension(kind, tmp_path):
    cls, error, folder = kind
    torch.save({"a": Touch(tmp_path / "harm")}, folder / WEIGHTS)
    assert "damaged or not a safetensors file" in rejected(cls, error, folder)
    (folder / WEIGHTS).write_bytes(pickle.dumps(Touch(tmp_path / "harm")))
    rejected(cls, error, folder)
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")
    assert "never opened" in rejected(cls, error, folder)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        (2**60).to_bytes(8, "little"),
        (2**63).to_bytes(8, "little") + b"{}",
        with_header(b"{" + b" " * 10**8 + b"}"),
        with_header(b"[" * 3_000_000),
        with_header(b'{"a": ' + b"[" * 100_000 + b"}"),
        with_header(b"\xff\xfe{}"),
        with_header(json.dumps({"a": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 4]}}).encode(), b"1234"),
        with_header(json.dumps({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}).encode(), b"1234"),
        with_header(json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}).encode(), b"1234"),
        with_header(json.dumps({"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}).encode(), b"1234"),
        with_header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
                    b'"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', b"1234"),
        with_header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
                    b'"b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', b"1234"),
        with_header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', b"12345678"),
    ],
    ids=["empty", "short", "length 2^60", "negative length", "100 MB of spaces", "deep list", "deep value", "no UTF-8",
         "huge shape", "negative shape", "offsets backwards", "unknown dtype", "twice", "overlap", "hole"],
)  # fmt: skip
def test_headers(kind, content):
    cls, error, folder = kind
    (folder / WEIGHTS).write_bytes(content)
    assert "damaged or not a safetensors file" in rejected(cls, error, folder)


@pytest.mark.parametrize(
    "change",
    [
        {"block_out_channels": [10**9]},
        {"block_out_channels": [4] * 10_000},
        {"layers_per_block": 10**9},
        {"norm_num_groups": 0},
        {"latent_channels": 10**12, "in_channels": 10**12},
        {"block_out_channels": "4"},
        {"auto_map": {"AutoModel": "harm.Model"}, "_class_name": "Harm"},
        {"_class_name": ["harm", "Model"]},
    ],
)
def test_configs(kind, change):
    cls, error, folder = kind
    values = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(values))
    rejected(cls, error, folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"a": 1, "a": 2}', "\ud800", " " * (5 * 2**20) + "{}"])
def test_configs_that_are_not_json_objects(kind, text):
    cls, error, folder = kind
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    rejected(cls, error, folder)


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Flip a few bits, or insert, delete or overwrite bytes, mostly in the header."""
    data = bytearray(content)
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(rng.randint(1, 3)):
        if not data:
            break
        place = rng.randrange(header if rng.random() < 0.8 else len(data)) % len(data)
        action = rng.randrange(5)
        if action == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif action == 1:
            del data[place : place + rng.choice((1, 2, 8, 100))]
        elif action == 2:
            data[place:place] = rng.choice((b"0", b"9999999999", b'"', b"}", b"{", b"-1", b"\x00" * 8, b'"a":'))
        elif action == 3:
            data = data[: rng.randrange(len(data) + 1)]
        else:
            data[place : place + 8] = bytes(rng.randrange(256) for _ in range(8))
    return bytes(data)


@pytest.mark.parametrize("size", [1000, pytest.param(25_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", KINDS)
def test_thousands_of_damaged_files(name, tmp_path, size):
    """So many for each kind of model: each either opens with exactly the right tensors or raises our error."""
    files = {"unet": unet_config, "vae": vae_config}[name].FILES
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Conv2d(1, 2, 1))  # the same code path, few bytes
    path = tmp_path / WEIGHTS
    save_file(model.state_dict(), path, metadata={"format": "pt"})
    content, rng, opened = path.read_bytes(), random.Random(0), 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(size):
        path.write_bytes(mutated(content, rng))
        try:
            weights = files.read_weights(path, model, "cpu", torch.float32)
        except LatentDiffError:
            continue
        opened += 1
        assert {key: (value.shape, value.dtype) for key, value in weights.items()} == {
            key: (value.shape, value.dtype) for key, value in model.state_dict().items()
        }
    assert 0 < opened < size / 2  # bit flips in the data go unnoticed, most other damage does not
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024  # KiB, in all of them together


@pytest.fixture
def text_folder(tmp_path):
    tokenizer = train_tokenizer(["a red apple"] * 3, vocab_size=60, max_length=8)
    encoder = TextEncoder.new(TextEncoderConfig(width=8, num_layers=1, num_heads=2), tokenizer)
    encoder.save_pretrained(tmp_path / "text_encoder")
    return tmp_path / "text_encoder"


def test_text_encoders(text_folder, tmp_path):
    weights = text_folder / "model.safetensors"
    good = weights.read_bytes()
    for content in (b"", good[:100], good[:-10], pickle.dumps(Touch(tmp_path / "harm")), (2**60).to_bytes(8, "little")):
        weights.write_bytes(content)
        rejected(TextEncoder, TextEncoderError, text_folder)
    weights.write_bytes(good)
    TextEncoder.from_pretrained(text_folder)
    values = json.loads((text_folder / "config.json").read_text())
    for change in ({"auto_map": {"AutoModel": "harm.Model"}}, {"trust_remote_code": True}, {"model_type": "llama"}):
        (text_folder / "config.json").write_text(json.dumps(values | change))
        rejected(TextEncoder, TextEncoderError, text_folder)
    assert not (tmp_path / "harm").exists()


def test_text_encoders_shards(text_folder, tmp_path):
    """transformers itself would follow an index to any file."""
    encoder = TextEncoder.from_pretrained(text_folder)
    (text_folder / "model.safetensors").unlink()
    encoder.model.save_pretrained(text_folder, max_shard_size="2KB")
    assert not (text_folder / "model.safetensors").exists()
    again = TextEncoder.from_pretrained(text_folder)
    assert torch.equal(again(["a red apple"]), encoder(["a red apple"]))
    index = text_folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    shard = next(iter(values["weight_map"].values()))
    shutil.copy(text_folder / shard, tmp_path / "outside.safetensors")
    for name in ("../outside.safetensors", "not-there.safetensors", "x.bin"):
        values["weight_map"] = {key: name if place == shard else place for key, place in values["weight_map"].items()}
        index.write_text(json.dumps(values))
        rejected(TextEncoder, TextEncoderError, text_folder)
        shard = name


def test_text_encoder_variants(text_folder):
    encoder = TextEncoder.from_pretrained(text_folder)
    encoder.save_pretrained(text_folder.parent / "half/text_encoder", dtype=torch.float16, variant="fp16")
    half = text_folder.parent / "half/text_encoder"
    assert (half / "model.fp16.safetensors").is_file()
    assert not (half / "model.safetensors").exists()
    expected = {name: tensor.half().float() for name, tensor in encoder.state_dict().items()}
    for variant in (None, "fp16"):
        found = TextEncoder.from_pretrained(half, variant=variant).state_dict()
        assert all(torch.equal(found[name].float(), tensor) for name, tensor in expected.items())
    with pytest.raises(TextEncoderError, match=r"model.bf16.safetensors: no such file"):
        TextEncoder.from_pretrained(half, variant="bf16")
