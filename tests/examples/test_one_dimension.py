"""The teaching script: its densities against independent float64 computations, and the script as a reader runs it."""

import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

from latentdiff import Schedule

SCRIPT = Path(__file__).parents[2] / "examples" / "one_dimension.py"


def load():
    spec = importlib.util.spec_from_file_location("one_dimension", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


one = load()
X = one.GRID.numpy()


def modes(density):
    """Heights of a density's peaks (a thousandth of the highest at least), and the lowest point between them."""
    inner = density[1:-1]
    is_peak = (inner > density[:-2]) & (inner >= density[2:]) & (inner > 1e-3 * density.max())
    peaks = np.flatnonzero(is_peak) + 1
    return density[peaks], density[peaks[0] : peaks[-1] + 1].min()


@pytest.mark.parametrize("num_timesteps", [4, 8, 40, 1000])
@pytest.mark.parametrize("x_t", [-2.5, -0.75, 0.0, 1.1])
def test_the_reverse_conditional_is_a_density(num_timesteps, x_t):
    """Bayes' rule divides by the closed-form q(x_t): any mismatch of kernel, prior and evidence shows as mass."""
    schedule = Schedule.named("cosine", num_timesteps)
    for t in (num_timesteps // 4 - 1, num_timesteps - 1):
        density = one.reverse_conditional(one.DATA, x_t, t, schedule).numpy()
        assert np.trapezoid(density, X) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("num_timesteps", "t"), [(8, 1), (8, 6), (1000, 249), (1000, 0)])
def test_gaussian_data_have_the_closed_form_reverse(num_timesteps, t):
    """Condition the joint Gaussian of (x_{t-1}, x_t), built from the betas alone."""
    mean, std, x_t = 0.4, 0.7, -0.3
    schedule = Schedule.named("cosine", num_timesteps)
    betas = schedule.betas.numpy()
    signal = np.prod(1 - betas[:t])  # alpha_bar one step earlier
    prev_mean, prev_var = math.sqrt(signal) * mean, signal * std**2 + 1 - signal
    root = math.sqrt(1 - betas[t])
    gain = root * prev_var / ((1 - betas[t]) * prev_var + betas[t])  # covariance over the variance of x_t
    expected = scipy.stats.norm.pdf(
        X, prev_mean + gain * (x_t - root * prev_mean), math.sqrt(prev_var * (1 - gain * root))
    )
    data = one.Mixture(*torch.tensor([[1.0], [mean], [std]], dtype=torch.float64))
    found = one.reverse_conditional(data, x_t, t, schedule)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-9 * expected.max())
    assert one.total_variation(found, one.matched_gaussian(found)[0]) < 1e-6  # the grid ends at five deviations


def test_a_coarse_step_back_has_two_modes_and_a_fine_one_is_nearly_gaussian():
    coarse, middle, fine = (one.step_back(count) for count in (8, 40, 1000))
    peaks, valley = modes(coarse.numpy())
    assert len(peaks) == 2
    assert valley < 0.7 * peaks.min()
    assert [len(modes(density.numpy())[0]) for density in (middle, fine)] == [1, 1]
    gaps = [one.total_variation(density, one.matched_gaussian(density)[0]) for density in (coarse, middle, fine)]
    assert gaps[0] > 0.2
    assert 0.005 < gaps[1] < 0.03
    assert gaps[2] < 2e-4


def test_the_gap_to_a_gaussian_falls_like_the_step_count_to_the_power_of_minus_three_halves():
    """The slope that panel 2d claims; the leading error is the third derivative of log q times beta^(3/2)."""
    gaps = [one.total_variation(p, one.matched_gaussian(p)[0]) for p in map(one.step_back, (200, 400, 800))]
    slopes = np.log2(np.divide(gaps[:-1], gaps[1:]))
    assert slopes == pytest.approx([1.5, 1.5], abs=0.05)


def test_all_step_counts_are_compared_at_one_noise_level():
    levels = [Schedule.named("cosine", count).alpha_bar[count // 4 - 1].item() for count in (8, 40, 200, 1000)]
    assert levels == pytest.approx([levels[0]] * 4, rel=1e-12)


@pytest.mark.parametrize("sigma", [0.1, 0.6, 1.0])
def test_noised_data_and_the_best_guess_against_integrals_over_x0(sigma):
    alpha = math.sqrt(1 - sigma**2)
    clean = sum(w * scipy.stats.norm.pdf(X, m, s) for w, m, s in zip(*(v.numpy() for v in one.DATA), strict=True))
    points = torch.tensor([-2.0, -0.7, 0.1, 1.5], dtype=torch.float64)
    joint = clean * scipy.stats.norm.pdf(points.numpy()[:, None], alpha * X, sigma)
    evidence = np.trapezoid(joint, X)
    level = torch.tensor(alpha, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64)
    np.testing.assert_allclose(one.DATA.noised(*level).density(points), evidence, rtol=1e-9)
    np.testing.assert_allclose(one.DATA.denoise(points, *level), np.trapezoid(X * joint, X) / evidence, rtol=1e-9)


def test_total_variation_and_the_matched_gaussian_of_known_gaussians():
    p, q = (one.normal(one.GRID, torch.tensor(mean), torch.tensor(0.09)) for mean in (-0.2, 0.4))
    assert one.total_variation(p, q) == pytest.approx(math.erf(0.6 / (2 * math.sqrt(2) * 0.3)), abs=1e-6)
    assert one.matched_gaussian(q)[1:] == pytest.approx((0.4, 0.3), abs=1e-6)


def test_ks_distance_is_scipys():
    samples = torch.randn(500, dtype=torch.float64)
    data = one.Mixture(*torch.tensor([[1.0], [0.2], [1.1]], dtype=torch.float64))
    expected = scipy.stats.kstest(samples.numpy(), scipy.stats.norm(0.2, 1.1).cdf).statistic
    assert one.ks_distance(samples, data) == pytest.approx(expected, abs=1e-12)


@pytest.mark.slow
def test_a_seed_gives_one_picture(tmp_path, monkeypatch, capsys):
    """The whole script in this process too, where any warning of matplotlib's is an error."""
    for name, value in (("TRAIN_STEPS", 120), ("BATCH", 64), ("CHAIN_STEPS", 10), ("SAMPLES", 300)):
        monkeypatch.setattr(one, name, value)
    threads = torch.get_num_threads()
    try:
        pictures = {}
        for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
            path = tmp_path / f"{name}.png"
            monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--output", str(path), "--seed", seed])
            one.main()
            pictures[name] = path.read_bytes()
    finally:
        torch.set_num_threads(threads)
    assert pictures["a"] == pictures["b"]
    assert pictures["a"] != pictures["c"]


@pytest.mark.slow
def test_the_script_draws_its_picture(tmp_path):
    path = tmp_path / "new" / "picture.png"
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--output", str(path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    assert str(path) in run.stdout
    assert float(re.search(r"KS distance ([\d.]+)", run.stdout)[1]) < 0.025
    first, last, floor = map(
        float, re.search(r"loss ([\d.]+) to ([\d.]+), exact denoiser ([\d.]+)", run.stdout).groups()
    )
    assert floor - 0.001 < last < floor + 0.005 < first


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    with pytest.raises(SystemExit, match=re.escape("pip install 'latentdiff[examples]'")):
        load()
