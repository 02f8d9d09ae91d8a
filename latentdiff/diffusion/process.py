"""The diffusion process: forward process, posterior, predictions, reverse process, losses.

Pure functions of tensors. x0, x_t and noise are (B, ...); t is int64 (B,) or () in 0 ... T-1, the paper's t minus 1.
Computed in float32, or float64 where the input is, and returned so; all densities and divergences are in nats. Equation
numbers are those of DDPM (arXiv 2006.11239) unless another paper is named.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import LatentDiffError, check_choice
from .samplers import Spacing
from .schedule import Schedule, at_least_float32, looks_at_values

Prediction = Literal["eps", "x0", "v", "mean"]  # noise, clean latents, alpha * noise - sigma * x0, mean of x_{t-1}
Weighting = Literal["simple", "elbo", "min_snr"]
Variance = Literal["beta", "posterior"]  # of the reverse step

PREDICTIONS: tuple[Prediction, ...] = ("eps", "x0", "v", "mean")
WEIGHTINGS: tuple[Weighting, ...] = ("simple", "elbo", "min_snr")
VARIANCES: tuple[Variance, ...] = ("beta", "posterior")


class Process(NamedTuple):
    """The forward process of a model, what its network predicts, and the timesteps it expects to be sampled at."""

    schedule: Schedule
    prediction: Prediction
    spacing: Spacing = "trailing"
    offset: int = 0  # of leading spacing
    final_sigma_zero: bool = (
        True  # False: sampling ends at the noise level of t = 0, as in the original Stable Diffusion
    )


class Gaussian(NamedTuple):
    """A normal distribution with independent elements; `var` broadcasts against `mean`."""

    mean: Tensor
    var: Tensor


# --- the forward process ---


def forward_step(x_prev: Tensor, t: Tensor, schedule: Schedule) -> Gaussian:
    """q(x_t | x_{t-1}): a little less signal, a little more noise (equation 2)."""
    beta = schedule.gather(schedule.betas, t, x_prev)
    return Gaussian((1 - beta).sqrt() * x_prev, beta)


def forward_kernel(x0: Tensor, t: Tensor, schedule: Schedule) -> Gaussian:
    """q(x_t | x0): all steps up to t at once (equation 4)."""
    alpha, sigma = schedule.at(t, x0)
    return Gaussian(alpha * x0, sigma.square())


def add_noise(x0: Tensor, noise: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """x_t: the draw from q(x_t | x0) that standard normal noise makes, in the dtype of x0.

    Raises:
        LatentDiffError: x0 and noise differ in shape, or x0 is not of floating point.
    """
    _check_same_shape("noise", noise, "x0", x0)
    alpha, sigma = schedule.at(t, x0)
    return (alpha * x0 + sigma * noise).to(x0.dtype)


def posterior(x0: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule) -> Gaussian:
    """q(x_{t-1} | x_t, x0) by Bayes' rule (equations 6 and 7). At t = 0 it is x0 itself, with variance 0."""
    c0, ct = _posterior_factors(t, schedule, x_t)
    return Gaussian(c0 * x0 + ct * x_t, _posterior_variance(t, schedule, x_t))


def sample_timesteps(
    batch_size: int, num_timesteps: int, generator: torch.Generator | None = None, *, stratified: bool = True
) -> Tensor:
    """Random timesteps (batch_size,) on the CPU, each uniform over 0 ... T-1.

    Stratified, the range is cut into `batch_size` equal parts, one draw falls in each, and the draws are shuffled: the
    same expectation, less variance (arXiv 2107.00630, appendix I.1), and every slice of a batch is fair. (The trainings
    draw theirs picture by picture, unshuffled: `sample_timestep` in data/batches.py.)
    """
    if batch_size < 1 or num_timesteps < 1:
        raise LatentDiffError(
            f"batch_size={batch_size!r}, num_timesteps={num_timesteps!r}: expected at least 1 of each"
        )
    uniform = torch.rand(batch_size, generator=generator, dtype=torch.float64)
    if stratified:
        parts = torch.randperm(batch_size, generator=generator)
        uniform = (parts + uniform) / batch_size
    return (uniform * num_timesteps).long().clamp(max=num_timesteps - 1)


# --- what a network may predict ---


def check_prediction(prediction: str, schedule: Schedule) -> None:
    """Refuse an unknown prediction, and `eps` on a schedule that ends in pure noise.

    Raises:
        LatentDiffError: with the reason.
    """
    check_choice("prediction", prediction, PREDICTIONS)
    if prediction == "eps" and schedule.has_zero_terminal_snr:
        raise LatentDiffError(
            "prediction 'eps' does not work with zero terminal SNR: at the last timestep x_t is all noise, so the "
            "noise says nothing about x0 (x0 = (x_t - sigma * eps) / alpha with alpha = 0); use 'v' or 'x0'"
        )


def target(x0: Tensor, noise: Tensor, t: Tensor, prediction: Prediction, schedule: Schedule) -> Tensor:
    """What the network should have said at x_t = add_noise(x0, noise, t)."""
    check_choice("prediction", prediction, PREDICTIONS)
    if prediction == "eps":
        return at_least_float32(noise)
    if prediction == "x0":
        return at_least_float32(x0)
    alpha, sigma = schedule.at(t, x0)
    if prediction == "v":
        return alpha * noise - sigma * x0
    return posterior(x0, alpha * x0 + sigma * noise, t, schedule).mean


def to_x0(output: Tensor, x_t: Tensor, t: Tensor, prediction: Prediction, schedule: Schedule) -> Tensor:
    """The clean latents that a prediction at x_t stands for.

    Raises:
        LatentDiffError: unknown prediction, or `eps` at a timestep where alpha is 0 (seen on the CPU only: on a GPU
            looking would wait for the device, and the result is not finite; `check_prediction` refuses it up front).
    """
    check_choice("prediction", prediction, PREDICTIONS)
    _check_same_shape("output", output, "x_t", x_t)
    if prediction == "x0":
        return at_least_float32(output)
    if prediction == "mean":
        c0, ct = _posterior_factors(t, schedule, x_t)
        return (output - ct * x_t) / c0
    alpha, sigma = schedule.at(t, x_t)
    if prediction == "v":
        return alpha * x_t - sigma * output
    if looks_at_values(alpha) and bool((alpha == 0).any()):
        check_prediction("eps", schedule)
    return (x_t - sigma * output) / alpha


def from_x0(x0: Tensor, x_t: Tensor, t: Tensor, prediction: Prediction, schedule: Schedule) -> Tensor:
    """The prediction at x_t that stands for clean latents x0: the inverse of `to_x0`."""
    check_choice("prediction", prediction, PREDICTIONS)
    if prediction == "x0":
        return at_least_float32(x0)
    if prediction == "mean":
        return posterior(x0, x_t, t, schedule).mean
    alpha, sigma = schedule.at(t, x_t)
    eps = (x_t - alpha * x0) / sigma
    return eps if prediction == "eps" else alpha * eps - sigma * x0


def convert(
    output: Tensor, x_t: Tensor, t: Tensor, source: Prediction, wanted: Prediction, schedule: Schedule
) -> Tensor:
    """One kind of prediction as another: `source` as `wanted`, both at x_t."""
    return from_x0(to_x0(output, x_t, t, source, schedule), x_t, t, wanted, schedule)


# --- the reverse process ---


def reverse_variance(t: Tensor, variance: Variance, schedule: Schedule, like: Tensor) -> Tensor:
    """Variance of the reverse step p(x_{t-1} | x_t), shaped to multiply `like`.

    `beta` is beta_t, the best choice where x0 is spread like x_T; `posterior` that of q(x_{t-1} | x_t, x0), the best
    where x0 is a single point (section 3.2). At t = 0 both are beta_0: that step is the reconstruction.

    The bound is tighter with `beta` on spread-out data: the first steps' true reverse variance is larger than the
    posterior's. On the mixture of tests/latentdiff/test_elbo.py `posterior` is looser by more than 0.3 bits per
    dimension at T = 1000.
    """
    check_choice("reverse variance", variance, VARIANCES)
    beta = schedule.gather(schedule.betas, t, like)
    if variance == "beta":
        return beta
    return torch.where(is_first(t, like), beta, _posterior_variance(t, schedule, like))


def reverse_step(
    output: Tensor, x_t: Tensor, t: Tensor, prediction: Prediction, variance: Variance, schedule: Schedule
) -> Gaussian:
    """p(x_{t-1} | x_t): the posterior with the network's x0 in place of the true one (equation 1)."""
    x0 = to_x0(output, x_t, t, prediction, schedule)
    return Gaussian(posterior(x0, x_t, t, schedule).mean, reverse_variance(t, variance, schedule, x_t))


# --- losses ---


def loss_weight(
    t: Tensor,
    prediction: Prediction,
    weighting: Weighting,
    schedule: Schedule,
    like: Tensor,
    *,
    min_snr_gamma: float = 5.0,
    variance: Variance = "beta",
) -> Tensor:
    """Weight of the squared error of a prediction at t, shaped to multiply `like`.

    `simple` is 1 (equation 14). `elbo` is 1 / (2 var_t) on the mean of the reverse step (equation 8), `min_snr` is
    min(snr, gamma) on x0 (arXiv 2303.09556, section 3.4); either is the same number whatever is predicted. Under zero
    terminal SNR the last timestep's `min_snr` weight is 0 and nothing is divided by zero.

    Raises:
        LatentDiffError: unknown weighting or prediction, or `eps` where the noise says nothing about x0.
    """
    check_choice("weighting", weighting, WEIGHTINGS)
    check_choice("prediction", prediction, PREDICTIONS)
    alpha, sigma = schedule.at(t, like)
    if weighting == "simple":
        return torch.ones_like(alpha)
    if not min_snr_gamma > 0:
        raise LatentDiffError(f"min_snr_gamma={min_snr_gamma!r}: expected a positive number")
    c0, _ = _posterior_factors(t, schedule, like)
    if prediction == "eps":
        check_prediction("eps", schedule)
        x0_error = sigma / alpha  # error of x0 for an error of 1 in the prediction
    else:
        x0_error = {"x0": torch.ones_like(alpha), "v": sigma, "mean": 1 / c0}[prediction]
    if weighting == "min_snr":
        on_x0 = (alpha / sigma).square().clamp(max=min_snr_gamma)
    else:
        on_x0 = c0.square() / (2 * reverse_variance(t, variance, schedule, like))
    return on_x0 * x0_error.square()


def diffusion_loss(
    output: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    prediction: Prediction,
    schedule: Schedule,
    *,
    weighting: Weighting = "simple",
    min_snr_gamma: float = 5.0,
    variance: Variance = "beta",
) -> Tensor:
    """Weighted squared error of the prediction at add_noise(x0, noise, t), mean over elements: (B,).

    Raises:
        LatentDiffError: as `check_prediction` and `loss_weight`, or shapes differ.
    """
    check_prediction(prediction, schedule)
    _check_same_shape("output", output, "x0", x0)
    _check_same_shape("noise", noise, "x0", x0)
    weight = loss_weight(t, prediction, weighting, schedule, x0, min_snr_gamma=min_snr_gamma, variance=variance)
    error = (at_least_float32(output) - target(x0, noise, t, prediction, schedule)).square()
    return (weight * error).flatten(1).mean(1)


# --- shared ---


def _posterior_factors(t: Tensor, schedule: Schedule, like: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of x0 and x_t in the mean of q(x_{t-1} | x_t, x0)."""
    beta = schedule.gather(schedule.betas, t, like)
    var, alpha_prev, var_prev = (
        schedule.gather(table, t, like)
        for table in (schedule.sigma.square(), schedule.alpha_prev, schedule.sigma_prev.square())
    )
    return alpha_prev * beta / var, (1 - beta).sqrt() * var_prev / var


def _posterior_variance(t: Tensor, schedule: Schedule, like: Tensor) -> Tensor:
    """beta-tilde_t of equation 7."""
    return schedule.gather(schedule.betas * (schedule.sigma_prev / schedule.sigma).square(), t, like)


def is_first(t: Tensor, like: Tensor) -> Tensor:
    """Where t is 0, shaped to broadcast against `like`."""
    return (t == 0).view(-1, *[1] * (like.dim() - 1))


def _check_same_shape(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse what would silently broadcast, and integers, which would silently be rounded."""
    if x.shape != other.shape:
        raise LatentDiffError(
            f"{name} has shape {tuple(x.shape)} and {other_name} {tuple(other.shape)}; expected the same"
        )
    for label, tensor in ((name, x), (other_name, other)):
        if not tensor.is_floating_point():
            raise LatentDiffError(f"{label} is {tensor.dtype}; expected floating point")
