"""Distances between histograms: Hellinger in a few dimensions, total variation in one.

With the probabilities p, q of the cells,

    H² = ½ Σ (√p − √q)² = 1 − Σ √(p q),        TV = ½ Σ |p − q|,

both between 0 (equal histograms) and 1 (no cell in common).  Of n independent samples with K
occupied cells, H² is about (K − 1)/(8 n) although nothing is wrong: see `floors`.

Samples outside the range are counted in cells of their own.  So a histogram always holds every
sample, equal laws stay at distance zero, and mass that has left a range in which the reference
lies finds no partner: it is lost, and raises the distance.
"""

import math

import torch
from torch import Tensor

from .. import checks
from . import _inputs

CHUNK = 2**20  # samples binned at a time: about 100 MB in three dimensions
MAX_CELLS = 2**27  # 1 GiB of counts


def histogram(x: Tensor, bins: int = 70, limit: float = 3.5) -> Tensor:
    """Count samples in the ``bins**d`` equal cells of [-limit, limit]^d.

    Counts add up: those of a large set are the sum of those of its parts.

    Parameters
    ----------
    x : Tensor of shape (..., d)
        Samples, usually standardised.  Binned in chunks, in double precision, so the counts are
        the same on every device.
    bins : int
        Cells along each axis.  Half open, the last one closed as in NumPy.
    limit : float
        Half width of the range, in the units of ``x``.

    Returns
    -------
    Tensor of shape (bins**d + 1,), int64, on the device of ``x``
        Counts in row-major order (first component slowest); the last entry counts the samples
        outside the range in any component.

    Raises
    ------
    TypeError, ValueError
        If ``x`` is not a finite floating-point tensor of that shape, if ``bins`` or ``limit`` are
        not positive, or if there would be more than 2**27 cells.
    """
    x = _inputs.states("x", x)
    checks.count("bins", bins)
    checks.positive("limit", limit)
    d = x.shape[-1]
    if d * math.log2(bins) > math.log2(MAX_CELLS):
        raise ValueError(f"bins**d must be at most 2**27 cells, got {bins}**{d}")
    cells = bins**d
    strides = torch.tensor([bins**i for i in reversed(range(d))], device=x.device)
    counts = torch.zeros(cells + 1, dtype=torch.int64, device=x.device)
    for part in x.split(CHUNK):
        part = part.double()
        index = ((part + limit) * (bins / (2 * limit))).floor().long().clamp_(0, bins - 1)
        flat = (index * strides).sum(-1)  # (chunk,)
        flat[(part.abs() > limit).any(-1)] = cells
        counts += torch.bincount(flat, minlength=cells + 1)
    return counts


def hellinger_counts(a: Tensor, b: Tensor) -> float:
    """Return the Hellinger distance between two histograms of counts.

    Parameters
    ----------
    a, b : Tensor of shape (cells,)
        Counts, as from `histogram`; each is divided by its sum.  They may be on two devices.

    Returns
    -------
    float, between 0 and 1
        H, with H² = 1 − Σ √(p q).

    Raises
    ------
    TypeError, ValueError
        If a or b are no tensors, differ in shape, or hold negative or non-finite counts or none.
    """
    probabilities = []
    for name, counts in (("a", a), ("b", b)):
        if not isinstance(counts, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(counts).__name__}")
        if counts.ndim != 1:
            raise ValueError(f"{name} must have shape (cells,), got {tuple(counts.shape)}")
        counts = checks.finite(name, counts.detach().to(a.device, torch.float64))
        if bool((counts < 0).any()) or not bool(counts.sum() > 0):
            raise ValueError(f"{name} must hold non-negative counts, not all of them zero")
        probabilities.append(counts / counts.sum())
    p, q = probabilities
    if p.shape != q.shape:
        raise ValueError(f"a and b must have equally many cells, got {len(p)} and {len(q)}")
    squared = (p.sqrt() - q.sqrt()).square().sum() / 2  # exact at zero, unlike 1 − Σ √(p q)
    return float(squared.sqrt())


def hellinger(a: Tensor, b: Tensor, bins: int = 70, limit: float = 3.5) -> float:
    """Return the Hellinger distance between the histograms of two sets of samples.

    Its value depends on the numbers of samples: print it with `hellinger_floor`.

    Parameters
    ----------
    a, b : Tensor of shape (..., d)
        Samples, in the same units, usually standardised.
    bins : int
        Cells along each axis; the default is F24's.
    limit : float
        The range is [-limit, limit]^d; samples outside share one cell of their own.

    Returns
    -------
    float, between 0 and 1
        H, with H² = 1 − Σ √(p q).

    Raises
    ------
    TypeError, ValueError
        If the arguments are not as `histogram` needs them, or a and b differ in d.

    References
    ----------
    F24: Finn et al. (2024), Nonlin. Processes Geophys. 31, 409–431, doi 10.5194/npg-31-409-2024.
    """
    _inputs.components("a", _inputs.states("a", a), "b", _inputs.states("b", b))
    return hellinger_counts(histogram(a, bins, limit), histogram(b, bins, limit))


def total_variation(
    a: Tensor, b: Tensor, bins: int = 128, limits: tuple[float, float] | None = None
) -> float:
    """Return the total variation distance between the histograms of two scalar samples.

    The floor of two samples of sizes n and m of one law is about
    Σ √(p (1 − p)) · √((1/n + 1/m)/(2π)).

    Parameters
    ----------
    a, b : Tensor of shape (n,) and (m,)
        Samples of a scalar.
    bins : int
        Equal cells between the limits; samples below and above have one further cell each.
    limits : (low, high), optional
        The range; from the smallest to the largest of all values when missing.  Fix it wherever
        several distances are compared.

    Returns
    -------
    float, between 0 and 1
        TV = ½ Σ |p − q|.

    Raises
    ------
    TypeError, ValueError
        If a or b are not finite floating-point tensors of one axis, or the limits not in order.
    """
    checks.count("bins", bins)
    samples = []
    for name, x in (("a", a), ("b", b)):
        x = checks.finite(name, x).detach()
        if x.ndim != 1 or x.numel() == 0:
            raise ValueError(f"{name} must have shape (n,) with n > 0, got {tuple(x.shape)}")
        samples.append(x.double())
    if limits is None:
        low = min(float(x.min()) for x in samples)
        high = max(float(x.max()) for x in samples)
        if low == high:  # all values are equal: any cell around them will do
            low, high = low - 0.5, high + 0.5
    else:
        low, high = limits
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"limits must be finite and in order, got {limits}")
    p, q = (_scalar_probabilities(x, bins, low, high).to(a.device) for x in samples)
    return float((p - q).abs().sum() / 2)


def _scalar_probabilities(x: Tensor, bins: int, low: float, high: float) -> Tensor:
    """Return the shares below, in each of the bins of [low, high], and above: (bins + 2,)."""
    index = ((x - low) * (bins / (high - low))).floor().clamp_(-1, bins).long()
    index[(index == bins) & (x <= high)] = bins - 1  # the last cell is closed
    return torch.bincount(index + 1, minlength=bins + 2).double() / len(x)
