"""Grids: the decreasing pseudo-times that a sampler takes, and how far they reach."""

import math

import torch
from torch import Tensor

from ddmlib import checks
from ddmlib.denoisers import Denoiser
from ddmlib.schedules import Schedule

SPACINGS = ("time", "log-ratio", "karras", "central")


def times(
    schedule: Schedule,
    steps: int,
    *,
    spacing: str = "time",
    start: float = 1.0,
    ratios: tuple[float, float] = (2e-3, 80.0),
    rho: float = 7.0,
) -> Tensor:
    """Return the pseudo-times of a sampler, decreasing from ``start`` to 0.

    Parameters
    ----------
    schedule : Schedule
    steps : int
        Number of steps.
    spacing : str
        "time": even in t (F24).  "log-ratio": even in log(sigma/alpha) between ``ratios``, and a
        last step to 0.  "karras": even in (sigma/alpha)^(1/rho) between ``ratios``, and a last step
        to 0 (Karras et al. 2022, eq. 5).  "central": finest in the middle, even in
        asinh(log(sigma/alpha) - m), m being log(sigma/alpha) in the middle of ``ratios``, and a
        last step to 0; a step is √(1 + u²) times the least at a distance u from the middle.
    start : float
        First pseudo-time; the upper end of ``ratios`` is lowered to it.
    ratios : tuple of float
        Lowest and highest sigma/alpha of all grids but "time".
    rho : float
        Exponent of "karras".

    Returns
    -------
    Tensor of shape (steps + 1,), float64.
    """
    checks.count("steps", steps)
    checks.choice("spacing", spacing, SPACINGS)
    if not 0 < start <= 1:
        raise ValueError(f"start must lie in (0, 1], got {start}")
    even = torch.linspace(0, 1, steps + 1 if spacing == "time" else steps, dtype=torch.float64)
    if spacing == "time":
        return start * (1 - even)
    low, high = ratios
    high = min(high, float(schedule.ratio(start)))
    low = max(low, float(schedule.ratio(0.0)))
    if not 0 < low < high:
        raise ValueError(f"ratios must satisfy 0 < low < high = {high:.3g}, got low = {low:.3g}")
    if spacing == "log-ratio":
        grid = torch.exp(math.log(high) + even * math.log(low / high))
    elif spacing == "central":
        reach = math.log(high / low) / 2
        grid = math.sqrt(low * high) * torch.exp(torch.sinh(math.asinh(reach) * (1 - 2 * even)))
    else:
        grid = (high ** (1 / rho) + even * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return torch.cat((schedule.time(grid), torch.zeros(1, dtype=torch.float64)))


def times_for(
    denoiser: Denoiser,
    steps: int,
    *,
    spacing: str = "log-ratio",
    ratios: tuple[float, float] | None = None,
) -> Tensor:
    """Return `times` under a denoiser's schedule; by default between its `noise_levels`."""
    ratios = noise_levels(denoiser) if ratios is None else ratios
    return times(denoiser.schedule, steps, spacing=spacing, ratios=ratios)


def noise_levels(denoiser: Denoiser) -> tuple[float, float]:
    """Return the lowest and highest sigma/alpha that a sampler takes by default.

    Those that a network was trained on, within (0.002, 80), or (0.002, 400) for trajectories: their
    states are correlated, so their largest variance is many times that of a component.
    """
    low, high = denoiser.ratios
    return max(low, 2e-3), min(high, 80.0 if denoiser.event == 1 else 400.0)
