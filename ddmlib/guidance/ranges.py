"""Trajectories given observations of components: at each noise level the rule that serves best."""

import math

import torch
from torch import Tensor

from ddmlib import checks, noise, sampling
from ddmlib.assimilation import Observation
from ddmlib.denoisers import ByLevel, Denoiser
from ddmlib.guidance.fusion import Fusion
from ddmlib.guidance.moments import MMPS

LOW = 0.1  # sigma/alpha below which the conditional law is nearly Gaussian
RATIOS = (3e-3, 60.0)  # of the last and the first step


def posterior(
    denoiser: Denoiser,
    observation: Observation,
    shape: tuple[int, ...],
    *,
    steps: int = 72,
    products: tuple[int, int] = (3, 1),
    corrections: int = 4,
    tau: float = 0.5,
    fused: float = 0.3,
    corrected: tuple[float, float] = (LOW, 3.0),
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw trajectories from p(x_0 | y), where y are components.

    The stochastic multistep rule, even in log(sigma/alpha).  Above 0.3 it takes `Fusion`, at one
    evaluation a step, which weighs histories that lie far apart as the network has learned to.
    From 0.3 to 0.1 `MMPS`, which asks the denoiser for equal levels only, where networks err least;
    below 0.1, where the conditional law is nearly Gaussian, with few products.  From 3 to 0.1,
    where a sample is decided, balanced Langevin corrections forget its errors.  For data of unit
    variance; chapter 08 measures what each part is good for.

    Parameters
    ----------
    denoiser : Denoiser
        Of trajectories, ``elementwise``.
    observation : Observation
        As for `Fusion`.
    shape : tuple of int
        (*batch, length, d) of the result; with a batch of ``y``, one that it broadcasts to.
    steps : int
        Steps; `evaluations` says what they cost.
    products : tuple of int
        Products with the Jacobian between ``fused`` and 0.1, and below.
    corrections, tau
        Langevin steps after each step in ``corrected``, and their length.
    fused : float
        Lowest sigma/alpha of `Fusion`, above 0.1.
    corrected : tuple of float
        Lowest and highest sigma/alpha of corrections.
    generator : torch.Generator, optional
        Source of randomness.
    dtype : torch.dtype
        Of the samples.

    Returns
    -------
    Tensor of shape ``shape``
        In standardised units.

    Raises
    ------
    TypeError, ValueError
        As `Fusion`; if ``shape`` is not that of trajectories, or a number is out of range.
    """
    d = len(denoiser.standardizer.mean)
    if denoiser.event != 2 or len(shape) < 3 or min(shape) < 1 or shape[-1] != d:
        raise ValueError(
            f"shape must be (*batch, length, {d}), of trajectories, got {tuple(shape)} "
            f"for {type(denoiser).__name__}"
        )
    if not fused > LOW:
        raise ValueError(f"fused must be above {LOW}, got {fused}")
    parts: list[tuple[float, Denoiser]] = [
        (fused, Fusion(denoiser, observation)),
        (LOW, MMPS(denoiser, observation, products=products[0])),
        (0.0, MMPS(denoiser, observation, products=products[1])),
    ]
    grid = sampling.times_for(denoiser, checks.count("steps", steps), ratios=RATIOS)
    alpha, sigma = (float(v) for v in denoiser.schedule(grid[0]))
    x = noise.normal(shape, generator=generator, device=denoiser.device, dtype=dtype)
    return sampling.reverse(
        ByLevel(parts),
        math.hypot(alpha, sigma) * x,
        grid,
        method="multistep",
        eta=1.0,
        corrections=corrections,
        tau=tau,
        corrector="balanced",
        corrected=corrected,
        clean=True,
        generator=generator,
    )


def evaluations(
    denoiser: Denoiser,
    *,
    steps: int = 72,
    products: tuple[int, int] = (3, 1),
    corrections: int = 4,
    tau: float = 0.5,
    fused: float = 0.3,
    corrected: tuple[float, float] = (LOW, 3.0),
) -> int:
    """Return what a sample of `posterior` costs: evaluations and products with the Jacobian."""
    grid = sampling.times_for(denoiser, steps, ratios=RATIOS)
    ratios = denoiser.schedule.ratio(grid)[:-1]

    def cost(r: Tensor) -> Tensor:
        middle, low = (1 + n for n in products)
        return torch.where(r >= fused, 1, torch.where(r >= LOW, middle, low))

    after = ratios[1:]  # corrections follow a step, and are evaluated at a lower level
    after = after[(after >= corrected[0]) & (after <= corrected[1])] * math.sqrt(1 - tau / 2)
    return int(cost(ratios).sum() + corrections * cost(after).sum())
