"""Twin experiments over many trajectories at once, and their scores.

A twin experiment runs one truth, observes it with noise, and lets methods estimate it from the
observations alone.  All methods see the same observations, so that their errors can be compared in
pairs.  Everything is batched over independent trajectories and statistics are gathered on the way:
memory does not grow with the number of cycles.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ddmlib import checks, metrics, noise
from ddmlib.assimilation.methods import Cycle, Forecast, Method
from ddmlib.assimilation.observations import Operator, identity, observe


@dataclass
class Scores:
    """Errors of a method, averaged within blocks of cycles.

    Attributes
    ----------
    analysis, background : Tensor of shape (blocks, trajectories, d), float64
        Mean squared error of each component, physical units squared.
    instantaneous : Tensor of shape (blocks, trajectories), float64
        Mean over cycles of the root-mean-square error over components of the analysis (what DAPPER
        averages); never above the root of the mean square.
    variance : Tensor of shape (blocks, trajectories, d), float64, optional
        Mean variance of the ensembles.
    crps : Tensor of shape (d,), optional
        Of the ensembles, against the truth.
    ranks : Tensor of shape (N + 1, d), optional
        Counts of the truth's rank.
    """

    analysis: Tensor
    background: Tensor
    instantaneous: Tensor
    variance: Tensor | None = None
    crps: Tensor | None = None
    ranks: Tensor | None = None

    def rmse(self, scale: Tensor | None = None) -> float:
        """Return the root-mean-square analysis error, each component divided by ``scale``."""
        return float(_scaled(self.analysis, scale).mean().sqrt())

    def interval(
        self, scale: Tensor | None = None, generator: torch.Generator | None = None
    ) -> metrics.Interval:
        """Return `rmse` with its 95 % interval over trajectories and blocks."""
        series = _scaled(self.analysis, scale).mean(-1)
        return _bootstrap(series[..., None], lambda x: x.mean().sqrt(), generator)


def difference(
    a: Scores, b: Scores, scale: Tensor | None = None, generator: torch.Generator | None = None
) -> metrics.Interval:
    """Return the difference of two methods' RMSE, a - b, with the 95 % interval of paired data.

    Both come from the same observations (one call of `twin`, or two with equal seeds).
    """
    if a.analysis.shape != b.analysis.shape:
        raise ValueError(
            f"a and b must come from the same experiment, got errors of shapes "
            f"{tuple(a.analysis.shape)} and {tuple(b.analysis.shape)}"
        )
    series = torch.stack([_scaled(s.analysis, scale).mean(-1) for s in (a, b)], -1)
    return _bootstrap(series, lambda x: torch.diff(x.mean(0).sqrt().flip(-1))[0], generator)


def _scaled(squared: Tensor, scale: Tensor | None) -> Tensor:
    return squared if scale is None else squared / scale.to(squared).square()


def _bootstrap(
    series: Tensor,
    statistic: Callable[[Tensor], Tensor],
    generator: torch.Generator | None,
) -> metrics.Interval:
    """Resample blocks of cycles; those of different trajectories are independent, those that follow
    each other nearly so when a block is much longer than the errors' memory."""
    rows = series.flatten(0, 1)
    return metrics.block_bootstrap(rows, statistic, block=1, generator=generator)


def twin(
    forecast: Forecast,
    truth: Tensor,
    methods: Mapping[str, Method],
    *,
    operator: Operator = identity,
    std: float | Tensor = 1.0,
    cycles: int,
    burn_in: int,
    block: int = 100,
    probabilistic: bool = False,
    guess_std: float | Tensor = 1.0,
    generator: torch.Generator,
    progress: bool = False,
) -> dict[str, Scores]:
    """Run a twin experiment with several methods on the same truth and observations.

    Parameters
    ----------
    forecast : callable
        Propagates states (..., d) from one observation to the next, for instance
        ``lambda x: dynamics.integrate(system, x, dt=0.01, steps=10, every=10)[..., -1, :]``.
    truth : Tensor of shape (trajectories, d)
        True states at the beginning, physical units.
    methods : mapping of name to Method
    operator, std
        What is observed of each state and with what noise; see `observations.Observation`.
    cycles, burn_in : int
        Scored cycles, a multiple of ``block``, and cycles before them.
    block : int
        Cycles in a block, over which errors are averaged.
    probabilistic : bool
        Score the ensembles as well (variance, CRPS, ranks).
    guess_std : float or Tensor of shape (d,)
        Standard deviation of the first guess about the truth, physical units.
    generator : torch.Generator
        Source of all randomness.  Observations do not depend on the methods.
    progress : bool
        Show a progress bar.

    Returns
    -------
    dict of name to Scores

    Raises
    ------
    ValueError
        On bad arguments, or when a method's analysis is not finite any more.
    """
    checks.finite("truth", truth)
    if truth.ndim != 2:
        raise ValueError(f"truth must have shape (trajectories, d), got {tuple(truth.shape)}")
    if checks.count("cycles", cycles) % checks.count("block", block):
        raise ValueError(f"cycles must be a multiple of block, got {cycles} and {block}")
    checks.count("burn_in", burn_in, 0)
    seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    guess_std = torch.as_tensor(guess_std, dtype=truth.dtype, device=truth.device)
    if guess_std.shape not in ((), truth.shape[1:]) or not bool((guess_std >= 0).all()):
        raise ValueError(f"guess_std must be a number or {truth.shape[1]} of them, not negative")
    guess = truth + guess_std * noise.normal_like(truth, generator)
    own = {name: torch.Generator(generator.device).manual_seed(seed) for name in methods}
    state = {name: method.start(guess, own[name]) for name, method in methods.items()}
    sums = {name: _Sums(truth, cycles // block, block, probabilistic) for name in methods}
    for k in tqdm(range(-burn_in, cycles), disable=not progress):
        truth = forecast(truth)
        observation = observe(truth, operator, std, generator=generator)
        for name, method in methods.items():
            cycle = method.cycle(state[name], forecast, observation, own[name])
            state[name] = cycle.state
            looked_at = probabilistic or (k + 1) % block == 0  # scores of ensembles must be finite
            if looked_at and not bool(torch.isfinite(cycle.analysis).all()):
                raise ValueError(f"method {name!r} diverged: its analysis is not finite")
            if k >= 0:
                sums[name].add(k, cycle, truth, own[name])
    return {name: found.scores() for name, found in sums.items()}


class _Sums:
    """Running sums of `Scores`."""

    def __init__(self, truth: Tensor, blocks: int, block: int, probabilistic: bool) -> None:
        self.block, self.probabilistic = block, probabilistic
        shape = (blocks, *truth.shape)
        options: dict[str, Any] = {"dtype": torch.float64, "device": truth.device}
        self.analysis, self.background, self.variance = torch.zeros(3, *shape, **options)
        self.instantaneous = torch.zeros(shape[:-1], **options)
        self.crps: Tensor | None = None
        self.ranks: Tensor | None = None

    def add(self, k: int, cycle: Cycle, truth: Tensor, generator: torch.Generator) -> None:
        """Add one cycle to its block."""
        i = k // self.block
        squared = (cycle.analysis - truth).square()
        self.analysis[i] += squared
        self.background[i] += (cycle.background - truth).square()
        self.instantaneous[i] += squared.mean(-1).sqrt()
        if self.probabilistic and cycle.ensemble is not None:
            self.variance[i] += cycle.ensemble.var(-2)
            crps = metrics.crps(cycle.ensemble, truth).mean(0)
            ranks = metrics.rank_histogram(cycle.ensemble, truth, generator=generator)
            self.crps = crps if self.crps is None else self.crps + crps
            self.ranks = ranks if self.ranks is None else self.ranks + ranks

    def scores(self) -> Scores:
        """Return the means."""
        n, found = self.block, self.crps is not None
        return Scores(
            self.analysis / n,
            self.background / n,
            self.instantaneous / n,
            self.variance / n if found else None,
            self.crps / (n * len(self.analysis)) if self.crps is not None else None,
            self.ranks,
        )
