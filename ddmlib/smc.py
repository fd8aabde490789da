r"""Twisted sequential Monte Carlo: guidance made exact by weights (Wu et al. 2023).

A guided sampler follows an approximate likelihood q(y | x_t), so its samples are biased.  Here many
of them, particles, run side by side down the ancestral kernels, p(x_s | x_t) = N(m(x_t, x̂), std²):
each is proposed with the guided x̂ in place of x̂, of the same variance, and is weighted with

    p(x_s | x_t) q(y | x_s) / (proposal(x_s | x_t) q(y | x_t)),

at the start with q(y | x_t) itself.  The last step is deterministic and unguided, and there the
true likelihood p(y | x_0) replaces the approximate one.  Particles are resampled systematically
when their weights have become uneven.  As their number grows the samples are distributed as
p(x_0) p(y | x_0) with p(x_0) the law of the unguided ancestral sampler *on this grid*; and for any
number the mean weight is an unbiased estimate of p(y) under that law.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ddmlib import noise, sampling
from ddmlib.guidance import Evaluation, Guided
from ddmlib.steps import ancestral_step


class Twisted(NamedTuple):
    """What `twisted` found.

    ``samples`` (*batch, particles, …): equally likely samples given the observation, standardised.
    ``log_evidence`` (*batch,): log of the unbiased estimate of p(y).  ``effective`` (steps + 1,
    *batch): effective sample size at the start and after each step, before resampling.
    """

    samples: Tensor
    log_evidence: Tensor
    effective: Tensor


@torch.no_grad()
def twisted(
    guided: Guided,
    shape: tuple[int, ...],
    *,
    steps: int = 100,
    spacing: str = "log-ratio",
    ratios: tuple[float, float] | None = None,
    threshold: float = 0.5,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> Twisted:
    """Sample given an observation, with populations of weighted particles.

    Parameters
    ----------
    guided : Guided
        Any rule of `ddmlib.guidance`, on a denoiser that is not itself guided.  Its ``y`` holds for
        all particles: (m,) or (n, m), or one for each population, (*batch, 1, m) or
        (*batch, 1, n, m).
    shape : tuple of int
        Of the samples: (*batch, particles, d) for states, (*batch, particles, length, d) for
        trajectories.  Leading axes are independent populations.
    steps, spacing, ratios
        Grid of the sampler, as in `sampling.sample`.
    threshold : float
        A population is resampled when its effective sample size falls below this share of it.
    generator : torch.Generator, optional
        Source of randomness.
    device, dtype, progress
        As in `sampling.sample`.

    Returns
    -------
    Twisted

    Raises
    ------
    ValueError
        For a shape that is not the denoiser's, a guided denoiser inside, or a threshold outside
        [0, 1].
    RuntimeError
        If all weights of a population vanish, or guidance leaves the finite numbers.

    References
    ----------
    Wu, Trippe, Naesseth, Blei and Cunningham (2023), Practical and asymptotically exact conditional
    sampling in diffusion models, NeurIPS 36.
    """
    event, d = guided.event, len(guided.standardizer.mean)
    if len(shape) < 1 + event or min(shape) < 1 or shape[-1] != d:
        raise ValueError(
            f"shape must be (*batch, particles, {'length, ' if event == 2 else ''}{d}) with "
            f"positive sizes, got {tuple(shape)}"
        )
    y = guided.observation.y
    if y.ndim > event and y.shape[-event - 1] != 1:
        raise ValueError(
            "y must have no axis of particles, or one of size 1: (*batch, 1, "
            f"{'n, ' if event == 2 else ''}m), got {tuple(y.shape)}"
        )
    if isinstance(guided.denoiser, Guided):
        raise ValueError("guided must wrap a denoiser that is not guided: join the observations")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must lie in [0, 1], got {threshold}")
    device = guided.device if device is None else device
    grid = sampling.times_for(guided, steps, spacing=spacing, ratios=ratios)
    alphas, sigmas = guided.schedule(grid[:, None])
    x = noise.normal(shape, generator=generator, device=device, dtype=dtype)
    levels = list(zip(alphas.to(x), sigmas.to(x), strict=True))
    x = x * torch.hypot(*levels[0])
    here = guided.evaluate(x, *levels[0])
    log_weights, effective = here.log_likelihood, list[Tensor]()
    log_evidence = torch.zeros_like(log_weights[..., 0])
    for level_t, level_s in tqdm(list(pairwise(levels[:-1])), disable=not progress):
        effective.append(_effective(log_weights))
        uneven = effective[-1] < threshold * log_weights.shape[-1]
        if bool(uneven.any()):
            index = _resampled(log_weights, uneven, generator)
            log_evidence = log_evidence + torch.where(uneven, _log_mean(log_weights), 0.0)
            log_weights = torch.where(uneven[..., None], 0.0, log_weights)
            x = _take(x, index)
            here = Evaluation(*(_take(value, index) for value in here))
        plain, std = ancestral_step(x, here.free, level_t, level_s)
        proposed, _ = ancestral_step(x, here.guided, level_t, level_s)
        z, offset = noise.normal_like(x, generator), (plain - proposed) / std
        x = proposed + std * z
        # log N(x; plain, std²) - log N(x; proposed, std²), with x - plain = std (z - offset)
        change = (z * offset - offset.square() / 2).sum(tuple(range(-event, 0)))
        before, here = here.log_likelihood, guided.evaluate(x, *level_s)
        log_weights = log_weights + change + here.log_likelihood - before
    effective.append(_effective(log_weights))
    x, before = here.free, here.log_likelihood  # the last step of the unguided sampler
    log_weights = log_weights + guided.log_likelihood(x) - before
    effective.append(_effective(log_weights))
    log_evidence = log_evidence + _log_mean(log_weights)
    every = torch.ones_like(log_evidence, dtype=torch.bool)
    x = _take(x, _resampled(log_weights, every, generator))
    return Twisted(x, log_evidence, torch.stack(effective))


def _log_mean(log_weights: Tensor) -> Tensor:
    return torch.logsumexp(log_weights, -1) - math.log(log_weights.shape[-1])


def _effective(log_weights: Tensor) -> Tensor:
    weights = torch.softmax(log_weights, -1)
    if not bool(torch.isfinite(weights).all()):
        raise RuntimeError("the weights of a population are all zero or not finite")
    return 1 / weights.square().sum(-1)


def _resampled(log_weights: Tensor, where: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return indices (*batch, particles): systematic resampling in the chosen populations."""
    n, on = log_weights.shape[-1], log_weights.device
    edges = torch.softmax(log_weights.double(), -1).cumsum(-1)
    drawn_on = on if generator is None else generator.device
    shift = torch.rand(
        (*where.shape, 1), generator=generator, device=drawn_on, dtype=torch.float64
    ).to(on)
    positions = (torch.arange(n, device=on) + shift) / n * edges[..., -1:]
    index = torch.searchsorted(edges, positions, right=True).clamp(max=n - 1)
    return torch.where(where[..., None], index, torch.arange(n, device=on))


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Return the particles of x (*batch, particles, …) at indices (*batch, particles)."""
    axis = index.ndim - 1
    return torch.take_along_dim(x, index.reshape(index.shape + (1,) * (x.ndim - 1 - axis)), axis)
