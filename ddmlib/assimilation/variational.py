"""Variational analyses: the state that minimises a cost with a prescribed background covariance.

3D-Var: J(x) = ½ (x - x_b)ᵀ B^-1 (x - x_b) + ½ |y - H(x)|²/std², by Gauss–Newton steps, each of
which is the Kalman update with the operator's Jacobian; one is exact for a linear operator.

Weak-constraint 4D-Var: the trajectory of a chain that maximises p(x_1 … x_L | y), again by
Gauss–Newton steps, each of which solves a block-tridiagonal system; one is exact for a linear chain
and operator, and is then the smoother's mean.  A chain's posterior may have several maxima: which
of them is found depends on where the search starts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ddmlib import checks
from ddmlib.assimilation.kalman import gain
from ddmlib.assimilation.observations import Observation
from ddmlib.dynamics import Chain


def jacobian(observation: Observation, x: Tensor) -> Tensor:
    """Return the derivative of the operator at states (*batch, d), shape (*batch, m, d)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        seen = observation.predict(x)
        rows = [
            torch.autograd.grad(value.sum(), x, retain_graph=True, materialize_grads=True)[0]
            for value in seen.unbind(-1)
        ]
    return torch.stack(rows, -2)


def three_d_var(
    background: Tensor, covariance: Tensor, observation: Observation, *, iterations: int = 1
) -> Tensor:
    """Return the 3D-Var analysis of each state.

    Parameters
    ----------
    background : Tensor of shape (*batch, d)
        Forecast, physical units.
    covariance : Tensor of shape (d, d) or (*batch, d, d)
        Background covariance B, symmetric, positive semi-definite.
    observation : Observation
        ``y`` of shape (*batch, m).
    iterations : int
        Gauss–Newton steps; 1 is exact for a linear operator.

    Returns
    -------
    Tensor of shape (*batch, d)
    """
    d = checks.finite("background", background).shape[-1]
    checks.finite("covariance", covariance)
    if covariance.shape[-2:] != (d, d):
        raise ValueError(f"covariance must be (..., {d}, {d}), got {tuple(covariance.shape)}")
    if observation.y.shape[:-1] != background.shape[:-1]:
        raise ValueError(
            f"y must have shape (*batch, m) with the batch of the background, "
            f"{tuple(background.shape[:-1])}; got {tuple(observation.y.shape)}"
        )
    m = observation.y.shape[-1]
    std = torch.as_tensor(observation.std, dtype=background.dtype, device=background.device)
    r, x = std.expand(m).square().diag(), background
    for _ in range(checks.count("iterations", iterations)):
        h = jacobian(observation, x)
        departure = observation.y - observation.predict(x)
        departure = departure + (h @ (x - background)[..., None])[..., 0]
        x = background + (gain(covariance, h, r) @ departure[..., None])[..., 0]
    return x


class Mode(NamedTuple):
    """Trajectories (*batch, length, d), their cost -log p(x, y) up to a constant, (*batch,), and
    whether the search converged, (*batch,)."""

    trajectory: Tensor
    cost: Tensor
    converged: Tensor


def weak_4d_var(
    chain: Chain,
    observation: Observation,
    start: Tensor,
    *,
    iterations: int = 100,
    tolerance: float = 1e-9,
) -> Mode:
    """Return the maximum of the posterior of a trajectory near each of the given ones.

    J(x) = ½ |x_1 - m|²_P + ½ Σ |x_{k+1} - M(x_k)|²_Q + ½ Σ |y - H(x)|²/std², with the norms of the
    inverse covariances, is lowered by Gauss–Newton steps, damped after Levenberg and Marquardt
    where a full step would raise it.

    Parameters
    ----------
    chain : Chain
    observation : Observation
        ``y`` of shape (n, m), or (*batch, n, m) with n = 1 + (length - 1) // every.
    start : Tensor of shape (*batch, length, d)
        Where each search starts, physical units; for instance samples of the posterior.
    iterations : int
        Most steps of each search.
    tolerance : float
        A search has converged when an accepted step lowers J by less than this share of 1 + J.

    Returns
    -------
    Mode
        In float64.

    Raises
    ------
    ValueError
        If a shape is wrong, ``start`` is not finite, or a setting is not positive.

    References
    ----------
    Trémolet (2006), Q. J. R. Meteorol. Soc. 132, 2483–2504.
    """
    checks.last_axis("start", checks.finite("start", start), chain.dim)
    checks.count("iterations", iterations)
    checks.positive("tolerance", tolerance)
    if start.ndim < 2:
        raise ValueError(f"start must have shape (*batch, length, d), got {tuple(start.shape)}")
    count = 1 + (start.shape[-2] - 1) // observation.every
    if observation.y.ndim < 2 or observation.y.shape[-2] != count:
        raise ValueError(
            f"y must have shape (*batch, {count}, m), got {tuple(observation.y.shape)}"
        )
    x = start.detach().double()
    cost, slope, blocks = _expand(chain, observation, x)
    damping = torch.zeros_like(cost)
    converged = torch.zeros_like(cost, dtype=torch.bool)
    for _ in range(iterations):
        trial = x - _solve(blocks, slope, damping)
        trial_cost, trial_slope, trial_blocks = _expand(chain, observation, trial)
        better = (trial_cost <= cost) & ~converged  # false where the trial's cost is NaN
        small = cost - trial_cost <= tolerance * (1 + trial_cost)
        damping = torch.where(better, damping / 10, (10 * damping).clamp(min=1e-3))
        damping = torch.where(damping < 1e-6, 0.0, damping)
        x = torch.where(better[..., None, None], trial, x)
        slope = torch.where(better[..., None, None], trial_slope, slope)
        blocks = tuple(
            torch.where(better[..., None, None, None], new, old)
            for new, old in zip(trial_blocks, blocks, strict=True)
        )
        converged = converged | (better & small)
        cost = torch.where(better, trial_cost, cost)
        if bool(converged.all()):
            break
    return Mode(x, cost, converged)


def _expand(
    chain: Chain, observation: Observation, x: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Return J (*batch,), its gradient (*batch, length, d) and the blocks of the Gauss–Newton
    Hessian: on the diagonal (*batch, length, d, d) and below it (*batch, length - 1, d, d)."""
    first, step = (torch.linalg.inv(v.to(x)) for v in (chain.covariance, chain.noise))
    seen = observation.observed(x)
    std = torch.as_tensor(observation.std).to(x).expand(observation.y.shape[-1])[:, None]
    h = jacobian(observation, seen) / std
    residual = (observation.y.to(x) - observation.predict(seen))[..., None] / std
    start = x[..., 0, :] - chain.mean.to(x)
    forecast, m = _linearise(chain, x[..., :-1, :])
    error = (x[..., 1:, :] - forecast)[..., None]

    cost = (start @ first * start).sum(-1) + residual.square().sum((-3, -2, -1))
    cost = (cost + (error.mT @ step @ error).sum((-3, -2, -1))) / 2
    slope, diagonal = torch.zeros_like(x)[..., None], x.new_zeros(*x.shape, x.shape[-1])
    slope[..., 0, :, 0] += start @ first
    slope[..., 1:, :, :] += step @ error
    slope[..., :-1, :, :] -= m.mT @ step @ error
    slope[..., :: observation.every, :, :] -= h.mT @ residual
    diagonal[..., 0, :, :] += first
    diagonal[..., 1:, :, :] += step
    diagonal[..., :-1, :, :] += m.mT @ step @ m
    diagonal[..., :: observation.every, :, :] += h.mT @ h
    return cost, slope[..., 0], (diagonal, -(step @ m))


def _linearise(chain: Chain, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return M(x) for states (..., d), and its derivative (..., d, d)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        forecast = chain.forecast(x)
        rows = [
            torch.autograd.grad(value.sum(), x, retain_graph=True)[0]
            for value in forecast.unbind(-1)
        ]
    return forecast.detach(), torch.stack(rows, -2)


def _solve(blocks: tuple[Tensor, ...], slope: Tensor, damping: Tensor) -> Tensor:
    """Solve the damped block-tridiagonal system by block elimination, all batches at once."""
    diagonal, below = blocks
    eye = torch.eye(slope.shape[-1]).to(slope)
    diagonal = diagonal * (1 + damping[..., None, None, None] * eye)
    pivots, right = [diagonal[..., 0, :, :]], [slope[..., 0, :, None]]
    for k in range(below.shape[-3]):
        left = torch.linalg.solve(pivots[-1], below[..., k, :, :].mT).mT  # B S^-1, S symmetric
        pivots.append(diagonal[..., k + 1, :, :] - left @ below[..., k, :, :].mT)
        right.append(slope[..., k + 1, :, None] - left @ right[-1])
    found = [torch.linalg.solve(pivots[-1], right[-1])]
    for k in range(below.shape[-3] - 1, -1, -1):
        rest = right[k] - below[..., k, :, :].mT @ found[-1]
        found.append(torch.linalg.solve(pivots[k], rest))
    return torch.cat(found[::-1], -1).mT
