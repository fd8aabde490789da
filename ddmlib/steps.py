r"""Step rules: one step of a sampler, from a noise level to the next, or at one level.

A step rule takes x_t at the level (alpha_t, sigma_t), an estimate x̂ = E[x_0|x_t], and the next
level (alpha_s, sigma_s) with less noise.  In the coordinates y = x/alpha and r = sigma/alpha the
probability flow is

    dy/dr = (y - x̂)/r = eps(y, r),

whatever the schedule (Song et al. 2021; Karras et al. 2022), so the deterministic rules are solvers
of this equation:

- `ddim_step`: exponential Euler, exact for constant x̂ (equally for constant eps); first order;
- `heun_step`: trapezoidal correction of the Euler step, second order, two evaluations a step;
- `multistep_step`: second order from the last two x̂, one evaluation a step (Lu et al. 2022,
  DPM-Solver++ 2M);
- `ancestral_step`: the posterior q(x_s | x_t, x_0 = x̂), Gaussian; stochastic, first order (Ho et
  al. 2020).

`langevin_step` stays at its level: it corrects the law of x_s towards the one whose score the
denoiser has (the corrector of Song et al. 2021); `balanced_langevin_step` does so without widening.
"""

import math

import torch
from torch import Tensor

from ddmlib import noise
from ddmlib.denoisers import Denoiser, noise_from_state

Level = tuple[Tensor, Tensor]


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


def langevin_step(
    x_s: Tensor,
    x_0: Tensor,
    level_s: Level,
    tau: float,
    *,
    event: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return x_s after one Langevin step at its own level, x_s - sigma_s (delta eps + sqrt(2 delta)
    z).

    The length delta = tau / mean(eps²) is set sample by sample, the mean taken over the last
    ``event`` axes.  The step's length is finite, so it inflates: white noise ends with the variance
    1 + tau/2 instead of 1 at its level.

    Source: Rozet & Louppe (2023), algorithm 4; Song et al. (2021), algorithm 4.
    """
    eps = noise_from_state(x_0, x_s, *level_s)
    size = eps.square().mean(tuple(range(-event, 0)), keepdim=True)
    # a sample without any expected noise is not moved by its score: any finite length will do
    delta = tau / size.clamp(min=torch.finfo(size.dtype).eps)
    return x_s - level_s[1] * (
        delta * eps + torch.sqrt(2 * delta) * noise.normal_like(x_s, generator)
    )


def balanced_langevin_step(
    x_s: Tensor,
    level_s: Level,
    tau: float,
    denoiser: Denoiser,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Level]:
    """Return x_s after one Langevin step of length tau that keeps the law of its level, and the
    estimate that the step was taken with, and the lower level of that estimate.

    A finite step widens: with a score at the noise variance s² it settles near the law of the level
    s² (1 + tau/2 + O(tau²)).  So the score is taken at s² = (1 - tau/2) sigma_s².  For Gaussian
    data the law of x_s is then kept to second order in tau; white noise, with which most directions
    of a correlated trajectory are filled, is kept exactly for any tau below 2.
    """
    alpha, sigma = level_s
    lower = alpha, sigma * math.sqrt(1 - tau / 2)
    x_0 = denoiser.denoise(x_s, *lower)
    eps = noise_from_state(x_0, x_s, *lower)
    fresh = math.sqrt(2 * tau) * noise.normal_like(x_s, generator)
    return x_s - lower[1] * (tau * eps + fresh), x_0, lower
