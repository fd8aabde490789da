r"""Whether the error bar of twisted paths can be trusted, beyond what their scatter says.

The scatter of independent populations is an honest error as long as each holds some of the paths
that make up P(E).  It is not where the twisting function h is wrong in the same way in all of them:
the paths that h takes for impossible are dropped everywhere, and once in a great many populations
one of them comes through with a huge weight.  Two things betray this.

*A bottleneck*: at some level a few paths carried all the weight.

*Blind spots*: samples in the event are diffused again, which gives x_t given E.  With the true h
these have the density h_t/P(E) relative to all x_t, so no more than a thousandth of them have
h_t < P(E)/1000.  Where many have, h is wrong about the very paths that matter.  (For an h that is
right up to a factor, P(E) is replaced by the mean of h_t.)

A part of the event that no path reached at all is seen by neither: ask `log_probability` with the
method "plain" or "subset" too where that can be afforded.
"""

import math

import torch

from ddmlib import noise
from ddmlib.denoisers import diffuse
from ddmlib.events.estimates import LEAST
from ddmlib.events.guidance import EventGuidance
from ddmlib.events.paths import Paths, levels, log_twist, systematic

FAINT = 1e-3  # of the mean of h, below which a path is as good as dropped
BLIND = 0.05  # share of the event's own paths that may be


def doubts(
    guidance: EventGuidance,
    grid: torch.Tensor,
    done: Paths,
    n: int,
    chunk: int | None,
    generator: torch.Generator | None,
) -> str:
    """Return why the scatter of twisted populations understates their error, or an empty string.

    Parameters
    ----------
    guidance, grid
        What ``done``, from `paths.twisted`, was made with.
    n : int
        Samples that are diffused again, one evaluation each a level; 0 for none.
    chunk : int, optional
        Of these, evaluated at once.
    """
    reasons = []
    if (fewest := float(done.fewest.sum())) < LEAST:
        reasons.append(f"at one level the weights left only {fewest:.3g} effective paths")
    if n:
        share, ratio = overlooked(guidance, grid, done, n, chunk, generator)
        if share > BLIND:
            reasons.append(
                f"at sigma/alpha = {ratio:.2g} the guidance takes {share:.0%} of the event's own "
                "paths for next to impossible: many may be missing, unseen by the error"
            )
    return "; ".join(reasons)


@torch.no_grad()
def overlooked(
    guidance: EventGuidance,
    grid: torch.Tensor,
    done: Paths,
    n: int,
    chunk: int | None,
    generator: torch.Generator | None,
) -> tuple[float, float]:
    """Return the largest share over all levels of the event's own paths whose h_t is faint.

    Parameters
    ----------
    guidance, grid, done, n, chunk
        As in `doubts`; some weight must not be zero.

    Returns
    -------
    share, ratio : float
        The share, and sigma/alpha of its level.
    """
    index = systematic(done.log_weights.reshape(1, -1), generator, n)[0]
    x_0 = done.x_0.flatten(0, 1)[index]
    found = []
    for level, log_mean in zip(levels(guidance, grid, x_0)[:-1], done.log_means, strict=True):
        x_t = diffuse(x_0, *level, noise.normal_like(x_0, generator))
        known = [guidance.condition(part, *level) for part in x_t.split(chunk or n)]
        log_h = torch.cat([log_twist(part, guidance.least) for part in known])
        share = (log_h < log_mean + math.log(FAINT)).double().mean()
        found.append((float(share), float(level[1] / level[0])))
    return max(found)
