"""Models with experts: the right one at every step, whatever is asked; on disk, and for stock diffusers."""

import copy
import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff import LatentDiffError, LatentPipeline
from latentdiff.config import load_config
from latentdiff.diffusion.samplers import SAMPLERS
from latentdiff.files.export import export_model
from latentdiff.files.inspect import describe
from unet import Experts, UNet
from unet.experts import band_edges

PROMPT = "a red apple"
SCHEDULERS = (diffusers.UniPCMultistepScheduler, diffusers.HeunDiscreteScheduler, diffusers.DDPMScheduler)
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
MASK = np.arange(32)[:, None].repeat(32, 1) < 16


@pytest.fixture(scope="module")
def pipe(pipe):
    """With noise at the last timestep that Heun's scheduler can express."""
    process = pipe.process._replace(
        schedule=load_config("debug", ["diffusion.zero_terminal_snr=false"]).diffusion.build()
    )
    return LatentPipeline(vae=pipe.vae, unet=pipe.unet, text_encoder=pipe.text_encoder, **process._asdict())


def split(pipe, experts=4):
    """The pipeline with experts that are all copies of its UNet."""
    edges = band_edges(experts, pipe.process.schedule.num_timesteps)
    unet = Experts([copy.deepcopy(pipe.unet) for _ in edges[1:]], edges)
    return LatentPipeline(vae=pipe.vae, unet=unet, text_encoder=pipe.text_encoder, **pipe.process._asdict())


def differ(pipe):
    """Make the experts of a pipeline differ, by ever more noise in their weights."""
    for number, unet in enumerate(pipe.unet.unets):
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05 * number)
    return pipe


@pytest.fixture
def visits(monkeypatch):
    """Which UNet was called with which projected or plain timestep, as (UNet, shift or t)."""
    found = []
    original = UNet.forward
    monkeypatch.setattr(
        UNet, "forward", lambda self, x, t, context: (found.append((self, t)), original(self, x, t, context))[1]
    )
    return found


def everything(pipe):
    """Pictures and figures of everything that a pipeline does with its UNet."""
    options = {"seed": 3, "num_steps": 5}
    yield from (pipe(PROMPT, sampler=name, **options)[0] for name in SAMPLERS)
    yield from (pipe(PROMPT, sampler=kind.from_config(pipe.scheduler_config), **options)[0] for kind in SCHEDULERS)
    yield pipe(PROMPT, guidance_interval=(0.5, 5.0), **options)[0]
    yield pipe.img2img(PROMPT, PICTURE, strength=0.7, **options)[0]
    yield pipe.inpaint(PROMPT, PICTURE, MASK, **options)[0]
    yield pipe.invert(PICTURE, num_steps=6).image
    yield pipe.exaggerate(PROMPT, "a green apple", **options)[0]
    (bound,) = pipe.log_likelihood(PICTURE, PROMPT, draws=1)
    yield [[bound.kl, bound.first]]


@pytest.mark.parametrize("experts", [4, pytest.param((1, 2, 999), marks=pytest.mark.slow)])
def test_a_split_draws_what_the_shared_unet_draws(pipe, experts):
    """Bit for bit; the terms of the likelihood, for which a batch spans the bands, up to rounding."""
    for one, several in zip(everything(pipe), everything(split(pipe, experts)), strict=True):
        exact = isinstance(one, Image.Image)
        assert np.allclose(np.asarray(one), np.asarray(several), rtol=0 if exact else 1e-4, atol=0)


def test_every_timestep_has_its_expert(pipe, visits):
    """The shifts of a step are those that its own expert computes for its own timesteps, and for no others."""
    model = differ(split(pipe))
    own = {}
    with torch.no_grad():
        for number, unet in enumerate(model.unet.members):
            band = torch.arange(model.unet.edges[number], model.unet.edges[number + 1])
            own[id(unet)] = {shift.numpy().tobytes() for shift in unet.project_time(band)[0]}
    assert not set.intersection(*own.values())
    for _ in everything(model):
        assert visits
        for unet, t in visits:
            if isinstance(t, torch.Tensor):
                assert {model.unet.members[model.unet.expert_at(float(each))] for each in t.reshape(-1)} == {unet}
            else:
                assert t[0][0].numpy().tobytes() in own[id(unet)]
        visits.clear()
    prompts = [PROMPT, "a blue car"]
    both = model(prompts, seed=[1, 2], num_steps=5)
    alone = [model(prompt, seed=seed, num_steps=5)[0] for prompt, seed in zip(prompts, (1, 2), strict=True)]
    assert all(np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1 for a, b in zip(both, alone, strict=True))


def test_saved_and_opened(pipe, tmp_path, largest_difference):
    """The same pictures; a model saved in its place with fewer experts, or with one UNet, leaves nothing behind."""
    model = differ(split(pipe))
    model.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model/bands.json").read_text()) == {"edges": [0, 250, 500, 750, 1000]}
    opened = LatentPipeline.from_pretrained(tmp_path / "model", device="cpu", dtype=torch.float32)
    assert largest_difference(opened(PROMPT, seed=1, num_steps=4)[0], model(PROMPT, seed=1, num_steps=4)[0]) == 0
    text = "\n".join(describe(tmp_path / "model"))
    assert "unet/ for t = 0 to 249, unet_1/ for t = 250 to 499" in text
    split(pipe, 2).save_pretrained(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").glob("unet*")) == ["unet", "unet_1"]
    pipe.save_pretrained(tmp_path / "model")
    assert not [*(tmp_path / "model").glob("unet_*"), *(tmp_path / "model").glob("bands.json")]
    assert isinstance(LatentPipeline.from_pretrained(tmp_path / "model", device="cpu").unet, UNet)


def test_stock_diffusers_does_not_draw_with_the_first_expert(pipe, tmp_path, open_stock):
    """It refuses the model by name, also where the class is given; experts written apart open, one by one."""
    model = differ(split(pipe, 2))
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(AttributeError, match="TimestepExpertsPipeline"):
        open_stock(tmp_path / "model")
    for kind in (diffusers.StableDiffusionPipeline, diffusers.StableDiffusionImg2ImgPipeline):
        with pytest.raises(ValueError, match="TimestepExperts"):
            open_stock(tmp_path / "model", kind)
    for output, single in ((tmp_path / "out", False), (tmp_path / "out.safetensors", True)):
        with pytest.raises(LatentDiffError, match="has 2 experts, each for a band of timesteps"):
            export_model(tmp_path / "model", output, single=single)
    export_model(tmp_path / "model", tmp_path / "out", experts_apart=True)
    for number, steps in enumerate(("0 to 499", "500 to 999")):
        folder = tmp_path / "out" / f"expert_{number}"
        weights = open_stock(folder).unet.state_dict()
        assert all(torch.equal(weights[name], tensor) for name, tensor in model.unet.unets[number].state_dict().items())
        assert f"for timesteps {steps} only" in (folder / "README.md").read_text()
    pipe.save_pretrained(tmp_path / "one")
    with pytest.raises(LatentDiffError, match="no experts to write apart"):
        export_model(tmp_path / "one", tmp_path / "none", experts_apart=True)


@pytest.fixture(scope="module")
def three(pipe, tmp_path_factory):
    """The folder of a model with three experts."""
    folder = tmp_path_factory.mktemp("three")
    split(pipe, 3).save_pretrained(folder)
    return folder


def edges(*values):
    return lambda folder: (folder / "bands.json").write_text(json.dumps({"edges": list(values)}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edges(0, 500, 500, 1000), r"bands.json: edges=\[0, 500, 500, 1000\]: expected increasing timesteps"),
        (edges(1, 300, 600, 1000), "expected increasing timesteps from 0"),
        (edges(0, 1000), "at least three"),
        (edges(0, 300.5, 600, 1000), "expected increasing timesteps"),
        (edges(0, 300, 600, 900), "bands.json: its bands end at 900, but the model has 1000 timesteps"),
        (edges(0, 300, 600, 800, 1000), "unet_3: no such folder; .*bands.json has 4 bands"),
        (edges(0, 300, 1000), "unet_2: one folder too many; .*bands.json has 2 bands"),
        (lambda folder: shutil.rmtree(folder / "unet_1"), "unet_1: no such folder"),
        (lambda folder: (folder / "bands.json").unlink(), "Pipeline', but the folder has no bands.json"),
        (lambda folder: shutil.copytree(folder / "unet", folder / "unet_10"), "unet_10: one folder too many"),
        (lambda folder: (folder / "unet_2/diffusion_pytorch_model.safetensors").unlink(), "unet_2"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_folder_is_said_in_one_line(three, tmp_path, damage, message):
    folder = shutil.copytree(three, tmp_path / "model")
    damage(folder)
    with pytest.raises(LatentDiffError, match=message) as caught:
        LatentPipeline.from_pretrained(folder, device="cpu")
    assert "\n" not in str(caught.value)
