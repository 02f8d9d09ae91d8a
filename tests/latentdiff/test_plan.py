"""The planner: exact numbers against hand counts and real states, estimates against real CPU passes."""

import resource
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from latentdiff.config import load_config, recipes
from latentdiff.errors import LatentDiffError
from latentdiff.plan import DEVICES, _Planner, plan
from latentdiff.plan.counting import Autocast, Counter
from latentdiff.plan.devices import GIB
from latentdiff.plan.models import build_models
from latentdiff.training.checkpoint import newest_checkpoint, save_checkpoint
from latentdiff.training.discriminator import Discriminator
from latentdiff.training.optimizer import TrainState
from latentdiff.training.vae import Autoencoder
from unet import UNet, UNetConfig
from vae import VAE

ONE_LEVEL = UNetConfig(in_channels=4, out_channels=4, block_out_channels=(16,), layers_per_block=1,
                       attention_levels=(0,), num_heads=2, context_dim=12, norm_groups=4, sample_size=8)  # fmt: skip
TINY = UNetConfig(in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
                  attention_levels=(0, 1), num_heads=2, context_dim=32, norm_groups=8, sample_size=32)  # fmt: skip


def inputs(config: UNetConfig, batch: int, size: int, length: int, device: str = "meta") -> tuple:
    with torch.device(device):
        return (torch.zeros(batch, 4, size, size), torch.zeros(batch, dtype=torch.int64),
                torch.zeros(batch, length, config.context_dim))  # fmt: skip


def on_meta(config: UNetConfig) -> UNet:
    with torch.device("meta"):
        return UNet(config)


def counted(model: nn.Module, given: tuple, *, train: bool, dtype: torch.dtype = torch.float32) -> tuple[Counter, int]:
    """Return the counter and the bytes kept between forward and backward."""
    autocast = Autocast(dtype, norms_in_float32=False)
    with Counter() as counter, autocast, torch.set_grad_enabled(train):
        output = model(*given)
        kept = counter.live
        if train:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            autocast.backward(output.float().square().mean())
    return counter, kept


def hand_count(config: UNetConfig, size: int, length: int) -> int:
    """FLOPs of a one-level UNet by hand, with 2 per multiply-add."""
    (c,), n, e, d = config.block_out_channels, size**2, 4 * config.block_out_channels[0], config.context_dim

    def res(inside: int) -> int:
        shortcut = inside * c * n if inside != c else 0
        return 9 * inside * c * n + 9 * c * c * n + shortcut + e * c

    attention = 4 * c * c * n + 2 * n * n * c  # q, k, v, out; scores and weighted sum
    cross = 2 * c * c * n + 2 * d * c * length + 2 * n * length * c
    transformer = 2 * c * c * n + attention + cross + 8 * c * c * n + 4 * c * c * n  # GEGLU is twice as wide
    way_down, middle, way_up = res(c) + transformer, 2 * res(c) + transformer, 2 * (res(2 * c) + transformer)
    ends = 9 * 4 * c * n * 2 + c * e + e * e
    return 2 * (way_down + middle + way_up + ends)


def test_flops_equal_a_count_by_hand():
    """Catches a count that forgets attention, or counts a multiply-add as one."""
    counter, _ = counted(on_meta(ONE_LEVEL), inputs(ONE_LEVEL, 1, 8, 5), train=False)
    assert counter.flops == hand_count(ONE_LEVEL, 8, 5)


def test_flops_are_those_of_torchs_own_counter():
    model, given = on_meta(TINY), inputs(TINY, 2, 16, 7)
    with FlopCounterMode(display=False) as expected, torch.no_grad():
        model(*given)
    assert counted(model, given, train=False)[0].flops == expected.get_total_flops()


def test_training_is_three_forward_passes_and_recomputation_a_fourth():
    model, given = on_meta(TINY), inputs(TINY, 2, 16, 7)
    forward = counted(model, given, train=False)[0].flops
    assert counted(model, given, train=True)[0].flops == pytest.approx(3 * forward, rel=0.03)
    model.enable_gradient_checkpointing()
    assert 3.5 * forward < counted(model, given, train=True)[0].flops < 4.05 * forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_those_of_a_real_pass(dtype: torch.dtype):
    """Catches unfused attention, and activations in another dtype than those of a CPU pass."""
    torch.manual_seed(0)
    real, (x, t, context) = UNet(TINY), inputs(TINY, 2, 32, 80, "cpu")
    own = {parameter.untyped_storage().data_ptr() for parameter in real.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = real(x, t, context)
    assert output.dtype == dtype
    expected = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    _, kept = counted(on_meta(TINY), inputs(TINY, 2, 32, 80), train=True, dtype=dtype)
    assert kept == pytest.approx(expected, rel=0.3)


def test_peak_on_meta_is_the_peak_of_real_tensors():
    """The same counter follows a real pass with recomputation, and nothing is live afterwards."""
    real, meta = UNet(TINY), on_meta(TINY)
    without = counted(meta, inputs(TINY, 2, 32, 80), train=True)[0].peak
    for model in (real, meta):
        model.enable_gradient_checkpointing()
    for parameter in real.parameters():
        parameter.grad = torch.zeros_like(parameter)
    given = inputs(TINY, 2, 32, 80, "cpu")
    with Counter() as counter:
        torch.autograd.backward(real(*given).square().mean())
    assert counter.live == 0
    expected = counted(meta, inputs(TINY, 2, 32, 80), train=True)[0].peak
    assert expected == pytest.approx(counter.peak, rel=0.3)
    assert expected < 0.7 * without


@pytest.mark.slow
def test_a_history_costs_half_a_forward_pass_a_step_and_its_keys_and_values():
    """K passes of half of the batch beside the three of a step; 4 width^2 and a few weights for each transformer."""
    stages, passes = [], []
    for steps in (0, 4):
        config = load_config("debug", [f"unet.trajectory_attention={steps}"])
        models = build_models(config)
        stages.append(_Planner(config, DEVICES["h100"], 1, 0.25, models).train_latent())
        given = (models.noise(1), *inputs(models.unet.config, 1, 16, 16)[1:])
        passes.append(counted(models.unet, given, train=False)[0].flops)
    (plain, looking), (before, after) = stages, passes
    added = looking.parameters["unet"] - plain.parameters["unet"]
    assert added == 4 * (4 * 32**2 + (2 + 5 + 1) * 32)  # 4 transformers: q, k, v, out; norm, one to five steps, bias
    assert looking.trained - plain.trained == added
    encoder = plain.forward_flops - before  # runs once more for half of the batch, as its captions are in every pass
    expected = 4 / 2 * after + 3 * (after - before) + encoder / 2
    assert looking.step_flops - plain.step_flops == pytest.approx(expected, rel=0.03)
    assert looking.memory.activations > plain.memory.activations


def test_snapshots_take_further_averages():
    """Two more in memory and in checkpoints, or one if the model's own has the length of one of them."""
    lengths = {"0.1": 2, "0.05": 2, "0.07": 3}
    plain, *tracked = (
        plan(load_config("debug", settings), device="h100").stages[-2]
        for settings in ((), *((f"train_latent.ema_sigma_rel={length}", "train_latent.ema_snapshots=4")
                               for length in lengths))
    )  # fmt: skip
    for stage, number in zip(tracked, lengths.values(), strict=True):
        assert stage.memory.average == number * plain.memory.average == 4 * number * stage.trained
        assert stage.memory.states - plain.memory.states == stage.memory.average - plain.memory.average
        assert stage.checkpoint == 4 * (3 + number) * stage.trained


def test_state_is_that_of_a_real_training():
    """Weights, gradients, optimizer and average agree to the byte."""
    config = load_config("debug")
    inner = Autoencoder(VAE(config.vae.build(32)), True)
    critic = Discriminator(8, 2)
    trained = [TrainState([({name: p for name, p in module.named_parameters() if p.requires_grad}, 1e-3)],
                        config.train_vae) for module in (inner, critic)]  # fmt: skip
    memory = plan(config, device="h100").stages[0].memory
    parameters = [p for state in trained for p in state.local.values()]
    assert memory.weights == memory.gradients == sum(p.nbytes for p in parameters)
    assert memory.average == sum(tensor.nbytes for state in trained for tensor in state.ema.tensors)
    states = [state for one in trained for state in one.optimizer.state.values()]
    assert memory.optimizer == sum(tensor.nbytes for state in states for tensor in state.values())


def test_checkpoint_size_is_that_of_a_real_checkpoint(tmp_path):
    config = load_config("debug")
    state = TrainState([(dict(UNet(TINY).named_parameters()), 1e-3)], config.train_latent)
    save_checkpoint(tmp_path, 1, state.tensors(), {})
    checkpoint = newest_checkpoint(tmp_path, print)
    assert checkpoint is not None
    size = sum(file.stat().st_size for file in checkpoint.path.iterdir())
    assert size == pytest.approx(16 * sum(p.numel() for p in state.parameters.values()), rel=0.05)


def test_full_size_models_have_their_known_parameters():
    models = build_models(load_config("ldm-text2im-large"))
    assert sum(p.numel() for p in models.unet.parameters()) == 872_300_484
    assert sum(p.numel() for p in models.vae.parameters()) == 83_653_863


QUICK = ("debug",)


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
                                  for name in recipes()])  # fmt: skip
def test_every_recipe_is_planned_fast_and_in_little_memory(name: str):
    """Catches a planner that allocates the weights it counts, or imports diffusers."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    found = plan(load_config(name), device="h200")
    assert time.process_time() - start < 20
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 400 * 1024  # KiB; the smallest of the large models has 3 GiB
    first = [] if load_config(name).vae.pretrained else ["train_vae"]
    assert [stage.name.split()[0] for stage in found.stages] == [*first, "encode", "train_latent", "sample"]


@pytest.mark.slow
def test_the_text_says_what_is_known_and_what_is_estimated():
    config = load_config("debug")
    found = plan(config, device="h100", num_devices=2, dataset_size=5000)
    text, models = "\n".join(found.lines()), build_models(config)
    for model in (models.unet, models.vae):
        assert f"{sum(p.numel() for p in model.parameters()):,}" in text
    for part in ("GiB", "2 x h100", "vendor", "25%", "encode 5,000 pictures", "fits"):
        assert part in text
    memory = [line for line in text.split("\n") if line.strip().startswith(("memory", "time", "verdict"))]
    assert len(memory) == 12
    assert all("estimate" in line for line in memory)
    assert found.fits
    assert found.stages[1].disk == {"cache": 5000 * (2 * 8 * 16 * 16 * 2 + 1)}


@pytest.mark.slow
def test_a_small_gpu_is_told_what_would_fit():
    found = plan(load_config("ldm-text2im-large"), device="t4", num_devices=8)
    latent = found.stages[2]
    assert not found.fits
    assert not latent.fits
    assert latent.precision == "fp32"
    assert any("FSDP" in advice for advice in latent.advice)
    found = plan(load_config("emoji-256-large"), device="rtx-4090")
    assert not found.stages[2].fits
    assert any("gradient_checkpointing=true" in advice for advice in found.stages[2].advice)
    smaller = [f"train_latent.micro_batch_size={found.stages[2].largest_batch}"]
    assert plan(load_config("emoji-256-large", smaller), device="rtx-4090").stages[2].fits


@pytest.mark.slow
def test_more_share_of_the_peak_takes_less_time():
    config = load_config("debug")
    slow, fast = (plan(config, device="l4", mfu=mfu).stages[0].seconds for mfu in (0.1, 0.2))
    assert slow == pytest.approx(2 * fast)


def test_the_cpu_is_measured(monkeypatch):
    """Speed is measured on the CPU, and memory is that of the machine."""
    clock = iter(range(1000))
    monkeypatch.setattr("latentdiff.plan.devices.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    found = plan(load_config("debug"), num_devices=2)
    assert 0 < found.device.single < 100
    assert found.device.memory < 10_000
    assert "measured" in found.lines()[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "h1000"}, "did you mean 'h100'"),
        ({"device": "h100", "num_devices": 3}, "train_vae.batch_size=8"),
        ({"device": "h100", "num_devices": 0}, "num_devices=0"),
        ({"device": "h100", "mfu": 2.0}, "mfu=2.0"),
    ],
)
def test_mistakes_are_named(options: dict, words: str):
    with pytest.raises(LatentDiffError, match=words):
        plan(load_config("debug"), **options)


def test_devices_are_plausible_and_diffusers_is_not_imported():
    assert all(device.half >= device.single > 1 and 10 < device.memory < 200 for device in DEVICES.values())
    assert {"a100-40", "a100-80", "h100", "h200", "b200", "l4", "l40s", "a10", "v100", "t4"} < set(DEVICES)
    assert GIB == 1024**3
    if "diffusers" not in sys.modules:
        plan(load_config("debug"), device="h100")
        assert "diffusers" not in sys.modules


# With a budget. At this share of its peak, an H100 takes about half a second for a step of the recipe `debug`.


@pytest.mark.slow
def test_experts_cost_memory_and_no_passes():
    """Four UNets hold and store four times what one does; a picture still goes through one of them."""
    one, four = ({stage.name.split()[0]: stage for stage in plan(load_config("debug", settings)).stages}
                 for settings in ((), ("unet.experts=4",)))  # fmt: skip
    for name in ("train_latent", "sample"):
        assert four[name].parameters == one[name].parameters | {"unet": 4 * one[name].parameters["unet"]}
        assert four[name].step_flops == pytest.approx(one[name].step_flops, rel=0.01)
    more = 3 * one["train_latent"].parameters["unet"]
    assert four["train_latent"].trained == one["train_latent"].trained + more
    before, after = one["train_latent"].memory, four["train_latent"].memory
    assert (after.gradients, after.average) == (before.gradients + 4 * more, before.average + 4 * more)
