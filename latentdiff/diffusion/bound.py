"""The variational bound on the negative log-likelihood, term by term, in nats (DDPM, arXiv 2006.11239, eq. 5)."""

import math

import torch
from torch import Tensor

from .process import Gaussian, Variance, forward_kernel, is_first, posterior, reverse_variance
from .schedule import Schedule


def gaussian_kl(p: Gaussian, q: Gaussian) -> Tensor:
    """Return KL(p || q) in nats, summed over all dimensions but the first: (B,)."""
    terms = (q.var / p.var).log() + (p.var + (p.mean - q.mean).square()) / q.var - 1
    return 0.5 * terms.flatten(1).sum(1)


def prior_term(x0: Tensor, schedule: Schedule) -> Tensor:
    """Return L_T = KL(q(x_T | x0) || N(0, I)) in nats, (B,); 0 under zero terminal SNR."""
    last = torch.tensor(schedule.num_timesteps - 1, device=schedule.betas.device)
    end = forward_kernel(x0, last, schedule)
    return gaussian_kl(end, Gaussian(torch.zeros_like(end.mean), torch.ones_like(end.var)))


def bound_term(x0: Tensor, x_t: Tensor, x0_hat: Tensor, t: Tensor, variance: Variance, schedule: Schedule) -> Tensor:
    """Return the negative ELBO's term for timestep t in nats, (B,) (equation 5).

    For t >= 1 it is KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)), for t = 0 the reconstruction term -log p(x0 | x_1)
    with variance beta_0. `x0_hat` is the network's estimate of x0. Summed over t and averaged over x_t, these terms
    plus `prior_term` bound -log p(x0) from above.
    """
    true = posterior(x0, x_t, t, schedule)
    model = Gaussian(posterior(x0_hat, x_t, t, schedule).mean, reverse_variance(t, variance, schedule, x_t))
    first = is_first(t, x_t)
    true_var = torch.where(first, model.var, true.var)  # the true variance is 0 at t = 0: avoid log(0)
    kl = (model.var / true_var).log() + (true_var + (true.mean - model.mean).square()) / model.var - 1
    reconstruction = (2 * math.pi * model.var).log() + (x0 - model.mean).square() / model.var
    return 0.5 * torch.where(first, reconstruction, kl).flatten(1).sum(1)
