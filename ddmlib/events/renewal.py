r"""Samples given an event, made anew without leaving it.

A sample x_0 of the event is diffused to some noise level, x_t = alpha_t x_0 + sigma_t ε, and the
reverse process takes x_t back to some x_0'.  If x_0' is in the event it takes the place of x_0,
otherwise x_0 stays.  Diffusing draws from p(x_t | x_0) and coming back from p(x_0' | x_t): together
they are a reversible chain of law p(x_0), so with the refusals the chain is reversible for
p(x_0 | E), by Metropolis' rule, whatever the event and without its gradient (Gilks & Berzuini 2001
call weighted samples that go on like this "resample-move").

Twisted paths have few ancestors where the weights are uneven, and samples that share most of their
path resemble one another.  A move at a low noise level is nearly always taken and changes little;
at a high one it changes everything and is seldom taken: some moves at levels where one in two to
ten is taken, then some further down, leave little of the resemblance.  What they hardly mend is a
part of the event with fewer samples than its share: from low noise nothing is proposed in another
part, and of what is proposed from high noise little stays in the event.

The law is kept as well as the sampler keeps p(x_0) from that level down, and the error of many
moves adds up.  Where the last steps of a sampler are all that is left they lose variance, for the
last one returns a mean: on a standard normal number a hundred moves from the lowest of 48 levels,
0.04, take off a seventh of the variance, and a thousand half.  A hundred from sigma/alpha = 1 leave
it as it was, within 1 %.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ddmlib import checks, noise, sampling
from ddmlib.denoisers import Denoiser, diffuse
from ddmlib.events import arguments
from ddmlib.events.constraints import Event
from ddmlib.events.paths import RULES, levels

ROUNDING = 1e-5  # relative, of a level


def starts(pairs: list[sampling.Level], renewals: Sequence[float]) -> list[int]:
    """Return the first of these levels at which sigma/alpha is no higher, for each renewal.

    Raises
    ------
    ValueError
        For one above the highest level, or with no step to take.
    """
    found = [float(sigma / alpha) for alpha, sigma in pairs[:-1]]
    # ends may be given as the numbers that the grid was made from, however levels are rounded
    low, high = found[-1] * (1 - ROUNDING), found[0] * (1 + ROUNDING)
    for value in renewals:
        if not low <= value <= high:
            raise ValueError(
                f"renewals must be sigma/alpha from {found[-1]:.3g} to {found[0]:.3g}, got {value}"
            )
    return [sum(r > value for r in found[:-1]) for value in renewals]


@torch.no_grad()
def renew(
    denoiser: Denoiser,
    event: Event,
    x: Tensor,
    renewals: Sequence[float],
    *,
    steps: int = 64,
    rule: str = "multistep",
    spacing: str = "log-ratio",
    ratios: tuple[float, float] | None = None,
    chunk: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, list[float]]:
    """Make samples of an event anew, one after the other at each noise level of ``renewals``.

    Parameters
    ----------
    denoiser : Denoiser
        Without guidance.
    event : Event
        Of positive probability: no equality.
    x : Tensor of shape (n, *shape)
        Samples, in standardised units; those outside the event stay until a move takes them in.
    renewals : sequence of float
        sigma/alpha that the samples are diffused to, one move each.
    steps, spacing, ratios
        Of the sampler from pure noise, as in `sampling.sample`; a move takes those of its steps
        that lie below its level, so it costs fewer evaluations than a sample.
    rule : str
        "multistep" or "ddpm", both with ``eta=1``.
    chunk : int, optional
        Samples moved at once, to bound memory.
    generator : torch.Generator, optional
        Source of randomness.

    Returns
    -------
    x : Tensor of shape (n, *shape), standardised units
    taken : list of float
        The share of samples that each move made anew.

    Raises
    ------
    ValueError
        For an equality, samples of another shape, or a noise level without steps.
    """
    checks.choice("rule", rule, RULES)
    arguments.inequality(arguments.suited(denoiser, event))
    renewals = arguments.ratios("renewals", renewals)
    if checks.finite("x", x).shape[1:] != event.shape:
        raise ValueError(f"x must have shape (n, *{event.shape}), got {tuple(x.shape)}")
    size = len(x) if chunk is None else checks.count("chunk", chunk)
    grid = sampling.times_for(denoiser, steps, spacing=spacing, ratios=ratios)
    pairs = levels(denoiser, grid, x)
    taken = []
    for first in starts(pairs, renewals):
        moved = []
        for part in x.split(size):
            x_t = diffuse(part, *pairs[first], noise.normal_like(part, generator))
            moved.append(
                sampling.reverse(
                    denoiser, x_t, grid[first:], method=rule, eta=1.0, clean=True,
                    generator=generator,
                )
            )  # fmt: skip
        proposal = torch.cat(moved)
        inside = event.holds(denoiser.standardizer.inverse(proposal))
        x = torch.where(inside.reshape(-1, *(1,) * len(event.shape)), proposal, x)
        taken.append(float(inside.double().mean()))
    return x, taken
