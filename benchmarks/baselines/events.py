"""Event-conditioned trajectories as Z23 (Finzi et al. 2023) samples them, without ddmlib.

The variance-exploding SDE, even steps of Euler-Maruyama, one noise level a trajectory; the
conditional score with the logistic stand-in for the normal distribution function, and 1e-3 added
to the variance.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

SIGMA_MIN, SIGMA_MAX = 1e-3, 300.0
LOG_GROWTH = math.log(SIGMA_MAX / SIGMA_MIN)


def sigma_at(t: Tensor) -> Tensor:
    return SIGMA_MIN * torch.sqrt(torch.expm1(2 * LOG_GROWTH * t))


def denoised(network: nn.Module, x: Tensor, sigma: Tensor, ratios: tuple[float, float]) -> Tensor:
    """E[x_0 | x_t] of a network that predicts the velocity of (x_0, noise), sigma (n, 1, 1)."""
    r = torch.sqrt(1 + sigma**2)
    velocity = network(x / r, torch.log(sigma.clamp(*ratios))[..., 0])
    return x / r**2 - sigma / r * velocity


def conditional_score(
    network: nn.Module,
    constraint: Callable[[Tensor], Tensor],
    x: Tensor,
    sigma: Tensor,
    ratios: tuple[float, float],
) -> Tensor:
    x = x.detach().requires_grad_()
    x_0 = denoised(network, x, sigma, ratios)
    c = constraint(x_0)
    (g,) = torch.autograd.grad(c.sum(), x_0, retain_graph=True)
    (jg,) = torch.autograd.grad(x_0, x, g)
    s = sigma * torch.sqrt((g * jg).sum((1, 2), keepdim=True).abs() + 1e-3)
    pull = 1.6 * torch.sigmoid(-1.6 * c[:, None, None] / s) / s
    return ((x_0 - x) / sigma**2 + pull * jg).detach()


def euler_maruyama(
    network: nn.Module,
    constraint: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    steps: int,
    ratios: tuple[float, float],
    generator: torch.Generator,
    only: int | None = None,
) -> Tensor:
    """Sample in so many steps; ``only`` takes that many of them, the first, to be timed."""
    times = torch.linspace(1, 0, steps + 1)
    x = SIGMA_MAX * torch.randn(shape, generator=generator)
    for t, s in list(pairwise(times))[:only]:
        sigma = sigma_at(t).expand(shape[0], 1, 1)
        score = conditional_score(network, constraint, x, sigma, ratios)
        diffusion = 2 * LOG_GROWTH * (sigma**2 + SIGMA_MIN**2) * (t - s)  # g² dt
        x = x + diffusion * score
        if s > 0:
            x = x + torch.sqrt(diffusion) * torch.randn(shape, generator=generator)
    return x
