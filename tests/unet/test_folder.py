"""Invalid configs and folders give one clear error, and nothing is left half-loaded."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from unet import UNet, UNetConfig, UNetError

CONFIG = UNetConfig(block_out_channels=(32, 64), attention_levels=(0,), num_heads=4, context_dim=24, norm_groups=8)
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    UNet(CONFIG).save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_embed_type": "timestep"}, r"class_embed_type='timestep' is not supported; only None is"),
        ({"addition_embed_type": "text_time"}, "addition_embed_type='text_time'"),
        ({"mid_block_type": None}, "mid_block_type=None is not supported; only 'UNetMidBlock2DCrossAttn' is"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift='scale_shift'"),
        ({"encoder_hid_dim": 512}, "encoder_hid_dim=512"),
        ({"act_fn": "gelu"}, "act_fn='gelu'"),
        ({"dropout": 0.1}, "dropout=0.1"),
        ({"cross_attention_dim": [24, 32]}, r"cross_attention_dim=\[24, 32\] is not supported"),
        ({"layers_per_block": [2, 1]}, r"layers_per_block=\[2, 1\] is not supported"),
        (
            {"layers_per_block": 10**9},
            "layers_per_block=1000000000 is not supported; expected an integer from 1 to 100",
        ),
        (
            {"layers_per_block": 100},
            "levels x layers_per_block x transformer_layers_per_block is 200; expected at most 128",
        ),
        ({"transformer_layers_per_block": 10**30}, "transformer_layers_per_block=1000000000"),
        ({"block_out_channels": [32, 2**64]}, "block_out_channels=18446744073709551616"),
        ({"downsample_padding": True}, "downsample_padding=True is not supported; only 1 is"),
        ({"flip_sin_to_cos": 1}, "flip_sin_to_cos=1 is not supported; only True is"),
        ({"layers_per_block": True}, "layers_per_block=True is not supported"),
        ({"attention_head_dim": 7}, "num_heads=7 does not divide"),
        ({"attention_head_dim": [4]}, "num_heads has 1 entries for 2 levels"),
        ({"attention_head_dim": None}, "attention_head_dim=None is not supported"),
        ({"attention_head_dim": "8"}, "num_heads='8' is not supported"),
        ({"down_block_types": ["KDownBlock2D", "DownBlock2D"]}, "down_block_types has 'KDownBlock2D'"),
        ({"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}, "does not mirror down_block_types"),
        ({"down_block_types": "DownBlock2D"}, "down_block_types='DownBlock2D' is not supported; expected a list"),
        ({"block_out_channels": 5}, "block_out_channels=5 is not supported; expected a list"),
        ({"block_out_channels": [32, 64, 64]}, "2 down_block_types for 3 block_out_channels"),
        ({"block_out_channels": [32, 60]}, "block_out_channels has 60, not divisible by norm_groups=8"),
        ({"norm_num_groups": None}, "norm_groups=None"),
        ({"norm_eps": "small"}, "norm_eps='small'"),
        ({"use_linear_projection": 1}, "linear_projection=1 is not supported; expected true or false"),
        ({"in_channels": 0}, "in_channels=0"),
        ({"sample_size": -1}, "sample_size=-1"),
        ({"_class_name": "UNet3DConditionModel"}, "_class_name is 'UNet3DConditionModel'"),
        ({"bolck_out_channels": [1]}, "unknown key 'bolck_out_channels'"),
    ],
)
def test_unsupported_configs_are_refused_by_name(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(UNetError, match=message) as caught:
        UNet.from_pretrained(folder)
    assert str(folder / "config.json") in str(caught.value)


def test_a_missing_key_takes_diffusers_default(folder):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    del values["norm_eps"], values["flip_sin_to_cos"], values["out_channels"]
    path.write_text(json.dumps(values))
    assert UNet.from_pretrained(folder).config == CONFIG


@pytest.mark.parametrize(
    "changes",
    [
        {"act_fn": "swish"},
        {"mid_block_only_cross_attention": False},
        {"only_cross_attention": [False, False]},
        {"use_linear_projection": None, "upcast_attention": None},
        {"layers_per_block": [2, 2], "cross_attention_dim": [24, 24], "transformer_layers_per_block": [1, 1]},
        {"_diffusers_version": "0.2.2", "_name_or_path": "somewhere"},
    ],
    ids=str,
)
def test_other_spellings_of_the_same_network(folder, changes):
    edit_config(folder, **changes)
    assert UNet.from_pretrained(folder).config == CONFIG


def test_configs_in_code():
    for options, message in (
        ({"attention_levels": 1}, "attention_levels=1 is not supported; expected a list of integers"),
        ({"attention_levels": (0.0, True)}, r"attention_levels has 0\.0"),
        ({"attention_levels": (4,)}, "attention_levels has 4; the levels are 0 to 3"),
        ({"block_out_channels": 64}, "block_out_channels=64"),
        ({"block_out_channels": ()}, "block_out_channels is empty"),
        ({"block_out_channels": (33,), "norm_groups": 33, "attention_levels": ()}, r"block_out_channels\[0\] is 33"),
    ):
        with pytest.raises(UNetError, match=message):
            UNetConfig(**options)


def change_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("conv_in.bias"), "lacks 1 tensor: conv_in.bias"),
        (lambda w: [w.pop(name) for name in list(w) if "mid_block" in name], r"lacks 46 tensors: mid_block.*, …"),
        (lambda w: w.update(extra=torch.zeros(1)), "unexpected for this UNet: 1 tensor: extra"),
        (
            lambda w: w.update({"conv_in.bias": torch.zeros(31)}),
            r"conv_in.bias has shape \[31\]; the config says \[32\]",
        ),
        (
            lambda w: w.update({"conv_in.bias": torch.zeros(32, dtype=torch.int8)}),
            "conv_in.bias is I8; expected one of",
        ),
    ],
    ids=["missing", "many_missing", "extra", "misshapen", "integers"],
)
def test_wrong_tensors(folder, change, message):
    change_weights(folder, change)
    with pytest.raises(UNetError, match=message) as caught:
        UNet.from_pretrained(folder)
    assert str(folder / WEIGHTS) in str(caught.value)


def test_a_giant_config_is_refused_before_it_is_allocated(folder):
    """The config asks for terabytes, the file is small: shapes must be compared on the meta device."""
    edit_config(folder, block_out_channels=[320_000, 64])
    with pytest.raises(UNetError, match="the config says"):
        UNet.from_pretrained(folder)


@pytest.mark.parametrize("size", [0, 5, 1000, -1], ids=["empty", "in_length", "in_header", "last_byte"])
def test_truncated_weights(folder, size):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UNetError, match="damaged or not a safetensors file"):
        UNet.from_pretrained(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object, found list"),
        ("\xff", "JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("9" * 5000, "not valid JSON"),
    ],
    ids=["cut", "list", "bytes", "deep", "endless"],
)
def test_damaged_config(folder, text, message):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UNetError, match=message):
        UNet.from_pretrained(folder)


def test_missing_files(folder, tmp_path):
    with pytest.raises(UNetError, match="no such folder"):
        UNet.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(UNetError, match="is not a folder"):
        UNet.from_pretrained(folder / "config.json")
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(
        UNetError,
        match=r"the folder has config\.json, .*\.bin; pickled \.bin files are never",
    ):
        UNet.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UNetError, match=r"config\.json: no such file"):
        UNet.from_pretrained(folder)


def test_saving_twice_and_dtypes(folder):
    unet = UNet.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.bfloat16}
    assert not unet.training
    unet.save_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == {"config.json", WEIGHTS}
    assert load_file(folder / WEIGHTS)["conv_in.bias"].dtype == torch.bfloat16
    assert UNet.from_pretrained(folder).conv_in.weight.dtype == torch.float32


def test_wrong_dtypes(folder):
    for dtype in (torch.int8, "float16"):
        with pytest.raises(UNetError, match=r"expected a floating-point torch\.dtype"):
            UNet.from_pretrained(folder, dtype=dtype)


def test_a_loaded_model_does_not_change_with_its_file(folder):
    """Memory-mapped tensors would; and a truncated file would crash the process."""
    unet = UNet.from_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    with open(folder / WEIGHTS, "r+b") as file:
        file.seek(-100_000, 2)
        file.write(b"\x01" * 100_000)
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())


def test_saving_where_one_cannot(folder):
    """A single error, and no partial file left behind."""
    unet = UNet.from_pretrained(folder)
    with pytest.raises(UNetError, match=r"config\.json: cannot be written"):
        unet.save_pretrained(folder / "config.json")
    (folder / "taken" / WEIGHTS).mkdir(parents=True)
    with pytest.raises(UNetError, match="taken: cannot be written"):
        unet.save_pretrained(folder / "taken")
    assert [path.name for path in (folder / "taken").iterdir()] == [WEIGHTS]
