r"""Log-densities of a denoiser's samples, by the probability-flow ODE (Song et al. 2021).

In the coordinates y = x_t/alpha_t and u = log(sigma_t/alpha_t), whatever the schedule, the samples
of the deterministic samplers flow along

    dy/du = y - x̂,    d log p_u(y)/du = -div(y - x̂) = tr(∂x̂/∂y) - n,

n being the number of components of a sample.  From data at the lowest level u_0 to noise at u_1,
where log p is that of a Gaussian, both are integrated by the classical Runge-Kutta rule:

    log p_{u_0}(y_0) = log N(y_1; 0, (1 + r_1²) I) + ∫ (n - tr ∂x̂/∂y) du,    r_1 = exp u_1.

The Gaussian is that of standardised data; a law with mean m, as a guided one has, makes an error of
about |m|/r_1 standard deviations.

The trace is exact (n vector-Jacobian products an evaluation) or Hutchinson's estimate vᵀ ∂x̂/∂y v
with random signs v, whose standard error comes from independent v.

Units are standardised; where they are affine, log p(x) of physical x is lower by the sum of log std
over all components (in those of `tails` by that of the logarithms of their slopes at x).
The result is the density of the data *with noise of level u_0*.  Trajectories of a deterministic
system lie on a thin set, whose density has no limit as u_0 falls: compare densities only at one
level, and differences rather than values.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ddmlib import checks, grids, noise
from ddmlib.denoisers import Denoiser


class LogDensity(NamedTuple):
    """Log-densities and their standard errors from Hutchinson's estimate, shape (*batch,) each."""

    value: Tensor
    standard_error: Tensor


def log_density(
    denoiser: Denoiser,
    z: Tensor,
    *,
    axes: int | None = None,
    steps: int = 64,
    ratios: tuple[float, float] | None = None,
    probes: int | None = None,
    generator: torch.Generator | None = None,
) -> LogDensity:
    """Return log p(z) under the probability flow of a denoiser.

    Parameters
    ----------
    denoiser : Denoiser
        Any, a guided one included.
    z : Tensor of shape (*batch, d), or (*batch, length, d) for trajectories
        Samples in standardised units.
    axes : int, optional
        Axes of one sample, 1 for states and 2 for trajectories.  Default: the denoiser's, which it
        may not be less than; 2 for one of states: trajectories of independent states.
    steps : int
        Runge-Kutta steps, even in log(sigma/alpha), four evaluations each.
    ratios : tuple of float, optional
        Lowest and highest sigma/alpha; default: `grids.noise_levels`.  Narrowed to what the
        schedule reaches.
    probes : int, optional
        Vectors v of Hutchinson's estimate, two or more; default: the exact trace.
    generator : torch.Generator, optional
        Source of the vectors.

    Returns
    -------
    LogDensity
        The standard errors are zero for the exact trace, and do not cover the discretisation.

    Raises
    ------
    ValueError
        If a shape or a number is wrong.

    References
    ----------
    Song et al. (2021), Score-based generative modeling through SDEs, eq. 39.
    Grathwohl et al. (2019), FFJORD (Hutchinson's estimate along a flow).
    """
    checks.last_axis("z", checks.finite("z", z), len(denoiser.standardizer.mean))
    checks.count("steps", steps)
    axes = denoiser.event if axes is None else checks.count("axes", axes, denoiser.event)
    if axes > z.ndim:
        raise ValueError(f"z must have {axes} axes or more, got shape {tuple(z.shape)}")
    vectors = None
    if probes is not None:
        checks.count("probes", probes, 2)
        draw = noise.normal((probes, *z.shape), generator=generator, device=z.device)
        vectors = torch.where(draw < 0, -1.0, 1.0).to(z.dtype)
    ratios = grids.noise_levels(denoiser) if ratios is None else ratios
    low = max(ratios[0], float(denoiser.schedule.ratio(0.0)))
    high = min(ratios[1], float(denoiser.schedule.ratio(1.0)))
    checks.interval("ratio", low, high)
    u = torch.linspace(math.log(low), math.log(high), steps + 1, dtype=torch.float64)
    middles = (u[1:] + u[:-1]) / 2
    n = math.prod(z.shape[-axes:])

    def rates(y: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Return dy/du, and n - trace for each probe (or one row): (rows, *batch)."""
        alpha, sigma = denoiser.schedule(denoiser.schedule.time(at.exp()).reshape(1))
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            x_0 = denoiser.denoise(alpha.to(y) * y, alpha.to(y), sigma.to(y))
            trace = _trace(x_0, y, axes, vectors)
        return (y - x_0).detach(), n - trace

    y, total = z.detach(), z.new_zeros(1 if probes is None else probes, *z.shape[: z.ndim - axes])
    for k in range(steps):
        h = float(u[k + 1] - u[k])
        slope_1, rate_1 = rates(y, u[k])
        slope_2, rate_2 = rates(y + h / 2 * slope_1, middles[k])
        slope_3, rate_3 = rates(y + h / 2 * slope_2, middles[k])
        slope_4, rate_4 = rates(y + h * slope_3, u[k + 1])
        y = y + h / 6 * (slope_1 + 2 * slope_2 + 2 * slope_3 + slope_4)
        total = total + h / 6 * (rate_1 + 2 * rate_2 + 2 * rate_3 + rate_4)
    variance = 1 + high**2
    end = -0.5 * (y.flatten(-axes).square().sum(-1) / variance + n * math.log(math.tau * variance))
    error = total.std(0) / math.sqrt(len(total)) if probes else torch.zeros_like(end)
    return LogDensity(end + total.mean(0), error)


def _trace(x_0: Tensor, y: Tensor, axes: int, vectors: Tensor | None) -> Tensor:
    """Return tr ∂x̂/∂y of each sample, exactly or with each probe: (rows, *batch)."""
    if vectors is None:
        n = math.prod(y.shape[-axes:])
        flat, total = x_0.flatten(-axes), x_0.new_zeros(x_0.shape[: x_0.ndim - axes])
        for i in range(n):
            (row,) = torch.autograd.grad(flat[..., i].sum(), y, retain_graph=i + 1 < n)
            total = total + row.flatten(-axes)[..., i]
        return total[None]
    rows = []
    for i, v in enumerate(vectors):
        (row,) = torch.autograd.grad(x_0, y, v, retain_graph=i + 1 < len(vectors))
        rows.append((row * v).flatten(-axes).sum(-1))
    return torch.stack(rows)
