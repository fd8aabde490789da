"""Scores of an ensemble against a truth.

The members stand on the axis before the last, as `sampling.resample` returns them:
``ensemble`` (..., members, d) against ``truth`` (..., d).

An ensemble is calibrated if the truth cannot be told from another member.  For finite ensembles
this fixes exactly what the ranks of the truth (`rank_histogram`: all equally likely) and of
intervals (`coverage`) should be; no correction for the number of members is left to the reader.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import checks
from . import _inputs

CHUNK = 2**22  # ensemble values treated at a time: 32 MB in double precision


def rmse(
    a: Tensor,
    b: Tensor,
    *,
    scale: Tensor | None = None,
    dim: int | tuple[int, ...] | None = None,
) -> Tensor:
    """Return the root of the mean squared difference.

    Parameters
    ----------
    a, b : Tensor of one shape (..., d)
        For instance analyses and truth, in physical units.
    scale : Tensor of shape (d,), optional
        Divides the difference of each component, for instance climatological standard
        deviations: F24's normalised RMSE.
    dim : int or tuple of int, optional
        Axes of the mean; all when missing.  The root is taken last.

    Returns
    -------
    Tensor, float64
        Shape of ``a`` without the axes ``dim``.

    Raises
    ------
    TypeError, ValueError
        If a and b are not finite floating-point tensors of one shape and device, or the scale is
        not positive and of shape (d,).
    """
    a, b = checks.finite("a", a).detach(), checks.finite("b", b).detach()
    if a.shape != b.shape or a.device != b.device or a.numel() == 0:
        raise ValueError(
            "a and b must have one shape, not empty, and one device, "
            f"got {tuple(a.shape)} on {a.device} and {tuple(b.shape)} on {b.device}"
        )
    difference = (a - b).double()
    if scale is not None:
        scale = checks.finite("scale", scale).to(difference)
        if scale.shape != a.shape[-1:] or not bool((scale > 0).all()):
            raise ValueError(f"scale must be positive, of shape {tuple(a.shape[-1:])}, got {scale}")
        difference = difference / scale
    return difference.square().mean(dim).sqrt()


def spread_ratio(ours: Tensor, reference: Tensor) -> float:
    """Return the pooled standard deviation of our samples over that of reference samples.

    Ideally 1.  It catches what `wasserstein1` forgives: samples with too little spread.

    Parameters
    ----------
    ours, reference : Tensor of shape (n, ...) and (m, ...), n and m at least 2
        Samples along the first axis.  Variances (divided by n − 1) are averaged over all other
        axes before the root.

    Returns
    -------
    float

    Raises
    ------
    TypeError, ValueError
        If they are not finite floating-point tensors with equally many components, or the
        reference has no spread.
    """
    a = _inputs.rows("ours", ours, minimum=2)
    b = _inputs.rows("reference", reference, minimum=2)
    _inputs.pair("ours", a, "reference", b)
    variance_a, variance_b = (float(x.double().var(0).mean()) for x in (a, b))
    if variance_b == 0:
        raise ValueError("reference must have some spread, got equal samples")
    return math.sqrt(variance_a / variance_b)


def crps(ensemble: Tensor, truth: Tensor, *, fair: bool = True) -> Tensor:
    """Return the continuous ranked probability score of each component, smaller is better.

    E|X − y| − ½ E|X − X'| over members X, X'; the absolute error for a single member.

    Parameters
    ----------
    ensemble : Tensor of shape (..., members, d)
        Members before the last axis.
    truth : Tensor of shape (..., d)
        What happened, in the same units.
    fair : bool
        Average |X − X'| over different members (dividing by members (members − 1)): the expected
        score is then that of the law the members are drawn from, whatever their number.  False
        divides by members²: the score of the ensemble taken as a step function.

    Returns
    -------
    Tensor of shape (..., d), float64
        Average it over cases with ``.mean(...)``.

    Raises
    ------
    TypeError, ValueError
        If the tensors are not finite, floating-point, of those shapes and on one device, or a
        fair score is asked of fewer than two members.

    References
    ----------
    Gneiting and Raftery (2007), J. Am. Stat. Assoc. 102, 359–378; Ferro (2014), Q. J. R.
    Meteorol. Soc. 140, 1917–1923 (fair).
    """
    members, cases, shape = _cases(ensemble, truth, minimum=2 if fair else 1)
    m = members.shape[1]
    pairs = m * (m - 1) if fair else m * m
    # Σ_ij |x_i − x_j| / 2 = Σ_i (2 i − m − 1) x_(i) over sorted members
    weights = torch.arange(1 - m, m, 2, dtype=torch.float64, device=truth.device)[:, None]
    scores = []
    for x, y in _chunks(members, cases):
        difference = (x.double() - y[:, None].double()).sort(1).values  # (n, members, d)
        spread = (weights * difference).sum(1) / pairs
        scores.append(difference.abs().mean(1) - spread)
    return torch.cat(scores).reshape(shape)


def rank_histogram(
    ensemble: Tensor, truth: Tensor, *, generator: torch.Generator | None = None
) -> Tensor:
    """Count the rank of the truth among the members: flat for a calibrated ensemble.

    A hump in the middle means too much spread, a valley too little, a slope a bias.

    Parameters
    ----------
    ensemble : Tensor of shape (..., members, d)
        Members before the last axis.
    truth : Tensor of shape (..., d)
        What happened.  For observations, add observation noise to the members first.
    generator : torch.Generator, optional
        Breaks ties between the truth and members at random.

    Returns
    -------
    Tensor of shape (members + 1, d), int64
        Number of cases in which so many members lie below the truth.

    Raises
    ------
    TypeError, ValueError
        If the tensors are not finite, floating-point, of those shapes and on one device.

    References
    ----------
    Hamill (2001), Mon. Weather Rev. 129, 550–560.
    """
    members, cases, _ = _cases(ensemble, truth)
    m, d = members.shape[1:]
    drawn_on = truth.device if generator is None else generator.device
    offset = torch.arange(d, device=truth.device)
    counts = torch.zeros((m + 1) * d, dtype=torch.int64, device=truth.device)
    for x, y in _chunks(members, cases):
        below = (x < y[:, None]).sum(1)
        ties = (x == y[:, None]).sum(1)
        uniform = torch.rand(y.shape, generator=generator, device=drawn_on).to(truth.device)
        rank = below + (uniform * (ties + 1)).long().clamp(max=ties)
        counts += torch.bincount((rank * d + offset).flatten(), minlength=len(counts))
    return counts.reshape(m + 1, d)


def coverage(ensemble: Tensor, truth: Tensor, level: float = 0.9) -> Tensor:
    """Return how often the truth lies in the central interval of the ensemble.

    Between the k-th smallest and the k-th largest of m members the truth of a calibrated
    ensemble lies with probability (m + 1 − 2k)/(m + 1) exactly.  The two neighbouring k are
    weighted so that the expectation is ``level``, without bias for any number of members.

    Parameters
    ----------
    ensemble : Tensor of shape (..., members, d)
        Members before the last axis; at least 2/(1 − level) − 1 of them (19 for 0.9).
    truth : Tensor of shape (..., d)
        What happened.
    level : float
        Nominal probability of the interval, between 0 and 1.

    Returns
    -------
    Tensor of shape (d,), float64
        Share of the cases inside, ideally ``level``.  Its standard error over n independent cases
        is about √(level (1 − level)/n).

    Raises
    ------
    TypeError, ValueError
        If the tensors are not finite, floating-point, of those shapes and on one device, or there
        are too few members for the level (or it is below 1/(members + 1)).
    """
    members, cases, _ = _cases(ensemble, truth)
    m, d = members.shape[1:]
    depth = round((m + 1) * (1 - _inputs.fraction("level", level)) / 2, 9)  # 1.0, not 0.99…97
    if depth < 1:
        needed = math.ceil(2 / (1 - level) - 1 - 1e-9)
        raise ValueError(f"ensemble must have at least {needed} members for level {level}, got {m}")
    if level * (m + 1) < 1:
        raise ValueError(f"level must be at least 1/{m + 1} for {m} members, got {level}")
    k = math.floor(depth)
    inside = torch.zeros(d, dtype=torch.float64, device=truth.device)
    for x, y in _chunks(members, cases):
        ordered = x.sort(1).values
        for order, weight in ((k, k + 1 - depth), (k + 1, depth - k)):
            if weight > 0 and order <= m - order + 1:
                within = (ordered[:, order - 1] <= y) & (y <= ordered[:, m - order])
                inside += weight * within.sum(0)
    return inside / len(cases)


def _cases(ensemble: Tensor, truth: Tensor, minimum: int = 1) -> tuple[Tensor, Tensor, torch.Size]:
    """Check and flatten: (cases, members, d), (cases, d), and the shape of the truth."""
    ensemble = checks.finite("ensemble", ensemble).detach()
    truth = checks.finite("truth", truth).detach()
    if truth.ndim == 0 or truth.numel() == 0:
        raise ValueError(f"truth must have shape (..., d) and not be empty, got {truth.shape}")
    expected = (*truth.shape[:-1], "members", truth.shape[-1])
    if ensemble.ndim != truth.ndim + 1 or (
        (*ensemble.shape[:-2], ensemble.shape[-1]) != tuple(truth.shape)
    ):
        raise ValueError(
            f"ensemble must have shape ({', '.join(map(str, expected))}) for a truth of shape "
            f"{tuple(truth.shape)}, got {tuple(ensemble.shape)}"
        )
    if ensemble.device != truth.device:
        raise ValueError(
            f"ensemble and truth must be on one device, got {ensemble.device} and {truth.device}"
        )
    if ensemble.shape[-2] < minimum:
        raise ValueError(f"ensemble must have at least {minimum} members, got {ensemble.shape[-2]}")
    d = truth.shape[-1]
    return ensemble.reshape(-1, ensemble.shape[-2], d), truth.reshape(-1, d), truth.shape


def _chunks(members: Tensor, cases: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Split cases so that a chunk holds a bounded number of ensemble values."""
    size = max(1, CHUNK // (members.shape[1] * members.shape[2]))
    return zip(members.split(size), cases.split(size), strict=True)
