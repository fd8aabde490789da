"""Forecasts: features and a head as a map of the state, iterated, and its Lyapunov exponents."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import checks

Map = Callable[[Tensor], Tensor]


class Surrogate(nn.Module):
    """The increment x(t + dt) - x(t) as a head on features; differentiable in x.

    Parameters
    ----------
    features : callable
        (*batch, d) -> (*batch, k).
    head : Module
        (*batch, k) -> (*batch, d).
    """

    def __init__(self, features: Map, head: nn.Module) -> None:
        super().__init__()
        self.features, self.head = features, head

    def forward(self, x: Tensor) -> Tensor:
        """Return the increment of states (*batch, d), in their shape and dtype."""
        return self.head(self.features(x)).to(x.dtype)


@torch.no_grad()
def rollout(increment: Map, x0: Tensor, steps: int) -> Tensor:
    """Iterate x ← x + increment(x) from a batch of initial states.

    Parameters
    ----------
    increment : callable
        Maps states (*batch, d) to increments of their shape, for instance a `Surrogate`.
    x0 : Tensor of shape (*batch, d)
        Initial states, standardised.
    steps : int
        Increments.

    Returns
    -------
    Tensor of shape (*batch, steps + 1, d)
        The first state is ``x0``.  A surrogate that diverges is not stopped: its states become
        infinite or NaN.
    """
    checks.finite("x0", x0)
    checks.count("steps", steps)
    x = x0.detach()
    states = [x]
    for step in range(steps):
        change = increment(x)
        if not step and change.shape != x.shape:
            raise ValueError(
                f"increment must keep the shape of its argument, {tuple(x.shape)}, got "
                f"{tuple(change.shape)}"
            )
        x = x + change
        states.append(x)
    return torch.stack(states, dim=-2)


def lyapunov_exponents(
    increment: Map, x0: Tensor, *, interval: float, steps: int, spin_up: int = 20
) -> Tensor:
    """Estimate the Lyapunov exponents of the map x ↦ x + increment(x) along its own trajectories.

    An orthonormal frame is pushed through the Jacobian of each step and made orthonormal again by
    QR; the mean logarithms of the diagonal of R, per time, are the exponents.

    Parameters
    ----------
    increment : callable
        Maps states (n, d) to increments, each row by itself; differentiable.
    x0 : Tensor of shape (*batch, d)
        Initial states on the attractor, standardised.
    interval : float
        Time between a state and the next, in time units of the system.
    steps, spin_up : int
        Steps that are averaged over, and steps before that, in which the frame aligns.

    Returns
    -------
    Tensor of shape (*batch, d)
        Exponents per time unit in float64, in descending order of their expectation; NaN where a
        trajectory diverged.

    References
    ----------
    Benettin, Galgani, Giorgilli, Strelcyn (1980), Meccanica 15, 9-20.
    """
    checks.finite("x0", x0)
    checks.positive("interval", interval)
    checks.count("steps", steps)
    checks.count("spin_up", spin_up, 0)
    d, x = x0.shape[-1], x0.detach().reshape(-1, x0.shape[-1])
    q = torch.eye(d, dtype=torch.float64, device=x.device).expand(len(x), d, d)
    total = torch.zeros_like(x, dtype=torch.float64)
    alive = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for step in range(spin_up + steps):
        with torch.enable_grad():
            start = x.requires_grad_()
            end = start + increment(start)
            rows = [
                torch.autograd.grad(end[:, i].sum(), start, retain_graph=True)[0] for i in range(d)
            ]
        jacobian = torch.stack(rows, dim=1).double()  # (n, d, d)
        alive &= torch.isfinite(jacobian).flatten(1).all(1) & torch.isfinite(end.detach()).all(1)
        # QR refuses NaN: a trajectory that has diverged goes on as zero
        x = torch.where(alive[:, None], end.detach(), 0.0)
        q, r = torch.linalg.qr(torch.where(alive[:, None, None], jacobian @ q, 0.0))
        if step >= spin_up:
            total += torch.diagonal(r, dim1=-2, dim2=-1).abs().log()
    total[~alive] = torch.nan
    return (total / (steps * interval)).reshape(x0.shape)
