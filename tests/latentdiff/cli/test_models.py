"""`latentdiff sample`, `evaluate`, `inspect`, `export`, and the example in every command's help."""

import csv
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import Dinov2Config, Dinov2Model
from typer.testing import CliRunner

from latentdiff import LatentDiffError, LatentPipeline
from latentdiff.cli import COMMANDS, app
from latentdiff.cli.models import SAMPLER, _prompts, data_config
from latentdiff.config import load_config
from latentdiff.data.cache import read_pixels
from latentdiff.data.pictures import to_pixels
from latentdiff.data.sources import open_source
from latentdiff.diffusion.samplers import SAMPLERS
from latentdiff.evaluation.metrics import psnr
from latentdiff.sampling.settings import SamplingSettings
from latentdiff.sections import DataConfig
from text_encoder import TextEncoder, train_tokenizer
from unet import UNet
from vae import VAE


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a small random model in `runs/mine/model`, and with `my-pictures`."""
    place = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    config = load_config("debug")
    encoder = TextEncoder.new(
        config.text_encoder.build(), train_tokenizer(["a red apple", "a blue car"] * 2, vocab_size=99, max_length=16)
    )
    pipe = LatentPipeline(
        vae=VAE(config.vae.build(32)),
        unet=UNet(config.unet.build(4, encoder.context_dim, 16)),
        text_encoder=encoder,
        schedule=config.diffusion.build(),
    )
    pipe.vae.facts = {"decoder_likelihood": "laplace", "decoder_log_scale": "-1.5"}
    pipe.save_pretrained(place / "runs/mine/model")
    (place / "runs/mine/run.json").write_text(json.dumps({"launches": [{
        "config": {"seed": 7, "precision": "fp32", "output": "/secret/place", "data": {"source": "/secret/pictures"},
                   "vae": {"pretrained": "/secret/vae"}},
        "versions": {"torch": "2.13.0"},
    }]}))  # fmt: skip
    (place / "runs/mine/train_latent").mkdir()
    (place / "runs/mine/train_latent/log.jsonl").write_text(
        '{"step": 5, "loss": 1}\n{"step": 9, "validation_loss": 0.5}\n'
    )
    shutil.copytree(place / "runs/mine/model", place / "model-only")
    (place / "my-pictures").mkdir()
    for number in range(20):
        Image.effect_noise((64, 64), 50).convert("RGB").save(place / f"my-pictures/{number}.png")
        (place / f"my-pictures/{number}.txt").write_text(f"picture number {number}")
    return place


@pytest.fixture
def invoke(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr("latentdiff.evaluation.asking.PILOTS", 2)

    def run(line: str, **options):
        return CliRunner().invoke(app, shlex.split(line), **options)

    return run


def test_sample(invoke, place):
    line = 'sample "a red apple" "a blue car!" --model runs/mine -n 2 --seed 3 --steps 2 --output out --precision fp32'
    result = invoke(line)
    assert result.exit_code == 0, result.output
    files = sorted(path.name for path in (place / "out").iterdir())
    assert files == ["0001-a-red-apple.png", "0002-a-red-apple.png", "0003-a-blue-car.png", "0004-a-blue-car.png",
                     "grid.png"]  # fmt: skip
    drawn = Image.open(place / "out/0003-a-blue-car.png")
    settings = json.loads(drawn.info["latentdiff"])
    assert (settings["prompt"], settings["seed"], settings["num_steps"]) == ("a blue car!", 5, 2)
    pipe = LatentPipeline.from_pretrained(place / "runs/mine", dtype=torch.float32, device="cpu")
    again = pipe(settings.pop("prompt"), **settings)[0]
    assert again.tobytes() == drawn.tobytes()


@pytest.mark.parametrize("text", ["num_step=3", "negative_prompt=low quality", "data.source=pictures", "Seed=3", "n=4"])
def test_a_setting_is_not_a_prompt(invoke, place, text):
    result = invoke(f"sample 'a red apple' '{text}' --output settings")
    assert result.exit_code == 1
    assert f"'{text}': a setting, not a prompt" in result.stderr
    assert not (place / "settings").exists()


def test_most_prompts_with_an_equals_sign_are_prompts():
    prompts = ["e=mc2", "style=noir", "weight=heavy", "with=love", "x.y=z", "größe=1", "a = b", "a_b=c", "="]
    assert _prompts(prompts, None) == prompts


def test_prompts_from_standard_input_and_file(invoke, place):
    result = invoke("sample --file - -m runs/mine --steps 1 --output stdin", input="a red apple\n\na blüe car\n")
    assert result.exit_code == 0, result.output
    files = sorted(path.name for path in (place / "stdin").iterdir())
    assert files == ["0001-a-red-apple.png", "0002-a-blue-car.png", "grid.png"]
    (place / "prompts.txt").write_text("a car\n")
    assert invoke("sample apple --file prompts.txt -m runs/mine --steps 1 --output both").exit_code == 0
    assert len(list((place / "both").iterdir())) == 3


def test_evaluate(invoke, place):
    """The report of an untrained model leaves out a broken picture, and its PSNR is that of the VAE."""
    shutil.copytree(place / "my-pictures", place / "measured")
    (place / "measured/7.png").write_bytes(b"no picture")
    Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, image_size=28,
                             patch_size=14)).save_pretrained(place / "network")  # fmt: skip
    (place / "network/preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    line = "evaluate data.source=measured -m runs/mine -o report --concepts 6 -n 3 --steps 2 --precision fp32"
    result = invoke(f"{line} --features network --against model-only")
    assert result.exit_code == 0, result.output
    report = json.loads((place / "report/evaluation.json").read_text())
    concepts = report["concepts"]
    assert (concepts["concepts"], concepts["pictures"]) == (6, 18)
    assert concepts["agreements"][0]["chance"] == pytest.approx(1 / concepts["gallery"])
    rows = [json.loads(line) for line in (place / "report/drawn.jsonl").read_text().splitlines()]
    assert len(rows) == 18
    for found in concepts["agreements"]:
        right = [row[found["features"]]["nearest"] == row["prompt"] for row in rows]
        assert found["top1"] == sum(right) / 18
    quality = report["quality"]
    assert any(figure["name"] == "network: kernel distance (KID)" for figure in quality["figures"])
    assert [each["value"] for each in quality["differences"]] == [0.0] * len(quality["figures"])  # the same model
    with Image.open(place / "report/concepts.png") as sheet:
        assert sheet.width > 500
    data = DataConfig(source="measured", image_size=32)
    train, held_out = open_source(data)
    assert report["broken"] == ["7.png"]
    assert "could not be read and skipped: 1, the first is" in result.output
    assert concepts["gallery"] + report["vae"]["num_pictures"] == len(train) + len(held_out) - 1 == 19
    pixels = torch.cat([to_pixels(torch.from_numpy(read_pixels(held_out, place, data))[None])
                        for place in range(len(held_out)) if held_out.name(place) != "7.png"])  # fmt: skip
    vae = VAE.from_pretrained(place / "runs/mine/model/vae")
    with torch.no_grad():
        again = vae.decode(vae.encode(pixels))
    assert report["vae"]["psnr"] == pytest.approx(float(psnr(pixels, again).mean()), abs=1e-3)


def test_evaluate_takes_captions_as_they_are(invoke, place):
    """As in training, parentheses in a caption do not weight its words."""
    shutil.copytree(place / "my-pictures", place / "brackets")
    for path in (place / "brackets").glob("*.txt"):
        path.write_text(f"poster (year: 1999) {path.stem}")
    result = invoke("evaluate data.source=brackets -m runs/mine -o brackets-report --concepts 2 -n 1 --steps 1")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("option", ["--concepts 1", "--steps 0", "--num-images 0", "--guidance -1"])
def test_evaluate_rejects_numbers_out_of_range(invoke, option):
    result = invoke(f"evaluate data.source=my-pictures -m runs/mine {option}")
    assert result.exit_code == 2
    assert f"Invalid value for '{option.split()[0]}'" in result.output


@pytest.mark.parametrize(
    ("record", "known"),
    [({"launches": [{"config": {"data": {"source": "kept", "image_size": 36, "flip": False}}}]}, True),
     ({"launches": [{"config": {"data": {"source": "kept", "image_size": 16}}}]}, True),
     ({}, False), ({"launches": []}, False), ({"launches": 3}, False), ([], False)],
)  # fmt: skip
def test_data_settings_of_a_run(place, tmp_path, monkeypatch, record, known):
    """They are found whatever the image size and VAE; a record without them is a plain error."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place / "runs/mine/model", tmp_path / "run/model")
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    if known:
        assert data_config("run", []).source == "kept"
        monkeypatch.chdir(tmp_path / "run/model")
        assert data_config(".", []).source == "kept"
    else:
        with pytest.raises(LatentDiffError, match=r"run: no record of its training data; give data.source"):
            data_config("run", [])
        assert data_config("run", ["data.source=mine", "data.flip=false"]).source == "mine"


def test_inspect(invoke):
    result = invoke("inspect runs/mine")
    assert result.exit_code == 0
    for words in ("StableDiffusionPipeline", "v_prediction", "unet/", "F32", "MiB", "cross_attention_dim 32"):
        assert words in result.output
    assert "tensors" in invoke("inspect runs/mine/model/vae/diffusion_pytorch_model.safetensors").output


@pytest.mark.parametrize("form", ["folder", "single"])
def test_export_and_open_again(invoke, place, form):
    target = "exported" if form == "folder" else "exported.safetensors"
    result = invoke(
        f"export runs/mine {target} --format {form} --precision fp16 --license mit --data 'my own pictures'"
    )
    assert result.exit_code == 0, result.output
    before = LatentPipeline.from_pretrained(place / "runs/mine", dtype=torch.float32, device="cpu")
    after = LatentPipeline.from_pretrained(place / target, dtype=torch.float32, device="cpu")
    for name, tensor in before.unet.state_dict().items():
        assert torch.equal(tensor.half().float(), after.unet.state_dict()[name])
    assert after("a red apple", num_steps=2, seed=0)[0].size == (32, 32)
    if form == "folder":
        card = (place / target / "README.md").read_text()
    else:
        with safe_open(place / target, framework="pt") as file:
            card = file.metadata()["latentdiff.card"]
    for words in ('license: "mit"', "my own pictures", "seed: 7", "torch 2.13.0", "| train_latent | loss | 0.5 |"):
        assert words in card
    assert "secret" not in card


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("sample -m runs/mine", ["no prompts"]),
        ("sample a -m nothing", ["nothing: no such folder or file"]),
        ("sample a -m runs/mine --steps 0", ["num_steps=0"]),
        ("sample a -m runs/mine --sampler foo", ["unknown sampler 'foo'"]),
        ("sample a -m runs/mine --guidance nan", ["guidance_scale=nan"]),
        ("sample a -m runs/mine --height 33", ["height=33: expected a multiple of 2"]),
        ("sample --file none.txt -m runs/mine", ["none.txt: cannot be read"]),
        ("sample a -m runs/mine --device warp", ["device='warp'"]),
        ("sample a -m runs/mine --output /dev/full/x", ["/dev/full"]),
        ("sample a -m model.ckpt", ["pickled weights are never opened"]),
        ("inspect nothing", ["nothing: no such folder or file"]),
        ("inspect my-pictures", ["found neither model_index.json nor"]),
        ("export runs/mine out --format single", ["out: expected a name ending in .safetensors"]),
        ("export runs/mine runs/mine/model", ["overlaps the model to be exported"]),
        ("export runs/mine runs/mine", ["overlaps the model to be exported"]),
        ("export runs/mine my-pictures", ["is not empty"]),
        ("evaluate data.source=nothing -m runs/mine", ["data.source='nothing': no such file or folder"]),
        ("evaluate", ["emoji-256: its training pictures do not ship; give data.source=FOLDER"]),
        ("evaluate data.source=my-pictures -m runs/mine --style (", ["style '(': not a valid regular expression"]),
        ("evaluate data.image_size=32 -m runs/mine", ["'data.image_size=32': images are evaluated at the model's"]),
        ("evaluate data.sauce=my-pictures -m runs/mine", ["unknown key 'data.sauce'; did you mean 'source'"]),
        ("evaluate seed=1 -m runs/mine", ["only data.key=value is allowed here"]),
        ("evaluate -m model-only", ["model-only: no record of its training data; give data.source=FOLDER"]),
        ("export runs/mine out --shard-gb nan", ["--shard-gb nan"]),
        ("export runs/mine out --push nobody/nothing --format single", ["--push uploads a folder"]),
        ("export runs/mine pushed --push nobody/nothing", ["nobody/nothing: cannot be uploaded"]),
    ],
)
def test_mistakes(invoke, line, words):
    result = invoke(line)
    assert result.exit_code == 1, result.output
    (message,) = [part for part in result.stderr.splitlines() if part.startswith("error: ")]
    assert all(word in message for word in words), message


def test_a_damaged_model(invoke, place):
    shutil.copytree(place / "runs/mine/model", place / "damaged")
    weights = place / "damaged/unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    result = invoke("sample a -m damaged")
    assert result.exit_code == 1
    assert "damaged" in result.stderr
    weights.unlink()
    assert "no such file" in invoke("sample a -m damaged").stderr


def examples() -> dict[str, str]:
    """Return the example in the help of every command."""
    found = {}
    for name in COMMANDS:
        text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", CliRunner().invoke(app, [*name.split(), "--help"]).output).split())
        (example,) = re.findall(r"Example: latentdiff (.*?) (?:Arguments|Options)", text)
        found[name] = example
    return found


@pytest.mark.parametrize(
    "command", ["data check", "schema", "sample", "inspect", "export",
                *(pytest.param(each, marks=pytest.mark.slow) for each in ("evaluate", "plan", "likelihood"))]
)  # fmt: skip
def test_the_examples_of_the_help(invoke, command):
    result = invoke(examples()[command])
    assert result.exit_code == 0, result.output


@pytest.mark.slow
def test_the_examples_of_the_trainings(invoke, place):
    """In the order of use, with the recipe that takes seconds."""
    for command in ("train-vae", "encode", "train-latent", "train"):
        line = examples()[command].replace("emoji-64", "debug").replace("runs/mine", "runs/trained")
        result = invoke(line + " trackers=[]")
        assert result.exit_code == 0, result.output
    assert invoke("sample picture --model runs/trained --steps 2").exit_code == 0


def test_the_help_names_every_sampler():
    described = SamplingSettings.model_fields["sampler"].description
    assert all(re.search(rf"\b{name}\b", text) for name in SAMPLERS for text in (SAMPLER, described))


def test_likelihood(invoke, place):
    """A folder with captions and a file without one; both tables; proposals are kept beside the model."""
    Path("few").mkdir()
    for name in ("1.png", "1.txt", "2.png", "2.txt"):
        shutil.copy(f"my-pictures/{name}", "few")
    shutil.copy("my-pictures/2.png", "alone.png")
    result = invoke("likelihood few alone.png -m model-only --draws 3 --timesteps 2 --output table.csv")
    assert result.exit_code == 0, result.output
    assert "given 'picture number 1'; " in result.stdout
    assert "bits per value (uncompressed 8, as PNG" in result.stdout
    rows = list(csv.DictReader(Path("table.csv").read_text().splitlines()))
    assert {row["prompt"] for row in rows[:2]} == {"picture number 1", "picture number 2"}
    assert rows[2]["prompt"] == ""
    assert all(float(row["decoder"]) < -1000 for row in rows)
    for row in rows:  # a new UNet predicts zero, whatever is asked for
        assert float(row["nats"]) == pytest.approx(float(row["nats_without_prompt"]), rel=1e-12)
    assert Path("model-only/likelihood.json").is_file()
    again = invoke("likelihood few alone.png -m model-only --draws 3 --timesteps 2 --output table.json")
    assert again.stdout.splitlines()[:3] == result.stdout.splitlines()[:3]
    assert [row["picture"] for row in json.loads(Path("table.json").read_text())] == [row["picture"] for row in rows]
    matched = invoke("likelihood alone.png -m model-only --timesteps 2 --caption a --caption b")
    assert re.fullmatch(r"alone.png: '[ab]' [+-]\d+ nats; '[ab]' [+-]\d+ nats\n", matched.stdout)
    own = invoke("likelihood few -m model-only --timesteps 2 --distractors 1")
    assert len(own.stdout.splitlines()) == 2
    assert re.search(r"1.png: 'picture number 1' [+-]\d+ nats", own.stdout)
    assert "expected a name ending in .csv or .json" in invoke("likelihood alone.png --output x.txt").stderr
    Path("few/2.txt").unlink()
    Path("few/2.png").write_bytes(b"no picture")
    Image.open("few/1.png").resize((20, 20)).save("few/1.png")  # smaller than the model's, as a file may be
    spoilt = invoke("likelihood few -m model-only --draws 2 --timesteps 2")  # a single picture is enough
    assert re.fullmatch(r"left out: broken pictures: 1 \(2.png: .+\)\n1.png: log p >= .+\n", spoilt.stdout)
    Path("few/1.png").unlink()
    assert "few: no picture that can be read; left out: " in invoke("likelihood few -m model-only").stderr
    kept = json.loads(Path("model-only/likelihood.json").read_text())
    kept["bound"][5] /= 1e4  # as before proposals had a uniform share
    for spoilt in (kept, {}):
        Path("model-only/likelihood.json").write_text(json.dumps(spoilt))
        assert "is of another model, or of a version" in invoke("likelihood alone.png -m model-only").stderr
