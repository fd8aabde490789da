r"""Ensemble analyses: the covariance of the forecast is that of an ensemble.

An ensemble E of N members (..., N, d) has mean x̄ and anomalies X; seen through the operator, ȳ and
Y, divided by the standard deviations of the observations.  With S = Y/√(N - 1) all of the Kalman
filter happens in the space of the members (Bishop et al. 2001; Hunt et al. 2007):

    w = S (I + SᵀS)^-1 (y - ȳ)/std /√(N - 1),   T = (I + S Sᵀ)^-1/2,   E_a = x̄ + wᵀX + T X.

Everything is batched over the leading axes and goes through the smaller of the m × m matrix SᵀS and
the N × N matrix S Sᵀ.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ddmlib import checks, noise
from ddmlib.assimilation.observations import Observation

Inflation = float | Tensor


def members(name: str, x: Tensor) -> int:
    """Return the number of members of an ensemble (..., N, d); an error unless N is 2 or more."""
    checks.is_tensor(name, x)
    if x.ndim < 2 or x.shape[-2] < 2:
        raise ValueError(f"{name} must have shape (..., members >= 2, d), got {tuple(x.shape)}")
    return x.shape[-2]


def anomalies(ensemble: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (..., 1, d) and anomalies (..., N, d)."""
    mean = ensemble.mean(-2, keepdim=True)
    return mean, ensemble - mean


def inflate(ensemble: Tensor, factor: Inflation) -> Tensor:
    """Multiply the anomalies by ``factor``, a positive number or one for each ensemble (...,)."""
    mean, x = anomalies(ensemble)
    return mean + _per_ensemble("factor", factor, x) * x


def rotate(ensemble: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Mix the anomalies by a random rotation that keeps mean and covariance.

    It undoes outliers that a deterministic analysis keeps (Sakov & Oke 2008).  All ensembles of
    the batch share the rotation.
    """
    n = members("ensemble", ensemble)
    kept = torch.linalg.qr(  # first column (1, …, 1)/√n up to its sign, others orthogonal to it
        torch.cat((torch.ones(n, 1, dtype=torch.float64), torch.eye(n, n - 1).double()), 1)
    ).Q[:, 1:]
    q, r = torch.linalg.qr(noise.normal((n - 1, n - 1), generator=generator).double().cpu())
    q = q * torch.sign(torch.diagonal(r))  # uniform over rotations
    mean, x = anomalies(ensemble)
    return mean + (kept @ q @ kept.mT).to(x) @ x


def etkf(ensemble: Tensor, observation: Observation, *, inflation: Inflation = 1.0) -> Tensor:
    """Return the analysis ensemble of the ensemble-transform Kalman filter, symmetric square root.

    Parameters
    ----------
    ensemble : Tensor of shape (*batch, N, d)
        Forecast, physical units.
    observation : Observation
        ``y`` of shape (*batch, m).
    inflation : float or Tensor of shape (*batch,)
        Factor of the forecast *covariance* (F24).

    Returns
    -------
    Tensor of shape (*batch, N, d)

    References
    ----------
    Bishop, Etherton and Majumdar (2001), Mon. Weather Rev. 129, 420–436; Hunt, Kostelich and
    Szunyogh (2007), Physica D 230, 112–126.
    """
    mean, x, s, innovation = _prepare(ensemble, observation)
    root = _per_ensemble("inflation", inflation, x).sqrt()
    s = s * root
    return mean + (_weights(s, innovation) + _transform(s)) @ (root * x)


def enoi(
    background: Tensor,
    ensemble: Tensor,
    observation: Observation,
    *,
    inflation: Inflation = 1.0,
) -> Tensor:
    """Return the analysis of ensemble optimal interpolation: one state, somebody else's spread.

    The increment is the Kalman gain of the ensemble's covariance times the innovation
    y - H(background).

    Parameters
    ----------
    background : Tensor of shape (*batch, d)
        Deterministic forecast, physical units.
    ensemble : Tensor of shape (*batch, N, d)
        Its anomalies (about its own mean) are used, added to the background.
    observation : Observation
        ``y`` of shape (*batch, m).
    inflation : float or Tensor of shape (*batch,)
        Factor of the covariance of the ensemble.

    Returns
    -------
    Tensor of shape (*batch, d)

    References
    ----------
    Evensen (2003), Ocean Dyn. 53, 343–367.
    """
    n = members("ensemble", ensemble)
    if ensemble.shape[:-2] != background.shape[:-1] or ensemble.shape[-1] != background.shape[-1]:
        raise ValueError(
            f"ensemble must have shape (*batch, N, d) for a background of shape "
            f"{tuple(background.shape)}, got {tuple(ensemble.shape)}"
        )
    _, x = anomalies(ensemble)
    x = x * _per_ensemble("inflation", inflation, x).sqrt()
    s = anomalies(observation.predict(background[..., None, :] + x))[1] / observation.std
    innovation = _innovation(background, observation)
    weights = _weights(s / math.sqrt(n - 1), innovation[..., None, :])
    return background + (weights @ x)[..., 0, :]


def enkf_n(ensemble: Tensor, observation: Observation) -> Tensor:
    """Return the analysis of the finite-size filter EnKF-N: `etkf`, inflating by itself.

    The inflation of each ensemble minimises the dual cost of Bocquet, Raanes & Hannart (2015), with
    their correction of its mode; nothing is tuned.

    Parameters
    ----------
    ensemble : Tensor of shape (*batch, N, d)
    observation : Observation

    Returns
    -------
    Tensor of shape (*batch, N, d)
    """
    _, _, s, innovation = _prepare(ensemble, observation)
    return etkf(ensemble, observation, inflation=adaptive_inflation(s, innovation))


def adaptive_inflation(s: Tensor, innovation: Tensor) -> Tensor:
    """Return EnKF-N's inflation of the covariance, shape (*batch,).

    With λ² the inflation, minimises over λ

        Σ_i u_i² / (N - 1 + λ² s_i²) + e_N/λ² + c_L log λ²,

    s_i singular values and u the rotated innovation, both in units of the observations' noise,
    e_N = (N + 1)/N and c_L = N/(N - 1) before the correction of the mode.

    Parameters
    ----------
    s : Tensor of shape (*batch, N, m)
        Observed anomalies over std √(N - 1).
    innovation : Tensor of shape (*batch, 1, m)
        (y - ȳ)/std.
    """
    n, m = s.shape[-2:]
    values, vectors = torch.linalg.eigh(s.mT @ s)
    s2 = values.clamp(min=0) * (n - 1)  # squared singular values of the observed anomalies
    u2 = (innovation @ vectors)[..., 0, :].square()
    e, c = (n + 1) / n, n / (n - 1)
    padded = ((n - 1) / (s2 + n - 1)).sum(-1) + max(n - m, 0)  # null directions count with 1
    if m > n:  # no more than n of the m are not null
        padded = ((n - 1) / (s2[..., -n:] + n - 1)).sum(-1)
    correction = (e / c) ** (padded / n / 2)
    e, c = (e / correction)[..., None], (c * correction)[..., None]

    def cost(log_l2: Tensor) -> Tensor:  # (*batch, k) to the same
        fit = u2[..., None, :] / (n - 1 + log_l2.exp()[..., None] * s2[..., None, :])
        return fit.sum(-1) + e * torch.exp(-log_l2) + c * log_l2

    grid = torch.linspace(-2.0, 12.0, 57, dtype=s.dtype, device=s.device).expand(*s.shape[:-2], 57)
    best = cost(grid).argmin(-1, keepdim=True).clamp(1, 55)
    low, high = grid.gather(-1, best - 1), grid.gather(-1, best + 1)
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(20):  # narrows the bracket 15 000-fold
        a, b = high - golden * (high - low), low + golden * (high - low)
        left = cost(a) < cost(b)
        low, high = torch.where(left, low, a), torch.where(left, b, high)
    return ((low + high) / 2).exp()[..., 0]


def ienks(
    ensemble: Tensor,
    forecast: Callable[[Tensor], Tensor],
    observation: Observation,
    *,
    iterations: int = 10,
    tolerance: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Return the first forecast and the analysis of the iterative ensemble Kalman smoother, lag 1.

    Gauss–Newton for the state at the *previous* time, in the space of the members; sensitivities
    come from the ensemble, which is re-run from there in each iteration.  The analysis is the last
    ensemble, propagated to the time of the observation.

    Parameters
    ----------
    ensemble : Tensor of shape (*batch, N, d)
        Analysis at the previous time.
    forecast : callable
        Propagates states (..., d) to the time of the observation.
    observation : Observation
    iterations : int
        Most iterations.
    tolerance : float
        Stop when the mean-square step of the weights is below it in all ensembles.

    Returns
    -------
    Two tensors of shape (*batch, N, d), at the time of the observation.

    References
    ----------
    Sakov, Oliver and Bertino (2012), Mon. Weather Rev. 140, 1988–2004; Bocquet and Sakov (2014), Q.
    J. R. Meteorol. Soc. 140, 1521–1535.
    """
    n = members("ensemble", ensemble)
    checks.count("iterations", iterations)
    mean, x = anomalies(ensemble)
    weights, step = torch.zeros_like(x[..., :1, :1]).expand(*x.shape[:-2], 1, n), 1.0
    eye = torch.eye(n, dtype=x.dtype, device=x.device)
    transform = inverse = eye
    first = None
    for _ in range(iterations):
        run = forecast(mean + (weights + transform) @ x)
        first = run if first is None else first
        seen_mean, seen = anomalies(observation.predict(run))
        y = inverse @ (seen / observation.std)  # as if the anomalies had not been narrowed
        innovation = (observation.y[..., None, :] - seen_mean) / observation.std
        values, vectors = torch.linalg.eigh(y @ y.mT)
        values = values.clamp(min=0) + n - 1
        gradient = innovation @ y.mT - (n - 1) * weights
        change = (gradient @ (vectors / values[..., None, :])) @ vectors.mT
        weights = weights + change
        transform = (vectors * ((n - 1) / values).sqrt()[..., None, :]) @ vectors.mT
        inverse = (vectors * (values / (n - 1)).sqrt()[..., None, :]) @ vectors.mT
        step = float(change.square().mean(-1).max())
        if step < tolerance:
            break
    assert first is not None
    return first, forecast(mean + (weights + transform) @ x)


def _per_ensemble(name: str, value: Inflation, x: Tensor) -> Tensor:
    """Return ``value`` so that it broadcasts against ensembles x; an error unless positive."""
    if not isinstance(value, Tensor):
        return torch.as_tensor(checks.positive(name, value), dtype=x.dtype, device=x.device)
    if value.shape != x.shape[:-2] or not bool((value > 0).all()):
        raise ValueError(f"{name} must be positive, a number or of shape {tuple(x.shape[:-2])}")
    return value[..., None, None]


def _innovation(x: Tensor, observation: Observation) -> Tensor:
    """Return (y - H(x))/std of states (*batch, d); an error unless y is (*batch, m)."""
    if observation.y.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"y must have shape (*batch, m) with the batch of the states, {tuple(x.shape[:-1])}; "
            f"got {tuple(observation.y.shape)}"
        )
    return observation.residual(x)


def _prepare(ensemble: Tensor, observation: Observation) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return mean, anomalies, S and the scaled innovation (*batch, 1, m) of the observed mean."""
    n = members("ensemble", ensemble)
    if observation.y.shape[:-1] != ensemble.shape[:-2]:
        raise ValueError(
            f"y must have shape (*batch, m) with the batch of the ensemble, "
            f"{tuple(ensemble.shape[:-2])}; got {tuple(observation.y.shape)}"
        )
    mean, x = anomalies(ensemble)
    seen_mean, seen = anomalies(observation.predict(ensemble))
    s = seen / observation.std / math.sqrt(n - 1)
    return mean, x, s, (observation.y[..., None, :] - seen_mean) / observation.std


def _weights(s: Tensor, innovation: Tensor) -> Tensor:
    """Return the weights (*batch, 1, N) of the anomalies in the increment of the mean, from S
    (*batch, N, m) and (y - ȳ)/std (*batch, 1, m)."""
    n, m = s.shape[-2:]
    if m <= n:
        eye = torch.eye(m, dtype=s.dtype, device=s.device)
        weights = torch.linalg.solve(eye + s.mT @ s, innovation.mT).mT @ s.mT
    else:
        eye = torch.eye(n, dtype=s.dtype, device=s.device)
        weights = torch.linalg.solve(eye + s @ s.mT, s @ innovation.mT).mT
    return weights / math.sqrt(n - 1)


def _transform(s: Tensor) -> Tensor:
    """Return the symmetric transform (I + S Sᵀ)^-1/2 of the anomalies, (*batch, N, N)."""
    n, m = s.shape[-2:]
    if m > n:
        values, vectors = torch.linalg.eigh(s @ s.mT)
        return (vectors / (1 + values.clamp(min=0)).sqrt()[..., None, :]) @ vectors.mT
    values, vectors = torch.linalg.eigh(s.mT @ s)
    values, projected = values.clamp(min=0)[..., None, :], s @ vectors
    # I + S V g Vᵀ Sᵀ with g = ((1 + λ)^-1/2 - 1)/λ, in a form that is safe at λ = 0
    shrink = (projected / (1 + values + (1 + values).sqrt())) @ projected.mT
    return torch.eye(n, dtype=s.dtype, device=s.device) - shrink
