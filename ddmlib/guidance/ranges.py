"""Trajectories given observations of components: at each noise level the rule that serves best."""

import math

import torch
from torch import Tensor

from ddmlib import checks, noise, sampling
from ddmlib.assimilation import Observation
from ddmlib.denoisers import ByLevel, Denoiser
from ddmlib.guidance.fusion import Fusion
from ddmlib.guidance.moments import MMPS

HIGH, LOW = 1.0, 0.1  # sigma/alpha between which a sample of unit variance is decided
RATIOS = (3e-3, 60.0)  # of the last and the first step


def posterior(
    denoiser: Denoiser,
    observation: Observation,
    shape: tuple[int, ...],
    *,
    steps: int = 72,
    products: tuple[int, int] = (3, 1),
    corrections: int = 2,
    tau: float = 0.5,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw trajectories from p(x_0 | y), where y are components.

    The stochastic multistep rule, even in log(sigma/alpha).  Above 1, where nothing is decided, it
    takes `Fusion`, at one evaluation a step.  From 1 to 0.1, where a sample is decided, `MMPS`,
    which asks the denoiser for equal levels only, and balanced Langevin corrections, which forget
    its errors.  Below 0.1, where the conditional law is nearly Gaussian, `MMPS` with few products.
    For data of unit variance; chapter 08 measures what each part is good for.

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
        Products with the Jacobian between 1 and 0.1, and below.
    corrections, tau
        Langevin steps after each step between 1 and 0.1, and their length.
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
    parts: list[tuple[float, Denoiser]] = [
        (HIGH, Fusion(denoiser, observation)),
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
        corrected=(LOW, HIGH),
        clean=True,
        generator=generator,
    )


def evaluations(
    denoiser: Denoiser,
    *,
    steps: int = 72,
    products: tuple[int, int] = (3, 1),
    corrections: int = 2,
) -> int:
    """Return what a sample of `posterior` costs: evaluations and products with the Jacobian."""
    ratios = denoiser.schedule.ratio(sampling.times_for(denoiser, steps, ratios=RATIOS))[:-1]
    high, low = (int((ratios >= v).sum()) for v in (HIGH, LOW))
    corrected = int(((ratios[1:] >= LOW) & (ratios[1:] < HIGH)).sum()) * corrections
    middle = (low - high + corrected) * (1 + products[0])
    return high + middle + (steps - low) * (1 + products[1])
