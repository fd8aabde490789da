r"""Samplers: from noise to data along a grid of decreasing noise levels.

`sample` starts from pure noise, `resample` from diffused states; `reverse` takes the steps, by the
rules of `ddmlib.steps`: "ddim", "ddpm" (ancestral), "heun" or "multistep".  After each of them
Langevin steps may correct the state at its new level (predictor and corrector, Song et al. 2021;
Rozet & Louppe 2023).  `smoothed` averages out what a network's errors have of chance in the end.
"""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ddmlib import checks, noise
from ddmlib.denoisers import Denoiser
from ddmlib.grids import noise_levels as noise_levels  # names of this module too
from ddmlib.grids import times as times
from ddmlib.grids import times_for as times_for
from ddmlib.steps import (
    Level,
    ancestral_step,
    balanced_langevin_step,
    ddim_step,
    extrapolate,
    heun_step,
    langevin_step,
)
from ddmlib.steps import multistep_step as multistep_step  # one of this module's names too

METHODS = ("ddim", "ddpm", "heun", "multistep")
CORRECTORS = ("langevin", "balanced")


@torch.no_grad()
def reverse(
    denoiser: Denoiser,
    x: Tensor,
    grid: Tensor,
    *,
    method: str = "ddim",
    eta: float | None = None,
    corrections: int = 0,
    tau: float = 0.25,
    corrector: str = "langevin",
    corrected: tuple[float, float] = (0.0, math.inf),
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
    corrections : int
        Langevin steps after each step, at its new level; none where that is free of noise.
    tau : float
        Their length; R23's code has 0.25, its figures 0.5.  Below 2 for "balanced".
    corrector : str
        "langevin": `steps.langevin_step`, as R23.  "balanced": `steps.balanced_langevin_step`,
        which does not widen the law that it corrects.
    corrected : tuple of float
        Range of sigma/alpha in which they are taken; R23 takes them at all levels.
    clean : bool
        End without noise, even where the schedule leaves a little at ``grid[-1]``.
    generator : torch.Generator, optional
        Used when eta > 0, or for corrections.
    progress : bool
        Show a progress bar.
    """
    checks.choice("method", method, METHODS)
    checks.last_axis("x", x, len(denoiser.standardizer.mean))
    falling = grid.ndim == 1 and len(grid) > 1 and bool((grid.diff() < 0).all())
    if not falling or not 0 <= float(grid[-1]) < float(grid[0]) <= 1:
        raise ValueError("grid must be a decreasing sequence of two or more times in [0, 1]")
    share = _share_of_noise(method, eta)
    checks.count("corrections", corrections, 0)
    checks.positive("tau", tau)
    if checks.choice("corrector", corrector, CORRECTORS) == "balanced" and not tau < 2:
        raise ValueError(f"tau must be below 2 for balanced corrections, got {tau}")
    if not 0 <= corrected[0] < corrected[1]:
        raise ValueError(f"corrected must satisfy 0 <= low < high, got {corrected}")
    # (1,) rather than (): a level then broadcasts like any other, with its last axis in place
    alphas, sigmas = denoiser.schedule(grid.to(torch.float64).cpu()[:, None])
    levels = list(zip(alphas.to(x), sigmas.to(x), strict=True))
    if clean:
        levels[-1] = (torch.ones_like(levels[-1][0]), torch.zeros_like(levels[-1][1]))
    before: tuple[Tensor, Level] | None = None
    unmoved: tuple[Tensor, Level] | None = None  # x̂ before the corrections of the last level
    for level_t, level_s in tqdm(list(pairwise(levels)), disable=not progress):
        estimate = x_0 = denoiser.denoise(x, *level_t)
        if method == "multistep":
            if before is not None and unmoved is not None:
                # corrections leave the path: its slope is carried along, not their jump
                before = _carried(before, unmoved, (x_0, level_t))
            estimate, before = extrapolate(x_0, level_t, level_s, before), (x_0, level_t)
        if method == "heun":
            x = heun_step(x, x_0, level_t, level_s, denoiser)
        elif share == 0:
            x = ddim_step(x, estimate, level_t, level_s)
        else:
            x, std = ancestral_step(x, estimate, level_t, level_s, share)
            if bool((std > 0).any()):
                x = x + std * noise.normal_like(x, generator)
        unmoved, level = None, level_s
        for _ in range(corrections if _within(level_s, corrected) else 0):
            if corrector == "balanced":
                x, x_0, level = balanced_langevin_step(
                    x, level_s, tau, denoiser, generator=generator
                )
            else:
                x_0 = denoiser.denoise(x, *level_s)
                x = langevin_step(x, x_0, level_s, tau, event=denoiser.event, generator=generator)
            unmoved = (x_0, level) if unmoved is None else unmoved
    return x


def _carried(
    before: tuple[Tensor, Level], after: tuple[Tensor, Level], now: tuple[Tensor, Level]
) -> tuple[Tensor, Level]:
    """Return the estimate and level from which x̂ comes to ``now`` as it came ``before`` to
    ``after``: by the same amount, over the same distance in log(alpha/sigma)."""
    (x_b, (alpha_b, sigma_b)), (x_a, (alpha_a, sigma_a)), (x, (alpha, sigma)) = before, after, now
    return x_b + x - x_a, (alpha_b, sigma_b * (sigma / alpha) / (sigma_a / alpha_a))


def _within(level: Level, corrected: tuple[float, float]) -> bool:
    """Whether a level is noisy and its sigma/alpha lies in the range of corrections."""
    alpha, sigma = (float(v.max()) for v in level)
    return sigma > 0 and corrected[0] * alpha <= sigma <= corrected[1] * alpha


def _share_of_noise(method: str, eta: float | None) -> float:
    """Return eta, by default 1 for "ddpm" and 0 for the others; refuse what makes no sense."""
    eta = (1.0 if method == "ddpm" else 0.0) if eta is None else eta
    if not 0 <= eta <= 1 or (method == "heun" and eta > 0):
        raise ValueError(f"eta must lie in [0, 1], and be 0 for heun; got {eta} for {method}")
    return eta


def evaluations(method: str, steps: int, corrections: int = 0) -> int:
    """Return the number of denoiser evaluations a sample of a run down to t = 0.

    Corrections are counted at all levels: fewer are taken where `reverse` keeps them to a range.  A
    guided denoiser costs products with its Jacobian besides; see `ddmlib.guidance`.
    """
    plain = 2 * steps - 1 if checks.choice("method", method, METHODS) == "heun" else steps
    return plain + corrections * (steps - 1)


def sample(
    denoiser: Denoiser,
    shape: tuple[int, ...],
    *,
    steps: int = 50,
    method: str = "ddim",
    eta: float | None = None,
    spacing: str = "log-ratio",
    ratios: tuple[float, float] | None = None,
    corrections: int = 0,
    tau: float = 0.25,
    corrector: str = "langevin",
    corrected: tuple[float, float] = (0.0, math.inf),
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
        "log-ratio", "karras", "central" or "time"; see `times`.
    ratios : tuple of float, optional
        Lowest and highest sigma/alpha; default: `noise_levels`.
    corrections, tau, corrector, corrected
        Langevin steps after each step, their length, kind, and levels, as in `reverse`.
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
        For an unknown method or spacing, an empty shape, a number of components that is not the
        denoiser's, or fewer axes than one sample has.
    """
    checks.choice("method", method, METHODS)
    d = len(denoiser.standardizer.mean)
    if len(shape) < 1 + denoiser.event or min(shape) < 1 or shape[-1] != d:
        raise ValueError(f"shape must be (*batch, {d}) with positive sizes, got {tuple(shape)}")
    device = denoiser.device if device is None else device
    grid = times_for(denoiser, steps, spacing=spacing, ratios=ratios)
    alpha, sigma = (float(v) for v in denoiser.schedule(grid[0]))
    x = math.hypot(alpha, sigma) * noise.normal(
        shape, generator=generator, device=device, dtype=dtype
    )
    parts = x.split(len(x) if chunk is None else checks.count("chunk", chunk))
    y = getattr(getattr(denoiser, "observation", None), "y", None)
    if len(parts) > 1 and y is not None and y.ndim >= len(shape) and y.shape[-len(shape)] != 1:
        raise ValueError("chunk cannot divide samples that have observations of their own")
    run: Any = {"method": method, "eta": eta, "generator": generator, "progress": progress}
    run |= {"corrections": corrections, "tau": tau, "corrector": corrector, "corrected": corrected}
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
    """Diffuse samples to pseudo-time ``t`` and denoise them again: an ensemble near each of them.

    Parameters
    ----------
    denoiser : Denoiser
    z : Tensor of shape (*batch, d), or (*batch, length, d) for a denoiser of trajectories
        States or trajectories in standardised units.
    t : float
        Pseudo-time in (0, 1]; its sigma/alpha sets the spread.
    members : int
        Samples for each state or trajectory.
    steps : int
        Steps of the reverse process from ``t`` to 0.
    method, eta, spacing
        As in `sample`; F24 uses the defaults.
    generator : torch.Generator, optional
        Source of randomness.

    Returns
    -------
    Tensor of shape (*batch, members, d), or (*batch, members, length, d)

    Raises
    ------
    ValueError
        If z is not finite or holds no sample of the denoiser, or a number is out of range.
    """
    checks.last_axis("z", checks.finite("z", z), len(denoiser.standardizer.mean))
    axis = z.ndim - denoiser.event  # of the members
    if axis < 0:
        raise ValueError(f"z must hold trajectories (*batch, length, d), got {tuple(z.shape)}")
    checks.count("members", members)
    if not 0 < t <= 1:
        raise ValueError(f"t must lie in (0, 1], got {t}")
    levels = noise_levels(denoiser)
    grid = times(denoiser.schedule, steps, spacing=spacing, start=t, ratios=levels)
    alpha, sigma = (float(v) for v in denoiser.schedule(grid[0]))
    x = z.unsqueeze(axis).expand(*z.shape[:axis], members, *z.shape[axis:])
    x = alpha * x + sigma * noise.normal(
        x.shape, generator=generator, device=z.device, dtype=z.dtype
    )
    return reverse(denoiser, x, grid, method=method, eta=eta, clean=True, generator=generator)


def smoothed(
    denoiser: Denoiser,
    z: Tensor,
    *,
    ratio: float,
    draws: int = 4,
    chunk: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Replace samples by the mean of what a denoiser makes of them with a little noise.

    The last step of a sampler is one evaluation at one noisy sample, and where noise is low the
    error of a network is mostly other with other noise.  The mean over many draws is free of that
    part.  What they have in common stays, and nothing is learnt of what ``ratio`` would blur.

    Parameters
    ----------
    denoiser : Denoiser
    z : Tensor of shape (*batch, d), or (*batch, length, d) for a denoiser of trajectories
        Samples in standardised units.
    ratio : float
        sigma/alpha of the noise, small: samples move towards the mean as the exact denoiser does
        there, those of a Gaussian by ratio² of their distance, in units of its variance.
    draws : int
        Of noise for each sample; each is used with both signs, so two evaluations.
    chunk : int, optional
        Samples denoised at once.
    generator : torch.Generator, optional
        Source of randomness.

    Returns
    -------
    Tensor of the shape of ``z``

    Raises
    ------
    ValueError
        If z is not finite or holds no sample of the denoiser, or a number is out of range.
    """
    checks.last_axis("z", checks.finite("z", z), len(denoiser.standardizer.mean))
    if z.ndim < denoiser.event + 1:
        raise ValueError(f"z must be a batch of samples, got {tuple(z.shape)}")
    checks.positive("ratio", ratio)
    checks.count("draws", draws)
    size = len(z) if chunk is None else checks.count("chunk", chunk)
    alpha, total = torch.ones(1).to(z), torch.zeros_like(z)
    for _ in range(draws):
        eps = ratio * noise.normal_like(z, generator)
        for x in (z + eps, z - eps):
            parts = [denoiser.denoise(part, alpha, ratio * alpha) for part in x.split(size)]
            total += torch.cat(parts)
    return total / (2 * draws)
