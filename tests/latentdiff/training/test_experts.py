"""Training experts: each learns from its own timesteps alone, and otherwise all is as with a single UNet."""

import itertools
import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from equality import same

from latentdiff import LatentPipeline
from latentdiff.config import load_config
from latentdiff.data.batches import sample_timestep
from latentdiff.data.sources import open_source
from latentdiff.diffusion.process import add_noise, diffusion_loss
from latentdiff.errors import LatentDiffError, UnfinishedModelWarning
from latentdiff.evaluation.evaluate import evaluate
from latentdiff.sampling.settings import SamplingSettings
from latentdiff.sections import DataConfig
from latentdiff.training import launch as launching
from latentdiff.training.latent import LatentTraining
from latentdiff.training.logging import MetricLogger
from latentdiff.training.stages import make_caches, new_unet, open_text_encoder
from unet import Experts
from unet.experts import band_edges
from vae import VAE

LITERAL = ("unet.experts=20", "diffusion.num_timesteps=20")  # a network of its own for each diffusion step
EIGHT = ("train_latent.batch_size=8", "train_latent.micro_batch_size=4")
CASES = (("unet.experts=4",), ("unet.experts=3", *EIGHT), (*LITERAL, *EIGHT))


@pytest.mark.parametrize(("number", "batch", "T"), [(3, 4, 10), (3, 8, 10), (4, 3, 20), (20, 8, 20), (2, 2, 7)])
def test_every_expert_gets_in_expectation_its_share_of_the_loss(number, batch, T):
    """Exactly, by going through what each stratum can draw: the mean over the batch needs no weights.

    A mean over an expert's own pictures, times its band's share of the timesteps, is biased where a stratum crosses an
    edge.
    """
    edges, losses = band_edges(number, T), np.random.default_rng(0).random(T)
    fine = 2 * batch * T
    drawn = [[sample_timestep(SimpleNamespace(random=lambda u=u: (u + 0.5) / fine), (i, batch), T) for u in range(fine)]
             for i in range(batch)]  # fmt: skip
    for low, high in itertools.pairwise(edges):
        gradient = sum(np.mean([losses[t] * (low <= t < high) for t in each]) for each in drawn) / batch
        assert gradient == pytest.approx(losses[low:high].sum() / T, rel=1e-12)
    if batch == 4:
        coarse = [each[fine // 10 :: fine // 5] for each in drawn]  # the strata's pieces are multiples of a fifth
        batches = [[losses[t] for t in times if t < edges[1]] for times in itertools.product(*coarse)]
        biased = np.mean([np.mean(own) for own in batches]) * edges[1] / T
        assert biased != pytest.approx(losses[: edges[1]].sum() / T, rel=1e-2)


@pytest.fixture
def new_task(tmp_path, pictures):
    """Latent training of the smallest recipe with settings, before its first step."""

    def make(*settings):
        overrides = [f"output={tmp_path}", f"data.source={pictures}", "precision=fp32", "threads=1", "trackers=[]"]
        run = launching.launch(load_config("debug", [*overrides, "train_latent.warmup_steps=0", *settings]))
        vae = VAE(run.config.vae.build(run.config.data.image_size))
        sources = open_source(run.config.data)
        encoder = open_text_encoder(run.config, sources[0])
        caches = make_caches(run, sources, vae, encoder)
        unet = new_unet(run.config, vae, encoder)
        return LatentTraining(run, tmp_path / "latent", sources, vae, unet, encoder, caches)

    return make


def test_a_step_of_training(new_task, tmp_path):
    """The gradients of the mean loss, one norm over all, and experts without pictures that stay as they are."""
    task = new_task("unet.experts=8", "diffusion.num_timesteps=8", "train_latent.batch_size=4",
                    "train_latent.micro_batch_size=2", "train_latent.max_grad_norm=0.01")  # fmt: skip
    log = MetricLogger(task.run, tmp_path, "train", 0, 100, 8)
    for unet in task.inner.unet.members:
        torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
    with_moments: set[int] = set()
    idle_later = 0
    for step, batches in enumerate(task.batches(0, 3), start=1):
        times = torch.cat([batch.t for batch in batches])
        called = set(times.tolist())  # T = N: the expert is the timestep
        expected = gradients(task, batches) if step == 1 else {}
        before = snapshot(task)
        if step == 1:
            task._gradients([task._calls(batch) for batch in batches], prepared(task, batches))
            for name, parameter in task.inner.named_parameters():
                assert (parameter.grad is None) == (expected[name] is None), name
                if parameter.grad is not None:
                    assert torch.allclose(parameter.grad, expected[name], atol=1e-5), name
                parameter.grad = None
        metrics, finite = task.train_step(batches, step, log)
        assert finite
        if step == 1:
            squares = sum(float(grad.square().sum()) for grad in expected.values() if grad is not None)
            assert float(metrics["norm"]) == pytest.approx(squares**0.5, rel=1e-4)
        after = snapshot(task)
        for name in task.state.parameters:
            owner = int(name.split(".")[2]) if name.startswith("unet.") else None
            moves = owner is None or owner in called
            assert after["steps"][name] == before["steps"][name] + moves
            for what in ("weights", "exp_avg", "exp_avg_sq"):
                assert moves or torch.equal(after[what][name], before[what][name]), (what, name)
        heads = [f"unet.unets.{number}.conv_out.weight" for number in range(8)]
        moved = {number for number, name in enumerate(heads)
                 if not torch.equal(after["weights"][name], before["weights"][name])}  # fmt: skip
        assert moved == called
        idle_later += len(with_moments - called)
        with_moments |= called
    assert idle_later  # experts with momentum were among those that stayed


def snapshot(task):
    """Copies of weights, moments and numbers of steps, by parameter name."""
    tensors = task.state.tensors()
    steps = dict(zip(task.state.parameters, tensors.pop("scalars")["steps"], strict=True))
    return {what: {name: tensor.clone() for name, tensor in values.items()} for what, values in tensors.items()} | {
        "steps": steps
    }


def prepared(task, batches):
    return [(*task.frozen.prepare(batch), *task.frozen.text(batch)) for batch in batches]


def gradients(task, batches):
    """Of the mean loss over all pictures, each predicted alone by the expert of its timestep."""
    losses = []
    for x0, noise, t, *tokens in prepared(task, batches):
        context = task.inner.text_encoder.encode(*tokens)
        for row in range(len(t)):
            one = slice(row, row + 1)
            x_t = add_noise(x0[one], noise[one], t[one], task.schedule)
            output = task.inner.unet.unets[int(t[row])](x_t, t[one], context[one])
            losses.append(diffusion_loss(output, x0[one], noise[one], t[one], "v", task.schedule)[0])
    names, parameters = zip(*task.inner.named_parameters(), strict=True)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    found = iter(torch.autograd.grad(torch.stack(losses).mean(), trained, allow_unused=True))
    return {name: next(found) if parameter.requires_grad else None
            for name, parameter in zip(names, parameters, strict=True)}  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["unet.experts=1001"], "unet: experts=1001: expected 1 to 1000"),
        (["unet.experts=0"], "unet: experts=0: expected 1 to 1000"),
        (["unet.experts=[500,250]"], r"unet: experts=\[500, 250\]: expected increasing timesteps from 1 to 999"),
        (["unet.experts=[500,1000]"], "expected increasing timesteps from 1 to 999"),
        (["unet.experts=21", "diffusion.num_timesteps=20"], "experts=21: expected 1 to 20"),
        (["unet.experts_from=folder"], "unet: experts_from=folder: needs `experts`"),
        (["unet.experts=2", "unet.experts_from=a", "unet.pretrained=b"], "takes the place of `pretrained`"),
        (["unet.experts=2", "train_latent.compile=true"], "train_latent.compile=true: not supported with unet.experts"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(LatentDiffError, match=message) as caught:
        load_config("debug", settings)
    assert "\n" not in str(caught.value)


def test_one_expert_is_a_single_unet():
    assert load_config("debug", ["unet.experts=1"]) == load_config("debug")


@pytest.mark.slow
def test_one_expert_trains_the_same_bits(train, state, uninterrupted):
    settings = [f"vae.pretrained={uninterrupted('fp32')}", "train_latent.steps=20"]
    assert train("one", *settings, stage="train_latent") == train("single", *settings, "unet.experts=1",
                                                                  stage="train_latent") == 0  # fmt: skip
    assert state("one")[0] == 20
    assert same(state("one")[1], state("single")[1])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_resumed_sampled_and_evaluated(train, state, log, uninterrupted, pictures, tmp_path, case):
    """kill -9, in a step and while saving: bit for bit what it would have been; in between it can be sampled from."""
    settings = [f"vae.pretrained={uninterrupted('fp32')}", "train_latent.ema_snapshots=2", *case]
    assert train("one", *settings, stage="train_latent") == 0
    assert train("run", *settings, stage="train_latent", accident="kill at step", at=5) == -9
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnfinishedModelWarning)
        unfinished = LatentPipeline.from_pretrained(tmp_path / "run", device="cpu", dtype=torch.float32)
    assert isinstance(unfinished.unet, Experts)
    assert train("run", *settings, stage="train_latent", accident="kill while saving", at=12) == -9
    assert train("run", *settings, stage="train_latent") == 0
    assert same(state("one")[1], state("run")[1])
    assert log("one") == log("run")
    pipe = LatentPipeline.from_pretrained(tmp_path / "run", device="cpu", dtype=torch.float32)
    averages = {name.removeprefix("model-ema/unet."): tensor for name, tensor in state("run")[1].items()}
    assert all(torch.equal(tensor, averages[name]) for name, tensor in pipe.unet.state_dict().items())
    assert pipe("a red circle", num_steps=4)[0].size == (32, 32)
    data = DataConfig(source=str(pictures), flip=False)
    settings = SamplingSettings(num_steps=2, seed=0, progress=False)
    report = evaluate(pipe, data, settings, style="", num_concepts=2)
    assert all(np.isfinite(each.error) for each in report.denoising)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
@pytest.mark.parametrize(
    "case",
    [("unet.experts=3", "train_latent.batch_size=8", "train_latent.micro_batch_size=2"),
     ("unet.experts=4", "diffusion.num_timesteps=4", "train_latent.batch_size=2",
      "train_latent.micro_batch_size=null")],
)  # fmt: skip
def test_two_processes_train_what_one_does(train, log, state, uninterrupted, case, fsdp):
    """Though each has pictures for other experts, and of four some have none on either; these resume bit for bit."""
    environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if fsdp else {}
    settings = [f"vae.pretrained={uninterrupted('fp32')}", "train_latent.log_every=1", "validation.timestep_bands=3",
                "train_latent.steps=4", "train_latent.validate_every=4", 'validation.prompts=["a red circle"]',
                "validation.guidance_scale=1", *case]  # fmt: skip
    two = {"stage": "train_latent", "processes": 2, "environment": environment}
    assert train("one", *settings, stage="train_latent") == 0
    assert train("two", *settings, **two) == 0
    one, several = log("one"), log("two")
    assert one.keys() == several.keys()
    assert max(abs(several[step] / one[step] - 1) for step in one) < 1e-5
    (_, one), (_, several) = state("one"), state("two")
    assert torch.equal(one["model-scalars/steps"], several["model-scalars/steps"])
    assert all(torch.allclose(one[name], several[name], atol=2e-5) for name in one)
    if "unet.experts=4" in case:
        assert (one["model-scalars/steps"] < 4).any()
        assert train("again", *settings, **two, accident="terminate", at=3) == 143
        assert train("again", *settings, **two) == 0
        assert same(state("again")[1], several)


@pytest.mark.slow
def test_experts_split_from_one_unet(train, log, weights, said, tmp_path):
    """At step 0 they have its losses and draw its pictures, bit for bit; then they part. What does not fit is said."""
    common = ["train_latent.validate_first=true", f"validation.prompts={json.dumps(['a red circle', 'a blue square'])}"]
    assert train("first", *common) == 0
    model = tmp_path / "first/model"
    parts = [f"vae.pretrained={model}", f"text_encoder.pretrained={model}"]
    split = [
        *common,
        *parts,
        "unet.experts=4",
        f"unet.experts_from={tmp_path / 'first'}",
        "unet.block_out_channels=[32,64]",
    ]
    assert train("second", *split) == 0
    first, second = log("first", "validation_loss"), log("second", "validation_loss")
    assert second[0] == first[6]  # four bands in the validation, too
    drawn = [
        tmp_path / run / f"train_latent/samples/step-{step:08d}.png" for run, step in (("first", 6), ("second", 0))
    ]
    assert drawn[0].read_bytes() == drawn[1].read_bytes()
    shared, *others = (weights(folder / "diffusion_pytorch_model.safetensors")
                       for folder in (model / "unet", *(tmp_path / "second/model").glob("unet*")))  # fmt: skip
    assert len(others) == 4
    assert all(not torch.equal(each["conv_out.weight"], shared["conv_out.weight"]) for each in others)
    assert "second/model: already done" not in said("second")
    later = tmp_path / "second/model"
    again = [
        f"vae.pretrained={later}",
        f"text_encoder.pretrained={later}",
        f"unet.pretrained={later}",
        "unet.experts=4",
    ]
    assert train("third", *again, "train_latent.validate_first=true") == 0
    assert log("third", "validation_loss")[0] == second[6]
    for name, message, *wrong in (
        ("a", "a single UNet, but unet.experts=4; unet.experts_from", "unet.experts=4", f"unet.pretrained={model}"),
        ("b", "begin at timesteps 0, 250, 500, 750, but unet.experts=None", f"unet.pretrained={tmp_path / 'second'}"),
        ("c", "0, 250, 500, 750, but unet.experts=2", "unet.experts=2", f"unet.experts_from={tmp_path / 'second'}"),
        ("d", f"{tmp_path}/none: no such folder", "unet.experts=2", f"unet.experts_from={tmp_path}/none"),
    ):
        assert train(name, *parts, *wrong) == 1
        assert message in said(name)
        assert "Traceback" not in said(name)
