"""Twin experiments of chapter 06: every method in F24's setting, tuned and compared in pairs.

python book/tools/interpolation.py            # all parts, about 40 minutes of one core
python book/tools/interpolation.py tau        # one part: setting, tau, intervals, partial

Results go to book/results/interpolation.json, part by part.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import results
import torch
from torch import Tensor

from ddmlib import assimilation as da
from ddmlib import datasets, denoisers, dynamics, pretrained, sampling

OUT = results.FOLDER / "interpolation.json"
B = torch.tensor([[0.520, 0.747, 0.0], [0.747, 1.378, 0.001], [0.0, 0.001, 1.177]])  # F24's
DIAGONAL = B.diag().diag()
MEMBERS, STD = 50, 2.0
SCALE = datasets.LORENZ63.std
INTERVALS = (1, 5, 10, 15, 20, 25)


def forecaster(steps: int) -> da.methods.Forecast:
    """Return the propagation by ``steps`` steps of 0.01."""

    def forecast(x: Tensor) -> Tensor:
        system = dynamics.Lorenz63()
        return dynamics.integrate(system, x, dt=0.01, steps=steps, every=steps)[..., -1, :]

    return forecast


@functools.cache
def archive(n: int) -> Tensor:
    """Return n states of the attractor, physical units."""
    return datasets.lorenz63(n // 16, 16, every=100, seed=11).reshape(-1, 3)


def diffusion(t: float, steps: int, denoiser: Any = None, **rule: Any) -> da.perturbations.Sampler:
    """Return the ensemble sampler by partial diffusion to t and back in ``steps`` steps."""
    denoiser = denoiser or pretrained.load("lorenz63-states")[0]
    standardizer = denoiser.standardizer

    def sample(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        options: dict[str, Any] = {"t": t, "steps": steps, "members": MEMBERS} | rule
        z = sampling.resample(denoiser, standardizer(x), generator=generator, **options)
        return standardizer.inverse(z)

    return sample


def kernel(t: float, n: int = 2**15) -> da.perturbations.Sampler:
    """Return the limit of many steps with the exact denoiser of n states: diffuse to t, then draw
    a state of the archive from its posterior weights."""
    schedule = pretrained.load("lorenz63-states")[0].schedule
    ratio = float(schedule.ratio(t))
    data = datasets.LORENZ63(archive(n))

    def sample(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        z = datasets.LORENZ63(x)[..., None, :].expand(*x.shape[:-1], MEMBERS, 3)
        z = (z + ratio * torch.randn(z.shape, generator=generator)).reshape(-1, 3)
        u = torch.rand(len(z), 1, generator=generator)
        drawn = []
        for part, level in zip(z.split(64), u.split(64), strict=True):
            logits = torch.cdist(part, data).square_().mul_(-0.5 / ratio**2)
            total = (logits - logits.amax(1, keepdim=True)).exp_().cumsum(1)
            drawn.append(torch.searchsorted(total, level * total[:, -1:])[:, 0])
        index = torch.cat(drawn).clamp(max=len(data) - 1)
        return datasets.LORENZ63.inverse(data[index].reshape(*x.shape[:-1], MEMBERS, 3))

    return sample


def run(methods: dict[str, da.Method], **options: Any) -> dict[str, da.Scores]:
    """Run a twin experiment; equal seeds give equal truths and observations."""
    settings: dict[str, Any] = {"every": 10, "trajectories": 128, "cycles": 120, "burn_in": 40}
    settings |= {"seed": 0, "block": 20, "std": STD} | options
    truth = datasets.lorenz63(settings.pop("trajectories"), 1, seed=20 + settings["seed"])[:, 0]
    generator = torch.Generator().manual_seed(settings.pop("seed"))
    forecast = forecaster(settings.pop("every"))
    return da.twin(forecast, truth, methods, generator=generator, **settings)


def interval(found: Any) -> list[float]:
    """Return [estimate, low, high], rounded."""
    return [round(float(v), 4) for v in found]


def row(scores: da.Scores, reference: da.Scores | None = None) -> dict[str, Any]:
    """Return what is stored of a method."""
    g = torch.Generator().manual_seed(0)
    result: dict[str, Any] = {"nrmse": interval(scores.interval(SCALE, g))}
    result["rmse"] = round(scores.rmse(), 4)
    result["background"] = round(float((scores.background / SCALE**2).mean().sqrt()), 4)
    if reference is not None:
        result["difference"] = interval(da.difference(scores, reference, SCALE, g))
    if scores.crps is not None and scores.ranks is not None and scores.variance is not None:
        result["crps"] = round(float((scores.crps / SCALE).mean()), 4)
        result["spread"] = round(float((scores.variance / SCALE**2).mean().sqrt()), 4)
        result["ranks"] = (scores.ranks.double() / scores.ranks.sum(0)).mean(1).tolist()
        result["ranks"] = [round(v, 5) for v in result["ranks"]]
    return result


def setting() -> dict[str, Any]:
    """F24's setting: all methods on the same observations, differences to 3D-Var."""
    kernel_denoiser = denoisers.EmpiricalDenoiser(
        datasets.LORENZ63(archive(2**14)), standardizer=datasets.LORENZ63
    )
    t = 0.13
    methods: dict[str, da.Method] = {
        "3D-Var": da.ThreeDVar(1.72**2 * B),
        "EnOI, full B": da.EnOI(da.gaussian(B, MEMBERS), 1.82**2),
        "EnOI, diagonal B": da.EnOI(da.gaussian(DIAGONAL, MEMBERS), 2.22**2),
        "EnOI, analogs": da.EnOI(da.analogs(archive(2**14), MEMBERS), best_analog()),
        "ETKF, 3 members": da.ETKF(3, inflation=1.34),
        "ETKF, 12 members": da.ETKF(12, inflation=1.07),
        "EnKF-N, 3 members": da.EnKFN(3),
        "EnKF-N, 12 members": da.EnKFN(12),
        "iEnKS, 10 members": da.IEnKS(10, analysis_inflation=1.02, rotation=True),
        "EnOI, diffusion": da.EnOI(diffusion(t, 13)),
        "EnOI, exact": da.EnOI(kernel(t)),
    }
    scores: dict[str, da.Scores] = {}
    longer: dict[str, list[float]] = {}
    for name, method in methods.items():
        slow = name in ("EnOI, diffusion", "EnOI, exact", "iEnKS, 10 members")
        began = time.perf_counter()
        scores[name] = run({name: method}, probabilistic=True)[name]
        print(name, row(scores[name])["nrmse"], round(time.perf_counter() - began), flush=True)
        if not slow:  # more cycles for the stand-in targets
            long = run({name: method}, trajectories=256, cycles=800, seed=1)[name]
            longer[name] = interval(long.interval(SCALE, torch.Generator().manual_seed(0)))
    result = {name: row(s, scores["3D-Var"]) for name, s in scores.items()}
    for name, value in longer.items():
        result[name]["nrmse_long"] = value
    g = torch.Generator().manual_seed(0)
    close = da.difference(scores["EnOI, diffusion"], scores["EnOI, exact"], SCALE, g)
    few: dict[str, Any] = {"trajectories": 32, "cycles": 60, "burn_in": 20, "seed": 2}
    same = {
        "network": da.EnOI(diffusion(t, 13)),
        "exact": da.EnOI(diffusion(t, 13, kernel_denoiser)),
        "many steps": da.EnOI(kernel(t)),
    }
    stepped = run(same, **few)
    return {
        "t": t,
        "methods": result,
        "diffusion_minus_exact": interval(close),
        "same_steps": {
            "trajectories": 32,
            "cycles": 60,
            "network_minus_exact": interval(
                da.difference(stepped["network"], stepped["exact"], SCALE, g)
            ),
            "exact_minus_many_steps": interval(
                da.difference(stepped["exact"], stepped["many steps"], SCALE, g)
            ),
        },
    }


def best_analog() -> float:
    """Return the best inflation of the covariance of analogs in F24's setting."""
    grid = (8.0, 16.0, 32.0, 64.0, 128.0)
    return tuned(lambda v: da.EnOI(da.analogs(archive(2**14), MEMBERS), v), grid, 10)[0]


def tuned(
    make: Callable[[float], da.Method], grid: tuple[float, ...], every: int, **options: Any
) -> tuple[float, da.Scores]:
    """Return the best value of a grid by seed 5, and its scores by seed 6."""
    small: dict[str, Any] = {"every": every, "trajectories": 64, "cycles": 100, "burn_in": 40}
    small |= options
    errors = []
    for value in grid:
        try:
            errors.append(run({"it": make(value)}, seed=5, **small)["it"].rmse(SCALE))
        except ValueError:  # it diverged
            errors.append(float("inf"))
    best = grid[errors.index(min(errors))]
    return best, run({"it": make(best)}, seed=6, **small)["it"]


def tau() -> list[dict[str, Any]]:
    """EnOI against tau: network, exact denoiser, with F24's steps and with few."""
    rows = []
    few: dict[str, Any] = {"trajectories": 64, "cycles": 80, "burn_in": 30, "seed": 3}
    schedule = pretrained.load("lorenz63-states")[0].schedule
    for t in (0.08, 0.1, 0.115, 0.13, 0.16, 0.2):
        methods: dict[str, da.Method] = {
            "network": da.EnOI(diffusion(t, round(100 * t))),
            "network, 4 steps": da.EnOI(diffusion(t, 4, method="multistep", eta=1.0)),
            "network, 2 steps": da.EnOI(diffusion(t, 2, method="multistep", eta=1.0)),
            "exact": da.EnOI(kernel(t, 2**13)),
        }
        scores = run(methods, **few)
        g = torch.Generator().manual_seed(0)
        found = {name: interval(s.interval(SCALE, g)) for name, s in scores.items()}
        difference = interval(da.difference(scores["network"], scores["exact"], SCALE, g))
        few_steps = interval(da.difference(scores["network, 4 steps"], scores["network"], SCALE, g))
        rows.append(
            {"t": t, "ratio": round(float(schedule.ratio(t)), 4), **found}
            | {"network_minus_exact": difference, "four_minus_f24": few_steps}
        )
        print(rows[-1], flush=True)
    return rows


def families(every: int) -> dict[str, tuple[Callable[[float], da.Method], tuple[float, ...]]]:
    """Return each method with the grid of its one parameter, for observations every so many
    steps."""
    factors = (1.0, 1.7, 3.0, 5.0, 8.0, 13.0, 21.0, 34.0)
    scales = (4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)  # of the covariance of analogs
    if every == 1:
        factors, scales = (0.03, 0.06, 0.12, 0.25, 0.5, 1.0), (0.5, 1.0, 2.0, 4.0, 8.0)
    taus = {
        1: (0.015, 0.025, 0.04, 0.06),
        5: (0.07, 0.09, 0.11),
        10: (0.11, 0.13, 0.15),
        15: (0.13, 0.16, 0.19),
    }
    taus |= {20: (0.16, 0.19, 0.23), 25: (0.19, 0.23, 0.27, 0.31)}
    inflations = {
        1: (1.0, 1.005, 1.01),
        5: (1.01, 1.02, 1.04),
        10: (1.04, 1.07, 1.12),
        15: (1.1, 1.15, 1.25),
    }
    inflations |= {20: (1.2, 1.35, 1.5), 25: (1.4, 1.6, 1.85)}
    return {
        "3D-Var": (lambda v: da.ThreeDVar(v * B), factors),
        "EnOI, diagonal B": (lambda v: da.EnOI(da.gaussian(DIAGONAL, MEMBERS), v), factors),
        "EnOI, analogs": (
            lambda v: da.EnOI(da.analogs(archive(2**14), MEMBERS), v),
            scales,
        ),
        "EnOI, diffusion": (
            lambda v: da.EnOI(diffusion(v, 4, method="multistep", eta=1.0)),
            taus[every],
        ),
        "ETKF, 12 members": (
            lambda v: da.ETKF(12, inflation=v),
            inflations[every],
        ),
        "EnKF-N, 12 members": (lambda v: da.EnKFN(12), (1.0,)),
        "iEnKS, 10 members": (
            lambda v: da.IEnKS(10, analysis_inflation=v, rotation=True),
            (1.0, 1.03),
        ),
    }


def tuned_all(every: int, grids: dict[str, tuple[float, ...]], **options: Any) -> dict[str, Any]:
    """Return every method, tuned, with its paired difference to 3D-Var; ``grids`` replaces some."""
    found: dict[str, Any] = {}
    scores: dict[str, da.Scores] = {}
    for name, (make, grid) in families(every).items():
        best, scores[name] = tuned(make, grids.get(name, grid), every, **options)
        g = torch.Generator().manual_seed(0)
        found[name] = {
            "tuned": best,
            "nrmse": interval(scores[name].interval(SCALE, g)),
            "difference": interval(da.difference(scores[name], scores["3D-Var"], SCALE, g)),
        }
        print(every, name, found[name], flush=True)
    return found


def intervals() -> list[dict[str, Any]]:
    """Every method at every interval between observations, re-tuned."""
    return [
        {"every": every} | tuned_all(every, {}, burn_in=max(40, 400 // every))
        for every in INTERVALS
    ]


def partial() -> dict[str, Any]:
    """Only x is observed, every 10 steps; re-tuned."""
    grids = {
        "EnOI, diffusion": (0.14, 0.18, 0.23, 0.29, 0.36, 0.44),
        "EnOI, diagonal B": (21.0, 34.0, 55.0, 89.0),
    }
    return tuned_all(10, grids, operator=da.component(0), burn_in=80)


def main() -> None:
    """Run the parts that were asked for; keep the others."""
    parts = {"setting": setting, "tau": tau, "intervals": intervals, "partial": partial}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*parts, []], help="default: all")
    asked = parser.parse_args().parts or list(parts)
    for name in asked:
        began, found = time.perf_counter(), parts[name]()
        made = results.made("python book/tools/interpolation.py")
        results.save(results.load(OUT) | made | {name: found}, OUT)
        print(name, "took", round(time.perf_counter() - began), "s", flush=True)


if __name__ == "__main__":
    main()
