r"""Samplers: from noise to data along a grid of decreasing noise levels.

A step rule takes x_t at the level (alpha_t, sigma_t), an estimate x̂ = E[x_0|x_t], and the next
level (alpha_s, sigma_s) with less noise.  In the coordinates y = x/alpha and r = sigma/alpha the
probability flow is

    dy/dr = (y - x̂)/r = eps(y, r),

whatever the schedule (Song et al. 2021; Karras et al. 2022), so the deterministic rules are solvers
of this equation:

- `ddim_step`: exponential Euler, exact for constant x̂ (equally for constant eps); first order;
- "heun": trapezoidal correction of the Euler step, second order, two evaluations a step;
- `multistep_step`: second order from the last two x̂, one evaluation a step (Lu et al. 2022,
  DPM-Solver++ 2M);
- `ancestral_step`: the posterior q(x_s | x_t, x_0 = x̂), Gaussian; stochastic, first order (Ho et
  al. 2020).
"""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ddmlib import checks, noise
from ddmlib.denoisers import Denoiser, noise_from_state
from ddmlib.schedules import Schedule

METHODS = ("ddim", "ddpm", "heun", "multistep")
SPACINGS = ("time", "log-ratio", "karras")
Level = tuple[Tensor, Tensor]


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
        to 0 (Karras et al. 2022, eq. 5).
    start : float
        First pseudo-time; the upper end of ``ratios`` is lowered to it.
    ratios : tuple of float
        Lowest and highest sigma/alpha of the two latter grids.
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
    else:
        grid = (high ** (1 / rho) + even * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return torch.cat((schedule.time(grid), torch.zeros(1, dtype=torch.float64)))


def ddim_step(x_t: Tensor, x_0: Tensor, level_t: Level, level_s: Level) -> Tensor:
    """Return x_s = alpha_s x̂ + sigma_s eps with eps = (x_t - alpha_t x̂)/sigma_t.

    The same as the exponential Euler step
    (alpha_s/alpha_t) x_t + (sigma_s - sigma_t alpha_s/alpha_t) eps.
    Source: Song, Meng & Ermon (2021), eq. 12 with eta = 0.
    """
    alpha_s, sigma_s = level_s
    return alpha_s * x_0 + sigma_s * noise_from_state(x_0, x_t, *level_t)


def ancestral_step(
    x_t: Tensor, x_0: Tensor, level_t: Level, level_s: Level, eta: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of x_s given x_t and x_0 = x̂.

    The noise that is added has eta times the standard deviation of the posterior q(x_s | x_t, x_0),
    and the deterministic part shrinks so that x_s keeps the marginal std sigma_s: eta = 1 is DDPM,
    eta = 0 DDIM.
    Source: Ho et al. (2020), eq. 6-7; Song, Meng & Ermon (2021), eq. 16.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = level_t, level_s
    shrink = (alpha_t * sigma_s) / (alpha_s * sigma_t)  # ratio_s / ratio_t < 1
    std = eta * sigma_s * torch.sqrt((1 - shrink**2).clamp(min=0))
    remaining = torch.sqrt((sigma_s**2 - std**2).clamp(min=0))
    return alpha_s * x_0 + remaining * noise_from_state(x_0, x_t, *level_t), std


def extrapolate(
    x_0: Tensor, level_t: Level, level_s: Level, before: tuple[Tensor, Level] | None
) -> Tensor:
    """Return x̂ extrapolated to the middle of the step from t to s, linearly in log(alpha/sigma).

    ``before`` holds the previous step's x̂ and level; without it, or when s is free of noise, x̂ is
    returned as it is.  With h the step in log(alpha/sigma) and h' the one before, the result is
    x̂ + (h / 2h') (x̂ - x̂_before).  Source: Lu et al. (2022), DPM-Solver++(2M).
    """
    if before is None or not bool((level_s[1] > 0).all()):
        return x_0
    x_before, (alpha_b, sigma_b) = before
    log_t = torch.log(level_t[0] / level_t[1])
    h = torch.log(level_s[0] / level_s[1]) - log_t
    h_before = log_t - torch.log(alpha_b / sigma_b)
    return x_0 + h / (2 * h_before) * (x_0 - x_before)


def multistep_step(
    x_t: Tensor, x_0: Tensor, level_t: Level, level_s: Level, before: tuple[Tensor, Level] | None
) -> Tensor:
    """Return x_s of `ddim_step` with x̂ from `extrapolate`: second order, one evaluation."""
    return ddim_step(x_t, extrapolate(x_0, level_t, level_s, before), level_t, level_s)


def heun_step(
    x_t: Tensor, x_0: Tensor, level_t: Level, level_s: Level, denoiser: Denoiser
) -> Tensor:
    """Return x_s by the trapezoidal rule for dy/dr = eps, y = x/alpha, r = sigma/alpha.

    Evaluates the denoiser a second time at the end of the Euler step, unless s is free of noise or
    t is free of signal (there r is infinite).  The rule is linear in r: long steps at large r, as a
    few even ones in t make them, are inaccurate; "log-ratio" and "karras" grids avoid them.
    Source: Karras et al. (2022), algorithm 1.
    """
    x_s = ddim_step(x_t, x_0, level_t, level_s)
    if not bool((level_s[1] > 0).all() and (level_t[0] > 0).all()):
        return x_s
    eps_t = noise_from_state(x_0, x_t, *level_t)
    eps_s = noise_from_state(denoiser.denoise(x_s, *level_s), x_s, *level_s)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = level_t, level_s
    return alpha_s * (x_t / alpha_t + (sigma_s / alpha_s - sigma_t / alpha_t) * (eps_t + eps_s) / 2)


@torch.no_grad()
def reverse(
    denoiser: Denoiser,
    x: Tensor,
    grid: Tensor,
    *,
    method: str = "ddim",
    eta: float | None = None,
    clean: bool = False,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Tensor:
    """Run the reverse process from ``x`` at pseudo-time ``grid[0]`` to ``grid[-1]``.

    Parameters
    ----------
    denoiser : Denoiser
    x : Tensor of shape (*batch, d)
        Noisy states at ``grid[0]``, standardised.
    grid : Tensor of shape (steps + 1,)
        Decreasing pseudo-times, as from `times`.
    method : str
        "ddim", "ddpm", "heun" or "multistep".
    eta : float, optional
        Share of fresh noise in each step, 0 to 1; see `ancestral_step`.  Default: 1 for "ddpm", 0
        for the others.  "multistep" with eta = 1 forgets errors of the denoiser that a
        deterministic rule keeps (Lu et al. 2022, SDE-DPM-Solver++ 2M).
    clean : bool
        End without noise, even where the schedule leaves a little at ``grid[-1]``.
    generator : torch.Generator, optional
        Used when eta > 0.
    progress : bool
        Show a progress bar.
    """
    checks.choice("method", method, METHODS)
    checks.last_axis("x", x, len(denoiser.standardizer.mean))
    falling = grid.ndim == 1 and len(grid) > 1 and bool((grid.diff() < 0).all())
    if not falling or not 0 <= float(grid[-1]) < float(grid[0]) <= 1:
        raise ValueError("grid must be a decreasing sequence of two or more times in [0, 1]")
    share = _share_of_noise(method, eta)
    # (1,) rather than (): a level then broadcasts like any other, with its last axis in place
    alphas, sigmas = denoiser.schedule(grid.to(torch.float64).cpu()[:, None])
    levels = list(zip(alphas.to(x), sigmas.to(x), strict=True))
    if clean:
        levels[-1] = (torch.ones_like(levels[-1][0]), torch.zeros_like(levels[-1][1]))
    before: tuple[Tensor, Level] | None = None
    for level_t, level_s in tqdm(list(pairwise(levels)), disable=not progress):
        estimate = x_0 = denoiser.denoise(x, *level_t)
        if method == "heun":
            x = heun_step(x, x_0, level_t, level_s, denoiser)
            continue
        if method == "multistep":
            estimate, before = extrapolate(x_0, level_t, level_s, before), (x_0, level_t)
        if share == 0:
            x = ddim_step(x, estimate, level_t, level_s)
        else:
            x, std = ancestral_step(x, estimate, level_t, level_s, share)
            if bool((std > 0).any()):
                x = x + std * noise.normal_like(x, generator)
    return x


def _share_of_noise(method: str, eta: float | None) -> float:
    """Return eta, by default 1 for "ddpm" and 0 for the others; refuse what makes no sense."""
    eta = (1.0 if method == "ddpm" else 0.0) if eta is None else eta
    if not 0 <= eta <= 1 or (method == "heun" and eta > 0):
        raise ValueError(f"eta must lie in [0, 1], and be 0 for heun; got {eta} for {method}")
    return eta


def evaluations(method: str, steps: int) -> int:
    """Return the number of denoiser evaluations a sample of a run down to t = 0."""
    return 2 * steps - 1 if checks.choice("method", method, METHODS) == "heun" else steps


def sample(
    denoiser: Denoiser,
    shape: tuple[int, ...],
    *,
    steps: int = 50,
    method: str = "ddim",
    eta: float | None = None,
    spacing: str = "log-ratio",
    ratios: tuple[float, float] | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    chunk: int | None = None,
    progress: bool = False,
) -> Tensor:
    """Generate samples from pure noise.

    Parameters
    ----------
    denoiser : Denoiser
    shape : tuple of int
        Shape of the result, (*batch, d).
    steps : int
        Steps of the sampler; see `evaluations` for what they cost.
    method : str
        "ddim", "ddpm", "heun" or "multistep".
    eta : float, optional
        Share of fresh noise in each step, as in `reverse`.
    spacing : str
        "log-ratio", "karras" or "time"; see `times`.
    ratios : tuple of float, optional
        Lowest and highest sigma/alpha; default: what a network was trained on, else (0.002, 80).
    generator : torch.Generator, optional
        Source of randomness.
    device, dtype : optional
        Of the samples; the device defaults to that of a network's parameters, else the CPU.
    chunk : int, optional
        Samples (along the first axis) handled at once, to bound memory and stay in the cache.
    progress : bool
        Show a progress bar for each chunk.

    Returns
    -------
    Tensor of shape ``shape``
        In standardised units; ``denoiser.standardizer.inverse`` makes them physical.

    Raises
    ------
    ValueError
        For an unknown method or spacing, an empty shape, or a number of components that is not the
        denoiser's.
    """
    checks.choice("method", method, METHODS)
    d = len(denoiser.standardizer.mean)
    if len(shape) < 2 or min(shape) < 1 or shape[-1] != d:
        raise ValueError(f"shape must be (*batch, {d}) with positive sizes, got {tuple(shape)}")
    if device is None and isinstance(denoiser, torch.nn.Module):
        device = next(denoiser.parameters()).device
    if ratios is None:
        low, high = getattr(denoiser, "ratios", (0.0, math.inf))
        ratios = (max(low, 2e-3), min(high, 80.0))
    grid = times(denoiser.schedule, steps, spacing=spacing, ratios=ratios)
    alpha, sigma = (float(v) for v in denoiser.schedule(grid[0]))
    x = math.hypot(alpha, sigma) * noise.normal(
        shape, generator=generator, device=device, dtype=dtype
    )
    parts = x.split(len(x) if chunk is None else checks.count("chunk", chunk))
    run: Any = {"method": method, "eta": eta, "generator": generator, "progress": progress}
    return torch.cat([reverse(denoiser, part, grid, clean=True, **run) for part in parts])


def resample(
    denoiser: Denoiser,
    z: Tensor,
    *,
    t: float,
    members: int,
    steps: int,
    method: str = "ddpm",
    eta: float | None = None,
    spacing: str = "time",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Diffuse states to pseudo-time ``t`` and denoise them again: an ensemble near each state.

    Parameters
    ----------
    denoiser : Denoiser
    z : Tensor of shape (*batch, d)
        States in standardised units.
    t : float
        Pseudo-time in (0, 1]; its sigma/alpha sets the spread.
    members : int
        Samples for each state.
    steps : int
        Steps of the reverse process from ``t`` to 0.
    method, eta, spacing
        As in `sample`; F24 uses the defaults.
    generator : torch.Generator, optional
        Source of randomness.

    Returns
    -------
    Tensor of shape (*batch, members, d)
    """
    checks.last_axis("z", checks.finite("z", z), len(denoiser.standardizer.mean))
    checks.count("members", members)
    if not 0 < t <= 1:
        raise ValueError(f"t must lie in (0, 1], got {t}")
    grid = times(denoiser.schedule, steps, spacing=spacing, start=t)
    alpha, sigma = (float(v) for v in denoiser.schedule(grid[0]))
    x = z[..., None, :].expand(*z.shape[:-1], members, z.shape[-1])
    x = alpha * x + sigma * noise.normal(
        x.shape, generator=generator, device=z.device, dtype=z.dtype
    )
    return reverse(denoiser, x, grid, method=method, eta=eta, clean=True, generator=generator)
