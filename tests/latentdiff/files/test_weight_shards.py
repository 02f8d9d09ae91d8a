"""Shards and variants of UNet and VAE, as diffusers writes and reads them."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file

from unet import UNet, UNetConfig, UNetError
from vae import VAE, VAEConfig, VAEError

KINDS = {
    "unet": (UNet, UNet2DConditionModel, UNetError,
             lambda: UNet(UNetConfig(block_out_channels=(16, 32), layers_per_block=1, context_dim=16, norm_groups=8,
                                     attention_levels=(1,)))),
    "vae": (VAE, AutoencoderKL, VAEError, lambda: VAE(VAEConfig(block_out_channels=(16, 32), norm_groups=8))),
}  # fmt: skip
STEM = "diffusion_pytorch_model"


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def same(ours, other, dtype=torch.float32) -> bool:
    theirs = other.state_dict()
    return all(
        torch.equal(tensor.to(dtype).float(), theirs[name].float()) for name, tensor in ours.state_dict().items()
    )


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("size", [None, 20_000])
def test_both_libraries_open_what_we_write(kind, tmp_path, variant, size):
    ours, theirs, _, new = kind
    model, dtype = new(), torch.float16 if variant else torch.float32
    model.save_pretrained(tmp_path, dtype=dtype, variant=variant, max_shard_bytes=size)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert (len(files) > 2) == bool(size), files
    assert not size or max(path.stat().st_size for path in tmp_path.glob("*.safetensors")) < 100_000
    assert same(model, ours.from_pretrained(tmp_path, variant=variant), dtype)
    assert same(model, ours.from_pretrained(tmp_path), dtype)  # a single variant needs no name
    assert same(model, theirs.from_pretrained(tmp_path, variant=variant, use_safetensors=True), dtype)
    stored = load_file(next(tmp_path.glob("*.safetensors")))
    assert {tensor.dtype for tensor in stored.values()} == {dtype}


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_we_open_what_diffusers_writes(kind, tmp_path, variant):
    ours, theirs, _, new = kind
    new().save_pretrained(tmp_path / "config")
    model = theirs.from_pretrained(tmp_path / "config")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB", variant=variant)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert same(ours.from_pretrained(tmp_path / "shards", variant=variant), model)


def test_a_save_replaces_the_one_before(kind, tmp_path):
    """Nothing of an earlier save is opened or left, whatever its layout."""
    ours, theirs, _, new = kind
    for size in (None, 20_000, 40_000, None):
        model = new()
        model.save_pretrained(tmp_path, max_shard_bytes=size)
        assert same(model, ours.from_pretrained(tmp_path))
        assert same(model, theirs.from_pretrained(tmp_path, use_safetensors=True))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../outside.safetensors", "expected the plain name of a .safetensors file"),
        ("/etc/passwd", "expected the plain name"),
        ("sub/x.safetensors", "expected the plain name"),
        ("shard.bin", "expected the plain name"),
        (3, "expected the plain name"),
        ("not-there.safetensors", r"of its .. files are missing: not-there.safetensors"),
    ],
)
def test_an_index_cannot_point_outside_its_folder(kind, tmp_path, name, message):
    ours, _, error, new = kind
    new().save_pretrained(tmp_path / "model", max_shard_bytes=20_000)
    new().save_pretrained(tmp_path)
    (tmp_path / f"{STEM}.safetensors").rename(tmp_path / "outside.safetensors")
    index = tmp_path / "model" / f"{STEM}.safetensors.index.json"
    values = json.loads(index.read_text())
    first = next(iter(values["weight_map"]))
    values["weight_map"][first] = name
    index.write_text(json.dumps(values))
    with pytest.raises(error, match=message):
        ours.from_pretrained(tmp_path / "model")


def test_a_link_out_of_the_folder(kind, tmp_path):
    ours, _, error, new = kind
    new().save_pretrained(tmp_path / "model", max_shard_bytes=20_000)
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[0]
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(error, match="is a link to"):
        ours.from_pretrained(tmp_path / "model")


def test_index_and_shards_disagree(kind, tmp_path):
    ours, _, error, new = kind
    new().save_pretrained(tmp_path, max_shard_bytes=20_000)
    index = tmp_path / f"{STEM}.safetensors.index.json"
    values = json.loads(index.read_text())
    del values["weight_map"][next(iter(values["weight_map"]))]
    index.write_text(json.dumps(values))
    with pytest.raises(error, match=r"not listed in .*: 1 tensor"):
        ours.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "../x"}, "variant='../x': expected letters"),
        ({"max_shard_bytes": 0}, "max_shard_bytes=0"),
        ({"dtype": torch.int8}, "dtype=torch.int8"),
    ],
)
def test_bad_arguments(kind, tmp_path, options, message):
    _, _, error, new = kind
    with pytest.raises(error, match=message):
        new().save_pretrained(tmp_path, **options)
