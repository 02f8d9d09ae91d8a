"""The diffusion process: forward process, posterior, predictions, reverse process and losses.

Pure functions of tensors. x0, x_t and noise are (B, ...); t is int64, (B,) or (), in 0 ... T-1 (the paper's t minus 1).
Everything is computed and returned in float32, or in float64 if the input is; densities and divergences are in nats.
Equation numbers refer to DDPM (arXiv 2006.11239) unless another paper is named. Functions raise LatentDiffError on
unknown options, on shapes or dtypes that do not match, and on `eps` predictions under zero terminal SNR.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import LatentDiffError, check_choice
from .samplers import Spacing
from .schedule import Schedule, at_least_float32, can_read_values

Prediction = Literal["eps", "x0", "v", "mean"]  # noise, clean latents, alpha * noise - sigma * x0, mean of x_{t-1}
Weighting = Literal["simple", "elbo", "min_snr"]
Variance = Literal["beta", "posterior"]  # of the reverse step

PREDICTIONS: tuple[Prediction, ...] = ("eps", "x0", "v", "mean")
WEIGHTINGS: tuple[Weighting, ...] = ("simple", "elbo", "min_snr")
VARIANCES: tuple[Variance, ...] = ("beta", "posterior")


class Process(NamedTuple):
    """A model's noise schedule, what its network predicts, and the timesteps it is sampled at."""

    schedule: Schedule
    prediction: Prediction
    spacing: Spacing = "trailing"
    offset: int = 0  # added to the timesteps of "leading" spacing
    final_sigma_zero: bool = True  # False: end at the noise level of t = 0, as the original Stable Diffusion does

    def x0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the clean latents that the network's output at x_t implies."""
        return to_x0(output, x_t, t, network_output(self.prediction), self.schedule)


class Gaussian(NamedTuple):
    """A Gaussian with diagonal covariance; `var` broadcasts against `mean`."""

    mean: Tensor
    var: Tensor


# --- the forward process ---


def forward_step(x_prev: Tensor, t: Tensor, schedule: Schedule) -> Gaussian:
    """Return q(x_t | x_{t-1}), a single noising step (equation 2)."""
    beta = schedule.gather(schedule.betas, t, x_prev)
    return Gaussian((1 - beta).sqrt() * x_prev, beta)


def forward_kernel(x0: Tensor, t: Tensor, schedule: Schedule) -> Gaussian:
    """Return q(x_t | x0), all noising steps up to t at once (equation 4)."""
    alpha, sigma = schedule.at(t, x0)
    return Gaussian(alpha * x0, sigma.square())


def add_noise(x0: Tensor, noise: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """Return x_t = alpha * x0 + sigma * noise in the dtype of x0, a sample of q(x_t | x0) for standard normal noise."""
    _check_same_shape("noise", noise, "x0", x0)
    alpha, sigma = schedule.at(t, x0)
    return (alpha * x0 + sigma * noise).to(x0.dtype)


def posterior(x0: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule) -> Gaussian:
    """Return q(x_{t-1} | x_t, x0) by Bayes' rule (equations 6 and 7); at t = 0 it is x0 with variance 0."""
    c0, ct = _posterior_factors(t, schedule, x_t)
    return Gaussian(c0 * x0 + ct * x_t, _posterior_variance(t, schedule, x_t))


def sample_timesteps(
    batch_size: int, num_timesteps: int, generator: torch.Generator | None = None, *, stratified: bool = True
) -> Tensor:
    """Sample timesteps uniformly from 0 ... T-1: (batch_size,) on the CPU.

    Stratified sampling splits the range into `batch_size` equal parts and takes one sample from each, in random order:
    the same expectation with less variance (arXiv 2107.00630, appendix I.1). Training does the same image by image and
    without shuffling; see `sample_timestep` in data/batches.py.
    """
    if batch_size < 1 or num_timesteps < 1:
        raise LatentDiffError(f"batch_size={batch_size!r}, num_timesteps={num_timesteps!r}: both must be at least 1")
    uniform = torch.rand(batch_size, generator=generator, dtype=torch.float64)
    if stratified:
        strata = torch.randperm(batch_size, generator=generator)
        uniform = (strata + uniform) / batch_size
    return (uniform * num_timesteps).long().clamp(max=num_timesteps - 1)


# --- predictions ---


def check_prediction(prediction: str, schedule: Schedule) -> None:
    """Raise LatentDiffError on an unknown prediction type, or on `eps` with a schedule that ends in pure noise."""
    check_choice("prediction", prediction, PREDICTIONS)
    if prediction == "eps" and schedule.has_zero_terminal_snr:
        raise LatentDiffError(
            "prediction 'eps' does not work with zero terminal SNR: at the last timestep x_t is pure noise, so "
            "eps says nothing about x0 (x0 = (x_t - sigma * eps) / alpha with alpha = 0); use 'v' or 'x0'"
        )


def check_weighting(weighting: str, prediction: Prediction) -> None:
    """Raise LatentDiffError on an unknown loss weighting, or on `simple` with a network that predicts the mean."""
    check_choice("weighting", weighting, WEIGHTINGS)
    if prediction == "mean" and weighting == "simple":
        raise LatentDiffError(
            "weighting 'simple' does not work with prediction 'mean': most of the mean is x_t, so its unweighted error "
            "counts an error of x0 c_0^2 times, below a millionth at high noise, where hardly anything would be "
            "learned; use 'elbo' or 'min_snr'"
        )


def network_output(prediction: Prediction) -> Prediction:
    """Return what the output F of a network estimates that is trained for a prediction.

    That is the prediction itself, but for `mean`, which is asked for as g(x_t, t) = c_t x_t + c_0 F(x_t, t) with the
    coefficients of the posterior (equation 7), since x_t is known. Comparing with that equation, F estimates x0, and
    `to_x0` of g is F. The weights `elbo` and `min_snr` of g's error and of F's give one and the same loss.
    """
    return "x0" if prediction == "mean" else prediction


def target(x0: Tensor, noise: Tensor, t: Tensor, prediction: Prediction, schedule: Schedule) -> Tensor:
    """Return the training target, the ideal prediction at x_t = add_noise(x0, noise, t)."""
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
    """Convert a prediction at x_t to the clean latents x0 that it implies.

    Where alpha is 0, `eps` implies no x0. This raises LatentDiffError on the CPU only, as reading values would
    synchronize a GPU; there the result is not finite.
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
    if can_read_values(alpha) and bool((alpha == 0).any()):
        check_prediction("eps", schedule)
    return (x_t - sigma * output) / alpha


def from_x0(x0: Tensor, x_t: Tensor, t: Tensor, prediction: Prediction, schedule: Schedule) -> Tensor:
    """Convert clean latents x0 to the prediction at x_t that implies them, the inverse of `to_x0`."""
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
    """Convert a prediction at x_t from type `source` to type `wanted`."""
    return from_x0(to_x0(output, x_t, t, source, schedule), x_t, t, wanted, schedule)


# --- the reverse process ---


def reverse_variance(t: Tensor, variance: Variance, schedule: Schedule, like: Tensor) -> Tensor:
    """Return the variance of the reverse step p(x_{t-1} | x_t), shaped to broadcast against `like`.

    `beta` is beta_t, optimal if x0 ~ N(0, I); `posterior` is the variance of q(x_{t-1} | x_t, x0), optimal if x0 is a
    single point (section 3.2). Both are beta_0 at t = 0, the reconstruction step. On spread-out data `beta` gives the
    tighter bound, since the true reverse variance of the first steps exceeds the posterior's: by more than 0.3 bits
    per dimension for the mixture of tests/latentdiff/diffusion/test_elbo.py at T = 1000.
    """
    check_choice("reverse variance", variance, VARIANCES)
    beta = schedule.gather(schedule.betas, t, like)
    if variance == "beta":
        return beta
    return torch.where(is_first(t, like), beta, _posterior_variance(t, schedule, like))


def reverse_step(
    output: Tensor, x_t: Tensor, t: Tensor, prediction: Prediction, variance: Variance, schedule: Schedule
) -> Gaussian:
    """Return p(x_{t-1} | x_t), the posterior with the network's x0 in place of the true one (equation 1)."""
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
    """Return the weight of the squared error of a prediction at t, shaped to broadcast against `like`.

    `simple` is 1 (equation 14). `elbo` weights the mean of the reverse step by 1 / (2 var_t) (equation 8), `min_snr`
    weights x0 by min(snr, gamma) (arXiv 2303.09556, section 3.4). Both are converted to the prediction type, so that
    the loss is the same for every type. Under zero terminal SNR the `min_snr` weight of the last timestep is 0.
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
        x0_error = sigma / alpha  # error of x0 per unit error of the prediction
    else:
        x0_error = {"x0": torch.ones_like(alpha), "v": sigma, "mean": 1 / c0}[prediction]
    if weighting == "min_snr":
        x0_weight = (alpha / sigma).square().clamp(max=min_snr_gamma)
    else:
        x0_weight = c0.square() / (2 * reverse_variance(t, variance, schedule, like))
    return x0_weight * x0_error.square()


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
    """Return the weighted squared error of a prediction at add_noise(x0, noise, t), averaged over elements: (B,)."""
    check_prediction(prediction, schedule)
    _check_same_shape("output", output, "x0", x0)
    _check_same_shape("noise", noise, "x0", x0)
    weight = loss_weight(t, prediction, weighting, schedule, x0, min_snr_gamma=min_snr_gamma, variance=variance)
    error = (at_least_float32(output) - target(x0, noise, t, prediction, schedule)).square()
    return (weight * error).flatten(1).mean(1)


# --- shared ---


def _posterior_factors(t: Tensor, schedule: Schedule, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of x0 and x_t in the mean of q(x_{t-1} | x_t, x0)."""
    beta = schedule.gather(schedule.betas, t, like)
    var, alpha_prev, var_prev = (
        schedule.gather(table, t, like)
        for table in (schedule.sigma.square(), schedule.alpha_prev, schedule.sigma_prev.square())
    )
    return alpha_prev * beta / var, (1 - beta).sqrt() * var_prev / var


def _posterior_variance(t: Tensor, schedule: Schedule, like: Tensor) -> Tensor:
    """Return beta-tilde_t of equation 7."""
    return schedule.gather(schedule.betas * (schedule.sigma_prev / schedule.sigma).square(), t, like)


def is_first(t: Tensor, like: Tensor) -> Tensor:
    """Return the mask t == 0, shaped to broadcast against `like`."""
    return (t == 0).view(-1, *[1] * (like.dim() - 1))


def _check_same_shape(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Raise on shapes that would silently broadcast, and on integers, which would silently be rounded."""
    if x.shape != other.shape:
        raise LatentDiffError(
            f"{name} has shape {tuple(x.shape)} and {other_name} {tuple(other.shape)}; expected the same"
        )
    for label, tensor in ((name, x), (other_name, other)):
        if not tensor.is_floating_point():
            raise LatentDiffError(f"{label} is {tensor.dtype}; expected floating point")
