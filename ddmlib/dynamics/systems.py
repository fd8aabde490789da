"""Ordinary differential equations: Lorenz 63, the integrator, Lyapunov exponents."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ddmlib import checks

BLOCK = 64  # stored states gathered before they are copied to the result in one go


class System(Protocol):
    """What `integrate` asks of a dynamical system."""

    @property
    def dim(self) -> int:
        """Number of components of a state."""

    def tendency(self, x: Tensor) -> Tensor:
        """Return dx/dt at states ``x`` of shape (..., dim)."""


@functools.lru_cache(maxsize=32)
def _lorenz63_rows(
    sigma: float, rho: float, beta: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Rows of the linear part of the tendency, then the rows (0, -z, y) that multiply x."""
    rows = [[-sigma, sigma, 0], [rho, -1, 0], [0, 0, -beta], [0, 0, 0], [0, 0, -1], [0, 1, 0]]
    with torch.inference_mode(False):  # it is kept, and may be differentiated through later
        return torch.tensor(rows, dtype=dtype, device=device)


@dataclass(frozen=True)
class Lorenz63:
    """The Lorenz-63 system dx/dt = sigma (y - x), dy/dt = x (rho - z) - y, dz/dt = x y - beta z.

    Parameters
    ----------
    sigma, rho, beta : float
        Prandtl number, scaled Rayleigh number, geometric factor; the classical chaotic values.
    """

    sigma: float = 10.0
    rho: float = 28.0
    beta: float = 8.0 / 3.0
    dim: ClassVar[int] = 3

    def tendency(self, x: Tensor) -> Tensor:
        """Return dx/dt.

        Parameters
        ----------
        x : Tensor of shape (..., 3)
            States, in any memory layout.  The result keeps each component in a row of its own,
            which is what makes `integrate` fast.

        Returns
        -------
        Tensor of shape (..., 3)
        """
        if x.ndim != 2:
            return self.tendency(x.reshape(-1, 3)).reshape(x.shape)
        rows = _lorenz63_rows(self.sigma, self.rho, self.beta, x.dtype, x.device)
        columns = x.mT
        linear, factor = torch.mm(rows, columns).chunk(2)  # (3, n) each
        return torch.addcmul(linear, columns.narrow(0, 0, 1), factor).mT

    def fixed_points(self) -> Tensor:
        """Return the three steady states, shape (3, 3), float64: the origin, then the two lobes."""
        if self.rho <= 1:
            return torch.zeros(1, 3, dtype=torch.float64)
        r = math.sqrt(self.beta * (self.rho - 1))
        c = self.rho - 1
        return torch.tensor([[0, 0, 0], [r, r, c], [-r, -r, c]], dtype=torch.float64)


def rk4(tendency: Callable[[Tensor], Tensor], x: Tensor, dt: float) -> Tensor:
    """Advance ``x`` by one classical Runge-Kutta step of order four.

    Parameters
    ----------
    tendency : callable
        Right-hand side f of dx/dt = f(x).
    x : Tensor of shape (..., d)
        States at time t.
    dt : float
        Step in time units.

    Returns
    -------
    Tensor of shape (..., d), the states at t + dt.
    """
    k_1 = tendency(x)
    k_2 = tendency(torch.add(x, k_1, alpha=dt / 2))
    k_3 = tendency(torch.add(x, k_2, alpha=dt / 2))
    k_4 = tendency(torch.add(x, k_3, alpha=dt))
    slope = torch.add(k_1 + k_4, k_2 + k_3, alpha=2)
    return torch.add(x, slope, alpha=dt / 6)


def integrate(system: System, x0: Tensor, *, dt: float, steps: int, every: int = 1) -> Tensor:
    """Integrate a batch of initial states with `rk4` and keep every ``every``-th state.

    Parameters
    ----------
    system : System
        Object with ``dim`` and ``tendency``.
    x0 : Tensor of shape (*batch, d)
        Initial states in physical units; their dtype and device are those of the result.
    dt : float
        Step in time units.
    steps : int
        Number of steps; a multiple of ``every``.
    every : int
        Interval, in steps, between the states that are kept.

    Returns
    -------
    Tensor of shape (*batch, steps // every + 1, d), whose first state is ``x0``.

    Raises
    ------
    ValueError
        If a shape is wrong, ``x0`` is not finite, ``steps`` is no multiple of ``every``, or the
        integration ends in values that are not finite (``dt`` too long).
    """
    checks.last_axis("x0", checks.finite("x0", x0), system.dim)
    checks.positive("dt", dt)
    checks.count("steps", steps, 0)
    checks.count("every", every)
    if steps % every:
        raise ValueError(f"steps must be a multiple of every, got {steps} and {every}")
    batch, kept = x0.shape[:-1], steps // every
    x = x0.reshape(-1, system.dim).mT.contiguous().mT  # one row of memory a component
    out = x.new_empty(len(x), kept + 1, system.dim)
    out[:, 0] = x
    for start in range(0, kept, BLOCK):
        block = []
        for _ in range(min(BLOCK, kept - start)):
            for _ in range(every):
                x = rk4(system.tendency, x, dt)
            block.append(x)
        rows = torch.cat([states.mT for states in block])  # each state as it lies in memory
        out[:, 1 + start : 1 + start + len(block)] = rows.mT.unflatten(1, (-1, system.dim))
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"the integration diverged: dt={dt} is too long for these states")
    return out.reshape(*batch, kept + 1, system.dim)


def lyapunov_exponents(
    system: System, x0: Tensor, *, dt: float, steps: int, every: int = 10, spin_up: int = 1000
) -> Tensor:
    """Estimate the Lyapunov exponents along each trajectory of a batch.

    Parameters
    ----------
    system : System
        Object with ``dim`` and ``tendency``.
    x0 : Tensor of shape (*batch, d)
        States on the attractor; use float64.
    dt : float
        Step in time units.
    steps : int
        Steps that are averaged over, a multiple of ``every``.
    every : int
        Steps between two orthonormalisations.
    spin_up : int
        Steps before averaging starts, in which the frame aligns; a multiple of ``every``.

    Returns
    -------
    Tensor of shape (*batch, d)
        Exponents per time unit, in descending order of their expectation.  Average over the batch
        for an estimate, and take its spread for a standard error.

    References
    ----------
    Benettin, Galgani, Giorgilli, Strelcyn (1980), Meccanica 15, 9-20.
    """
    checks.last_axis("x0", checks.finite("x0", x0), system.dim)
    checks.positive("dt", dt)
    checks.count("every", every)
    if checks.count("steps", steps) % every or checks.count("spin_up", spin_up, 0) % every:
        raise ValueError(f"steps and spin_up must be multiples of every={every}")
    d, x = system.dim, x0.detach().reshape(-1, system.dim)
    q = torch.eye(d, dtype=x.dtype, device=x.device).expand(len(x), d, d)
    total = torch.zeros_like(x)

    for k in range(0, spin_up + steps, every):
        with torch.enable_grad():
            start = end = x.detach().requires_grad_()
            for _ in range(every):
                end = rk4(system.tendency, end, dt)
            rows = [
                torch.autograd.grad(end[:, i].sum(), start, retain_graph=True)[0] for i in range(d)
            ]
        x, jacobian = end.detach(), torch.stack(rows, dim=1)  # (n, d, d)
        q, r = torch.linalg.qr(jacobian @ q)
        if k >= spin_up:
            total += torch.diagonal(r, dim1=-2, dim2=-1).abs().log()
    return (total / (steps * dt)).reshape(x0.shape)
