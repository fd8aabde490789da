"""Checks of arguments: each raises an error that names the argument and what was expected."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor


def is_tensor(name: str, x: Any) -> Tensor:
    """Return ``x`` if it is a floating-point tensor; raise `TypeError` otherwise."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got dtype {x.dtype}")
    return x


def finite(name: str, x: Any) -> Tensor:
    """Return ``x`` if it is a floating-point tensor without NaN or infinity."""
    x = is_tensor(name, x)
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name} must be finite, got NaN or infinite values")
    return x


def last_axis(name: str, x: Any, d: int) -> Tensor:
    """Return ``x`` if it is a floating-point tensor of shape (..., d)."""
    x = is_tensor(name, x)
    if x.ndim == 0 or x.shape[-1] != d:
        raise ValueError(f"{name} must have shape (..., {d}), got {tuple(x.shape)}")
    return x


def positive(name: str, value: float) -> float:
    """Return ``value`` if it is a finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return value


def interval(name: str, low: float, high: float) -> tuple[float, float]:
    """Return ``low`` and ``high`` if both are positive and finite, and low < high."""
    positive(f"{name}_min", low)
    positive(f"{name}_max", high)
    if low >= high:
        raise ValueError(f"{name}_max must exceed {name}_min, got {high} and {low}")
    return low, high


def count(name: str, value: int, minimum: int = 1) -> int:
    """Return ``value`` if it is an integer of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return value


def choice(name: str, value: str, allowed: Collection[str]) -> str:
    """Return ``value`` if it is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(sorted(allowed))}; got {value!r}")
    return value
