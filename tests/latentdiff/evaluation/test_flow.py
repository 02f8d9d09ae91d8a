"""The density by the probability-flow ODE, where it is known: Gaussians with rotated spectra."""

import math

import pytest
import torch

from latentdiff import LatentDiffError, Schedule
from latentdiff.diffusion.process import Process
from latentdiff.evaluation.flow import angles, log_density, velocity

T = 1000


def problem(size, prediction="v", zero=False):
    """Latents of covariance Q diag(lambda) Q^T, the ideal network for them, and their log-density at an angle."""
    generator = torch.Generator().manual_seed(size)
    rotation, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    spectrum = torch.logspace(-2, math.log10(4), size, dtype=torch.float64)
    process = Process(Schedule.named("linear", T, beta_start=1e-4, beta_end=0.02, zero_terminal_snr=zero), prediction)
    known = angles(process)

    def predict(x, t):
        index = t[0].clamp(0, T - 1)
        low = int(index.floor())
        high = min(low + 1, T - 1)
        phi = torch.lerp(known[low], known[high], index - low)
        alpha, sigma = phi.cos(), phi.sin()
        gain = alpha * spectrum / (alpha**2 * spectrum + sigma**2)
        x0 = ((x @ rotation) * gain) @ rotation.T
        noise = (x - alpha * x0) / sigma
        return {"x0": x0, "eps": noise, "v": alpha * noise - sigma * x0}[prediction]

    def log_prob(x, phi):
        variances = math.cos(phi) ** 2 * spectrum + math.sin(phi) ** 2
        return -0.5 * ((x @ rotation) ** 2 / variances + (2 * math.pi * variances).log()).sum(1)

    start, end = float(known[0]), float(known[-1])
    scale = (math.cos(start) ** 2 * spectrum + math.sin(start) ** 2).sqrt()
    x = (torch.randn(3, size, generator=generator, dtype=torch.float64) * scale) @ rotation.T
    return velocity(predict, process), x, start, end, log_prob(x, start)


@pytest.mark.parametrize(("prediction", "zero"), [("v", True), ("v", False), ("x0", True), ("eps", False)])
def test_the_exact_trace(prediction, zero):
    """64 dimensions, to 0.01 nats; without zero terminal SNR the end is normal only to within alpha_T."""
    v, x, start, end, truth = problem(64, prediction, zero)
    found = log_density(v, x, start, end, probes=None, tolerance=1e-6)
    assert (found.nats - truth).abs().max() < (0.01 if zero else 0.05)
    assert found.standard_error.tolist() == [0, 0, 0]


def test_hutchinsons_trace():
    """512 dimensions: within two standard errors and 0.05 nats, the standard error at most 10 nats."""
    v, x, start, end, truth = problem(512, zero=True)
    found = log_density(v, x, start, end, probes=20)
    assert (found.standard_error <= 10).all()
    error = (found.nats - truth).abs()
    assert (error <= 2 * found.standard_error + 0.05).float().mean() >= 2 / 3
    assert (error <= 4 * found.standard_error + 0.05).all()


def test_one_probe_says_nothing_of_its_error():
    v, x, start, end, _ = problem(16)
    assert log_density(v, x, start, end, probes=1).standard_error.isnan().all()


def test_a_prediction_without_a_flow():
    process = Process(Schedule.named("linear", 10), "mean")
    with pytest.raises(LatentDiffError, match="predicts 'mean'"):
        velocity(lambda x, t: x, process)(torch.zeros(1, 2), 1.0)
