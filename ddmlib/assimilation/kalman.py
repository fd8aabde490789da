"""The Kalman filter and smoother: exact for linear dynamics with Gaussian noise.

x_{k+1} = A x_k + q with q ~ N(0, Q), from x_0 ~ N(mean, covariance); y = H x + r with
r ~ N(0, R) at the states 0, every, 2 every, …  They are the oracles of everything else here.
"""

from typing import NamedTuple

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from ddmlib import checks
from ddmlib.assimilation.observations import Observation, matrix
from ddmlib.dynamics import LinearGaussian


class Law(NamedTuple):
    """Gaussian laws along a trajectory: means (*batch, length, d), covariances (length, d, d)."""

    mean: Tensor
    covariance: Tensor


class Filtered(NamedTuple):
    """Laws before (forecast) and after (analysis) each observation; log p(y), shape (*batch,)."""

    forecast: Law
    analysis: Law
    log_evidence: Tensor


def gain(covariance: Tensor, h: Tensor, r: Tensor) -> Tensor:
    """Return the Kalman gain P Hᵀ (H P Hᵀ + R)^-1, shape (..., d, m), of forecast covariance P."""
    ph = covariance @ h.mT
    return torch.linalg.solve(h @ ph + r, ph.mT).mT


def kalman_filter(system: LinearGaussian, observation: Observation, length: int) -> Filtered:
    """Return the law of each state given the observations up to it.

    Parameters
    ----------
    system : LinearGaussian
    observation : Observation
        ``y`` of shape (*batch, n, m) with a linear operator; n = 1 + (length - 1) // every.
    length : int
        States of the trajectory.

    Returns
    -------
    Filtered

    Raises
    ------
    ValueError
        If the number of observations is not n, or the operator is not linear.

    References
    ----------
    Kalman (1960), J. Basic Eng. 82, 35–45.
    """
    y, d = observation.y, system.dim
    count = 1 + (checks.count("length", length) - 1) // observation.every
    if y.ndim < 2 or y.shape[-2] != count:
        raise ValueError(f"y must have shape (*batch, {count}, m), got {tuple(y.shape)}")
    spread = system.covariance.diagonal(dim1=-2, dim2=-1).amax().sqrt()
    h = matrix(observation.operator, d, y, scale=float(system.mean.abs().amax() + spread))
    r = torch.as_tensor(observation.std, dtype=y.dtype, device=y.device).expand(len(h)).square()
    r, a, q = r.diag(), system.matrix.to(y), system.noise.to(y)
    mean, covariance = system.mean.to(y).expand(*y.shape[:-2], d), system.covariance.to(y)
    laws: list[list[Tensor]] = [[], [], [], []]
    evidence = y.new_zeros(y.shape[:-2])
    for k in range(length):
        if k > 0:
            mean, covariance = mean @ a.mT, a @ covariance @ a.mT + q
        laws[0].append(mean)
        laws[1].append(covariance)
        if k % observation.every == 0:
            innovation = y[..., k // observation.every, :] - mean @ h.mT
            spread = h @ covariance @ h.mT + r
            evidence = evidence + torch.distributions.MultivariateNormal(
                torch.zeros_like(innovation), spread
            ).log_prob(innovation)
            k_gain = gain(covariance, h, r)
            mean = mean + innovation @ k_gain.mT
            remainder = torch.eye(d).to(y) - k_gain @ h  # Joseph's form stays symmetric, positive
            covariance = remainder @ covariance @ remainder.mT + k_gain @ r @ k_gain.mT
        laws[2].append(mean)
        laws[3].append(covariance)
    forecast = Law(torch.stack(laws[0], -2), torch.stack(laws[1]))
    return Filtered(forecast, Law(torch.stack(laws[2], -2), torch.stack(laws[3])), evidence)


def rts_smoother(system: LinearGaussian, observation: Observation, length: int) -> Law:
    """Return the law of each state given all observations; arguments as in `kalman_filter`.

    References
    ----------
    Rauch, Tung and Striebel (1965), AIAA J. 3, 1445–1450.
    """
    forecast, analysis, _ = kalman_filter(system, observation, length)
    a = system.matrix.to(analysis.mean)
    mean, covariance = analysis.mean[..., -1, :], analysis.covariance[-1]
    means, covariances = [mean], [covariance]
    for k in range(length - 2, -1, -1):
        cross = a @ analysis.covariance[k]  # Cov[x_{k+1}, x_k]
        back = torch.linalg.solve(forecast.covariance[k + 1], cross).mT
        mean = analysis.mean[..., k, :] + (mean - forecast.mean[..., k + 1, :]) @ back.mT
        covariance = (
            analysis.covariance[k] + back @ (covariance - forecast.covariance[k + 1]) @ back.mT
        )
        means.append(mean)
        covariances.append(covariance)
    return Law(torch.stack(means[::-1], -2), torch.stack(covariances[::-1]))


def steady_state(system: LinearGaussian, h: Tensor, r: Tensor) -> Tensor:
    """Return the forecast covariance (d, d) that a filter settles on, observing every state.

    Solves Riccati's equation P = A (P - P Hᵀ (H P Hᵀ + R)^-1 H P) Aᵀ + Q.
    """
    a, q = (np.asarray(v.cpu(), np.float64) for v in (system.matrix, system.noise))
    parts = (np.asarray(v.cpu(), np.float64) for v in (h.mT, r))
    return torch.from_numpy(scipy.linalg.solve_discrete_are(a.T, next(parts), q, next(parts))).to(h)
