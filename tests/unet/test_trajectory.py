"""Attention to earlier steps: against PyTorch's attention, as an addition to a UNet, its gradients, invalid input."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from unet import UNet, UNetConfig, UNetError
from unet.trajectory import History, StepMemory, Trace, TrajectoryAttention

PLAIN = UNetConfig(
    block_out_channels=(32, 64), attention_levels=(0, 1), num_heads=4, context_dim=24, norm_groups=8, layers_per_block=1
)
CONFIG = replace(PLAIN, trajectory_attention=4)


def new_unet(config: UNetConfig, *, fresh: bool = False) -> UNet:
    """A UNet that does not predict zero; its attention to earlier steps adds zero if it is `fresh`."""
    torch.manual_seed(0)
    unet = UNet(config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(unet.named_parameters(), key=lambda item: ("trajectory" in item[0], item[0])):
        if not parameter.any() and not (fresh and "trajectory" in name):
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return unet


def run(unet: UNet, context: torch.Tensor, states: torch.Tensor) -> tuple[torch.Tensor, History]:
    """Run through states (S, B, c, h, w) along a trajectory; return the last prediction and its history."""
    history = unet.start_history()
    for number, x in enumerate(states):
        prediction, history = unet(x, torch.full((len(x),), 900 - 100 * number), context, history)
    return prediction, history


@pytest.fixture
def inputs():
    torch.manual_seed(2)
    return torch.randn(2, 7, 24), torch.randn(5, 2, 4, 8, 8)


def test_every_pixel_attends_to_itself_in_the_steps_that_its_picture_has_taken():
    """One step and two before it, of which the second picture has taken one: PyTorch's attention, pixel by pixel."""
    torch.manual_seed(0)
    layer = TrajectoryAttention(12, 3, 4, 0).double()
    torch.nn.init.normal_(layer.to_out[0].weight)
    states = torch.randn(3, 2, 5, 12, dtype=torch.float64)  # the latest first
    memories = []
    for state, present in ((states[1], None), (states[2], torch.tensor([True, False]))):
        layer(state, trace := Trace(History()))
        memories.append(StepMemory((trace.added[0],), present))
    found = layer(states[0], Trace(History(tuple(memories))))
    for picture, count in ((0, 3), (1, 2)):
        h = layer.norm(states[:count, picture])  # (S, N, C)
        q, k, v = layer.to_q(h[:1]), layer.to_k(h) + layer.steps_ago[:count, None], layer.to_v(h)
        q, k, v = (part.transpose(0, 1).unflatten(2, (3, 4)).transpose(1, 2) for part in (q, k, v))  # (N, h, S, d)
        expected = layer.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1))
        assert torch.allclose(found[picture], expected, atol=1e-12)


def test_a_unet_stays_the_same_to_the_bit_when_it_is_added(inputs):
    """Also one that is new: whatever else is random starts as it would without it."""
    context, states = inputs
    plain, fresh = new_unet(PLAIN), new_unet(CONFIG, fresh=True)
    assert all(torch.equal(tensor, fresh.state_dict()[name]) for name, tensor in plain.state_dict().items())
    added = new_unet(PLAIN)
    added.add_trajectory_attention(4)
    assert added.config == fresh.config
    expected = plain(states[-1], torch.full((2,), 500), context)
    for unet in (fresh, added):
        assert torch.equal(run(unet, context, states)[0], expected)
        assert torch.equal(unet(states[-1], torch.full((2,), 500), context), expected)
    trained = new_unet(CONFIG)
    assert not torch.allclose(run(trained, context, states)[0], expected, atol=1e-3)


def test_after_two_updates_every_new_weight_has_a_gradient(inputs):
    context, states = inputs
    unet = new_unet(CONFIG, fresh=True)
    new = {name: parameter for name, parameter in unet.named_parameters() if "trajectory" in name}
    optimizer = torch.optim.SGD(unet.parameters(), 0.1)
    for _ in range(3):
        with torch.no_grad():
            _, history = run(unet, context, states[:-1])
        unet.zero_grad()
        unet(states[-1], torch.full((2,), 500), context, history)[0].sub(1).square().mean().backward()
        optimizer.step()
    assert len(new) == 7 * 8  # in every transformer
    for name, parameter in new.items():
        assert parameter.grad.view(len(parameter), -1).any(1).all(), name  # in every row: for every step ago, too


def test_a_history_is_as_long_as_it_may_be_and_no_longer(inputs):
    """The sixth step sees four before it, and these are what it depends on."""
    context, states = inputs
    unet = new_unet(CONFIG).eval()
    with torch.no_grad():
        _, history = run(unet, context, states)
        assert len(history.steps) == 4
        first = run(unet, context, states[:1])[1]
        assert len(first.steps) == 1
        shorter = History(history.steps[:3])
        last = [unet(states[0], torch.tensor(0), context, past)[0] for past in (history, shorter, History())]
    assert len({float(prediction.sum()) for prediction in last}) == 3


def test_with_checkpointing_the_gradients_are_the_same(inputs):
    context, states = inputs
    unet, gradients = new_unet(CONFIG), []
    with torch.no_grad():
        _, history = run(unet, context, states[:3])
    for checkpointed in (False, True):
        unet.enable_gradient_checkpointing(checkpointed)
        unet.zero_grad()
        unet(states[3], torch.tensor(5), context, history)[0].square().mean().backward()
        gradients.append([parameter.grad for parameter in unet.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.slow
def test_it_compiles_without_graph_breaks(inputs):
    context, states = inputs
    unet = new_unet(replace(CONFIG, attention_levels=()))  # a transformer in the middle
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(run(compiled, context, states[:3])[0], run(unet, context, states[:3])[0])


@pytest.mark.parametrize("number", [-1, 17, True, 1.0])
def test_other_numbers_of_steps_are_refused(number):
    with pytest.raises(UNetError, match=rf"^trajectory_attention={number} is not supported; expected 0 to 16 steps$"):
        replace(PLAIN, trajectory_attention=number)


def test_histories_that_do_not_fit_are_refused(inputs):
    context, states = inputs
    unet = new_unet(CONFIG)
    _, history = run(unet, context, states[:1])
    with pytest.raises(UNetError, match="the history is of a batch of 2; x has 1"):
        unet(states[0, :1], torch.tensor(3), context[:1], history)
    assert new_unet(PLAIN).start_history() is None
    with pytest.raises(UNetError, match="this UNet takes no history"):
        new_unet(PLAIN)(states[0], torch.tensor(3), context, history)


def test_the_folder_says_what_it_has(tmp_path, inputs):
    context, states = inputs
    unet = new_unet(CONFIG).eval()
    unet.save_pretrained(tmp_path)
    opened = UNet.from_pretrained(tmp_path)
    assert opened.config == CONFIG
    with torch.no_grad():
        assert torch.equal(run(opened, context, states)[0], run(unet, context, states)[0])
