"""The Fréchet distance: two sets of samples seen through the Gaussians fitted to their features.

It sees two moments of the features and nothing else; which features, the caller decides (F24: the
256 of a surrogate network's last hidden layer).
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from . import _inputs


class Moments(NamedTuple):
    """Mean (k,), covariance (k, k, divided by size − 1) in float64, and number of samples."""

    mean: Tensor
    covariance: Tensor
    size: int


def moments(batches: Tensor | Iterable[Tensor]) -> Moments:
    """Return mean and covariance of features, streamed batch by batch.

    Parameters
    ----------
    batches : Tensor of shape (..., k), or an iterable of such tensors
        Features; a tensor is read in chunks.  At least two samples in all.

    Returns
    -------
    Moments

    Raises
    ------
    TypeError, ValueError
        If a batch is not a finite floating-point tensor of that shape, if batches differ in k,
        or if there are fewer than two samples.
    """
    if isinstance(batches, Tensor):
        batches = _inputs.states("batches", batches).split(2**17)
    total: Moments | None = None
    for batch in batches:
        batch = _inputs.states("batches", batch).double()  # (n, k)
        mean = batch.mean(0)
        centred = batch - mean
        part = Moments(mean, centred.T @ centred, len(batch))
        if total is not None:
            _inputs.pair("batches", total.mean, "a later batch", mean)
        total = part if total is None else _merge(total, part)
    if total is None or total.size < 2:
        raise ValueError("batches must hold at least two samples in all")
    return total._replace(covariance=total.covariance / (total.size - 1))


def _merge(a: Moments, b: Moments) -> Moments:
    """Join two parts whose covariances are still sums (Chan, Golub and LeVeque's update)."""
    n = a.size + b.size
    shift = b.mean - a.mean
    scatter = a.covariance + b.covariance + shift.outer(shift) * (a.size * b.size / n)
    return Moments(a.mean + shift * (b.size / n), scatter, n)


def frechet(features_a: Tensor | Moments, features_b: Tensor | Moments) -> float:
    """Return the Fréchet distance between Gaussians fitted to two sets of features.

    It is the *squared* 2-Wasserstein distance of the Gaussians, as in the FID:
    |m_a − m_b|² + Tr(S_a + S_b − 2 (S_a S_b)^½).  The last trace is the sum of the singular
    values of S_a^½ S_b^½: no root of an asymmetric matrix is taken, and covariances may be
    rank-deficient.  The value is biased upwards by
    about 1/n: print its `floor`.

    Parameters
    ----------
    features_a, features_b : Tensor of shape (..., k), or Moments
        Features of the samples, or their streamed `moments`.

    Returns
    -------
    float, non-negative
        The distance in squared units of the features.

    Raises
    ------
    TypeError, ValueError
        If the features are not as `moments` needs them, or a and b differ in k or device.

    References
    ----------
    Dowson and Landau (1982), J. Multivariate Anal. 12, 450–455; Heusel et al. (2017),
    arXiv 1706.08500.
    """
    a = features_a if isinstance(features_a, Moments) else moments(features_a)
    b = features_b if isinstance(features_b, Moments) else moments(features_b)
    _inputs.pair("features_a", a.mean, "features_b", b.mean)
    cross = torch.linalg.svdvals(_root(a.covariance) @ _root(b.covariance)).sum()
    squared = (a.mean - b.mean).square().sum()
    squared = squared + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(float(squared), 0.0)


def _root(covariance: Tensor) -> Tensor:
    """Return the symmetric root of a positive semi-definite matrix, (k, k)."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
