"""Guidance and probabilities of events on a Gaussian, where every answer is known; for chapters 09
and 10.

python book/tools/half_space.py            # some minutes of one core

Two half-spaces, of probability 0.1 and 1e-4, for which moment matching is exact, and two events for
which it is not: outside a circle, and on both sides of a strip.  A stochastic sampler makes a
Gaussian of a Gaussian, so P(E) of the sampler itself is known too: this is what estimates are
unbiased for, and what their intervals are to cover.  Results go to book/results/half_space.json.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import results
import scipy.stats
import torch
from torch import Tensor

from ddmlib import events, sampling
from ddmlib.denoisers import Denoiser, GaussianDenoiser
from ddmlib.events import paths

OUT = results.FOLDER / "half_space.json"
DOUBLE: dict[str, Any] = {"dtype": torch.float64}
MEAN, COVARIANCE = torch.tensor([0.5, -0.3], **DOUBLE), torch.tensor([[1, 0.8], [0.8, 1]], **DOUBLE)
DIRECTION = torch.tensor([1.0, 1.0], **DOUBLE)


@dataclass(frozen=True)
class Case:
    """A Gaussian, an event, and its log-probability under a Gaussian of given mean, covariance."""

    denoiser: GaussianDenoiser
    event: events.Constraint
    log_probability: Callable[[Tensor, Tensor], float]


def half_space(probability: float) -> Case:
    """Return the event DIRECTION · x > b of given probability."""
    spread = math.sqrt(float(DIRECTION @ COVARIANCE @ DIRECTION))
    b = float(DIRECTION @ MEAN) + spread * float(scipy.stats.norm.isf(probability))

    def log_probability(mean: Tensor, covariance: Tensor) -> float:
        std = math.sqrt(float(DIRECTION @ covariance @ DIRECTION))
        return float(scipy.stats.norm.logsf(b, float(DIRECTION @ mean), std))

    event = events.Constraint(lambda x: x @ DIRECTION.to(x) - b, (2,))
    return Case(GaussianDenoiser(MEAN, COVARIANCE), event, log_probability)


def normal(d: int) -> GaussianDenoiser:
    """Return the denoiser of d independent standard normal numbers."""
    return GaussianDenoiser(torch.zeros(d, **DOUBLE), torch.eye(d, **DOUBLE))


def outside() -> Case:
    """Return the event |x|² > 9 of a standard normal law, of probability exp(-4.5) = 0.011."""
    event = events.Constraint(lambda x: x.square().sum(-1) - 9, (2,))
    return Case(normal(2), event, lambda mean, covariance: -4.5 / float(covariance[0, 0]))


def two_sides() -> Case:
    """Return the event |x_1| > 3 of a standard normal law, of probability 0.0027."""
    return Case(
        normal(2),
        events.Constraint(lambda x: x[..., 0].abs() - 3, (2,)),
        lambda mean, covariance: (
            math.log(2) + float(scipy.stats.norm.logsf(3 / math.sqrt(float(covariance[0, 0]))))
        ),
    )


CASES: dict[str, Callable[[], Case]] = {
    "half-space 0.1": lambda: half_space(0.1),
    "half-space 1e-4": lambda: half_space(1e-4),
    "outside a circle": outside,
    "two sides": two_sides,
}


def sampler_law(
    denoiser: Denoiser, steps: int, rule: str = "multistep", ratios: tuple = (2e-3, 80.0)
) -> tuple[Tensor, Tensor]:
    """Return mean and covariance of what a stochastic sampler makes of a Gaussian, exactly.

    Every step is affine in the state and in the estimate of the step before: (x, x̂ before).
    """
    d = len(denoiser.standardizer.mean)
    grid = sampling.times(denoiser.schedule, steps, spacing="log-ratio", ratios=ratios)
    pairs = paths.levels(denoiser, grid, torch.zeros((), **DOUBLE))
    basis = torch.cat((torch.zeros(1, 2 * d, **DOUBLE), torch.eye(2 * d, **DOUBLE)))
    x, then = basis[:, :d], basis[:, d:]
    mean, covariance = torch.zeros(2 * d, **DOUBLE), torch.zeros(2 * d, 2 * d, **DOUBLE)
    covariance[:d, :d] = float(torch.hypot(*pairs[0])) ** 2 * torch.eye(d, **DOUBLE)
    before = None
    for t, s in pairwise(pairs):
        x_0 = denoiser.denoise(x, *t)
        out, std = paths.kernel(x, x_0, t, s, before, rule)
        out, before = torch.cat((out, x_0), 1), (then, t)
        matrix = (out[1:] - out[0]).mT
        mean = out[0] + matrix @ mean
        covariance = matrix @ covariance @ matrix.mT
        covariance[:d, :d] += float(std) ** 2 * torch.eye(d, **DOUBLE)
    return mean[:d], covariance[:d, :d]


def guided_quantiles(event: events.Event, n: int = 4096) -> Tensor:
    """Return n samples of a standard normal number given an event, (n,), nothing of them random.

    The deterministic sampler carries quantiles of the noise to quantiles of the guided law.  It
    starts at a ratio of 1000: at 80 the law of x_t given a rare event is not yet that of noise.
    """
    guided = events.EventGuidance(normal(1), event)
    grid = sampling.times(guided.schedule, 128, spacing="log-ratio", ratios=(2e-3, 1000.0))
    start = torch.special.ndtri(torch.arange(n, **DOUBLE).add(0.5) / n)[:, None]
    return sampling.reverse(guided, start, grid, method="heun", clean=True)[:, 0]


def conditional(probability: float) -> dict[str, Any]:
    """Return mean and variance of guided samples beyond a plane, and the exact ones."""
    z = float(scipy.stats.norm.isf(probability))
    x = guided_quantiles(events.Constraint(lambda x: x[..., 0] - z, (1,)))
    slope = float(scipy.stats.norm.pdf(z)) / probability
    return {
        "probability": probability,
        "inside": float((x > z).double().mean()),
        "mean": float(x.mean()),
        "mean_exact": slope,
        "variance": float(x.var()),
        "variance_exact": 1 + z * slope - slope**2,
    }


def accuracy(name: str, samples: int = 8192, steps: int = 256, seed: int = 0) -> dict[str, Any]:
    """Return one estimate at many steps, beside P(E) of the law and of the sampler."""
    case = CASES[name]()
    generator = torch.Generator().manual_seed(seed)
    found = events.log_probability(
        case.denoiser, case.event, samples=samples, steps=steps, generator=generator, **DOUBLE
    )
    prior = case.denoiser
    covariance = prior.axes * prior.variances @ prior.axes.mT
    return {
        "samples": samples,
        "steps": steps,
        "log_probability": found.log_probability,
        "standard_error": found.standard_error,
        "of_the_sampler": case.log_probability(*sampler_law(case.denoiser, steps)),
        "exact": case.log_probability(prior.mean, covariance),
        "warning": found.warning,
    }


def coverage(
    name: str,
    method: str = "smc",
    repetitions: int = 200,
    samples: int = 512,
    steps: int = 24,
    pilot: int = 64,
    seed: int = 1,
) -> dict[str, Any]:
    """Repeat an estimate, and count how often its 95 % interval covers P(E) of the sampler.

    Returns
    -------
    dict
        The shares of intervals that cover, among all and among those without a warning, and the
        mean of the estimates over P(E), which is 1 for an unbiased one, with its standard error.
    """
    case = CASES[name]()
    own = case.log_probability(*sampler_law(case.denoiser, steps))
    generator = torch.Generator().manual_seed(seed)
    found = [
        events.log_probability(
            case.denoiser, case.event, method=method, samples=samples, steps=steps, pilot=pilot,
            generator=generator, **DOUBLE,
        )
        for _ in range(repetitions)
    ]  # fmt: skip
    covers = [e.interval[0] < own < e.interval[1] for e in found]
    trusted = [c for c, e in zip(covers, found, strict=True) if e.trustworthy]
    ratios = torch.tensor([e.log_probability - own for e in found], **DOUBLE).exp()
    return {
        "method": method,
        "repetitions": repetitions,
        "samples": samples,
        "steps": steps,
        "covered": sum(covers) / repetitions,
        "trusted": len(trusted),
        "trusted_covered": sum(trusted) / max(1, len(trusted)),
        "ratio": float(ratios.mean()),
        "ratio_error": float(ratios.std()) / math.sqrt(repetitions),
        "standard_error": float(torch.tensor([e.standard_error for e in found]).median()),
    }


def rounded(entry: dict[str, Any]) -> dict[str, Any]:
    """Return an entry with its numbers rounded to five digits."""
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in entry.items()}


def main() -> None:
    """Measure everything and store it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    start = time.perf_counter()
    result: dict[str, Any] = results.made("python book/tools/half_space.py") | {
        "conditional": [rounded(conditional(p)) for p in (0.1, 1e-4)],
        "accuracy": {},
        "coverage": {},
    }
    print(json.dumps(result["conditional"], indent=1), flush=True)
    for name in CASES:
        result["accuracy"][name] = rounded(accuracy(name))
        print(name, result["accuracy"][name], flush=True)
        exact = name.startswith("half-space")  # elsewhere guidance needs more paths
        methods, samples = (("smc", "importance"), 512) if exact else (("smc",), 2048)
        result["coverage"][name] = []
        for method in methods:
            entry = rounded(coverage(name, method, options.repetitions, samples))
            result["coverage"][name].append(entry)
            print(f"{time.perf_counter() - start:.0f} s", entry, flush=True)
    results.save(result, options.out)


if __name__ == "__main__":
    main()
