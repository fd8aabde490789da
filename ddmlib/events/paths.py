r"""Weighted paths of the reverse process: importance sampling and twisted sequential Monte Carlo.

A stochastic sampler is a Markov chain x_K → … → x_0 with Gaussian kernels
p(x_s | x_t) = N(μ(x_t, x̂), std²), and P(E) *of that sampler* is an expectation over its paths.  The
rule "ddpm" is the ancestral step; "multistep" extrapolates x̂ from the step before, which makes it
of second order (the chain then carries x̂ along).  The order matters here: ancestral steps lose
variance, and 64 of them make an event of probability 1e-4 on a Gaussian 3.7 times too rare.
Both methods here draw paths from the guided kernels q, of the same std but with x̂ given the event,
and weigh them by p/q, so both are unbiased for this P(E), however poor the guidance.  The last step
adds no noise and is never guided.

*Importance sampling* weighs whole paths.  A share β of the paths is drawn without guidance, so with
q̄ = (1 - β) q + β p no weight p/q̄ exceeds 1/β (Owen & Zhou 2000, "defensive mixture").

*Twisted sequential Monte Carlo* (Wu et al. 2023, arXiv 2306.17775) resamples on the way.  With
h_t(x_t) the guidance's own P(E | x_t) + ``guidance.least``, the weight of a step is
(p/q) h_s(x_s)/h_t(x_t), the first is h_K(x_K), and the last 1_E(x_0)/h_1(x_1): the product of the
mean weights is unbiased.  Several independent populations give its error, unless h is wrong in the
same way in all of them: paths that h takes for impossible are dropped, and do not show in the
scatter of the others.  `trust` looks for them from the other end.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ddmlib import noise
from ddmlib.denoisers import Denoiser
from ddmlib.events.constraints import Event
from ddmlib.events.estimates import effective_size, mean_exp
from ddmlib.events.guidance import Conditioned, EventGuidance
from ddmlib.sampling import Level, ancestral_step, extrapolate

RULES = ("multistep", "ddpm")


Before = tuple[Conditioned, Level] | None


class Paths(NamedTuple):
    """Ends of weighted paths.

    ``x_0`` (runs, n, *shape) in standardised units, ``log_weights`` (runs, n), and the logarithm
    of their means, ``log_probability`` (runs,), one estimate of log P(E) a run.  Of the twisted
    method also log E[h_t(x_t)] at each level, ``log_means`` (levels,), the fewest effective paths
    that each run had on its way, ``fewest`` (runs,), and how far guidance came true in each step,
    ``slopes`` (2, steps - 1): the slope of what log h did on what its gradient said of the step's
    noise, and the standard error of that slope.  ``evaluations`` are those of all runs.
    """

    x_0: Tensor
    log_weights: Tensor
    log_probability: Tensor
    log_means: Tensor
    fewest: Tensor
    slopes: Tensor
    evaluations: int


def levels(denoiser: Denoiser, grid: Tensor, like: Tensor) -> list[Level]:
    """Return (alpha, sigma) at each time of a sampler's grid, the last one free of noise."""
    alphas, sigmas = denoiser.schedule(grid.to(torch.float64).cpu()[:, None])
    pairs = list(zip(alphas.to(like), sigmas.to(like), strict=True))
    pairs[-1] = (torch.ones_like(pairs[-1][0]), torch.zeros_like(pairs[-1][1]))
    return pairs


def start(
    shape: tuple[int, ...], level: Level, like: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Draw x_K as `sampling.sample` does."""
    z = noise.normal(shape, generator=generator, device=like.device, dtype=like.dtype)
    return torch.hypot(*level) * z


def kernel(
    x_t: Tensor,
    x_0: Tensor,
    level_t: Level,
    level_s: Level,
    before: tuple[Tensor, Level] | None,
    rule: str,
) -> tuple[Tensor, Tensor]:
    """Return mean and std of p(x_s | x_t) given x̂, and the step before for "multistep"."""
    if rule == "multistep":
        x_0 = extrapolate(x_0, level_t, level_s, before)
    return ancestral_step(x_t, x_0, level_t, level_s)


def kernels(
    x_t: Tensor,
    known: Conditioned,
    level_t: Level,
    level_s: Level,
    before: Before,
    rule: str,
    guidance: EventGuidance,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean of p(x_s | x_t), the shift of the mean by guidance, and the std."""
    free = guided = None
    if before is not None:
        free, guided = (before[0].x_0, before[1]), (before[0].guided, before[1])
    mean, std = kernel(x_t, known.x_0, level_t, level_s, free, rule)
    other, _ = kernel(x_t, known.guided, level_t, level_s, guided, rule)
    # the gradient of log(P + least) instead of log P: no pull where P says next to nothing
    weight = torch.sigmoid(known.log_mass - math.log(guidance.least))
    weight = weight.reshape(weight.shape + (1,) * (x_t.ndim - weight.ndim))
    shift = weight * (other - mean)
    return mean, std * guidance.restrained(shift / std, level_t[1] / level_t[0]), std


def log_ratio(noise_s: Tensor, shift: Tensor, std: Tensor, axes: int) -> Tensor:
    """Return log q/p at x_s = mean + std·noise_s, q being p with its mean shifted."""
    shift = (shift / std).flatten(-axes).double()
    return (shift * (noise_s.flatten(-axes).double() - shift / 2)).sum(-1)


def log_p_over_mixture(log_q_p: Tensor, share: float) -> Tensor:
    """Return log p/q̄ of the mixture q̄ = (1 - share) q + share p, given log q/p."""
    if share == 0:
        return -log_q_p
    return -torch.logaddexp(log_q_p + math.log1p(-share), log_q_p.new_tensor(math.log(share)))


@torch.no_grad()
def importance(
    guidance: EventGuidance,
    grid: Tensor,
    n: int,
    *,
    rule: str,
    defensive: float,
    event: Event | None = None,
    like: Tensor,
    generator: torch.Generator | None,
) -> Paths:
    """Draw n weighted paths, the first ⌈defensive · n⌉ of them without guidance; one run.

    They are weighted for ``event``, by default the one of the guidance.
    """
    plain = math.ceil(defensive * n)
    share, axes = plain / n, len(guidance.constraint.shape)
    steps = levels(guidance, grid, like)
    x = start((n, *guidance.constraint.shape), steps[0], like, generator)
    free = (torch.arange(n, device=x.device) < plain).reshape(-1, *(1,) * axes)
    log_q_p = torch.zeros(n, dtype=torch.float64, device=x.device)
    before: Before = None
    for level_t, level_s in pairwise(steps[:-1]):
        known = guidance.condition(x, *level_t)
        mean, shift, std = kernels(x, known, level_t, level_s, before, rule, guidance)
        before = known, level_t
        z = noise.normal_like(x, generator)
        used = torch.where(free, 0.0, shift)
        log_q_p += log_ratio(z + used / std, shift, std, axes)
        x = mean + used + std * z
    x = guidance.denoiser.denoise(x, *steps[-2])
    inside = (event or guidance.constraint).holds(guidance.standardizer.inverse(x))
    log_weights = torch.where(inside, log_p_over_mixture(log_q_p, share), -torch.inf)
    none = log_weights.new_empty(0)
    cost = n * (len(grid) - 1)
    return Paths(x[None], log_weights[None], mean_exp(log_weights)[None], none, none, none, cost)


@torch.no_grad()
def twisted(
    guidance: EventGuidance,
    grid: Tensor,
    n: int,
    runs: int,
    *,
    rule: str,
    defensive: float,
    threshold: float = 0.5,
    thin: int = 1,
    until: float = 0.0,
    event: Event | None = None,
    chunk: int | None = None,
    like: Tensor,
    generator: torch.Generator | None,
) -> Paths:
    """Run ``runs`` independent populations of n paths, resampled on the way.

    A population is resampled when fewer than threshold · n effective paths are left.  In each step
    a share ``defensive`` of the paths, picked at random, follows the unguided kernel; the weight is
    that of the mixture.  The last weights are those of ``event``, by default that of the guidance.

    Where the guidance knows at which levels the event is decided (`EventGuidance.undecided`), a
    population has n paths there alone, and one in ``thin`` of them at other levels: above, paths
    are alike whatever becomes of them, and below, little is left to be told apart.

    With ``until`` the paths end, still noisy, at the first level where sigma/alpha is ``until`` or
    less, and are weighted for the law of x_t given the event as the guidance sees it; the steps
    that were taken are one fewer than ``log_means``.
    """
    shape, axes = guidance.constraint.shape, len(guidance.constraint.shape)
    steps = levels(guidance, grid, like)
    sizes = populations(guidance, steps[:-1], n, thin)
    m = sizes[0]
    x = start((runs * m, *shape), steps[0], like, generator)

    def know(x: Tensor, level: Level) -> tuple[Conditioned, Tensor]:
        parts = [guidance.condition(part, *level) for part in x.split(chunk or len(x))]
        known = Conditioned(*(torch.cat(field) for field in zip(*parts, strict=True)))
        return known, log_twist(known, guidance.least).reshape(runs, -1)

    known, log_h = know(x, steps[0])
    before: Before = None
    log_w, log_z = log_h.clone(), torch.zeros(runs, dtype=torch.float64, device=x.device)
    log_means, fewest = [mean_exp(log_w.flatten())], torch.full_like(log_z, float(n))
    evaluations, slopes = runs * m, [log_z.new_empty(2, 0)]
    for (level_t, level_s), size in zip(pairwise(steps[:-1]), sizes, strict=False):
        if level_t[1] <= until * level_t[0]:
            log_w = log_w + log_z[:, None]
            x = x.reshape(runs, m, *shape)
            found = torch.stack(log_means), fewest, torch.cat(slopes, 1), evaluations
            return Paths(x, log_w, mean_exp(log_w), *found)
        effective = effective_size(log_w)
        poor, fewest = (effective < threshold * m) | (size != m), torch.minimum(fewest, effective)
        if bool(poor.any()):
            index = systematic(log_w, generator, size)
            if size == m:
                index = torch.where(poor[:, None], index, torch.arange(m, device=x.device))
            log_z = torch.where(poor, log_z + mean_exp(log_w), log_z)
            log_w = torch.where(poor[:, None], 0.0, log_w.gather(1, index))
            log_h = log_h.gather(1, index)
            flat = (index + m * torch.arange(runs, device=x.device)[:, None]).reshape(-1)
            x, known, m = x[flat], Conditioned(*(v[flat] for v in known)), size
            if before is not None:
                before = Conditioned(*(v[flat] for v in before[0])), before[1]
        mean, shift, std = kernels(x, known, level_t, level_s, before, rule, guidance)
        before = known, level_t
        z = noise.normal_like(x, generator)
        free = _uniform(runs * m, generator, x) < defensive
        used = torch.where(free.reshape(-1, *(1,) * axes), 0.0, shift)
        log_q_p = log_ratio(z + used / std, shift, std, axes).reshape(runs, m)
        x = mean + used + std * z
        known, following = know(x, level_s)
        evaluations += runs * m
        felt = (shift / std * z).flatten(-axes).double().sum(-1)
        slopes.append(slope_of(following - log_h, felt.reshape(runs, m)))
        log_w = log_w + log_p_over_mixture(log_q_p, defensive) + following - log_h
        log_h = following
        log_means.append(mean_exp(log_z + mean_exp(log_w)))
    x = known.x_0
    inside = (event or guidance.constraint).holds(guidance.standardizer.inverse(x))
    log_w = torch.where(inside.reshape(runs, m), log_w - log_h, -torch.inf) + log_z[:, None]
    found = torch.stack(log_means), fewest, torch.cat(slopes, 1), evaluations
    return Paths(x.reshape(runs, m, *shape), log_w, mean_exp(log_w), *found)


def slope_of(y: Tensor, x: Tensor) -> Tensor:
    """Return the slope of y on x, whose mean is zero, and its standard error, (2, 1)."""
    y, square = y - y.mean(), x.square().sum().clamp(min=torch.finfo(x.dtype).tiny)
    slope = (x * y).sum() / square
    error = (x * (y - slope * x)).square().sum().sqrt() / square
    return torch.stack((slope, error))[:, None]


def populations(guidance: EventGuidance, steps: list[Level], n: int, thin: int) -> list[int]:
    """Return how many paths a population has at each level, see `twisted`."""
    low, high = guidance.undecided
    few = max(2, n // thin) if thin > 1 else n
    return [n if low <= float(sigma / alpha) <= high else few for alpha, sigma in steps]


def log_twist(known: Conditioned, least: float) -> Tensor:
    """Return log h, h being the guidance's P(E | x_t) + least, (*batch,)."""
    log_mass = known.log_mass.double()
    return torch.logaddexp(log_mass, torch.full_like(log_mass, math.log(least)))


def systematic(
    log_weights: Tensor, generator: torch.Generator | None, number: int | None = None
) -> Tensor:
    """Return indices (runs, number) that repeat each entry about as often as its weight says.

    Systematic resampling: one uniform number a run, unbiased (Douc & Cappé 2005).
    """
    runs, m = log_weights.shape
    number = number or m
    total = torch.softmax(log_weights, -1).cumsum(-1)
    u = _uniform(runs, generator, log_weights)[:, None]
    points = (torch.arange(number, device=u.device, dtype=u.dtype) + u) / number * total[:, -1:]
    return torch.searchsorted(total, points.contiguous()).clamp(max=m - 1)


def _uniform(n: int, generator: torch.Generator | None, like: Tensor) -> Tensor:
    drawn_on = like.device if generator is None else generator.device
    u = torch.rand(n, generator=generator, device=drawn_on, dtype=torch.float64)
    return u.to(like.device)
