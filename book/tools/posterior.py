"""Posteriors of the noisy Lorenz 63 of chapter 08: references, R23's settings, and ours.

python book/tools/posterior.py references     # 2**20 particles, twice an observation
python book/tools/posterior.py r23 --networks noisy-lorenz63-conv --observations 4 --samples 256
python book/tools/posterior.py past           # one setting for both processes

References, which are large, are kept in --folder (default: build/posterior) and made where they
are missing; so are scores, which a later run of the same setting does not compute again.  Results
go to book/results/posterior.json.
"""

import argparse
import datetime
import functools
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from ddmlib import assimilation as da
from ddmlib import datasets, dynamics, guidance, metrics, pretrained, sampling
from ddmlib.denoisers import ByLevel, Denoiser
from ddmlib.networks import WindowMLP
from ddmlib.recipes.common import TRAIN_SEED
from ddmlib.trajectories import TrajectoryDenoiser

OUT = Path(__file__).parents[1] / "results" / "posterior.json"
FOLDER = Path("build/posterior")
LENGTH, PATHS = 65, 1024
SCALE = datasets.NOISY_LORENZ63
CHAIN = dynamics.NoisyLorenz63()
PROCESSES = {"lo": (8, 0.05), "hi": (1, 0.25)}  # states between two observations, standard std


class Case(NamedTuple):
    """A true trajectory (65, 3), physical units, and its observation."""

    truth: Tensor
    observation: da.Observation


@functools.cache
def test_part() -> Tensor:
    """Return the test trajectories, physical units."""
    return datasets.split(datasets.noisy_lorenz63(1024, 1024, burn_in=1024, seed=TRAIN_SEED))[2]


def case(process: str, index: int) -> Case:
    """Return one of R23's problems: the first component of a trajectory of the test part."""
    every, std = PROCESSES[process]
    x = test_part()
    truth = datasets.windows(x, LENGTH, LENGTH)[index % len(x), index // len(x)]
    generator = torch.Generator().manual_seed(1000 + index)
    operator, scale = da.component(0), float(SCALE.std[0])
    return Case(truth, da.observe(truth, operator, std * scale, every=every, generator=generator))


def stationary(n: int, seed: int) -> Tensor:
    """Return n states of the chain's stationary law, in random order."""
    x = datasets.noisy_lorenz63(max(1, n // 128), 128 * 4, burn_in=1024, seed=seed)
    x = x[:, ::4].reshape(-1, 3)
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:n]]


def reference(process: str, index: int, folder: Path) -> dict[str, Tensor]:
    """Return two independent sets of paths, ``a`` and ``b``, two of R23's filter, ``r`` and ``s``,
    and what `metrics` say of them; from the folder, or made."""
    path = folder / f"reference-{process}-{index}.safetensors"
    if path.exists():
        return safetensors.torch.load_file(path)
    problem = case(process, index)
    found: dict[str, Tensor] = {}
    filters = {"a": (1, 2**20), "b": (2, 2**20), "r": (3, 2**14), "s": (4, 2**14)}
    for name, (seed, particles) in filters.items():
        g = torch.Generator().manual_seed(10 * index + seed)
        while True:
            first = stationary(particles, seed=100 * index + 10 + seed)
            if particles < 2**20:  # R23's prior: its Gaussian and 64 transitions
                first = dynamics.simulate(CHAIN, CHAIN.initial(particles, g), steps=64, generator=g)
                first = first[:, -1]
            run = da.bootstrap_filter(
                CHAIN,
                problem.observation,
                length=LENGTH,
                particles=particles,
                paths=PATHS,
                initial=first,
                generator=g,
            )
            if particles < 2**20 or run.first_states >= 500:
                break
            particles *= 2
        found[name] = run.paths.contiguous()
        found[f"{name}_evidence"] = torch.tensor(run.log_evidence)
        found[f"{name}_first_states"] = torch.tensor(run.first_states)
        found[f"{name}_particles"] = torch.tensor(particles)
    a, b = found["a"], found["b"]
    found["energy"] = torch.tensor(metrics.energy_distance(a, b))
    both, g = torch.cat((a, b)), torch.Generator().manual_seed(0)
    shuffled = [both[torch.randperm(2 * PATHS, generator=g)] for _ in range(20)]
    null = [metrics.energy_distance(x[:PATHS], x[PATHS:]) for x in shuffled]
    found["energy_std"] = torch.tensor(null).std()
    found["floor"] = torch.tensor(metrics.wasserstein1(a, b))
    found["floor_256"] = torch.tensor(w1(a, b, 256))
    found["floor_r23"] = torch.tensor(metrics.wasserstein1(found["r"], found["s"]))
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(found, path)
    return found


def w1(ours: Tensor, paths: Tensor, n: int) -> float:
    """Return W1 of n against n trajectories, averaged over the blocks that there are."""
    blocks = len(paths) // n
    distances = [
        metrics.wasserstein1(ours[n * (i % (len(ours) // n)) :][:n], paths[n * i :][:n])
        for i in range(blocks)
    ]
    return sum(distances) / blocks


def describe(problem: Case, x: Tensor) -> dict[str, float]:
    """Return log-prior and log-likelihood, averaged, of trajectories (n, 65, 3)."""
    x = x.double()
    prior = CHAIN.log_transition(x[:, :-1], x[:, 1:]).sum(-1).mean()
    observation = problem.observation
    likelihood = observation.log_likelihood(observation.observed(x)).sum(-1).mean()
    # of standardised observations, as R23 has them
    shift = observation.y.numel() * float(SCALE.std[0].log())
    return {"log_prior": float(prior), "log_likelihood": float(likelihood) + shift}


def score(problem: Case, x: Tensor, ref: dict[str, Tensor]) -> dict[str, float]:
    """Return all scores of n trajectories, physical units, against truth and reference."""
    n = min(len(x), PATHS)
    members = x.movedim(0, -2)  # (65, n, 3)
    paths, std = ref["a"].movedim(0, -2), SCALE.std
    side, truly = ((v[..., 0] > 0).float().mean(0) for v in (x, ref["a"]))
    return {
        "w1": w1(x, ref["a"], n),
        "floor": w1(ref["b"], ref["a"], n),
        "energy": metrics.energy_distance(x, ref["a"]),
        "spread": metrics.spread_ratio(x, ref["a"]),
        "coverage": float(metrics.coverage(members, problem.truth).mean()),
        "crps": float((metrics.crps(members, problem.truth) / std).mean()),
        "coverage_reference": float(metrics.coverage(paths, problem.truth).mean()),
        "crps_reference": float((metrics.crps(paths, problem.truth) / std).mean()),
        "lobe": float((side - truly).abs().max()),  # largest error of P(x > 0) at a state
        **describe(problem, x),
        **{f"{key}_reference": value for key, value in describe(problem, ref["a"]).items()},
    }


def references(options: argparse.Namespace) -> dict[str, Any]:
    """Make the references that are missing; return what they say of themselves."""
    rows: dict[str, Any] = {}
    for index in range(options.observations):
        for process in PROCESSES:
            ref = reference(process, index, options.folder)
            a = describe(case(process, index), ref["a"])
            row = {"particles": int(ref["a_particles"]), **a}
            row |= {k: float(v) for k, v in ref.items() if v.numel() == 1}
            rows.setdefault(process, []).append({k: round(v, 4) for k, v in row.items()})
            print(process, index, rows[process][-1], flush=True)
    return rows


@functools.cache
def network(name: str, weights: Path | None) -> Denoiser:
    """Return a denoiser of trajectories from shipped weights."""
    denoiser = pretrained.load(name, folder=weights)[0]
    return TrajectoryDenoiser(denoiser) if isinstance(denoiser.network, WindowMLP) else denoiser


class Counted(Denoiser):
    """A guided denoiser that counts what it costs: evaluations and products with the Jacobian."""

    def __init__(self, denoiser: Denoiser, products: int) -> None:
        self.denoiser, self.products, self.cost = denoiser, products, 0
        self.schedule, self.standardizer = denoiser.schedule, denoiser.standardizer
        self.event, self.ratios = denoiser.event, denoiser.ratios

    def denoise(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Return what the wrapped denoiser returns."""
        self.cost += 1 + self.products
        return self.denoiser.denoise(x_t, alpha_t, sigma_t)


class Setting(NamedTuple):
    """A network, rules of guidance with their products, by level, and stages of a sampler."""

    weights: str
    rules: list[tuple[float, Callable[[Denoiser, da.Observation], Denoiser], int]]
    stages: list[dict[str, Any]]  # of `sampling.reverse`, and "steps" down to a ratio "low"
    high: float = 60.0
    spacing: str = "log-ratio"

    def run(
        self, denoiser: Denoiser, observation: da.Observation, n: int, seed: int
    ) -> tuple[Tensor, int]:
        """Return n samples, standardised, and the cost of one."""
        parts = [(low, Counted(rule(denoiser, observation), k)) for low, rule, k in self.rules]
        guided, generator = ByLevel(parts), torch.Generator().manual_seed(seed)
        grids = self.grids(denoiser)
        samples = []
        for first in range(0, n, 32):
            shape = (min(32, n - first), LENGTH, 3)
            alpha, sigma = (float(v) for v in denoiser.schedule(grids[0][0]))
            x = math.hypot(alpha, sigma) * torch.randn(shape, generator=generator)
            for part in parts:
                part[1].cost = 0
            for grid, stage in zip(grids, self.stages, strict=True):
                options = {k: v for k, v in stage.items() if k not in ("steps", "low")}
                last = grid is grids[-1]
                x = sampling.reverse(guided, x, grid, clean=last, generator=generator, **options)
            samples.append(x)
        return torch.cat(samples), sum(part.cost for _, part in parts)

    def grids(self, denoiser: Denoiser) -> list[Tensor]:
        """Return the pseudo-times of each stage, the last of them down to 0."""
        schedule, found, high = denoiser.schedule, [], self.high
        if self.spacing == "time":
            return [sampling.times(schedule, self.stages[0]["steps"])]
        for stage in self.stages:
            ratios = (stage["low"], high)
            grid = sampling.times(schedule, stage["steps"] + 1, spacing="log-ratio", ratios=ratios)
            found.append(grid if stage is self.stages[-1] else grid[:-1])
            high = stage["low"]
        return found


def r23(weights: str, corrections: int) -> Setting:
    """Return R23's recipe: 256 even steps, each with Langevin corrections."""
    rule = functools.partial(guidance.GaussianLikelihood, gamma=3e-2)
    stage = {"steps": 256, "method": "ddim", "corrections": corrections, "tau": 0.5}
    return Setting(weights, [(0.0, rule, 1)], [stage], spacing="time")


def mmps(products: int) -> Callable[[Denoiser, da.Observation], Denoiser]:
    """Return MMPS with that many products."""
    return functools.partial(guidance.MMPS, products=products)


def ours(factor: float = 1.0, corrections: int = 2) -> Setting:
    """Return our setting.

    At high noise fusion, which cannot leave the attractor; where a trajectory is decided MMPS, with
    ancestral steps and corrections; at low noise, where the conditional law is nearly Gaussian, one
    product and second-order steps are enough.  ``factor`` multiplies the numbers of steps.
    """
    rules = [(1.0, guidance.Fusion, 0), (0.1, mmps(3), 3), (0.0, mmps(1), 1)]
    middle = {"corrections": corrections, "tau": 0.5, "corrected": (0.1, 1.0)}
    stages = [
        {"low": 0.1, "steps": round(46 * factor), "method": "ddpm", **middle},
        {"low": 3e-3, "steps": round(25 * factor), "method": "multistep", "eta": 1.0},
    ]
    return Setting("noisy-lorenz63-levels", rules, stages)


def scored(
    name: str, setting: Setting, process: str, index: int, options: argparse.Namespace
) -> dict[str, float]:
    """Return the scores of one setting on one problem; from the folder, or made."""
    path = options.folder / f"{name}-{options.samples}-{process}-{index}.json"
    if path.exists():
        return json.loads(path.read_text())
    problem, ref = case(process, index), reference(process, index, options.folder)
    denoiser = network(setting.weights, options.weights)
    started = time.monotonic()
    z, cost = setting.run(denoiser, problem.observation, options.samples, index)
    seconds = time.monotonic() - started
    found = score(problem, SCALE.inverse(z), ref) | {"cost": cost, "seconds": seconds}
    path.write_text(json.dumps(found))
    print(name, process, index, {k: round(v, 3) for k, v in found.items()}, flush=True)
    return found


def summary(
    name: str, setting: Setting, process: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Return the scores over all observations: medians of distances, means of the others."""
    every = range(options.observations)
    rows = [scored(name, setting, process, index, options) for index in every]
    table = {key: torch.tensor([row[key] for row in rows]).double() for key in rows[0]}
    for key in ("log_prior", "log_likelihood"):
        table[f"{key}_excess"] = table[key] - table[f"{key}_reference"]
    table["w1_over_floor"] = table["w1"] / table["floor"]
    median = {"w1", "floor", "w1_over_floor", "spread", "energy"}
    result = {
        key: round(float(value.median() if key in median else value.mean()), 4)
        for key, value in table.items()
        if key not in ("seconds", "cost")
    }
    return result | {
        "observations": len(rows),
        "samples": options.samples,
        "evaluations": rows[0]["cost"],
        "w1_each": [round(v, 3) for v in table["w1"].tolist()],
        "spread_each": [round(v, 3) for v in table["spread"].tolist()],
    }


def reproduced(options: argparse.Namespace) -> dict[str, Any]:
    """R23's settings, network by network."""
    return {
        f"{weights} C={c} {process}": summary(
            f"r23-{weights}-{c}", r23(weights, c), process, options
        )
        for weights in options.networks
        for c in (1, 4)
        for process in PROCESSES
    }


def past(options: argparse.Namespace) -> dict[str, Any]:
    """Our setting, at several numbers of evaluations."""
    return {
        f"ours x{factor:g} {process}": summary(f"ours-{factor:g}", ours(factor), process, options)
        for factor in options.factors
        for process in PROCESSES
    }


PARTS = {"references": references, "r23": reproduced, "past": past}


def main() -> None:
    """Run one part and store what it found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--observations", type=int, default=16)
    parser.add_argument("--samples", type=int, default=PATHS)
    parser.add_argument("--networks", nargs="+", default=["noisy-lorenz63-window-k2"])
    parser.add_argument("--factors", nargs="+", type=float, default=[1.0], help="of our steps")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of references and scores")
    parser.add_argument("--weights", type=Path, help="folder of the weights (default: package)")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    rows = PARTS[options.part](options)
    stored = json.loads(options.out.read_text()) if options.out.exists() else {}
    stored[options.part] = stored.get(options.part, {}) | rows
    stored["made"] = stored.get("made", {}) | {
        options.part: {
            "command": "python book/tools/posterior.py " + options.part,
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
    }
    options.out.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
