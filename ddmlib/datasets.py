"""Data sets: seeded simulation, the reader's own arrays, splits, windows and standardisation.

A data set is a tensor of shape (trajectories, length, d) in physical units.  `Standardizer` takes
it to the units in which denoisers work: zero mean and unit variance, component by component.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ddmlib import checks, dynamics, noise


@dataclass(frozen=True)
class Standardizer:
    """The affine map z = (x - mean) / std from physical to standardised units.

    Parameters
    ----------
    mean, std : Tensor of shape (d,)
        Physical units; every std positive.
    """

    mean: Tensor
    std: Tensor

    def __post_init__(self) -> None:
        checks.finite("mean", self.mean)
        checks.finite("std", self.std)
        if self.mean.shape != self.std.shape or self.mean.ndim != 1:
            raise ValueError(
                f"mean and std must have one shape (d,), got {tuple(self.mean.shape)} "
                f"and {tuple(self.std.shape)}"
            )
        if not bool((self.std > 0).all()):
            raise ValueError("std must be positive in every component (is one constant?)")

    def __call__(self, x: Tensor) -> Tensor:
        """Map x of shape (..., d) to standardised units."""
        checks.last_axis("x", x, len(self.mean))
        return (x - self.mean.to(x)) / self.std.to(x)

    def inverse(self, z: Tensor) -> Tensor:
        """Map z of shape (..., d) to physical units."""
        checks.last_axis("z", z, len(self.mean))
        return z * self.std.to(z) + self.mean.to(z)

    @classmethod
    def from_data(cls, x: Tensor) -> "Standardizer":
        """Return the standardizer with the mean and std of x (..., d), all other axes pooled."""
        flat = checks.finite("x", x).reshape(-1, x.shape[-1]).to(torch.float64)
        return cls(flat.mean(0), flat.std(0, correction=0))

    @classmethod
    def identity(cls, d: int) -> "Standardizer":
        """Return the map that changes nothing."""
        return cls(torch.zeros(d), torch.ones(d))


# F24's constants, measured on its 16M training states; published with its code.
LORENZ63 = Standardizer(
    torch.tensor([0.0450, 0.0451, 23.5463]), torch.tensor([7.9239, 9.0124, 8.6261])
)

# R23's constants for its noisy chain.
NOISY_LORENZ63 = Standardizer(torch.tensor([0.0, 0.0, 25.0]), torch.tensor([8.0, 9.0, 8.6]))


def lorenz63(
    trajectories: int,
    length: int,
    *,
    dt: float = 0.01,
    every: int = 1,
    burn_in: float = 100.0,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Simulate stationary trajectories of Lorenz 63, all side by side.

    Parameters
    ----------
    trajectories, length : int
        How many trajectories, and how many states of each.
    dt : float
        Integration step in time units.
    every : int
        Steps between two states.
    burn_in : float
        Time units that are integrated and thrown away; below about 50 the states are not yet
        distributed as on the attractor.
    seed : int
        Seed of the initial states N((0, 0, 25), diag(64, 81, 75)); the same on every device.

    Returns
    -------
    Tensor of shape (trajectories, length, 3), physical units.
    """
    checks.count("trajectories", trajectories)
    checks.count("length", length)
    checks.count("every", every)
    checks.positive("dt", dt)
    if burn_in < 0:
        raise ValueError(f"burn_in must not be negative, got {burn_in}")
    generator = torch.Generator().manual_seed(seed)
    x0 = noise.normal((trajectories, 3), generator=generator, dtype=torch.float64)
    x0 = x0 * torch.tensor([8.0, 9.0, 75**0.5], dtype=torch.float64)
    x0 = (x0 + torch.tensor([0.0, 0.0, 25.0], dtype=torch.float64)).to(device=device, dtype=dtype)
    system, skip = dynamics.Lorenz63(), round(burn_in / dt)
    if skip:
        x0 = dynamics.integrate(system, x0, dt=dt, steps=skip, every=skip)[:, -1]
    return dynamics.integrate(system, x0, dt=dt, steps=(length - 1) * every, every=every)


def noisy_lorenz63(
    trajectories: int = 1024,
    length: int = 1024,
    *,
    burn_in: int = 1024,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Simulate trajectories of R23's noisy Lorenz 63, `dynamics.NoisyLorenz63`, all side by side.

    Parameters
    ----------
    trajectories, length : int
        How many trajectories, and how many states of each, 0.025 time units apart; the defaults are
        R23's, and `split` gives its 80/10/10 parts.
    burn_in : int
        Transitions that are thrown away first.
    seed : int
        Seed of first states and noise; the same on every device.

    Returns
    -------
    Tensor of shape (trajectories, length, 3), physical units.

    References
    ----------
    Rozet and Louppe (2023), Score-based data assimilation, NeurIPS 36.
    """
    checks.count("trajectories", trajectories)
    checks.count("length", length)
    checks.count("burn_in", burn_in, 0)
    chain, generator = dynamics.NoisyLorenz63(), torch.Generator().manual_seed(seed)
    x = chain.initial(trajectories, generator).to(device=device, dtype=dtype)
    for _ in range(burn_in):
        x = chain.transition(x, generator)
    return dynamics.simulate(chain, x, steps=length - 1, generator=generator)


def from_arrays(arrays: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """Turn the reader's own arrays into a data set.

    Parameters
    ----------
    arrays : array or sequence of arrays
        One array of shape (trajectories, length, d) or (length, d), or a sequence of arrays of
        shape (length, d) of equal length; anything that `torch.as_tensor` takes.
    dtype : torch.dtype
        Of the result.

    Returns
    -------
    Tensor of shape (trajectories, length, d)

    Raises
    ------
    ValueError
        If shapes differ, axes are missing, or values are not finite.
    """
    if isinstance(arrays, Sequence):
        parts = [torch.as_tensor(a) for a in arrays]
        shapes = {tuple(p.shape) for p in parts}
        if len(shapes) != 1:
            raise ValueError(f"arrays must be one or more of one shape, got {sorted(shapes)}")
        x = torch.stack(parts)
    else:
        x = torch.as_tensor(arrays)
        x = x[None] if x.ndim == 2 else x
    if x.ndim != 3 or not x.numel():
        raise ValueError(
            f"arrays must make a data set of shape (trajectories, length, d), got {tuple(x.shape)}"
        )
    return checks.finite("arrays", x.to(dtype))


def split(x: Tensor, fractions: Sequence[float] = (0.8, 0.1, 0.1)) -> tuple[Tensor, ...]:
    """Split a data set by trajectory, in order, so that no trajectory is in two parts.

    Parameters
    ----------
    x : Tensor of shape (trajectories, length, d)
    fractions : sequence of float
        Share of each part; they sum to one.

    Returns
    -------
    One tensor for each fraction, views of ``x``.
    """
    if x.ndim != 3:
        raise ValueError(f"x must have shape (trajectories, length, d), got {tuple(x.shape)}")
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(f"fractions must be non-negative and sum to one, got {tuple(fractions)}")
    total, edges = 0.0, [0]
    for fraction in fractions:
        total += fraction
        edges.append(round(total * len(x)))
    parts = [b - a for a, b in pairwise(edges)]
    if any(size == 0 and f > 0 for size, f in zip(parts, fractions, strict=True)):
        raise ValueError(f"x has too few trajectories ({len(x)}) for fractions {tuple(fractions)}")
    return tuple(torch.split(x, parts))


def windows(x: Tensor, length: int, stride: int = 1) -> Tensor:
    """Cut trajectories into windows.

    Parameters
    ----------
    x : Tensor of shape (trajectories, total, d)
    length, stride : int
        States in a window, and states between the starts of two windows.

    Returns
    -------
    Tensor of shape (trajectories, number, length, d), a view of ``x``.
    """
    checks.count("length", length)
    checks.count("stride", stride)
    if x.ndim != 3 or x.shape[1] < length:
        raise ValueError(
            f"x must have shape (trajectories, total, d) with total >= length={length}, "
            f"got {tuple(x.shape)}"
        )
    return x.unfold(1, length, stride).movedim(-1, -2)
