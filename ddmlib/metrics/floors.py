"""Floors: the distance that a perfect generator would still show, for want of samples.

A floor that is too high flatters (`excess` subtracts it), one that is too low blames.  Three traps:

- Samples drawn from the reference itself and compared with it do not see the reference's own
  sampling error: too low.
- Neighbours in time are not independent.  Split a reference by trajectories, never by states.
- Halving the reference to have two independent sets makes both smaller: too high.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from . import _inputs, histograms

DRAWS = 16  # draws of all cells per split: they cost nothing beside reading the reference


class Floor(NamedTuple):
    """Mean and standard deviation of a metric between samples of one and the same law.

    ``std`` is the scatter of a single measurement, not the error of the mean; NaN for one repeat.
    """

    mean: float
    std: float


def excess(distance: float, floor: float) -> float:
    """Return a distance without its finite-sample floor, √max(distance² − floor², 0).

    Right for distances whose squares add up, such as Hellinger's: comparable across sample sizes.

    Parameters
    ----------
    distance : float
        The distance measured.
    floor : float
        Its floor at the same sample sizes.

    Returns
    -------
    float
        The excess; 0 when the distance is below its floor.

    Raises
    ------
    ValueError
        If either is negative or not finite.
    """
    for name, value in (("distance", distance), ("floor", floor)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be non-negative and finite, got {value}")
    return math.sqrt(max(float(distance) ** 2 - float(floor) ** 2, 0.0))


def floor(
    metric: Callable[[Tensor, Tensor], float | Tensor],
    reference: Tensor,
    n: int,
    m: int | None = None,
    *,
    independent: Tensor | None = None,
    repeats: int = 8,
    generator: torch.Generator | None = None,
) -> Floor:
    """Measure a metric between two disjoint random samples of one law.

    Parameters
    ----------
    metric : callable
        ``metric(sample, other) -> float``, for instance `energy_distance`; freeze its options
        with a lambda.
    reference : Tensor of shape (rows, ...)
        Samples of the law.  Rows must be independent: whole trajectories or well-separated
        states.  If they are not (the states of a few trajectories), give ``independent``.
    n : int
        Rows of the sample: as many as the generator will be asked for.
    m : int, optional
        Rows of the other sample; when missing, all that remain of the reference.
    independent : Tensor of shape (rows', ...), optional
        Samples of the same law from other trajectories, for instance the training set.  The n
        rows are then drawn from here, and the m rows (or all) from the reference.
    repeats : int
        Number of draws without replacement.
    generator : torch.Generator, optional
        Source of randomness.

    Returns
    -------
    Floor
        Mean and standard deviation over the repeats, which overlap: the standard deviation is
        somewhat too small when n + m is close to the number of rows.

    Raises
    ------
    TypeError, ValueError
        If a tensor is empty or non-finite, or has too few rows.
    """
    _inputs.rows("reference", reference)
    checks.count("n", n)
    checks.count("repeats", repeats)
    if m is not None:
        checks.count("m", m)
    if independent is None:
        if n + (m or 1) > len(reference):
            raise ValueError(
                f"reference must have at least n + m = {n + (m or 1)} rows, got {len(reference)}"
            )
    else:
        _inputs.rows("independent", independent)
        if n > len(independent) or (m or 1) > len(reference):
            raise ValueError(
                f"independent and reference must have at least n = {n} and m = {m or 1} rows, "
                f"got {len(independent)} and {len(reference)}"
            )
    values = []
    for _ in range(repeats):
        order = _inputs.permutation(len(reference), reference.device, generator)
        if independent is None:
            sample, order = reference[order[:n]], order[n:]
        else:
            pick = _inputs.permutation(len(independent), independent.device, generator)
            sample = independent[pick[:n]]
        values.append(float(metric(sample, reference[order[:m]])))
    found = torch.tensor(values, dtype=torch.float64)
    return Floor(float(found.mean()), float(found.std()) if repeats > 1 else math.nan)


def hellinger_floor(
    reference: Tensor,
    n: int,
    *,
    bins: int = 70,
    limit: float = 3.5,
    repeats: int = 4,
    generator: torch.Generator | None = None,
) -> float:
    """Return the Hellinger distance that n independent exact samples have from a reference.

    The squared floor is the sum of two sampling errors: that of the n samples, averaged over
    draws of each cell's count from the reference's histogram (binomial: only the mean of H² is
    wanted, and it is a sum over cells), and that of the reference.  The latter follows from
    its two halves, split by rows: errors go as one over size, H²(half, half) is the error of two
    sets of half the size, so a quarter of it is the error of the whole.  Neither a second set of
    trajectories nor a smaller reference is needed.

    It holds while the reference fills the cells that matter.  A reference with about as few
    samples as cells has never seen some of them, and the floor comes out too low (the excess too
    high, never flattering): use fewer bins, or `floor` with `hellinger`.

    Parameters
    ----------
    reference : Tensor of shape (rows, ..., d), at least two rows
        Samples of the law in standardised units.  Rows must be independent, that is whole
        trajectories: pass (trajectories, length, d) as it is, not flattened.
    n : int
        Number of samples whose distance from the reference is to be judged.
    bins, limit
        As in `hellinger`.
    repeats : int
        Number of splits in halves that are averaged, with 16 draws each.
    generator : torch.Generator, optional
        Source of randomness.

    Returns
    -------
    float
        The floor, to be given to `excess`.

    Raises
    ------
    TypeError, ValueError
        If the reference is not a finite floating-point tensor with two rows or more, or another
        argument is not positive.
    """
    _inputs.rows("reference", reference, minimum=2)
    if reference.ndim < 2:
        raise ValueError(f"reference must have shape (rows, ..., d), got {tuple(reference.shape)}")
    checks.count("n", n)
    checks.count("repeats", repeats)
    total = histograms.histogram(reference, bins, limit)
    p = total[total > 0].double() / total.sum()
    if generator is not None:
        p = p.to(generator.device)
    error_of_n = error_of_half = 0.0
    for _ in range(DRAWS * repeats):
        drawn = torch.binomial(torch.full_like(p, n), p, generator=generator)
        error_of_n += float((p.sqrt() - (drawn / n).sqrt()).square().sum() / 2)
    for _ in range(repeats):
        order = _inputs.permutation(len(reference), reference.device, generator)
        half = histograms.histogram(reference[order[: len(order) // 2]], bins, limit)
        error_of_half += histograms.hellinger_counts(half, total - half) ** 2
    return math.sqrt(error_of_n / (DRAWS * repeats) + error_of_half / (4 * repeats))
