"""Checks of arguments that the metrics share."""

from typing import Any

import torch
from torch import Tensor

from .. import checks


def states(name: str, x: Any) -> Tensor:
    """Return samples of shape (..., d) as (n, d), finite and not empty."""
    x = checks.finite(name, x).detach()
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(f"{name} must have shape (..., d) and not be empty, got {tuple(x.shape)}")
    return x.reshape(-1, x.shape[-1])


def rows(name: str, x: Any, minimum: int = 1) -> Tensor:
    """Return samples of shape (n, ...) as (n, features), finite, n at least ``minimum``."""
    x = checks.finite(name, x).detach()
    if x.ndim == 0 or x.numel() == 0 or x.shape[0] < minimum:
        raise ValueError(
            f"{name} must have shape (n, ...) with n at least {minimum} and not be empty, "
            f"got {tuple(x.shape)}"
        )
    return x.reshape(x.shape[0], -1)


def components(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    """Raise unless two sets of samples have equally many components on the last axis."""
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"{name_a} and {name_b} must have equally many components, "
            f"got {a.shape[-1]} and {b.shape[-1]}"
        )


def pair(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    """Raise unless two sets of samples have equally many components and live on one device."""
    components(name_a, a, name_b, b)
    if a.device != b.device:
        raise ValueError(
            f"{name_a} and {name_b} must be on one device, got {a.device} and {b.device}"
        )


def fraction(name: str, value: float, upper: float = 1.0) -> float:
    """Return ``value`` if it lies strictly between 0 and ``upper``."""
    if checks.positive(name, value) >= upper:
        raise ValueError(f"{name} must lie between 0 and {upper}, got {value}")
    return value


def permutation(n: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Draw a random permutation of ``n`` rows on the generator's device and move it."""
    drawn_on = device if generator is None else generator.device
    return torch.randperm(n, generator=generator, device=drawn_on).to(device)
