"""Checks of what samples and probabilities of events are asked for, before anything is run."""

from collections.abc import Iterable
from typing import Any

from ddmlib import checks
from ddmlib.denoisers import Denoiser
from ddmlib.events.constraints import Equality, Event

FEWEST = 16  # paths of a pilot


def suited(denoiser: Denoiser, constraint: Any) -> Event:
    """Return ``constraint`` if it is an event of samples that the denoiser makes."""
    if not isinstance(constraint, Event):
        raise TypeError(
            f"constraint must be a Constraint, an Equality or a conjunction, "
            f"got {type(constraint).__name__}"
        )
    d, axes = len(denoiser.standardizer.mean), denoiser.event
    if constraint.shape[-1] != d:
        raise ValueError(
            f"the constraint is for samples of shape {constraint.shape}, "
            f"but the denoiser has {d} components"
        )
    if len(constraint.shape) < axes:
        raise ValueError(
            f"the constraint is for states, shape {constraint.shape}, "
            f"but the denoiser is of trajectories: ask for a shape (length, {d})"
        )
    return constraint


def inequality(constraint: Event) -> None:
    """Refuse an event that no sample is in."""
    if any(isinstance(part, Equality) for part in constraint.parts):
        raise ValueError("the probability of an equality is zero; ask for C within an interval")


def weighted(
    denoiser: Denoiser,
    constraint: Event,
    *,
    defensive: float,
    pilot: int,
    chunk: int | None,
    guidance: Any = None,
) -> None:
    """Refuse settings that weighted paths cannot be drawn with; see `probability`.

    Raises
    ------
    ValueError
        Naming what is out of range, or a guidance that is not for this denoiser and these samples.
    """
    suited(denoiser, constraint)
    inequality(constraint)
    if not 0 <= defensive < 1:
        raise ValueError(f"defensive must lie in [0, 1), got {defensive}")
    if checks.count("pilot", pilot, 0) and pilot < FEWEST:
        raise ValueError(f"pilot must be 0 or at least {FEWEST}, got {pilot}")
    if chunk is not None:
        checks.count("chunk", chunk, 2)
    if guidance is None:
        return
    if guidance.denoiser is not denoiser:
        raise ValueError("guidance must be that of the same denoiser object")
    if guidance.constraint.shape != constraint.shape:
        raise ValueError(
            f"guidance must be for samples of shape {constraint.shape}, "
            f"got one for {guidance.constraint.shape}"
        )


def ratios(name: str, values: Any) -> tuple[float, ...]:
    """Return a sequence of sigma/alpha as numbers, each positive."""
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise TypeError(f"{name} must be a sequence of numbers, got {type(values).__name__}")
    return tuple(checks.positive(name, float(value)) for value in values)
