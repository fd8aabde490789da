"""Variational analyses: the state that minimises a cost with a prescribed background covariance.

3D-Var: J(x) = ½ (x - x_b)ᵀ B^-1 (x - x_b) + ½ |y - H(x)|²/std², by Gauss–Newton steps, each of
which is the Kalman update with the operator's Jacobian; one is exact for a linear operator.
"""

import torch
from torch import Tensor

from ddmlib import checks
from ddmlib.assimilation.kalman import gain
from ddmlib.assimilation.observations import Observation


def jacobian(observation: Observation, x: Tensor) -> Tensor:
    """Return the derivative of the operator at states (*batch, d), shape (*batch, m, d)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        seen = observation.predict(x).flatten(0, -2)
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
