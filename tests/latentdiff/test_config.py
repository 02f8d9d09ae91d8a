"""The configuration: what is accepted, what is rejected, and with which message."""

import json
import time

import pytest
import torch
from pydantic import ValidationError

from latentdiff import LatentDiffError
from latentdiff.config import Config, load_config, parse_config, recipes
from text_encoder import TextEncoder, TextEncoderConfig
from unet import UNet
from vae import VAE


@pytest.mark.parametrize("name", recipes())
def test_recipes_load_and_differ_from_the_defaults(name):
    assert load_config(name) != Config()


def test_shipped_recipes():
    assert {"debug", "emoji-64", "emoji-256", "emoji-256-large", "ldm-text2im-large", "sd1"} <= set(recipes())


def test_the_full_system_has_its_published_size():
    config = load_config("ldm-text2im-large")
    with torch.device("meta"):
        unet = UNet(config.unet.build(config.vae.latent_channels, config.text_encoder.width, 32))
        vae = VAE(config.vae.build(config.data.image_size))
    assert sum(p.numel() for p in unet.parameters()) == 872_300_484
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    assert config.text_encoder.build() == TextEncoderConfig(1280, 32, 8)


def test_sd1_has_stable_diffusions_unet():
    config = load_config("sd1")
    with torch.device("meta"):
        unet = UNet(config.unet.build(config.vae.latent_channels, 768, 64))
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964


def test_a_file_holds_what_differs(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("data:\n  source: pictures\ntrain_latent:\n  learning_rate: 1e-4\n  betas: [0.8, 0.9]\nvae:\n")
    config = load_config(path, ["seed=3", "unet.num_heads=[1, 2, 4, 8]", "data.flip=false"])
    assert config.data.source == "pictures"
    assert config.train_latent.learning_rate == 1e-4  # a string in YAML
    assert config.train_latent.betas == (0.8, 0.9)
    assert config.seed == 3
    assert config.unet.num_heads == (1, 2, 4, 8)
    assert not config.data.flip
    assert config.vae == Config().vae


def test_nothing_changes_afterwards():
    with pytest.raises(ValidationError):
        load_config("debug").seed = 1


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train_vae.stepz=1", ["'train_vae.stepz'", "did you mean 'steps'"]),
        ("vea.norm_groups=1", ["'vea'", "did you mean 'vae'"]),
        ("train_vae.steps=0", ["train_vae.steps=0", "greater than or equal to 1"]),
        ("train_vae.steps=1.5", ["train_vae.steps=1.5", "integer"]),
        ("train_vae.steps=many", ["train_vae.steps='many'", "integer"]),
        ("train_vae.learning_rate=fast", ["train_vae.learning_rate='fast'", "number"]),
        ("train_vae.learning_rate=.inf", ["train_vae.learning_rate=inf", "finite"]),
        ('data.flip="yes"', ["data.flip='yes'", "boolean"]),
        ("data.flip=1", ["data.flip=1", "boolean"]),
        ("data.background=[1, 2]", ["data.background"]),
        ("data.background=[1, 2, 256]", ["data.background.2=256", "less than or equal to 255"]),
        ("data.image_size=33", ["data.image_size=33", "multiple of 2"]),
        ("vae.norm_groups=7", ["vae:", "norm_groups=7"]),
        ("unet.num_heads=[1, 2, 3]", ["unet:", "num_heads has 3 entries for 2 levels"]),
        ("unet.trajectory_attention=-1", ["unet.trajectory_attention=-1", "greater than or equal to 0"]),
        ("unet.trajectory_attention=17", ["unet.trajectory_attention=17", "less than or equal to 16"]),
        ("text_encoder.num_heads=5", ["text_encoder:", "num_heads=5"]),
        ("text_encoder.train=false", ["text_encoder.train=false", "pretrained"]),
        ("diffusion.prediction=eps", ["diffusion:", "zero terminal SNR"]),
        ("diffusion.schedule=liner", ["diffusion:", "did you mean 'linear'"]),
        ("diffusion.prediction=mean", ["diffusion:", "weighting 'simple' does not work with prediction 'mean'"]),
        ("validation.sampler=ddmp", ["validation.sampler='ddmp'", "ddpm"]),
        ("train_latent.micro_batch_size=3", ["train_latent.batch_size=8", "micro_batch_size=3"]),
        ("train_latent.warmup_steps=1000", ["train_latent.warmup_steps=1000", "train_latent.steps=20"]),
        ("precision=half", ["precision='half'", "'bf16'"]),
        ("steps", ["'steps'", "section.key=value"]),
        ("seed.more=1", ["seed"]),
        ("data.caption_columns=[", ["not valid YAML"]),
        ("data.background=[1,2]", ["data.background=(1, 2): expected more values"]),
    ],
)
def test_one_line_says_what_is_wrong(override, words):
    with pytest.raises(LatentDiffError) as caught:
        load_config("debug", [override])
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1, 2]", ["list", "sections"]),
        ("a: [", ["not valid YAML"]),
        ("a: !!python/object/apply:os.system [echo]", ["not valid YAML"]),
        ("data: 3", ["data=3"]),
    ],
)
def test_files_that_are_not_configs(tmp_path, text, words):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(LatentDiffError) as caught:
        load_config(path)
    assert all(word in str(caught.value) for word in [str(path), *words]), caught.value


def test_unknown_recipe():
    with pytest.raises(LatentDiffError, match=r"emoji64: no such file or recipe; .* did you mean 'emoji-64'"):
        load_config("emoji64")


def test_json_there_and_back():
    config = load_config("debug")
    assert parse_config(json.loads(config.model_dump_json())) == config


def test_sizes_of_a_pretrained_model_are_not_recorded():
    """Settings that are ignored are neither recorded in a run nor printed on the model card."""
    names = [f"{part}.pretrained=builtin:emoji-256" for part in ("vae", "unet", "text_encoder")]
    values = load_config("emoji-64", names).model_dump(mode="json")
    assert values["vae"] == {"pretrained": "builtin:emoji-256"}
    assert values["unet"] == {"pretrained": "builtin:emoji-256", "attention": "sdpa", "experts": None,
                              "experts_from": None, "trajectory_attention": 0}  # fmt: skip
    assert values["text_encoder"] == {"pretrained": "builtin:emoji-256", "train": True, "max_length": 24}
    assert load_config("emoji-64").model_dump()["unet"]["block_out_channels"] == (96, 192, 256)


def test_a_folder_does_not_hide_a_recipe_of_its_name(tmp_path, monkeypatch):
    """As after `latentdiff export runs/emoji-256 emoji-256`."""
    for name in ("emoji-256", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_config("emoji-256").output == "runs/emoji-256"
    with pytest.raises(LatentDiffError, match="elsewhere: is a folder"):
        load_config("elsewhere")


def test_prompts_of_a_recipe_are_for_its_own_pictures(tmp_path):
    """With other data they are dropped in favor of its captions; explicit prompts and those of a file are kept."""
    assert len(load_config("emoji-64").validation.prompts) == 16
    assert load_config("emoji-64", ["data.source=mine"]).validation.prompts == ()
    assert load_config("emoji-64", ["data.source=mine", "validation.prompts=[a, b]"]).validation.prompts == ("a", "b")
    (tmp_path / "mine.yaml").write_text("validation: {prompts: [a]}")
    assert load_config(tmp_path / "mine.yaml", ["data.source=mine"]).validation.prompts == ("a",)


def test_the_schema_explains_every_setting():
    schema = Config.model_json_schema()
    fields = schema["$defs"]["TrainLatentSection"]["properties"]
    assert "over all processes" in fields["batch_size"]["description"]


def test_text_encoder_of_a_recipe_builds():
    from text_encoder import train_tokenizer

    section = load_config("debug").text_encoder
    tokenizer = train_tokenizer(["a red apple"] * 3, vocab_size=section.vocab_size, max_length=section.max_length)
    assert TextEncoder.new(section.build(), tokenizer)(["a red apple"]).shape == (1, 16, 32)


def test_text_and_paths_are_taken_as_typed(monkeypatch):
    """On the command line: no YAML, so that a folder may be called like a comment, a number, a date or a list."""
    monkeypatch.setenv("HOME", "/home/me")
    typed = [
        "photos #2",
        "2024-05-01",
        "001",
        "1e3",
        "yes",
        "[a]*",
        "a: b",
        "'quoted'",
        " x ",
        "*star",
        "&and",
        "{x}",
        "~x",
        "!",
    ]
    for name in typed:
        config = load_config("debug", [f"data.source={name}", f"output={name}", f"data.train_split={name}"])
        assert (config.data.source, config.output, config.data.train_split) == (name,) * 3
    config = load_config("debug", ["data.source=~/a", "output=~", "data.quarantine=~/q.txt", "unet.pretrained=~/u",
                                   "train_vae.perceptual_weights=~/lpips", "data.image_column=~/c"])  # fmt: skip
    assert (config.data.source, config.output, config.data.quarantine) == ("/home/me/a", "/home/me", "/home/me/q.txt")
    assert (config.unet.pretrained, config.train_vae.perceptual_weights) == ("/home/me/u", "/home/me/lpips")
    assert config.data.image_column == "~/c"  # no path
    config = load_config("emoji-64", ["data.quarantine=null", "unet.pretrained=", "precision=fp32", "data.source=./~"])
    assert (config.data.quarantine, config.unet.pretrained, config.precision) == (None, None, "fp32")
    assert config.data.source == "./~"
    config = load_config("debug", ["data.caption_columns=[a, b]", "data.flip=false", "trackers=null"])
    assert config.data.caption_columns == ("a", "b")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "has more than 10,000 values"),
        ("a: &a {<<: [*a]}", "has more than|not valid YAML"),
        ("data: &d [*d]", "has more than 10,000 values"),
        ("a: [" + "1, " * 50_000 + "1]", "has more than 10,000 values"),
        ("a: " + "x" * 2**20, "1,048,579 bytes is too large; expected at most 1,048,576"),
        ("[" * 3000 + "]" * 3000, "nested more than 20 deep"),
        ("{a: " * 3000 + "}" * 3000, "nested more than 20 deep"),
        ("data: 2024-13-45", "not valid YAML"),
        ("seed: " + "9" * 5000, "not valid YAML"),
        ("? [a]\n: b", "not valid YAML"),
        ("data: {image_size: 32}\ndata: {flip: true}", "the key 'data' is there twice"),
        ("data:\n  flip: true\n  image_size: 32\n  flip: false", "'flip' is there twice in the section .* line 2"),
        ("seed: 010", "seed='010': expected a valid integer"),
        ("seed: 1:30", "seed='1:30': expected a valid integer"),
    ],
)
def test_yaml_that_would_hang_or_overflow(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    started = time.monotonic()
    with pytest.raises(LatentDiffError, match=message) as failure:
        load_config(path)
    assert time.monotonic() - started < 2
    assert "\n" not in str(failure.value)
    if len(text) < 10_000:
        with pytest.raises(LatentDiffError):
            load_config("debug", [f"validation.prompts={text}"])
