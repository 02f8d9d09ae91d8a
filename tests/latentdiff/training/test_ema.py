"""The EMA against the closed form of the power function, and what must not change."""

import copy

import pytest
import torch

from latentdiff.errors import LatentDiffError
from latentdiff.training.ema import EMA, gamma_from_sigma_rel

STEPS = 300


def weights_of_steps(sigma_rel: float, steps: int) -> torch.Tensor:
    """Weight of each step in the average: at step i the parameter is the i-th unit vector."""
    parameter = torch.full((steps,), 7.0)  # initial weights, which must vanish
    ema = EMA([parameter], sigma_rel)
    for step in range(1, steps + 1):
        parameter.zero_()[step - 1] = 1
        ema.update(step)
    return ema.tensors[0].double()


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.2, 0.28])
def test_each_past_step_has_the_weight_of_the_power_function(sigma_rel):
    gamma = gamma_from_sigma_rel(sigma_rel)
    edges = (torch.arange(STEPS + 1, dtype=torch.float64) / STEPS) ** (gamma + 1)
    torch.testing.assert_close(weights_of_steps(sigma_rel, STEPS), edges.diff(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.2])
def test_the_window_is_as_wide_as_asked(sigma_rel):
    weights = weights_of_steps(sigma_rel, 2000)
    places = torch.arange(1, 2001, dtype=torch.float64) / 2000
    mean = (weights * places).sum() / weights.sum()
    deviation = ((weights * (places - mean) ** 2).sum() / weights.sum()).sqrt()
    assert float(deviation) == pytest.approx(sigma_rel, rel=0.01)


def test_gamma_of_the_paper():
    """Karras et al. give 6.94 for 10 % and 16.97 for 5 %."""
    assert gamma_from_sigma_rel(0.10) == pytest.approx(6.94, abs=0.005)
    assert gamma_from_sigma_rel(0.05) == pytest.approx(16.97, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [0, -0.1, 0.289, 1, float("nan")])
def test_widths_that_do_not_exist(sigma_rel):
    with pytest.raises(LatentDiffError, match="sigma_rel"):
        EMA([torch.ones(1)], sigma_rel)


def test_steps_count_from_one():
    with pytest.raises(LatentDiffError, match="step=0"):
        EMA([torch.ones(1)], 0.1).update(0)


def test_the_first_step_takes_the_weights_themselves():
    parameter = torch.randn(100)
    ema = EMA([parameter], 0.1)
    parameter.add_(torch.randn(100))
    ema.update(1)
    torch.testing.assert_close(ema.tensors[0], parameter, rtol=1e-6, atol=1e-7)


def test_constant_weights_stay_constant():
    parameter = torch.randn(1000)
    ema = EMA([parameter], 0.1)
    for step in range(1, 500):
        ema.update(step)
    assert torch.equal(ema.tensors[0], parameter)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32)


def test_a_skipped_step_moves_no_bit():
    tiny = torch.finfo(torch.float32).tiny
    parameter = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, tiny / 2, -tiny / 2, 1e38, -1e38])])
    ema = EMA([parameter], 0.1)
    for step in range(1, 20):
        parameter.mul_(0.9)
        ema.update(step)
    ema.tensors[0][-1] = -1e38  # far from the weights, so that a wrong factor would show
    before = ema.tensors[0].clone()
    parameter.neg_()
    ema.update(20, torch.tensor(0.0))
    assert torch.equal(bits(ema.tensors[0]), bits(before))


def test_a_negative_zero_in_the_weights_does_not_move_either():
    ema = EMA([torch.tensor([-0.0, 1.0])], 0.1)
    before = ema.tensors[0].clone()
    ema.update(5, torch.tensor(0.0))
    assert torch.equal(bits(ema.tensors[0]), bits(before))


def test_a_step_that_counts_is_the_same_with_and_without_the_factor():
    parameter = torch.randn(1000)
    one, other = EMA([parameter], 0.1), EMA([parameter], 0.1)
    parameter.add_(1)
    one.update(7)
    other.update(7, torch.tensor(1.0))
    torch.testing.assert_close(one.tensors[0], other.tensors[0], rtol=1e-6, atol=1e-7)
    assert not torch.equal(one.tensors[0], EMA([parameter], 0.1).tensors[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_host_does_not_wait_for_the_factor():
    parameter = torch.randn(1000, device="cuda")
    ema = EMA([parameter], 0.1)
    moves = torch.zeros((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        ema.update(3, moves)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_average_is_float32_in_the_memory_format_of_the_weights_and_apart_from_them():
    parameters = [torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last).bfloat16(), torch.randn(())]
    ema = EMA(parameters, 0.1)
    assert all(tensor.dtype == torch.float32 and not tensor.requires_grad for tensor in ema.tensors)
    assert ema.tensors[0].is_contiguous(memory_format=torch.channels_last)
    before = ema.tensors[1].clone()
    parameters[1].add_(1)
    assert torch.equal(ema.tensors[1], before)


def test_follows_the_parameters_of_a_model_and_takes_no_gradients():
    model = torch.nn.Linear(3, 3)
    ema = EMA(list(model.parameters()), 0.1)
    with torch.no_grad():
        model.weight.fill_(2)
    ema.update(1)
    assert torch.equal(ema.tensors[0], torch.full((3, 3), 2.0))
    ema.copy_to(list(copy.deepcopy(model).parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapped_shows_the_average_and_restores_every_bit(dtype):
    parameter = torch.randn(50).to(dtype)
    ema = EMA([parameter], 0.1)
    parameter.copy_(torch.randn(50))
    parameter[0], parameter[1], own = float("nan"), -0.0, parameter
    before = own.clone().view(torch.uint8)
    with ema.swapped([parameter]):
        assert torch.equal(parameter, ema.tensors[0].to(dtype))
    assert torch.equal(own.view(torch.uint8), before)


def test_swapped_restores_after_an_exception():
    model = torch.nn.Linear(3, 3)
    ema = EMA(list(model.parameters()), 0.1)
    with torch.no_grad():
        model.weight.add_(1)
    before = model.weight.detach().clone()

    def interrupted() -> None:
        with ema.swapped(list(model.parameters())):
            assert not torch.equal(model.weight, before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.equal(model.weight, before)
    assert model.weight.requires_grad


def test_another_number_of_tensors_is_refused():
    with pytest.raises(LatentDiffError, match="1 tensors for an average of 2"):
        EMA([torch.ones(1), torch.ones(2)], 0.1).copy_to([torch.ones(1)])


def test_two_runs_agree_in_every_bit():
    def run() -> list[torch.Tensor]:
        torch.manual_seed(1)
        parameters = [torch.randn(37), torch.randn(5, 5), torch.randn(0)]
        ema = EMA(parameters, 0.1)
        for step in range(1, 30):
            for parameter in parameters:
                parameter.add_(torch.randn_like(parameter))
            ema.update(step, torch.tensor(float(step % 3 > 0)))
        return ema.tensors

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
