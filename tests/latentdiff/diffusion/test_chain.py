"""The forward chain: its mean and covariances in closed form, its timesteps, and its end under zero terminal SNR."""

import pytest
import torch

from latentdiff import Schedule
from latentdiff.diffusion.chain import forward_chain, noisier_timesteps
from latentdiff.diffusion.samplers import timesteps


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("times", [[300, 301, 700, 999], [0, 1, 998, 999], [960, 999, 999, 999]])
def test_marginals_and_covariances(times, zero_terminal_snr):
    """States are linear in x0 and the noises, so that unit vectors give their coefficients, and these all moments.

    x_s given x0 is N(alpha_s x0, sigma_s^2), and Cov(x_s, x_u) = alpha_u / alpha_s sigma_s^2 for s < u: a Markov chain.
    """
    schedule = Schedule.named(zero_terminal_snr=zero_terminal_snr)
    units = torch.eye(5, dtype=torch.float64)  # x0, the noise of x_t, the noise of three later states
    alpha, sigma = schedule.alpha[times], schedule.sigma[times]
    noise = units[2:].T[..., None]  # a picture for each unit vector
    x_t = alpha[0] * units[0] + sigma[0] * units[1]
    later = torch.tensor(times[1:]).expand(5, 3)
    states = forward_chain(x_t[:, None], torch.full((5,), times[0]), later, noise, schedule)
    coefficients = torch.stack([x_t, *(state[:, 0] for state in states)])  # of each state, (4, 5)
    assert torch.allclose(coefficients[:, 0], alpha, atol=1e-14)
    found = coefficients[:, 1:] @ coefficients[:, 1:].T
    for i, s in enumerate(times):
        for j, u in enumerate(times[i:], i):
            ratio = 1.0 if s == u else float(alpha[j] / alpha[i])
            assert float(found[i, j]) == pytest.approx(ratio * float(sigma[i]) ** 2, abs=1e-14)


def test_under_zero_terminal_snr_the_last_state_is_its_noise():
    schedule = Schedule.named(zero_terminal_snr=True)
    x_t, noise = torch.randn(2, 3), torch.randn(2, 2, 3)
    times = torch.tensor([[999, 999], [998, 999]])  # the first picture is there already
    first, second = forward_chain(x_t, torch.tensor([999, 900]), times, noise, schedule)
    assert torch.equal(first[0], x_t[0])
    assert torch.equal(second[0], x_t[0])
    assert torch.equal(second[1], noise[1, 1])
    assert first.isfinite().all()


@pytest.mark.parametrize("num_steps", [10, 25, 37, 50])
def test_the_gaps_are_those_of_a_sampling_grid(num_steps):
    """From wherever the grid is, the timesteps before are found again, to 1; there are none beyond T-1."""
    grid = timesteps(1000, num_steps)
    for place, t in enumerate(grid):
        found = noisier_timesteps(t, num_steps, 4, 1000)
        expected = grid[max(0, place - 4) : place][::-1]
        taken = [s for s, before in zip(found, [t, *found], strict=False) if s > before]
        assert len(expected) - (taken != expected) <= len(taken) <= len(expected)
        assert all(abs(s - wanted) <= 1 for s, wanted in zip(taken, expected, strict=False))
        assert len(found) == 4
        assert found == sorted(found)
        assert max(found) <= 999
