"""Observations: what was seen, how a state would have looked, and how sure one can be.

y = H(x) + std · N(0, I), with an observation operator H that maps states (..., d) to (..., m),
linear or not.  All in physical units.  One object serves filters, smoothers and guidance alike.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddmlib import checks, noise

Operator = Callable[[Tensor], Tensor]


def identity(x: Tensor) -> Tensor:
    """Return the state itself: every component is observed."""
    return x


def component(*indices: int) -> Operator:
    """Return the operator that picks components, for instance ``component(0)`` for x alone."""
    if not indices:
        raise ValueError("indices must name one component or more")
    for index in indices:
        checks.count("indices", index, 0)

    def pick(x: Tensor) -> Tensor:
        return x[..., list(indices)]

    return pick


def matrix(operator: Operator, d: int, like: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """Return the matrix (m, d) of a linear operator, of the dtype and device of ``like``.

    Parameters
    ----------
    operator : callable
    d : int
        Components of a state.
    like : Tensor
    scale : float or Tensor of shape (d,)
        About how large states are, physical units: the operator is tried on some of six times that.

    Raises
    ------
    ValueError
        If the operator is not linear (tried on a few states).
    """
    eye = torch.eye(d, dtype=like.dtype, device=like.device)
    h = operator(eye).mT
    x = torch.linspace(-1.5, 2.0, d, dtype=like.dtype, device=like.device)
    large = torch.as_tensor(scale, dtype=like.dtype, device=like.device) * x
    for probe in (x, -3 * x, torch.zeros_like(x), large, -3 * large):
        rounding = 1e-4 * (1 + h.abs().sum() * probe.abs().amax().clamp(min=1))
        if bool(((operator(probe) - h @ probe).abs() > rounding).any()):
            raise ValueError("operator must be linear for this method")
    return h


@dataclass(frozen=True)
class Observation:
    """Observed values, with the operator and the standard deviation of their noise.

    Parameters
    ----------
    y : Tensor of shape (*batch, m), or (*batch, n, m) along a trajectory
        What was observed, physical units.
    operator : callable
        H, mapping states (..., d) to (..., m); default: all components.
    std : float or Tensor of shape (m,)
        Standard deviation of the noise, positive.
    every : int
        Along a trajectory: the states 0, every, 2 every, … are observed.
    """

    y: Tensor
    operator: Operator = identity
    std: float | Tensor = 1.0
    every: int = 1

    def __post_init__(self) -> None:
        checks.finite("y", self.y)
        if self.y.ndim == 0:
            raise ValueError("y must have shape (*batch, m), got a number")
        if isinstance(self.std, Tensor):
            checks.finite("std", self.std)
            if self.std.shape != self.y.shape[-1:] or not bool((self.std > 0).all()):
                raise ValueError(
                    f"std must be positive, a number or of shape {tuple(self.y.shape[-1:])}, "
                    f"got {self.std.tolist()}"
                )
        else:
            checks.positive("std", self.std)
        checks.count("every", self.every)

    def predict(self, x: Tensor) -> Tensor:
        """Return H(x) for states (..., d), checked to have the m values of ``y``."""
        seen = self.operator(checks.is_tensor("x", x))
        if seen.shape != (*x.shape[:-1], self.y.shape[-1]):
            raise ValueError(
                f"operator must map {tuple(x.shape)} to {(*x.shape[:-1], self.y.shape[-1])} as y "
                f"of shape {tuple(self.y.shape)} asks, got {tuple(seen.shape)}"
            )
        return seen

    def residual(self, x: Tensor) -> Tensor:
        """Return (y - H(x)) / std for states that broadcast against ``y``: standard normal at the
        truth."""
        return (self.y - self.predict(x)) / self.std

    def log_likelihood(self, x: Tensor) -> Tensor:
        """Return log p(y | x), summed over the m values, shape (...,)."""
        std = torch.as_tensor(self.std, dtype=self.y.dtype, device=self.y.device)
        terms = self.residual(x).square() / 2 + torch.log(std) + 0.9189385332046727  # log √(2π)
        return -terms.sum(-1)

    def observed(self, trajectory: Tensor) -> Tensor:
        """Return the states of trajectories (..., length, d) that are observed."""
        return trajectory[..., :: self.every, :]

    def at(self, k: int) -> "Observation":
        """Return the k-th observation along the trajectory."""
        return replace(self, y=self.y[..., k, :])


def observe(
    x: Tensor,
    operator: Operator = identity,
    std: float | Tensor = 1.0,
    *,
    every: int = 1,
    generator: torch.Generator | None = None,
) -> Observation:
    """Observe states with noise.

    Parameters
    ----------
    x : Tensor of shape (*batch, d)
        True states; with ``every`` above 1 a trajectory (*batch, length, d).
    operator, std, every
        As in `Observation`.
    generator : torch.Generator, optional
        Source of the noise.
    """
    seen = operator(checks.finite("x", x)[..., ::every, :] if every > 1 else checks.finite("x", x))
    return Observation(seen + std * noise.normal_like(seen, generator), operator, std, every)
