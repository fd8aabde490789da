r"""A pilot run that corrects moment matching where C is curved.

Moment matching puts C(x_0) given x_t at C(x̂) with the spread s of the linearised C.  At high noise
x̂ is close to the mean of all data, where neither says much of C(x_0): for C = |x|² - c, say, the
mean of C(x_0) is higher by the trace of Cov[x_0 | x_t], and s is nearly zero.  A few unguided paths
show what C(x_0) became after each (x_t, C(x̂), s²), and a regression at each level gives the
`Calibration`.  Corrections that the pilot cannot tell from none are left out, so where moment
matching is exact it stays so.

The variance needs two corrections.  The Jacobian of a network at high noise is far less accurate
than its x̂, and s² scatters by a factor from path to path where it should be one number; taken at
its word, P(E | x_t) would differ by many orders of magnitude, and the first weights leave a handful
of paths.  So the squared residuals are regressed on s², and what does not follow s² is a constant.
And with the true P(E | x_t) all levels have the same mean, P(E).  Where C(x_0) is no Gaussian
number its tail is underrated, and the mean is too low; the variance is then raised until it is not.

The pilot also says how large P(E | x_t) is on average.  A hundredth of that is added to it by
twisted paths: moment matching may take a part of the event for impossible, and paths that lead
there would be dropped.

Estimates of probabilities stay unbiased whatever the corrections are, because they are fixed before
the weighted paths are drawn.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from ddmlib import checks, noise
from ddmlib.events.arguments import FEWEST
from ddmlib.events.constraints import Constraint, Equality
from ddmlib.events.guidance import LEAST, Calibration, EventGuidance
from ddmlib.events.paths import kernel, levels, start
from ddmlib.sampling import Level

DOUBT = 3.0  # standard errors of a correction that are taken off it
SHARE = 0.01  # of the mean of P(E | x_t), added to it
VAGUEST = 0.25  # standard error of a slope above which it is left at 1
ALIKE = 0.1  # relative scatter of s² below which it is not asked what follows it
FACTOR = 3.0  # by which a mean of P(E | x_t) must be too low before it is raised
WIDEST = 4.0  # variances of C(x_0) that are added at most
HALVINGS = 30


def calibrate(
    guidance: EventGuidance,
    grid: Tensor,
    n: int,
    *,
    rule: str,
    like: Tensor,
    generator: torch.Generator | None,
    chunk: int | None = None,
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
    chunk : int, optional
        Paths evaluated at once, to bound memory.

    Returns
    -------
    Calibration
    """
    return follow(guidance, grid, n, rule=rule, like=like, generator=generator, chunk=chunk)[0]


@torch.no_grad()
def follow(
    guidance: EventGuidance,
    grid: Tensor,
    n: int,
    *,
    rule: str,
    like: Tensor,
    generator: torch.Generator | None,
    chunk: int | None = None,
) -> tuple[Calibration, Tensor]:
    """Return what `calibrate` measures, and the ends of its paths, (n, *shape), standardised."""
    checks.count("n", n, FEWEST)
    if any(isinstance(part, Equality) for part in guidance.constraint.parts):
        raise ValueError("equalities cannot be calibrated")
    steps = levels(guidance, grid, like)
    x = start((n, *guidance.constraint.shape), steps[0], like, generator)
    before: tuple[Tensor, Level] | None = None
    seen = []
    for level_t, level_s in pairwise(steps):
        found = [guidance.moments(part, *level_t) for part in x.split(chunk or n)]
        x_0 = torch.cat([part[0] for part in found])
        values, variances = (torch.cat([part[k] for part in found], -1) for k in (1, 2))
        seen.append((values, variances))
        x, std = kernel(x, x_0, level_t, level_s, before, rule)
        before = x_0, level_t
        if bool((std > 0).any()):
            x = x + std * noise.normal_like(x, generator)
    physical = guidance.standardizer.inverse(x)
    ends = torch.stack([part.value(physical) for part in guidance.constraint.parts]).double()
    # ascending levels; (4, parts, levels)
    rows = torch.stack([corrections(ends, *pair) for pair in reversed(seen)], -1)
    seen.reverse()
    masses = [mean_mass(guidance, *pair, rows[..., k]) for k, pair in enumerate(seen)]
    # with the true P(E | x_t) all levels would have the same mean; one that is too low misses E
    sure = [mean - error for mean, error in masses]
    best, target = sure.index(max(sure)), max(sure)
    for k in range(best + 1, len(seen)):  # below it, means hang on a few paths
        if sum(masses[k]) < target / FACTOR:
            rows[3, :, k] += widening(guidance, *seen[k], rows[..., k], ends.var(-1), target)
    ratios = torch.stack([(sigma / alpha).double()[0] for alpha, sigma in reversed(steps[:-1])])
    least = max(LEAST, SHARE * max(mean for mean, _ in masses))
    share = float(guidance.constraint.holds(physical).double().mean())
    intercept, slope, scale, extra = rows
    return Calibration(ratios.log(), intercept, slope, scale, extra, least, share), x


def mean_mass(
    guidance: EventGuidance, values: Tensor, variances: Tensor, corrected: Tensor
) -> tuple[float, float]:
    """Return the mean over paths of P(E | x_t) at one level, corrections (4, parts) applied, and
    its standard error."""
    log_mass = torch.zeros_like(values[0], dtype=torch.float64)
    for part, c, variance, row in zip(
        guidance.constraint.parts, values.double(), variances.double(), corrected.mT, strict=True
    ):
        assert isinstance(part, Constraint)
        intercept, slope, scale, extra = row
        c, variance = intercept + slope * c, scale * slope**2 * variance + extra
        log_mass = log_mass + part.log_mass(c, variance)
    mass = log_mass.exp()
    return float(mass.mean()), float(mass.std()) / math.sqrt(mass.numel())


def widening(
    guidance: EventGuidance,
    values: Tensor,
    variances: Tensor,
    corrected: Tensor,
    ends: Tensor,
    target: float,
) -> Tensor:
    """Return what to add to the variances, (parts,), for a mean of P(E | x_t) of ``target``.

    ``ends`` (parts,) are the variances of C(x_0) over all paths, in whose units it is sought.
    """
    low, high = 0.0, WIDEST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        wider = corrected.clone()
        wider[3] += middle * ends
        if mean_mass(guidance, values, variances, wider)[0] < target:
            low = middle
        else:
            high = middle
    return high * ends


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
    # what of the squared residual follows s², and what is the same for all paths
    taken = slope.square()[:, None] * variances
    apart = taken - taken.mean(-1, keepdim=True)
    squares = (residual - residual.mean(-1, keepdim=True)).square()
    weight = apart.square().sum(-1).clamp(min=tiny)
    share = (apart * squares).sum(-1) / weight
    rest = squares - squares.mean(-1, keepdim=True) - share[:, None] * apart
    error = (apart * rest).square().sum(-1).sqrt() / weight
    unlike = apart.square().mean(-1).sqrt() > ALIKE * taken.mean(-1)
    follows = ~unlike | ((share - 1).abs() < DOUBT * error)
    share = share.clamp(0, 1)
    constant = (variance - share * taken.mean(-1)).clamp(min=0)
    scale, extra = torch.where(follows, scale, share), torch.where(follows, extra, constant)
    return torch.stack((intercept, slope, scale, extra))


def beyond_doubt(x: Tensor, error: Tensor) -> Tensor:
    """Return x moved towards zero by some standard errors: zero where it may well be zero."""
    return x.sign() * (x.abs() - DOUBT * error).clamp(min=0)
