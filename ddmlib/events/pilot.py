r"""A pilot run that corrects moment matching where C is curved.

Moment matching puts C(x_0) given x_t at C(x̂) with the spread s of the linearised C.  At high noise
x̂ is close to the mean of all data, where neither says much of C(x_0): for C = |x|² - c, say, the
mean of C(x_0) is higher by the trace of Cov[x_0 | x_t], and s is nearly zero.  A few unguided paths
show what C(x_0) became after each (x_t, C(x̂), s²), and a regression at each level gives the
`Calibration`.  Corrections that the pilot cannot tell from none are left out, so where moment
matching is exact it stays so.

The pilot also says how large P(E | x_t) is on average.  A hundredth of that is added to it by
twisted paths: where C(x_0) is no Gaussian number, moment matching takes much of the event for
impossible, and paths that lead there would be dropped.

Estimates of probabilities stay unbiased whatever the corrections are, because they are fixed before
the weighted paths are drawn.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from ddmlib import checks, noise
from ddmlib.events.constraints import Constraint, Equality
from ddmlib.events.guidance import LEAST, Calibration, EventGuidance
from ddmlib.events.paths import kernel, levels, start
from ddmlib.sampling import Level

DOUBT = 3.0  # standard errors of a correction that are taken off it
SHARE = 0.01  # of the mean of P(E | x_t), added to it
VAGUEST = 0.25  # standard error of a slope above which it is left at 1


@torch.no_grad()
def calibrate(
    guidance: EventGuidance,
    grid: Tensor,
    n: int,
    *,
    rule: str,
    like: Tensor,
    generator: torch.Generator | None,
) -> Calibration:
    """Measure the corrections of moment matching on n unguided paths.

    Parameters
    ----------
    guidance : EventGuidance
        Its own calibration, if any, is not used.
    grid : Tensor of shape (steps + 1,)
        Pseudo-times of the sampler, as from `sampling.times`.
    n : int
        Paths, 16 or more: one evaluation and one vector-Jacobian product a part and step each.
    rule, like, generator
        As in `paths.importance`.

    Returns
    -------
    Calibration
    """
    checks.count("n", n, 16)
    if any(isinstance(part, Equality) for part in guidance.constraint.parts):
        raise ValueError("equalities cannot be calibrated")
    steps = levels(guidance, grid, like)
    x = start((n, *guidance.constraint.shape), steps[0], like, generator)
    before: tuple[Tensor, Level] | None = None
    seen = []
    for level_t, level_s in pairwise(steps):
        x_0, values, variances = guidance.moments(x, *level_t)
        seen.append((values, variances))
        x, std = kernel(x, x_0, level_t, level_s, before, rule)
        before = x_0, level_t
        if bool((std > 0).any()):
            x = x + std * noise.normal_like(x, generator)
    physical = guidance.standardizer.inverse(x)
    ends = torch.stack([part.value(physical) for part in guidance.constraint.parts]).double()
    # ascending levels; (4, parts, levels)
    rows = torch.stack([corrections(ends, *pair) for pair in reversed(seen)], -1)
    masses = [mean_mass(guidance, *pair, rows[..., k]) for k, pair in enumerate(reversed(seen))]
    ratios = torch.stack([(sigma / alpha).double()[0] for alpha, sigma in reversed(steps[:-1])])
    intercept, slope, scale, extra = rows
    # with the true P(E | x_t) all levels would have the same mean; one that is too low misses E
    least = max(LEAST, SHARE * max(masses))
    return Calibration(ratios.log(), intercept, slope, scale, extra, least)


def mean_mass(
    guidance: EventGuidance, values: Tensor, variances: Tensor, corrected: Tensor
) -> float:
    """Return the mean over paths of P(E | x_t) at one level, corrections (4, parts) applied."""
    log_mass = torch.zeros_like(values[0], dtype=torch.float64)
    for part, c, variance, row in zip(
        guidance.constraint.parts, values.double(), variances.double(), corrected.mT, strict=True
    ):
        assert isinstance(part, Constraint)
        intercept, slope, scale, extra = row
        c, variance = intercept + slope * c, scale * slope**2 * variance + extra
        log_mass = log_mass + part.log_mass(c, variance)
    return float(log_mass.exp().mean())


def corrections(ends: Tensor, values: Tensor, variances: Tensor) -> Tensor:
    """Return (intercept, slope, scale, extra), each of shape (parts,), at one level.

    Parameters
    ----------
    ends : Tensor of shape (parts, n)
        C(x_0) of each path.
    values, variances : Tensor of shape (parts, n)
        C(x̂) and s² at this level.
    """
    values, variances, n = values.double(), variances.double(), ends.shape[-1]
    tiny = torch.finfo(values.dtype).tiny
    mean = values.mean(-1, keepdim=True)
    centred, rest = values - mean, ends - ends.mean(-1, keepdim=True)
    square = centred.square().sum(-1).clamp(min=tiny)
    slope = (centred * rest).sum(-1) / square
    scatter = (rest - slope[:, None] * centred).square().mean(-1)
    error = (scatter / square).sqrt()
    slope = torch.where(error < VAGUEST, 1 + beyond_doubt(slope - 1, error), 1.0).clamp(min=0)
    residual = ends - mean - slope[:, None] * centred
    variance = residual.var(-1)
    offset = beyond_doubt(residual.mean(-1), (variance / n).sqrt())
    intercept = offset + (1 - slope) * mean[:, 0]
    doubt = DOUBT * math.sqrt(2 / n)  # relative, of a variance
    expected = (slope.square() * variances.mean(-1)).clamp(min=tiny)
    scale = (variance * (1 + doubt) / expected).clamp(max=1)
    extra = (variance * (1 - doubt) - expected).clamp(min=0)
    return torch.stack((intercept, slope, scale, extra))


def beyond_doubt(x: Tensor, error: Tensor) -> Tensor:
    """Return x moved towards zero by some standard errors: zero where it may well be zero."""
    return x.sign() * (x.abs() - DOUBT * error).clamp(min=0)
