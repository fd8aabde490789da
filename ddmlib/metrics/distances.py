"""Distances between sets of samples that need no histogram.

Most look at one property and can be fooled alone: `nearest_neighbour_distance` from generated to
reference samples rewards a generator that repeats one good state (so look in both directions),
`extremes` sees the tails of each component, and `wasserstein1` in many dimensions hardly punishes
too little spread.  `energy_distance` is zero only for equal laws, and unbiased.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from . import _inputs

PAIRS = 2**22  # pairwise distances held at a time: 32 MB
MAX_ASSIGNMENT = 2**14  # 2 GiB of costs


class Extremes(NamedTuple):
    """Tail probabilities, (2, d): lower, upper; and their sum averaged over components (F24)."""

    tails: Tensor
    total: float


def nearest_neighbour_distance(
    a: Tensor,
    b: Tensor,
    *,
    squared: bool = True,
    queries: int | None = None,
    generator: torch.Generator | None = None,
) -> float:
    """Return the mean distance from each state of a to its nearest state of b.

    The value depends on the size of ``b`` (in a set of fractal dimension D it falls as
    size^(−2/D) when squared): fix it and print the `floor`.  A k-d tree on the CPU, with all
    cores; quick in a few dimensions, no better than brute force beyond about 20.

    Parameters
    ----------
    a : Tensor of shape (..., d)
        States to start from.
    b : Tensor of shape (..., d)
        States to look among.
    squared : bool
        Average squared distances (F24), or distances.
    queries : int, optional
        Start from this many states of ``a`` only, drawn at random; all when missing.
    generator : torch.Generator, optional
        Source of randomness for ``queries``.

    Returns
    -------
    float
        Mean distance, in the units of the states, squared if ``squared``.

    Raises
    ------
    TypeError, ValueError
        If a or b are not finite floating-point tensors of that shape, differ in d, or ``queries``
        is not between 1 and the number of states in a.
    """
    from scipy.spatial import cKDTree  # slow to import

    a, b = _inputs.states("a", a), _inputs.states("b", b)
    _inputs.components("a", a, "b", b)
    if queries is not None:
        if checks.count("queries", queries) > len(a):
            raise ValueError(f"queries must be at most the {len(a)} states of a, got {queries}")
        a = a[_inputs.permutation(len(a), a.device, generator)[:queries]]
    tree = cKDTree(b.double().cpu().numpy())
    distances, _ = tree.query(a.double().cpu().numpy(), workers=-1)
    return float((distances**2 if squared else distances).mean())


def extremes(samples: Tensor, reference: Tensor, quantile: float = 0.01) -> Extremes:
    """Return how often samples fall beyond the extreme quantiles of a reference.

    Parameters
    ----------
    samples : Tensor of shape (..., d)
        Samples to judge.
    reference : Tensor of shape (..., d)
        Samples that define the quantiles: order statistics, so any number of them.
    quantile : float
        Probability of each tail, between 0 and ½.

    Returns
    -------
    Extremes
        ``tails`` (2, d): probability of samples ≤ the lower and ≥ the upper quantile of each
        component, ideally ``quantile``; ``total``: lower plus upper averaged over components
        (F24), ideally 2 ``quantile``.  The standard error of a tail is about
        √(quantile / number of independent samples).

    Raises
    ------
    TypeError, ValueError
        If samples or reference are not finite floating-point tensors of that shape, differ in d
        or device, or the quantile is out of range.
    """
    samples = _inputs.states("samples", samples)
    reference = _inputs.states("reference", reference)
    _inputs.pair("samples", samples, "reference", reference)
    n = len(reference)
    k = max(1, round(_inputs.fraction("quantile", quantile, 0.5) * n))
    tails = []
    for values, column in zip(samples.unbind(-1), reference.unbind(-1), strict=True):
        low, high = (column.kthvalue(i).values for i in (k, n + 1 - k))
        tails.append(
            torch.stack([(values <= low).double().mean(), (values >= high).double().mean()])
        )
    result = torch.stack(tails, dim=-1)  # (2, d)
    return Extremes(result, float(result.sum(0).mean()))


def wasserstein1(a: Tensor, b: Tensor) -> float:
    """Return the 1-Wasserstein distance between two equally large sets of samples.

    Exact: the mean Euclidean distance under the best one-to-one matching, a linear assignment
    (time about n³: a second at 1024 samples), or sorting for scalar samples of any number.
    In many dimensions its floor is high and it hardly sees too little spread: read it with
    `floor`, `energy_distance` and `spread_ratio`.

    Parameters
    ----------
    a, b : Tensor of shape (n, ...)
        Samples along the first axis; the other axes are flattened.

    Returns
    -------
    float
        W1 in the units of the samples.

    Raises
    ------
    TypeError, ValueError
        If a or b are not finite floating-point tensors of one shape on one device, or hold more
        than 2**14 samples that are not scalar.
    """
    a, b = _inputs.rows("a", a), _inputs.rows("b", b)
    _inputs.pair("a", a, "b", b)
    if len(a) != len(b):
        raise ValueError(f"a and b must hold equally many samples, got {len(a)} and {len(b)}")
    if a.shape[1] == 1:
        return float((a.double().sort(0).values - b.double().sort(0).values).abs().mean())
    if len(a) > MAX_ASSIGNMENT:
        raise ValueError(f"a and b must hold at most {MAX_ASSIGNMENT} samples, got {len(a)}")
    from scipy.optimize import linear_sum_assignment  # slow to import

    cost = _distances(*_centred(a, b)).cpu().numpy()  # (n, n)
    return float(cost[linear_sum_assignment(cost)].mean())


def energy_distance(a: Tensor, b: Tensor) -> float:
    """Return the energy distance 2 E|X − Y| − E|X − X'| − E|Y − Y'|, without bias.

    The U-statistic leaves out the distance of a sample from itself: its mean is exactly zero
    between samples of one law, so single values may be negative.  This is Székely's squared
    quantity; no root is taken.

    Parameters
    ----------
    a, b : Tensor of shape (n, ...) and (m, ...), n and m at least 2
        Samples along the first axis; the other axes are flattened.  Distances are computed in
        double precision, in blocks of at most 2**22 pairs.

    Returns
    -------
    float
        The energy distance in the units of the samples.

    Raises
    ------
    TypeError, ValueError
        If a or b are not finite floating-point tensors of two samples or more, or differ in the
        number of components or in device.

    References
    ----------
    Székely and Rizzo (2013), J. Stat. Plan. Inference 143, 1249–1272.
    """
    a, b = _inputs.rows("a", a, minimum=2), _inputs.rows("b", b, minimum=2)
    _inputs.pair("a", a, "b", b)
    a, b = _centred(a, b)
    n, m = len(a), len(b)
    across = _sum_across(a, b) / (n * m)
    return 2 * across - _sum_within(a) / (n * (n - 1)) - _sum_within(b) / (m * (m - 1))


def _centred(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Move two sets of rows to double precision and near the origin, for `_distances`."""
    a, b = a.double(), b.double()
    centre = a.mean(0)
    return a - centre, b - centre


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Return the Euclidean distances between rows, (n, m).

    By a matrix product, many times quicker than by differences in many dimensions; after
    `_centred` it is right to about 1e-8 times the size of a row even where rows coincide.
    """
    return torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist")


def _sum_across(a: Tensor, b: Tensor) -> float:
    """Return the sum of the distances between the rows of two sets, in blocks."""
    parts = a.split(max(1, PAIRS // len(b)))
    return math.fsum(float(_distances(part, b).sum()) for part in parts)


def _sum_within(x: Tensor) -> float:
    """Return the sum of the distances over ordered pairs of rows of one set, each block once."""
    size = max(1, PAIRS // len(x))
    total = []
    for start in range(0, len(x), size):
        part, rest = x[start : start + size], x[start + size :]
        total.append(float(_distances(part, part).sum()))  # a row from itself: 0, or nearly
        if len(rest):
            total.append(2 * float(_distances(part, rest).sum()))
    return math.fsum(total)
