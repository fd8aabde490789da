r"""Subset simulation: a rare event as a chain of events that are not rare (Au & Beck 2001).

A sampler is a function G of the noise ξ that it draws, and ξ is standard normal.  With thresholds
c_1 < c_2 < … ≤ 0 for the margin of the event,

    P(margin > 0) = P(margin > c_1) P(margin > c_2 | margin > c_1) ….

Each threshold is the upper quantile of the present population.  The next one starts from the
samples above it and is spread out by Metropolis moves that keep the normal law of ξ,
ξ' = √(1 - b²) ξ + b z (preconditioned Crank-Nicolson; Cotter et al. 2013), and are refused where
the margin falls below the threshold.  No gradient and no guidance is used, so this is a check of
the other estimators that shares nothing with them but the sampler.  The estimate is biased by a
term of order 1/n, and its populations must be large enough for the moves to mix.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from ddmlib import noise
from ddmlib.denoisers import Denoiser
from ddmlib.events.constraints import Event
from ddmlib.events.paths import kernel, levels
from ddmlib.sampling import Level

MOST_LEVELS = 60


@torch.no_grad()
def sampler_map(denoiser: Denoiser, grid: Tensor, xi: Tensor, rule: str) -> Tensor:
    """Return x_0 = G(ξ), the stochastic sampler with the noise ξ (steps, *batch, *shape) given."""
    pairs = levels(denoiser, grid, xi)
    x = torch.hypot(*pairs[0]) * xi[0]
    before: tuple[Tensor, Level] | None = None
    for k, (level_t, level_s) in enumerate(pairwise(pairs)):
        x_0 = denoiser.denoise(x, *level_t)
        x, std = kernel(x, x_0, level_t, level_s, before, rule)
        before = x_0, level_t
        if k + 1 < len(xi):
            x = x + std * xi[k + 1]
    return x


@torch.no_grad()
def subset_simulation(
    denoiser: Denoiser,
    event: Event,
    grid: Tensor,
    n: int,
    *,
    rule: str,
    keep: float,
    moves: int,
    like: Tensor,
    generator: torch.Generator | None,
) -> tuple[float, float, int]:
    """Return log P(E), the samples inside E at the end, and the evaluations; one population.

    Parameters
    ----------
    n : int
        Size of the population.
    keep : float
        Share that each threshold leaves.
    moves : int
        Metropolis moves of every member at each threshold.
    """
    shape, steps = (n, *event.shape), len(grid) - 1

    def margins(xi: Tensor) -> Tensor:
        x = denoiser.standardizer.inverse(sampler_map(denoiser, grid, xi, rule))
        return event.sound_margin(x)

    def draw() -> Tensor:
        return noise.normal(
            (steps, *shape), generator=generator, device=like.device, dtype=like.dtype
        )

    xi = draw()
    margin, evaluations, log_p, b = margins(xi), n * steps, 0.0, 0.5
    seeds = min(n - 1, math.ceil(keep * n))
    for _ in range(MOST_LEVELS):
        inside = int((margin > 0).sum())
        if inside >= seeds:
            return log_p + math.log(inside / n), float(inside), evaluations
        order = margin.argsort(descending=True)
        threshold = margin[order[seeds]]  # the best one that is left out
        above = int((margin > threshold).sum())
        if above == 0:
            break
        log_p += math.log(above / n)
        index = order[:above].repeat(-(-n // above))[:n]
        xi, margin = xi[:, index], margin[index]
        for _ in range(moves):
            proposal = math.sqrt(1 - b * b) * xi + b * draw()
            value = margins(proposal)
            accept = value > threshold
            xi = torch.where(accept.reshape(1, n, *(1,) * len(event.shape)), proposal, xi)
            margin = torch.where(accept, value, margin)
            evaluations += n * steps
            rate = float(accept.double().mean())
            b = min(0.99, max(1e-3, b * math.exp(rate - 0.3)))
    return -math.inf, 0.0, evaluations
