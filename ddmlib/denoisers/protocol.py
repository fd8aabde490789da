"""What every denoiser has in common, and the conversions between its four coordinates."""

import copy
import math
from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor

from ddmlib import checks
from ddmlib.datasets import Standardizer
from ddmlib.schedules import Schedule


def diffuse(x_0: Tensor, alpha_t: Tensor, sigma_t: Tensor, noise: Tensor) -> Tensor:
    """Return x_t = alpha_t x_0 + sigma_t noise, all arguments broadcast together."""
    return alpha_t * x_0 + sigma_t * noise


def noise_from_state(x_0: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """Return eps = (x_t - alpha_t x_0) / sigma_t."""
    return (x_t - alpha_t * x_0) / sigma_t


def state_from_noise(noise: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """Return x_0 = (x_t - sigma_t eps) / alpha_t."""
    return (x_t - sigma_t * noise) / alpha_t


def score_from_state(x_0: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """Return the score ∇ log p_t(x_t) = (alpha_t x̂ - x_t) / sigma_t² (Tweedie)."""
    return (alpha_t * x_0 - x_t) / sigma_t**2


def state_from_score(score: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """Return x̂ = (x_t + sigma_t² score) / alpha_t (Tweedie)."""
    return (x_t + sigma_t**2 * score) / alpha_t


def velocity_from_state(x_0: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """Return v = alpha_t eps - sigma_t x_0, where alpha² + sigma² = 1 (Salimans & Ho 2022)."""
    return alpha_t * noise_from_state(x_0, x_t, alpha_t, sigma_t) - sigma_t * x_0


def state_from_velocity(velocity: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """Return x_0 = alpha_t x_t - sigma_t v, where alpha² + sigma² = 1."""
    return alpha_t * x_t - sigma_t * velocity


class Denoiser(ABC):
    """Base of all denoisers: implement `denoise`, get the rest."""

    schedule: Schedule
    standardizer: Standardizer
    event: int = 1
    """Trailing axes that make one sample: 1 for states (d,), 2 for trajectories (length, d)."""
    elementwise: bool = False
    """Whether every component of every state may have a noise level of its own."""
    ratios: tuple[float, float] = (0.0, math.inf)
    """Range of sigma/alpha that it holds for: a network's is what it was trained on."""

    @property
    def device(self) -> torch.device | None:
        """Device of its parameters; None where there are none, which follow their argument."""
        return None

    @abstractmethod
    def denoise(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Return E[x_0 | x_t] of the shape of ``x_t``; alpha and sigma broadcast against it.

        Their last axis has size 1, unless the denoiser is ``elementwise``.
        """

    def levels(self, x_t: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return (alpha_t, sigma_t), shaped to broadcast against ``x_t`` and of its dtype.

        Parameters
        ----------
        x_t : Tensor of shape (*batch, d)
            Noisy states.
        t : float or Tensor
            Pseudo-time in [0, 1]: one for all, or one per sample (the axes of ``t`` are matched
            with the leading axes of ``x_t``).

        Raises
        ------
        ValueError
            If ``t`` leaves [0, 1], its axes do not match those of ``x_t``, or d is not the prior's.
        """
        checks.last_axis("x_t", x_t, len(self.standardizer.mean))
        t = torch.as_tensor(t, dtype=torch.float64, device=x_t.device)
        if not bool(((t >= 0) & (t <= 1)).all()):
            raise ValueError("t must lie within [0, 1]")
        if t.ndim >= max(x_t.ndim, 1) or any(
            a not in (1, b) for a, b in zip(t.shape, x_t.shape, strict=False)
        ):
            raise ValueError(
                f"t must be a number or match the leading axes of x_t, got shape {tuple(t.shape)} "
                f"for x_t of shape {tuple(x_t.shape)}"
            )
        alpha, sigma = self.schedule(t.reshape(t.shape + (1,) * (x_t.ndim - t.ndim)))
        return alpha.to(x_t.dtype), sigma.to(x_t.dtype)

    def __call__(self, x_t: Tensor, t: Tensor | float) -> Tensor:
        """Return x̂ = E[x_0 | x_t], shape and units (standardised) of ``x_t``."""
        return self.denoise(x_t, *self.levels(x_t, t))

    def noise(self, x_t: Tensor, t: Tensor | float) -> Tensor:
        """Return the expected noise E[eps | x_t]."""
        alpha, sigma = self.levels(x_t, t)
        return noise_from_state(self.denoise(x_t, alpha, sigma), x_t, alpha, sigma)

    def score(self, x_t: Tensor, t: Tensor | float) -> Tensor:
        """Return the score ∇ log p_t(x_t)."""
        alpha, sigma = self.levels(x_t, t)
        return score_from_state(self.denoise(x_t, alpha, sigma), x_t, alpha, sigma)

    def velocity(self, x_t: Tensor, t: Tensor | float) -> Tensor:
        """Return the expected velocity; an error unless the schedule preserves the variance."""
        if not self.schedule.preserves_variance:
            raise ValueError(
                "velocity is defined for alpha² + sigma² = 1 only, not for schedule "
                f"{self.schedule}"
            )
        alpha, sigma = self.levels(x_t, t)
        return velocity_from_state(self.denoise(x_t, alpha, sigma), x_t, alpha, sigma)

    def with_schedule(self, schedule: Schedule) -> Self:
        """Return the same denoiser (sharing its parameters) under another schedule."""
        other = copy.copy(self)
        other.schedule = schedule
        return other
