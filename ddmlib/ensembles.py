r"""The three ensembles of trajectories of Z23 (Finzi et al. 2023), 60 states each, physical units.

- `lorenz63`: states 0.1 time units apart; first states 20 N(0, I), burn-in 100 (Z23: 3);
- `fitzhugh_nagumo`: 6 apart; first states 0.04 N(0, I), burn-in 1500;
- `double_pendulum`: 0.5 apart; angles N(0, I), momenta N(0, diag(0.2², 0.3²)), no burn-in.

Z23 divides the states of Lorenz 63 by 20 and multiplies those of FitzHugh-Nagumo by 5; here all are
left in the units of the equations.

An ensemble is part of the question.  For Lorenz 63 a burn-in of 3 time units leaves many
trajectories off the attractor, spiralling out from the neighbourhood of a fixed point, and the
probability of staying in one lobe is some twenty times that of the stationary ensemble.
"""

from typing import Any

import torch
from torch import Tensor

from ddmlib import checks, dynamics, noise, oscillators

LENGTH = 60
SUBSTEPS = {"lorenz63": 10, "fitzhugh_nagumo": 6, "double_pendulum": 48}


def lorenz63(
    trajectories: int,
    length: int = LENGTH,
    *,
    burn_in: float = 100.0,
    seed: int | torch.Generator = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Simulate Z23's Lorenz-63 trajectories, stationary unless told otherwise.

    Parameters
    ----------
    trajectories, length : int
        How many trajectories, and how many states of each, 0.1 time units apart.
    burn_in : float
        Time units thrown away, a multiple of 0.1: 100 for the attractor, 3 as published.
    seed : int or Generator
        Of the first states; the same on every device.
    device, dtype : optional
        Where and in what precision to integrate.

    Returns
    -------
    Tensor of shape (trajectories, length, 3)
    """
    x = 20 * _normal(trajectories, 3, seed)
    system = dynamics.Lorenz63()
    return _run(system, x, length, 0.1, SUBSTEPS["lorenz63"], burn_in, device, dtype)


def fitzhugh_nagumo(
    trajectories: int,
    length: int = LENGTH,
    *,
    burn_in: float = 1500.0,
    seed: int | torch.Generator = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Simulate Z23's trajectories of two FitzHugh-Nagumo cells, states 6 time units apart.

    Parameters
    ----------
    trajectories, length, burn_in, seed, device, dtype
        As in `lorenz63`; the burn-in is a multiple of 6.

    Returns
    -------
    Tensor of shape (trajectories, length, 4)
    """
    x = 0.04 * _normal(trajectories, 4, seed)
    system = oscillators.FitzHughNagumo()
    return _run(system, x, length, 6.0, SUBSTEPS["fitzhugh_nagumo"], burn_in, device, dtype)


def double_pendulum(
    trajectories: int,
    length: int = LENGTH,
    *,
    seed: int | torch.Generator = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Simulate Z23's trajectories of the double pendulum, states 0.5 time units apart.

    Parameters
    ----------
    trajectories, length, seed, device, dtype
        As in `lorenz63`.  Starts with an angle beyond ±π are drawn again.

    Returns
    -------
    Tensor of shape (trajectories, length, 4)
    """
    generator = _generator(seed)
    kept, missing = [], checks.count("trajectories", trajectories)
    while missing:
        draw = noise.normal((missing, 4), generator=generator, dtype=torch.float64)
        draw = draw[(draw[:, :2].abs() <= torch.pi).all(1)]
        kept.append(draw)
        missing -= len(draw)
    draw, system = torch.cat(kept), oscillators.DoublePendulum()
    spread = torch.tensor([0.2, 0.3], dtype=torch.float64, device=draw.device)
    x = system.state(draw[:, :2], draw[:, 2:] * spread)
    return _run(system, x, length, 0.5, SUBSTEPS["double_pendulum"], 0.0, device, dtype)


def _generator(seed: int | torch.Generator) -> torch.Generator:
    return seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)


def _normal(trajectories: int, d: int, seed: int | torch.Generator) -> Tensor:
    shape = checks.count("trajectories", trajectories), d
    return noise.normal(shape, generator=_generator(seed), dtype=torch.float64)


def _run(
    system: Any,
    x: Tensor,
    length: int,
    interval: float,
    substeps: int,
    burn_in: float,
    device: torch.device | str | None,
    dtype: torch.dtype,
) -> Tensor:
    """Integrate from x over the burn-in, then keep ``length`` states ``interval`` apart."""
    checks.count("length", length)
    skip = round(burn_in / interval)
    if burn_in < 0 or abs(skip * interval - burn_in) > 1e-6 * interval:
        raise ValueError(f"burn_in must be a multiple of {interval}, not negative, got {burn_in}")
    step: dict[str, Any] = {"dt": interval / substeps}
    x = x.to(device=device, dtype=dtype)
    if skip:
        steps = skip * substeps
        x = dynamics.integrate(system, x, steps=steps, every=steps, **step)[:, -1]
    steps = (length - 1) * substeps
    return dynamics.integrate(system, x, steps=steps, every=substeps, **step)
