"""Confidence intervals for statistics of a correlated series."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from . import _inputs


class Interval(NamedTuple):
    """A statistic of a series, and the ends of its confidence interval, each of its shape."""

    estimate: Tensor
    low: Tensor
    high: Tensor


def block_bootstrap(
    series: Tensor,
    statistic: Callable[[Tensor], Tensor | float],
    *,
    block: int,
    replicates: int = 1000,
    level: float = 0.95,
    generator: torch.Generator | None = None,
) -> Interval:
    """Return a confidence interval for a statistic of a correlated series.

    Circular block bootstrap, percentile interval: blocks of consecutive rows, starting anywhere
    and wrapping round, are strung together to the length of the series.  Compare two methods by
    the series of their *paired differences*.

    Parameters
    ----------
    series : Tensor of shape (n, ...)
        Time, or independent trajectories (then ``block=1``), along the first axis.
    statistic : callable
        Maps a resampled series (n, ...) to a number or tensor, for instance
        ``lambda x: x.mean().sqrt()``.
    block : int
        Rows in a block, at most n: well above the correlation time, well below n.  Too short a
        block gives too narrow an interval.
    replicates : int
        Number of resampled series.
    level : float
        Probability of the interval, between 0 and 1.
    generator : torch.Generator, optional
        Source of randomness.

    Returns
    -------
    Interval
        Statistic of the series itself, and the lower and upper end, each of its shape, float64.

    Raises
    ------
    TypeError, ValueError
        If the series is empty or non-finite, or the block longer than the series.

    References
    ----------
    Politis and Romano (1992), in Exploring the Limits of Bootstrap, 263–270.
    """
    n = len(_inputs.rows("series", series))
    if checks.count("block", block) > n:
        raise ValueError(f"block must be at most the {n} rows of the series, got {block}")
    checks.count("replicates", replicates, minimum=2)
    tail = (1 - _inputs.fraction("level", level)) / 2
    blocks = -(-n // block)
    drawn_on = series.device if generator is None else generator.device
    starts = torch.randint(n, (replicates, blocks, 1), generator=generator, device=drawn_on)
    steps = torch.arange(block, device=series.device)

    def evaluate(x: Tensor) -> Tensor:
        return torch.as_tensor(statistic(x)).detach().double()

    found = []
    for start in starts.to(series.device):
        rows = ((start + steps) % n).flatten()[:n]
        found.append(evaluate(series[rows]))
    values = torch.stack(found)  # (replicates, *shape)
    low, high = values.quantile(tail, dim=0), values.quantile(1 - tail, dim=0)
    return Interval(evaluate(series), low, high)
