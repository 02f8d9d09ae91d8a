"""Samplers: invariants of every row, agreement with diffusers, order of convergence, and the sampled distribution."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from scipy.stats import ks_2samp

from latentdiff import LatentDiffError, Schedule
from latentdiff.diffusion.process import posterior, to_x0
from latentdiff.diffusion.samplers import SAMPLERS, SPACINGS, Row, ddim, make_rows, rows_at, sample, timesteps

STEPS = [1, 2, 5, 20, 50, 1000]
SCHEDULES = {
    "scaled_linear": Schedule.named(),
    "zero_snr": Schedule.named(zero_terminal_snr=True),
    "cosine": Schedule.named("cosine"),
}


def columns(rows: list[Row]) -> list[torch.Tensor]:
    return list(torch.tensor([row[1:] for row in rows], dtype=torch.float64).T)


# --- rows ---


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_row_keeps_signal_and_noise_level(name, spacing, schedule):
    for num_steps in STEPS:
        rows = make_rows(name, schedule, num_steps, spacing=spacing)
        t = [row.t for row in rows]
        alpha = torch.cat([schedule.alpha[t], torch.ones(1)])
        sigma = torch.cat([schedule.sigma[t], torch.zeros(1)])
        a, b, c, d = columns(rows)
        assert (a * alpha[:-1] + b + c - alpha[1:]).abs().max() < 1e-12
        assert ((a * sigma[:-1]).square() + d.square() - sigma[1:].square()).abs().max() < 1e-12
        assert rows[0].c == 0  # there is no x0_prev in the first row
        assert rows[-1] == Row(t[-1], 0.0, 1.0, 0.0, 0.0)  # the last row returns x0 itself
        assert len(rows) == num_steps


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("curve", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("T", [2, 100, 1000, 4000])
def test_coefficients_stay_small_on_every_schedule(curve, T, zero):
    """Large b and c that nearly cancel, as when steps in log SNR differ wildly, would not show in their sum.

    On a regular grid, no row extrapolates x0 by much more than the step before it.
    """
    schedule = Schedule.named(curve, T, zero_terminal_snr=zero)
    for name in SAMPLERS:
        for num_steps in {1, 2, min(20, T), T}:
            for spacing in ("trailing", "linspace"):
                values = torch.cat(columns(make_rows(name, schedule, num_steps, spacing=spacing)))
                assert values.isfinite().all()
                assert values.abs().max() < 10, (name, num_steps, spacing)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_keeps_the_levels_at_every_eta(eta):
    schedule = SCHEDULES["zero_snr"]
    rows = make_rows("ddim", schedule, 20, eta=eta)
    t = [row.t for row in rows]
    a, _, _, d = columns(rows)
    sigma = torch.cat([schedule.sigma[t], torch.zeros(1)])
    assert ((a * sigma[:-1]).square() + d.square() - sigma[1:].square()).abs().max() < 1e-12
    assert bool(d.any()) == (eta > 0)


def test_ddpm_rows_are_the_posterior():
    """With all T steps, a row of ddpm is q(x_{t-1} | x_t, x0)."""
    schedule = SCHEDULES["scaled_linear"]
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    for row in make_rows("ddpm", schedule, 1000):
        t = torch.tensor(row.t)
        assert row.a == pytest.approx(float(posterior(zero, one, t, schedule).mean), abs=1e-10)
        assert row.b == pytest.approx(float(posterior(one, zero, t, schedule).mean), abs=1e-10)
        assert row.d**2 == pytest.approx(float(posterior(one, one, t, schedule).var), abs=1e-10)


def test_euler_is_ddim_on_another_grid():
    schedule = SCHEDULES["scaled_linear"]
    assert make_rows("euler", schedule, 20, spacing="trailing") == make_rows("ddim", schedule, 20)
    assert make_rows("euler", schedule, 20) == make_rows("ddim", schedule, 20, spacing="linspace")
    assert make_rows("ddpm", schedule, 20) == make_rows("ddim", schedule, 20, eta=1.0)


def test_rows_take_levels_between_the_timesteps():
    """The functions take noise levels, not timesteps: a continuous grid that ends at a level above zero."""
    log_snr = torch.linspace(-8, 6, 12, dtype=torch.float64)
    alpha, sigma = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
    for name in SAMPLERS:
        a, b, c, d = SAMPLERS[name](alpha, sigma)
        assert (a * alpha[:-1] + b + c - alpha[1:]).abs().max() < 1e-12
        assert ((a * sigma[:-1]).square() + d.square() - sigma[1:].square()).abs().max() < 1e-12
        assert c[1:].all() == ("2m" in name)


# --- grids ---


def test_grids_of_the_paper():
    """arXiv 2305.08891, table 2, for T = 1000 and 10 steps (its 1-based numbers minus 1)."""
    assert timesteps(1000, 10, "leading", offset=0) == list(range(900, -1, -100))
    assert timesteps(1000, 10, "leading", offset=1) == list(range(901, 0, -100))
    assert timesteps(1000, 10, "trailing") == list(range(999, 98, -100))
    assert timesteps(1000, 10, "linspace") == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [1, 3, 7, 10, 30, 250, 999, 1000])
def test_grids_are_diffusers_and_strictly_descending(spacing, num_steps):
    theirs = DDIMScheduler(timestep_spacing=spacing)
    theirs.set_timesteps(num_steps)
    ours = timesteps(1000, num_steps, spacing)
    assert all(a > b for a, b in pairwise(ours))
    if (spacing, num_steps) != ("linspace", 1):  # diffusers uses t = 0 then: one step from noise, at the wrong end
        assert ours == theirs.timesteps.tolist()


# --- the same as diffusers ---


def model(x: torch.Tensor, t: int) -> torch.Tensor:
    """A smooth, nonlinear prediction; a linear one would hide errors in the order of convergence."""
    return torch.sin(1.7 * x + 0.3) * (0.8 + 0.4 * math.cos(t / 150)) + 0.2 * x.flip(-1)


def ours(name, schedule, prediction, x: torch.Tensor, grid, noise=None, **options) -> torch.Tensor:
    def denoise(x: torch.Tensor, t: int) -> torch.Tensor:
        return to_x0(model(x, t), x, torch.tensor(t), prediction, schedule)

    *_, last = sample(denoise, x, rows_at(name, schedule, grid, **options), noise)
    return last.x


def theirs(scheduler, num_steps: int, x: torch.Tensor, alpha_first: float, **options) -> torch.Tensor:
    """Run diffusers' loop; its Euler schedulers work in x / alpha."""
    scheduler.set_timesteps(num_steps)
    scaled = isinstance(scheduler, EulerDiscreteScheduler)
    if scaled:
        x = x / alpha_first
    for t in scheduler.timesteps:
        x = scheduler.step(model(scheduler.scale_model_input(x, t), int(t)), t, x, **options).prev_sample
    return x


PEERS = {
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "ddpm": (DDPMScheduler, {"clip_sample": False}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "euler": (EulerDiscreteScheduler, {}),
}


@pytest.mark.parametrize("num_steps", [1, 5, 10, 20, 50, 100])
@pytest.mark.parametrize(
    ("prediction", "zero", "spacing"),
    [
        ("eps", False, "trailing"),
        ("eps", False, "leading"),
        ("v", False, "trailing"),
        ("v", False, "leading"),
        ("v", True, "trailing"),  # not leading, which would not start at the last timestep
    ],
)
@pytest.mark.parametrize("name", PEERS)
def test_same_latents_as_diffusers(name, prediction, zero, spacing, num_steps):
    schedule = SCHEDULES["zero_snr" if zero else "scaled_linear"]
    cls, options = PEERS[name]
    scheduler = cls(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type={"eps": "epsilon", "v": "v_prediction"}[prediction],
        timestep_spacing=spacing,
        rescale_betas_zero_snr=zero,
        **options,
    )
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    draws = {"generator": torch.Generator().manual_seed(7)} if name in ("ddpm", "dpmpp_2m_sde") else {}
    scheduler.set_timesteps(num_steps)
    grid = [int(t) for t in scheduler.timesteps]
    if not (spacing == "leading" and name.startswith("dpmpp")):  # diffusers divides by num_steps + 1 there
        assert grid == timesteps(1000, num_steps, spacing)
    alpha_first = 2.0**-12 if zero else float(schedule.alpha[grid[0]])  # diffusers' substitute for zero signal
    expected = theirs(scheduler, num_steps, x, alpha_first, **draws)
    generator = torch.Generator().manual_seed(7)
    noise_dtype = torch.float32 if name == "dpmpp_2m_sde" else torch.float64

    def noise(_: int) -> torch.Tensor:
        return torch.randn(x.shape, generator=generator, dtype=noise_dtype)

    found = ours(name, schedule, prediction, x, grid, noise)
    # diffusers' alpha_T = 2**-12 under zero terminal SNR is a real difference, most of all in an ancestral first step.
    tolerances = {"dpmpp_2m": 1e-3, "euler": 1e-3, "dpmpp_2m_sde": 3e-3} if zero else {}
    tolerance = tolerances.get(name, 1e-4)
    assert float((found - expected).abs().max()) < tolerance * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_with_eta_is_diffusers(eta):
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        timestep_spacing="trailing",
    )
    expected = theirs(scheduler, 20, x, 1.0, eta=eta, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(7)

    def noise(_: int) -> torch.Tensor:
        return torch.randn(x.shape, generator=generator, dtype=torch.float64)

    found = ours("ddim", SCHEDULES["scaled_linear"], "eps", x, timesteps(1000, 20), noise, eta=eta)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# --- accuracy ---


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpmpp_2m", 2)])
def test_order_of_convergence(mixture, name, order):
    """Gaussian mixture, exact denoiser, grid uniform in log SNR between two noise levels above zero."""
    data = mixture([0.4, 0.6], [-1.0, 0.8], [0.3, 0.5])
    start = torch.linspace(-2, 2, 21, dtype=torch.float64)[:, None]

    def end(num_steps: int, sampler=SAMPLERS[name]) -> torch.Tensor:
        log_snr = torch.linspace(-6, 4, num_steps + 1, dtype=torch.float64)
        alpha, sigma = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
        rows = [
            Row(i, *values) for i, values in enumerate(zip(*(c.tolist() for c in sampler(alpha, sigma)), strict=True))
        ]
        *_, last = sample(lambda x, i: data.denoise(x, alpha[i], sigma[i]), start, rows)
        return last.x

    exact = end(6_000, SAMPLERS["dpmpp_2m"])
    steps = [40, 80, 160, 320, 640]
    errors = torch.tensor([float((end(n) - exact).norm()) for n in steps])
    logs = torch.tensor(steps).double().log()
    slope = -float(
        torch.linalg.lstsq(torch.stack([logs, torch.ones(5)], 1), errors.double().log()[:, None]).solution[0]
    )
    assert slope == pytest.approx(order, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("count", [4_000, 20_000])
def test_ddpm_samples_the_data(mixture, count):
    """At T = 1000: moments, the spread of each mode, and a KS test against the exact reverse chain."""
    data = mixture([0.35, 0.65], [[-1.5, 0.5], [1.0, -0.5]], [[0.3, 0.5], [0.5, 0.4]])
    schedule = Schedule.named("linear")
    T = 1000
    generator = torch.Generator().manual_seed(1)

    def normal(_: int = 0) -> torch.Tensor:
        return torch.randn(count, 2, dtype=torch.float64, generator=generator)

    def denoise(x: torch.Tensor, t: int) -> torch.Tensor:
        return data.denoise(x, schedule.alpha[t], schedule.sigma[t])

    *_, last = sample(denoise, normal(), make_rows("ddpm", schedule, T), normal)
    samples = last.x
    mean = data.weights @ data.means
    covariance = torch.diag(data.weights @ data.stds**2) + (data.weights * (data.means - mean).T) @ (data.means - mean)
    assert ((samples.mean(0) - mean).abs() < 3 * (covariance.diag() / count).sqrt()).all()
    products = (samples - mean)[:, :, None] * (samples - mean)[:, None, :]
    assert ((products.mean(0) - covariance).abs() < 3 * products.std(0) / math.sqrt(count)).all()
    nearest = data.posterior(samples, 1.0, 0.0)[0].argmax(1)
    real = data.sample(count, generator)
    real_nearest = data.posterior(real, 1.0, 0.0)[0].argmax(1)
    for mode in range(2):
        found, expected = samples[nearest == mode], real[real_nearest == mode]
        error = expected.std(0) * math.sqrt(1 / (2 * len(found)) + 1 / (2 * len(expected)))
        assert ((found.std(0) - expected.std(0)).abs() < 3 * error).all()

    x = normal()  # the exact chain: x0 from its true conditional, then the posterior
    for t in range(T - 1, -1, -1):
        weights, means, var = data.posterior(x, schedule.alpha[t], schedule.sigma[t])
        which = torch.multinomial(weights, 1, generator=generator)[:, 0]
        x0 = means[torch.arange(count), which] + var[which].sqrt() * normal()
        step = posterior(x0, x, torch.tensor(t), schedule)
        x = step.mean + step.var.sqrt() * normal()
    for axis in range(2):
        assert ks_2samp(samples[:, axis], x[:, axis]).pvalue > 0.01


# --- the loop ---


def test_the_loop_is_the_row_formula():
    rows = [Row(9, 0.5, 0.25, 0.0, 0.0), Row(4, 0.9, 0.3, -0.2, 0.1), Row(0, 0.0, 1.0, 0.0, 0.0)]
    x = torch.ones(1, 2, dtype=torch.float64)
    seen, asked = [], []

    def denoise(x: torch.Tensor, t: int) -> torch.Tensor:
        seen.append(t)
        return x + t

    steps = list(sample(denoise, x, rows, lambda i: asked.append(i) or torch.full_like(x, 10.0)))
    first = 0.5 * 1 + 0.25 * 10
    second = 0.9 * first + 0.3 * (first + 4) - 0.2 * 10 + 0.1 * 10
    assert seen == [9, 4, 0]
    assert asked == [1]  # only rows that add noise ask for it
    assert [float(step.x[0, 0]) for step in steps] == pytest.approx([first, second, second])
    assert [step.t for step in steps] == [9, 4, 0]
    assert float(steps[1].x0[0, 0]) == pytest.approx(first + 4)


def test_the_loop_is_lazy_and_draws_its_own_noise():
    x = torch.zeros(100_000)
    rows = make_rows("ddpm", SCHEDULES["scaled_linear"], 10)
    loop = sample(lambda x, _: x, x, rows)
    noise = next(loop).x / rows[0].d  # x and x0 are zero, so this is the noise
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert noise.abs().max() > 3
    assert len(list(loop)) == 9


def test_the_loop_stays_in_float32_around_a_half_precision_model():
    """Rounding x would accumulate over steps: the callable casts to its model's dtype, and its output is cast back."""
    seen = []

    def denoise(x: torch.Tensor, t: int) -> torch.Tensor:
        seen.append(x.dtype)
        return x.bfloat16() * 0.5

    *_, last = sample(denoise, torch.ones(1, 2, dtype=torch.bfloat16), make_rows("dpmpp_2m", SCHEDULES["cosine"], 5))
    assert set(seen) == {torch.float32}
    assert last.x.dtype == last.x0.dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: make_rows("dpmpp2m", s, 10), "unknown sampler 'dpmpp2m': .*; did you mean 'dpmpp_2m'"),
        (lambda s: make_rows("ddim", s, 0), "num_steps=0: expected an integer from 1 to 1000"),
        (lambda s: make_rows("ddim", s, -1), "num_steps=-1"),
        (lambda s: make_rows("ddim", s, 10**9), "num_steps=1000000000"),
        (lambda s: make_rows("ddim", s, 10.0), r"num_steps=10\.0"),
        (lambda s: make_rows("ddim", s, True), "num_steps=True"),
        (lambda s: make_rows("ddim", s, 10, spacing="even"), "unknown spacing 'even'"),
        (lambda s: make_rows("ddim", s, 10, eta=2.0), r"eta=2\.0 with sampler 'ddim'"),
        (lambda s: make_rows("ddim", s, 10, eta=math.nan), "eta=nan"),
        (lambda s: make_rows("ddpm", s, 10, eta=0.0), r"eta=0\.0 with sampler 'ddpm': only 'ddim' takes an eta"),
        (
            lambda s: make_rows("ddim", s, 1000, spacing="leading", offset=1),
            "offset=1 moves timesteps out of the range 0 to 999",
        ),
        (
            lambda s: make_rows("ddim", s, 10, offset=1),
            "offset=1 with spacing 'trailing': only 'leading' takes an offset",
        ),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(LatentDiffError, match=message):
        call(SCHEDULES["scaled_linear"])


def test_ddim_alone():
    a, b, c, d = ddim(*torch.tensor([[0.6, 1.0], [0.8, 0.0]], dtype=torch.float64))
    assert [float(v) for v in (a, b, c, d)] == [0.0, 1.0, 0.0, 0.0]
