r"""Log-odds fitted to samples of the event, where moment matching says too little of P(E | x_t).

Moment matching judges a noisy sample by C(x̂) alone.  At middle noise much is undecided that x̂, a
mean, averages away: a mean of trajectories that take either lobe of an attractor may look as if it
took none.  What is known there can be learned.  By Bayes' rule

    P(E | x_t) = P(E) p(x_t | E)/p(x_t),

and the ratio of two densities is what a classifier of their samples learns: if as many x_t of
samples in E as of any samples are shown, its log-odds are log P(E | x_t)/P(E).  So a first
population of weighted paths gives samples in E, a pilot gives others, both are diffused to each
level, and a logistic regression is fitted to those of a level and its neighbours.  It knows

    C(x̂), and the mean square of each component of x̂,

the latter being less than that of data by the variance that is left: a measure of what is decided.
Moment matching stays where it parts held-out samples as well as the odds do, as it does for linear
C and Gaussian x_t.  From the highest level on where it does not, or where it is worse than to know
nothing, the odds are taken, at all lower levels too: where paths pass from one judgement to another
their weights jump.  Far outside the event a Gaussian tail falls so fast that a path which comes
back weighs more than all others together; the odds fall evenly.

Odds know a part of the event only as well as the samples in it that they are fitted to, a few
hundred of a first population.  Of spikes of FitzHugh-Nagumo cells one in forty is cut off by an end
of the window.  Few of these are among the samples, odds take the others for no spikes, paths to
them are dropped, and twisted samples lack them (chapter 09).  Where C(x̂) shows such a part of the
event early enough, ``fitted=False`` is better.

The gradient of the odds says where to go, but no more reliably than the network's Jacobian does.  A
second population, which follows it, shows how much of the rise that it promises comes true in each
step, and from then on it is followed that far (`pulls`).

Estimates stay unbiased whatever the odds are, because they are fixed before the paths are drawn
that count.
"""

import math
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ddmlib import checks, noise
from ddmlib.denoisers import Denoiser, diffuse
from ddmlib.events import logistic
from ddmlib.events.constraints import Event
from ddmlib.events.estimates import mean_exp
from ddmlib.events.guidance import Conditioned, EventGuidance
from ddmlib.events.paths import levels, log_twist, systematic, twisted
from ddmlib.events.pilot import SHARE as FIRST_SHARE
from ddmlib.events.pilot import beyond_doubt, follow

# nats by which fitted odds must be better, over as many samples as either kind has: held-out losses
# of two fits that are as good differ by one over that number
BETTER = 5.12
NEAR = 3  # levels on either side whose samples help to fit those of a level
FARTHEST = 2.0  # shift of a step's mean, in units of its noise
FIRST, RUNS = 2, 4  # paths of the first population for each one of the pilot, and its parts
EARLY, LATE = 0.1, 0.9  # of the rise of log P(E | x_t), between which the event is decided
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
    undecided : tuple of float
        sigma/alpha between which log P(E | x_t) of samples in E mostly rises.
    pulls : Tensor of shape (levels,), optional
        How far the gradient of the odds is believed in a step; default: wholly.
    """

    log_ratios: Tensor
    weights: Tensor
    taken: Tensor
    undecided: tuple[float, float] = (0.0, math.inf)
    pulls: Tensor | None = None

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

    @property
    def undecided(self) -> tuple[float, float]:
        """sigma/alpha between which it is decided whether a path ends in the event."""
        return self.odds.undecided

    def restrained(self, shift: Tensor, ratio: Tensor) -> Tensor:
        """Return a share of the shift, at most `FARTHEST` long; see `EventGuidance.restrained`."""
        if self.odds.pulls is not None:
            shift = float(self.odds.pulls[self.odds.level(ratio)]) * shift
        over = tuple(range(-len(self.constraint.shape), 0))
        return shift * (FARTHEST / shift.norm(dim=over, keepdim=True).clamp(min=FARTHEST))


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
    least: float | None = None,
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
    least : float, optional
        Share of P(E) that is added to P(E | x_t); default: `SHARE` where odds may be fitted, else
        that of `pilot`.
    chunk
        As in `probability.log_probability`.
    **on
        ``rule``, ``like`` and ``generator`` of `paths.twisted`.
    """
    guidance = EventGuidance(denoiser, constraint)
    if least is not None:
        checks.positive("least", least)
    if not n:
        return guidance, 0
    calibration, plain = follow(guidance, grid, n, chunk=chunk, **on)
    if least is not None:  # before there are paths in the event the pilot's mean stands for P(E)
        calibration = replace(calibration, least=calibration.least * least / FIRST_SHARE)
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
    share = SHARE if least is None else least
    added = max(share * math.exp(log_p), sys.float_info.min)
    calibration = replace(calibration, least=added)
    guidance = EventGuidance(denoiser, constraint, calibration=calibration)
    odds = fit(guidance, grid, plain, inside, log_p, chunk=chunk, generator=generator)
    if bool(odds.taken.any()):
        guidance = FittedGuidance(guidance, odds)
        again = twisted(guidance, grid, each, RUNS, defensive=0.1, chunk=chunk, **on)
        guidance = FittedGuidance(guidance, replace(odds, pulls=pulls(again.slopes)))
        return guidance, n + 2 * RUNS * each + 2 * n
    return guidance, n + RUNS * each + 2 * n


def pulls(slopes: Tensor) -> Tensor:
    """Return how far gradients are to be believed, (levels,), of how far they came true.

    Parameters
    ----------
    slopes : Tensor of shape (2, levels - 1)
        As of `paths.Paths`: a slope less than 1 beyond doubt is taken for what it is.
    """
    slope, error = slopes.cpu()
    share = (1 + beyond_doubt(slope - 1, error)).clamp(0, 1)
    return torch.cat((share, share[-1:]))


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
    tables, matches, ratios = [], [], []
    for level in levels(guidance, grid, x)[:-1]:
        x_t = diffuse(x, *level, noise.normal_like(x, generator))
        known = [guidance.condition(part, *level) for part in x_t.split(chunk or len(x))]
        tables.append(features(guidance, torch.cat([part.x_0 for part in known])).double())
        matches.append(torch.cat([log_twist(part, guidance.least) for part in known]))
        ratios.append(level[1] / level[0])
    table = torch.stack(tables)
    mean, std = table.mean(1), table.std(1).clamp(min=torch.finfo(table.dtype).tiny)
    table = (table - mean[:, None]) / std[:, None]
    rows, worse, rises = [], [], []
    blank = table[:1, :, :0]  # no column at all
    nothing = logistic.held_out(blank, event)
    for k, matched in enumerate(matches):
        near = table[max(0, k - NEAR) : k + NEAR + 1]  # odds change little from level to level
        # each is judged but for a factor, which would not matter
        loss = logistic.held_out(near, event, min(k, NEAR))
        matching = logistic.held_out(blank, event, 0, matched)
        weights = none
        if loss + margin < nothing:
            w = logistic.regression(near.flatten(0, 1), event.repeat(len(near)))
            slopes = w[1:] / std[k]
            weights = torch.cat(((w[0] - slopes @ mean[k])[None], slopes))
        rows.append(weights + log_probability * constant)
        worse.append(matching > min(loss, nothing) + margin)
        own = log_odds(tables[k][event > 0], rows[-1])
        rises.append(torch.stack((matched[event > 0].mean(), own.mean())))
    taken = torch.tensor(worse).int().cummax(0).values.bool()  # from the highest level on
    log_ratios = torch.cat(ratios).double().cpu().log()
    rise = torch.stack(rises).cpu()
    undecided = deciding(log_ratios, torch.where(taken, rise[:, 1], rise[:, 0]))
    return Odds(log_ratios, torch.stack(rows), taken, undecided)


def deciding(log_ratios: Tensor, known: Tensor) -> tuple[float, float]:
    """Return sigma/alpha between which the mean of log P(E | x_t) over samples in E mostly rises.

    Parameters
    ----------
    log_ratios : Tensor of shape (levels,)
        log(sigma/alpha), descending.
    known : Tensor of shape (levels,)
        The mean at each level.
    """
    low, high = known.min(), known.max()
    share = (known - low) / (high - low).clamp(min=torch.finfo(known.dtype).tiny)
    before, during = (torch.nonzero(share < bound).flatten() for bound in (EARLY, LATE))
    first, last = int(before[-1]), min(int(during[-1]) + 1, len(known) - 1)
    margin = 1e-4  # both levels are in between, however they are rounded
    return float((log_ratios[last] - margin).exp()), float((log_ratios[first] + margin).exp())
