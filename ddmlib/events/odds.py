r"""Log-odds fitted to samples of the event, where moment matching says too little of P(E | x_t).

Moment matching judges a noisy sample by C(x̂) alone.  At middle noise much is undecided that x̂, a
mean, averages away: a mean of trajectories that take either lobe of an attractor may look as if it
took none.  What is known there can be learned.  By Bayes' rule

    P(E | x_t) = P(E) p(x_t | E)/p(x_t),

and the ratio of two densities is what a classifier of their samples learns: if as many x_t of
samples in E as of any samples are shown, its log-odds are log P(E | x_t)/P(E).  So a first
population of weighted paths gives samples in E, a pilot gives others, both are diffused to each
level, and a logistic regression is fitted to

    C(x̂), and the mean square of each component of x̂,

the latter being less than that of data by the variance that is left: a measure of what is decided.
Moment matching stays where it parts held-out samples as well as the odds do, as it does for linear
C and Gaussian x_t.  From the highest level on where it does not, or where it is worse than to know
nothing, the odds are taken, at all lower levels too: where paths pass from one judgement to another
their weights jump.  Far outside the event a Gaussian tail falls so fast that a path which comes
back weighs more than all others together; the odds fall evenly.

Estimates stay unbiased whatever the odds are, because they are fixed before the paths are drawn
that count.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ddmlib import noise
from ddmlib.denoisers import Denoiser, diffuse
from ddmlib.events.constraints import Event
from ddmlib.events.estimates import mean_exp
from ddmlib.events.guidance import Conditioned, EventGuidance
from ddmlib.events.paths import levels, log_twist, systematic, twisted
from ddmlib.events.pilot import follow

RIDGE = 1.0  # penalty of a squared weight, features being standardised
# nats by which fitted odds must be better, over as many samples as either kind has: held-out losses
# of two fits that are as good differ by one over that number
BETTER = 5.12
EASE = 1e-3  # penalty of the first weight: keeps a regression solvable
NEWTON, SETTLED = 40, 1e-7  # its steps at most, and the one that is the last
FIRST, RUNS = 2, 4  # paths of the first population for each one of the pilot, and its parts
SHARE = 0.05  # of P(E), added to P(E | x_t) for paths that it is wrong about


@dataclass(frozen=True)
class Odds:
    """Fitted log-odds of the event, level by level.

    Parameters
    ----------
    log_ratios : Tensor of shape (levels,)
        log(sigma/alpha), descending.
    weights : Tensor of shape (levels, 1 + features)
        Of one and of each feature: log P(E | x_t) is log sigmoid of their sum.
    taken : Tensor of shape (levels,), bool
        Whether they replace moment matching.
    """

    log_ratios: Tensor
    weights: Tensor
    taken: Tensor

    def level(self, ratio: Tensor) -> int:
        """Return the index of the level nearest to sigma/alpha."""
        if ratio.numel() != 1:
            raise ValueError("fitted odds need one noise level for all samples")
        return int((self.log_ratios - float(ratio.clamp(min=1e-12).log())).abs().argmin())


class FittedGuidance(EventGuidance):
    """Event guidance that takes fitted odds where they are better than moment matching.

    Parameters
    ----------
    guidance : EventGuidance
        What it is elsewhere.
    odds : Odds
        As from `fit`.
    """

    def __init__(self, guidance: EventGuidance, odds: Odds) -> None:
        super().__init__(
            guidance.denoiser, guidance.constraint, guidance.floor, guidance.calibration
        )
        self.odds = odds

    def condition(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Conditioned:
        """Return x̂, x̂ given the event, and log P(E | x_t), as `EventGuidance.condition`.

        One evaluation and one vector-Jacobian product where the odds are taken.
        """
        alpha_t, sigma_t = self._check(x_t, alpha_t, sigma_t)
        level = self.odds.level(sigma_t / alpha_t)
        if not bool(self.odds.taken[level]):
            return super().condition(x_t, alpha_t, sigma_t)
        create = torch.is_grad_enabled() and x_t.requires_grad
        with torch.enable_grad():
            x = x_t if create else x_t.detach().requires_grad_()
            x_0 = self.denoiser.denoise(x, alpha_t, sigma_t)
            log_mass = log_odds(features(self, x_0), self.odds.weights[level])
            (slope,) = torch.autograd.grad(log_mass.sum(), x, create_graph=create)
            guided = x_0 + sigma_t.square() / alpha_t * slope
        if not create:
            return Conditioned(x_0.detach(), guided.detach(), log_mass.detach())
        return Conditioned(x_0, guided, log_mass)


def log_odds(x: Tensor, weights: Tensor) -> Tensor:
    """Return log P(E | x_t) of features (*batch, n), with weights (1 + n,)."""
    weights = weights.to(x)
    return logsigmoid(weights[0] + x @ weights[1:])


def features(guidance: EventGuidance, x_0: Tensor) -> Tensor:
    """Return what the odds depend on, (*batch, parts + d), of x̂ (*batch, *shape)."""
    constraint = guidance.constraint
    physical, squares = guidance.standardizer.inverse(x_0), x_0.square()
    if len(constraint.shape) == 2:
        squares = squares.mean(-2)
    values = torch.stack([part.value(physical) for part in constraint.parts], -1)
    return torch.cat((values, squares), -1)


def prepare(
    denoiser: Denoiser,
    constraint: Event,
    grid: Tensor,
    n: int,
    *,
    fitted: bool = True,
    chunk: int | None = None,
    **on: Any,
) -> tuple[EventGuidance, int]:
    """Return guidance that a pilot has corrected, and what it cost in paths.

    Parameters
    ----------
    denoiser, constraint
        As in `EventGuidance`.
    grid : Tensor of shape (steps + 1,)
        Pseudo-times of the sampler.
    n : int
        Paths of the pilot; 0: guidance by moment matching alone.
    fitted : bool
        Whether odds are fitted where they do better.
    chunk
        As in `probability.log_probability`.
    **on
        ``rule``, ``like`` and ``generator`` of `paths.twisted`.
    """
    guidance = EventGuidance(denoiser, constraint)
    if not n:
        return guidance, 0
    calibration, plain = follow(guidance, grid, n, **on)
    guidance = EventGuidance(denoiser, constraint, calibration=calibration)
    if not fitted or calibration.inside == 1:  # in the latter case nothing is to be told apart
        return guidance, n
    each, generator = FIRST * n // RUNS, on["generator"]
    first = twisted(guidance, grid, each, RUNS, defensive=0.1, chunk=chunk, **on)
    log_weights = first.log_weights.reshape(1, -1)
    if not bool(torch.isfinite(log_weights).any()):
        return guidance, n + RUNS * each
    inside = first.x_0.flatten(0, 1)[systematic(log_weights, generator, n)[0]]
    log_p = float(mean_exp(log_weights))
    # the pilot's mean of P(E | x_t) may hang on a path or two; now P(E) is known far better
    calibration = replace(calibration, least=SHARE * math.exp(log_p))
    guidance = EventGuidance(denoiser, constraint, calibration=calibration)
    odds = fit(guidance, grid, plain, inside, log_p, chunk=chunk, generator=generator)
    if bool(odds.taken.any()):
        guidance = FittedGuidance(guidance, odds)
    return guidance, n + RUNS * each + 2 * n


@torch.no_grad()
def fit(
    guidance: EventGuidance,
    grid: Tensor,
    plain: Tensor,
    inside: Tensor,
    log_probability: float,
    *,
    chunk: int | None = None,
    generator: torch.Generator | None = None,
) -> Odds:
    """Fit log-odds of the event at each level of a sampler.

    Parameters
    ----------
    guidance : EventGuidance
        The moment matching that they are compared with.
    grid : Tensor of shape (steps + 1,)
        Pseudo-times of the sampler.
    plain, inside : Tensor of shape (n, *shape)
        As many samples of the model as samples of it in the event, standardised units.
    log_probability : float
        About log P(E).
    chunk, generator
        As in `probability.log_probability`.

    Returns
    -------
    Odds
    """
    if plain.shape != inside.shape:
        raise ValueError(
            f"plain and inside must have one shape, got {tuple(plain.shape)} "
            f"and {tuple(inside.shape)}"
        )
    x = torch.stack((plain, inside), 1).flatten(0, 1)  # in turn: any part holds as many of both
    event = (torch.arange(len(x), device=x.device) % 2).double()
    size = 1 + len(guidance.constraint.parts) + x.shape[-1]
    none, constant = torch.zeros(2, size, dtype=torch.float64, device=x.device)
    constant[0] = 1.0
    margin = BETTER / len(plain)
    rows, worse, ratios = [], [], []
    for level in levels(guidance, grid, x)[:-1]:
        x_t = diffuse(x, *level, noise.normal_like(x, generator))
        known = [guidance.condition(part, *level) for part in x_t.split(chunk or len(x))]
        found = features(guidance, torch.cat([part.x_0 for part in known])).double()
        matched = torch.cat([log_twist(part, guidance.least) for part in known])
        # each is judged but for a factor, which would not matter
        losses = [_held_out(found, event), _held_out(found[:, :0], event)]
        weights = regression(found, event) if losses[0] + margin < losses[1] else none
        rows.append(weights + log_probability * constant)
        worse.append(_held_out(found[:, :0], event, matched) > min(losses) + margin)
        ratios.append(level[1] / level[0])
    taken = torch.tensor(worse).int().cummax(0).values.bool()  # from the highest level on
    return Odds(torch.cat(ratios).double().cpu().log(), torch.stack(rows), taken)


def regression(x: Tensor, y: Tensor, offset: Tensor | float = 0.0) -> Tensor:
    """Return weights (1 + columns,) of a logistic regression, all but the first penalised.

    Parameters
    ----------
    x : Tensor of shape (n, columns)
    y : Tensor of shape (n,)
        Zeros and ones.
    offset : Tensor of shape (n,), optional
        Log-odds that are added to those of the columns.
    """
    mean = x.mean(0)
    std = (x - mean).square().mean(0).sqrt().clamp(min=torch.finfo(x.dtype).tiny)
    rows = torch.cat((torch.ones_like(y)[:, None], (x - mean) / std), 1)
    penalty = torch.full_like(rows[0], RIDGE)
    penalty[0] = EASE
    w = torch.zeros_like(penalty)
    for _ in range(NEWTON):
        p = torch.sigmoid(rows @ w + offset)
        hessian = (rows * (p * (1 - p))[:, None]).mT @ rows + torch.diag(penalty)
        step = torch.linalg.solve(hessian, rows.mT @ (y - p) - penalty * w)
        size = float(step.abs().max())
        w = w + step / max(1.0, size)  # no leaps where p is next to 0 or 1
        if size < SETTLED:
            break
    slopes = w[1:] / std
    return torch.cat(((w[0] - slopes @ mean)[None], slopes))


def _held_out(x: Tensor, y: Tensor, offset: Tensor | float = 0.0) -> float:
    """Return the mean log-loss of either half of the rows under the fit to the other half."""
    offset = torch.as_tensor(offset).expand(len(y)).to(y)
    half, loss = len(y) // 4 * 2, 0.0
    for fitted, judged in ((slice(half), slice(half, None)), (slice(half, None), slice(half))):
        w = regression(x[fitted], y[fitted], offset[fitted])
        odds = w[0] + x[judged] @ w[1:] + offset[judged]
        loss -= float(logsigmoid(torch.where(y[judged] > 0, odds, -odds)).sum())
    return loss / len(y)
