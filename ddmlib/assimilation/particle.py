r"""The bootstrap particle filter: samples of a trajectory given all its observations.

Particles follow the chain, are weighted with p(y_k | x_k) at each observation, and are resampled
systematically once the effective sample size 1/Σw² is less than half of them (Gordon, Salmond &
Smith 1993; Doucet & Johansen 2009).  The ancestor tree keeps what leads to a particle alive, and
nothing else, so memory is bounded by the states since the last resampling (Jacob, Murray &
Rubenthaler 2015).  Paths picked from the tree are samples of p(x_1 … x_L | y); their number of
distinct first states says how far the ancestry has degenerated.  The product of the mean weights is
an unbiased estimate of the evidence p(y).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ddmlib import checks
from ddmlib.assimilation.observations import Observation
from ddmlib.dynamics import Chain

LEAST = 0.5  # resample when the effective share of the particles falls below it


class Filtering(NamedTuple):
    """What the filter found.

    ``paths`` (paths, length, d): equally likely trajectories given the observations, physical
    units.  ``log_evidence``: log of the unbiased estimate of p(y).  ``effective`` (n,): effective
    sample size after each observation, before resampling.  ``first_states``: distinct first states
    that all particles descend from, at the end.
    """

    paths: Tensor
    log_evidence: float
    effective: Tensor
    first_states: int


@dataclass
class _Generation:
    """States (n, steps, d) between two resamplings, and the row that each continues in the
    generation before (in the first: the number of its first state)."""

    states: Tensor
    parent: Tensor


def bootstrap_filter(
    chain: Chain,
    observation: Observation,
    *,
    length: int,
    particles: int,
    paths: int,
    initial: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Filtering:
    """Run the bootstrap particle filter and keep its diagnostics.

    Parameters
    ----------
    chain : Chain
        For instance `dynamics.NoisyLorenz63`.
    observation : Observation
        ``y`` of shape (n, m) with n = 1 + (length - 1) // every; its dtype and device are those of
        the particles.
    length : int
        States of the trajectory.
    particles, paths : int
        Particles, and paths picked from them at random in proportion to their weights.
    initial : Tensor of shape (particles, d), optional
        First states, such as stationary ones; default: drawn from ``chain.initial``.
    generator : torch.Generator, optional
        Source of randomness.

    Returns
    -------
    Filtering

    Raises
    ------
    ValueError
        If a shape is wrong, or no particle has a positive likelihood.
    """
    y = observation.y
    count = 1 + (checks.count("length", length) - 1) // observation.every
    if y.ndim != 2 or len(y) != count:
        raise ValueError(f"y must have shape ({count}, m), got {tuple(y.shape)}")
    checks.count("particles", particles, 2)
    checks.count("paths", paths)
    if initial is None:
        initial = chain.initial(particles, generator)
    elif checks.finite("initial", initial).shape != (particles, chain.dim):
        raise ValueError(
            f"initial must have shape ({particles}, {chain.dim}), got {tuple(initial.shape)}"
        )
    x = initial.to(y).mT.contiguous().mT  # a row of memory for each component, for the chain
    uniform = -torch.log(torch.tensor(float(particles), dtype=torch.float64, device=y.device))
    log_weights, log_evidence = uniform.expand(particles), torch.zeros_like(uniform)
    tree: list[_Generation] = []
    segment, parent = [x], torch.arange(particles, device=y.device)
    effective = []
    for k in range(length):
        if k > 0:
            x = chain.transition(x, generator)
            segment.append(x)
        if k % observation.every:
            continue
        likelihood = observation.at(k // observation.every).log_likelihood(x)
        log_weights = log_weights + likelihood.double()
        mean = torch.logsumexp(log_weights, 0)
        if not bool(torch.isfinite(mean)):
            raise ValueError(f"no particle explains the observation at state {k}")
        log_weights, log_evidence = log_weights - mean, log_evidence + mean
        effective.append(1 / log_weights.exp().square().sum())
        if float(effective[-1]) < LEAST * particles and k + 1 < length:
            counts = _offspring(log_weights.exp(), particles, generator)
            (alive,) = counts.nonzero(as_tuple=True)
            states = torch.stack([state[alive] for state in segment], 1)
            tree.append(_Generation(states, parent[alive]))
            _prune(tree)
            parent = torch.repeat_interleave(counts[alive])
            x, segment = x.mT[:, alive[parent]].mT, []
            log_weights = uniform.expand(particles)
    weights = log_weights.exp()
    picked = _pick(weights, paths, generator)
    rows, _ = _trace(tree, parent[picked])
    parts = [generation.states[row] for generation, row in zip(tree, rows, strict=True)]
    parts.append(torch.stack([state[picked] for state in segment], 1))
    _, firsts = _trace(tree, parent[systematic(weights, particles, generator)])
    return Filtering(
        torch.cat(parts, 1), float(log_evidence), torch.stack(effective), len(torch.unique(firsts))
    )


def particle_filter(
    chain: Chain,
    observation: Observation,
    *,
    length: int,
    particles: int,
    paths: int,
    initial: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the paths (paths, length, d) of `bootstrap_filter`, whose arguments these are."""
    return bootstrap_filter(
        chain,
        observation,
        length=length,
        particles=particles,
        paths=paths,
        initial=initial,
        generator=generator,
    ).paths


def systematic(weights: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
    """Return n indices (n,), ascending, by systematic resampling.

    Index i comes floor or ceil of n w_i times, n w_i in expectation.

    Parameters
    ----------
    weights : Tensor of shape (particles,)
        Non-negative, with a positive sum.
    n : int
        Indices to draw.
    generator : torch.Generator, optional
        Source of the one random number there is.
    """
    return torch.repeat_interleave(_offspring(weights, n, generator))


def _offspring(weights: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    """Return how often each index comes in `systematic`, (particles,)."""
    edges = weights.double().cumsum(0)
    on = weights.device if generator is None else generator.device
    shift = torch.rand(1, generator=generator, device=on, dtype=torch.float64).to(weights.device)
    # of the positions (j + shift)/n, j < n, those below an edge; all of them below the last,
    # also where a shift near one is lost to rounding
    below = (edges / edges[-1] * n - shift).ceil().masked_fill(edges == edges[-1], n)
    return below.diff(prepend=below.new_zeros(1)).long()


def _pick(weights: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    """Return n independent indices, drawn on the generator's device."""
    on = weights.device if generator is None else generator.device
    picked = torch.multinomial(weights.to(on), n, replacement=True, generator=generator)
    return picked.to(weights.device)


def _prune(tree: list[_Generation]) -> None:
    """Drop from older generations the states that nobody descends from any more."""
    for older, younger in zip(tree[-2::-1], tree[:0:-1], strict=True):
        alive, parent = torch.unique_consecutive(younger.parent, return_inverse=True)
        if len(alive) == len(older.states):
            return  # nobody died here, so nobody before
        younger.parent = parent
        older.states, older.parent = older.states[alive], older.parent[alive]


def _trace(tree: list[_Generation], index: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the rows of each generation that lead to rows of the last, and their first states."""
    rows = []
    for generation in reversed(tree):
        rows.append(index)
        index = generation.parent[index]
    return rows[::-1], index
