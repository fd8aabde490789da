"""Markov chains with Gaussian steps: the linear one, and R23's noisy Lorenz 63."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from ddmlib import checks, noise
from ddmlib.dynamics.systems import Lorenz63, rk4


class Chain(Protocol):
    """What filters, smoothers and `simulate` ask of a Markov chain with Gaussian steps."""

    @property
    def dim(self) -> int:
        """Number of components of a state."""

    @property
    def mean(self) -> Tensor:
        """Mean m of the first state, shape (d,)."""

    @property
    def covariance(self) -> Tensor:
        """Covariance P of the first state, shape (d, d)."""

    @property
    def noise(self) -> Tensor:
        """Covariance Q of a step's noise, shape (d, d)."""

    def forecast(self, x: Tensor) -> Tensor:
        """Return M(x), the mean of the next state, for states of shape (..., d)."""

    def initial(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n first states, shape (n, d)."""

    def transition(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw the next states given states of shape (..., d)."""

    def log_transition(self, x: Tensor, following: Tensor) -> Tensor:
        """Return log p(x_{k+1} | x_k), shape (...,)."""


@dataclass(frozen=True, eq=False)
class LinearGaussian:
    """The linear Markov chain x_{k+1} = A x_k + q, q ~ N(0, Q), from x_0 ~ N(mean, covariance).

    Parameters
    ----------
    matrix : Tensor of shape (d, d)
        A.
    noise : Tensor of shape (d, d)
        Q, symmetric, positive definite.
    mean, covariance : Tensor of shape (d,) and (d, d)
        Law of the first state; see `stationary`.
    """

    matrix: Tensor
    noise: Tensor
    mean: Tensor
    covariance: Tensor

    def __post_init__(self) -> None:
        d = len(checks.finite("matrix", self.matrix))
        checks.finite("mean", self.mean)
        for name in ("matrix", "noise", "covariance"):
            value = checks.finite(name, getattr(self, name))
            if value.shape != (d, d):
                raise ValueError(f"{name} must have shape ({d}, {d}), got {tuple(value.shape)}")
        if self.mean.shape != (d,):
            raise ValueError(f"mean must have shape ({d},), got {tuple(self.mean.shape)}")

    @classmethod
    def stationary(cls, matrix: Tensor, noise: Tensor) -> "LinearGaussian":
        """Return the chain that begins in its stationary law N(0, P), P = A P Aᵀ + Q."""
        checks.finite("matrix", matrix)
        if float(torch.linalg.eigvals(matrix).abs().max()) >= 1:
            raise ValueError("matrix must be stable: no eigenvalue outside the unit circle")
        a, q = (np.asarray(v.cpu(), np.float64) for v in (matrix, noise))
        p = torch.from_numpy(scipy.linalg.solve_discrete_lyapunov(a, q)).to(matrix)
        return cls(matrix, noise, torch.zeros_like(matrix[0]), (p + p.mT) / 2)

    @property
    def dim(self) -> int:
        """Number of components of a state."""
        return len(self.matrix)

    def initial(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n first states, shape (n, d)."""
        return self.mean + self._noise((n, self.dim), self.covariance, generator)

    def law(self, length: int) -> tuple[Tensor, Tensor]:
        """Return mean (length, d) and covariance (length d, length d) of a trajectory."""
        means, blocks = [self.mean], [self.covariance]
        for _ in range(checks.count("length", length) - 1):
            means.append(self.matrix @ means[-1])
            blocks.append(self.matrix @ blocks[-1] @ self.matrix.mT + self.noise)
        whole = self.matrix.new_zeros(length, self.dim, length, self.dim)
        for k, block in enumerate(blocks):
            for later in range(k, length):  # Cov[x_later, x_k] = A^(later - k) P_k
                whole[later, :, k], whole[k, :, later] = block, block.mT
                block = self.matrix @ block
        size = length * self.dim
        return torch.stack(means), whole.reshape(size, size)

    def forecast(self, x: Tensor) -> Tensor:
        """Return A x, the mean of the next state, for states of shape (..., d)."""
        return x @ self.matrix.mT.to(x)

    def transition(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw x_{k+1} given states x_k of shape (..., d)."""
        return self.forecast(x) + self._noise(x.shape, self.noise, generator).to(x)

    def log_transition(self, x: Tensor, following: Tensor) -> Tensor:
        """Return log p(x_{k+1} | x_k), shape (...,)."""
        law = torch.distributions.MultivariateNormal(self.forecast(x), self.noise.to(x))
        return law.log_prob(following)

    def _noise(
        self, shape: Sequence[int], covariance: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        z = noise.normal(
            shape, generator=generator, device=covariance.device, dtype=covariance.dtype
        )
        return z @ torch.linalg.cholesky(covariance).mT


@dataclass(frozen=True)
class NoisyLorenz63:
    """R23's chain x_{k+1} = RK4(x_k; dt, one step) + sqrt(dt) q with q ~ N(0, I).

    The first state is N((0, 0, 25), [[64, 50, 0], [50, 81, 0], [0, 0, 75]]), which is not the
    stationary law: some 1000 transitions lead there, 64 not quite.
    Source: Rozet & Louppe (2023), section 4.1 and its code.

    Parameters
    ----------
    dt : float
        Time units from one state to the next, and the variance of a step's noise.
    flow : Lorenz63
        The deterministic part.
    """

    dt: float = 0.025
    flow: Lorenz63 = field(default_factory=Lorenz63)
    dim: ClassVar[int] = 3

    def __post_init__(self) -> None:
        checks.positive("dt", self.dt)

    @property
    def mean(self) -> Tensor:
        """Mean of the first state, shape (3,), float64."""
        return torch.tensor([0.0, 0.0, 25.0], dtype=torch.float64)

    @property
    def covariance(self) -> Tensor:
        """Covariance of the first state, shape (3, 3), float64."""
        rows = [[64.0, 50.0, 0.0], [50.0, 81.0, 0.0], [0.0, 0.0, 75.0]]
        return torch.tensor(rows, dtype=torch.float64)

    @property
    def noise(self) -> Tensor:
        """Covariance dt I of a step's noise, shape (3, 3), float64."""
        return self.dt * torch.eye(3, dtype=torch.float64)

    def initial(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n first states, shape (n, 3), float32."""
        root = torch.linalg.cholesky(self.covariance)
        z = noise.normal((n, 3), generator=generator, dtype=torch.float64)
        return (self.mean.to(z) + z @ root.mT.to(z)).float()

    def forecast(self, x: Tensor) -> Tensor:
        """Return the state one Runge-Kutta step later, for states of shape (..., 3)."""
        return rk4(self.flow.tendency, x, self.dt)

    def transition(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw x_{k+1} given states x_k of shape (..., 3)."""
        return self.forecast(x) + math.sqrt(self.dt) * noise.normal_like(x, generator)

    def log_transition(self, x: Tensor, following: Tensor) -> Tensor:
        """Return log p(x_{k+1} | x_k), shape (...,)."""
        squares = (following - self.forecast(x)).square().sum(-1)
        return -squares / (2 * self.dt) - self.dim / 2 * math.log(2 * math.pi * self.dt)


def simulate(
    chain: Chain, x0: Tensor, *, steps: int, generator: torch.Generator | None = None
) -> Tensor:
    """Draw trajectories of a chain from given first states.

    Parameters
    ----------
    chain : Chain
    x0 : Tensor of shape (*batch, d)
        First states, physical units.
    steps : int
        Transitions.
    generator : torch.Generator, optional
        Source of randomness.

    Returns
    -------
    Tensor of shape (*batch, steps + 1, d), whose first state is ``x0``.

    Raises
    ------
    ValueError
        If ``x0`` is not finite or of the wrong shape, or the chain ends in values that are not
        finite.
    """
    x = checks.last_axis("x0", checks.finite("x0", x0), chain.dim)
    out = x.new_empty(*x.shape[:-1], checks.count("steps", steps, 0) + 1, chain.dim)
    out[..., 0, :] = x
    for k in range(1, steps + 1):
        out[..., k, :] = x = chain.transition(x, generator)
    if not bool(torch.isfinite(x).all()):
        raise ValueError("the chain diverged: it is unstable, or its step is too long")
    return out
