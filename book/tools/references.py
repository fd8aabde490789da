"""The reference of chapter 08: posteriors of the noisy Lorenz 63 by particle filters.

python book/tools/references.py               # 16 observations of each process

R23's two processes, each observation with two filters of 2**20 particles or more and two of R23's.
The paths, which are large, are kept in --folder (default: build/posterior) and made where they are
missing; what they say of themselves goes to book/results/posterior.json.
"""

import argparse
import functools
from pathlib import Path
from typing import Any, NamedTuple

import results
import safetensors.torch
import torch
from torch import Tensor

from ddmlib import assimilation as da
from ddmlib import datasets, dynamics, metrics
from ddmlib.recipes import noisy_lorenz63

OUT = results.FOLDER / "posterior.json"
FOLDER = Path("build/posterior")
LENGTH, PATHS = noisy_lorenz63.LENGTH, 1024
PARTICLES, R23S = 2**20, 2**14
SCALE = datasets.NOISY_LORENZ63
CHAIN = dynamics.NoisyLorenz63()
MISSED = 4.5  # std: the noise of 65 observations reaches it once in 2000 trajectories
PROCESSES = {"lo": (8, 0.05), "hi": (1, 0.25)}  # states between two observations, standard std


class Case(NamedTuple):
    """A true trajectory (65, 3), physical units, and its observation."""

    truth: Tensor
    observation: da.Observation


@functools.cache
def test_part() -> Tensor:
    """Return the test trajectories, physical units."""
    return SCALE.inverse(noisy_lorenz63.trajectories(noisy_lorenz63.DATA, 2))


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


def filtered(problem: Case, index: int, seed: int, particles: int, r23s: bool) -> da.Filtering:
    """Return a run of the particle filter, from the stationary law or from R23's prior: its
    Gaussian and 64 transitions."""
    g = torch.Generator().manual_seed(10 * index + seed)
    if r23s:
        x = dynamics.simulate(CHAIN, CHAIN.initial(particles, g), steps=64, generator=g)[:, -1]
    else:
        x = stationary(particles, seed=100 * index + 10 + seed)
    options: dict[str, Any] = {"length": LENGTH, "particles": particles, "paths": PATHS}
    return da.bootstrap_filter(CHAIN, problem.observation, initial=x, generator=g, **options)


def agreement(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Return the energy distance of two sets of paths, and its std under permutations."""
    both, g = torch.cat((a, b)), torch.Generator().manual_seed(0)
    shuffled = [both[torch.randperm(len(both), generator=g)] for _ in range(20)]
    null = [metrics.energy_distance(x[: len(a)], x[len(a) :]) for x in shuffled]
    return metrics.energy_distance(a, b), float(torch.tensor(null).std())


def reference(process: str, index: int, folder: Path) -> dict[str, Tensor]:
    """Return two independent sets of paths, ``a`` and ``b``, two of R23's filter, ``r`` and ``s``,
    and what `metrics` say of them; from the folder, or made.

    Particles are doubled until both keep 500 distinct first states and agree: an energy distance
    within three standard deviations of that of permuted paths.
    """
    path = folder / f"reference-{process}-{index}.safetensors"
    if path.exists():
        return safetensors.torch.load_file(path)
    problem, particles = case(process, index), PARTICLES
    while True:
        runs = {
            k: filtered(problem, index, seed, particles, False) for k, seed in (("a", 1), ("b", 2))
        }
        energy, std = agreement(runs["a"].paths, runs["b"].paths)
        if energy <= 3 * std and min(run.first_states for run in runs.values()) >= 500:
            break
        particles *= 2
    runs |= {k: filtered(problem, index, seed, R23S, True) for k, seed in (("r", 3), ("s", 4))}
    found = {name: run.paths.contiguous() for name, run in runs.items()}
    a, b, r, s = found.values()
    for name, run in runs.items():
        found[f"{name}_evidence"] = torch.tensor(run.log_evidence)
        found[f"{name}_first_states"] = torch.tensor(run.first_states)
    found["particles"] = torch.tensor(particles)
    found["energy"], found["energy_std"] = torch.tensor(energy), torch.tensor(std)
    found["floor"] = torch.tensor(metrics.wasserstein1(a, b))
    found["floor_256"] = torch.tensor(w1(a, b, 256))
    found["floor_r23"] = torch.tensor(metrics.wasserstein1(r, s))
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
    """Return log-prior and log-likelihood, averaged, of trajectories (n, 65, 3), and the share that
    is more than `MISSED` standard deviations off some observation."""
    x = x.double()
    prior = CHAIN.log_transition(x[:, :-1], x[:, 1:]).sum(-1).mean()
    observation = problem.observation
    likelihood = observation.log_likelihood(observation.observed(x)).sum(-1).mean()
    # of standardised observations, as R23 has them
    shift = observation.y.numel() * float(SCALE.std[0].log())
    residuals = observation.residual(observation.observed(x)).flatten(1)
    return {
        "log_prior": float(prior),
        "log_likelihood": float(likelihood) + shift,
        "missed": float((residuals.abs().amax(1) > MISSED).double().mean()),
    }


def store(out: Path, part: str, rows: dict[str, Any], command: str) -> None:
    """Put one part of the results into a file, with the command, date and versions."""
    stored = results.load(out)
    stored[part] = stored.get(part, {}) | rows
    stored["made"] = stored.get("made", {}) | {part: results.made(command)}
    results.save(stored, out)


def main() -> None:
    """Make the references that are missing, and store what they say of themselves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--observations", type=int, default=16)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the paths")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    rows: dict[str, Any] = {process: [] for process in PROCESSES}
    for index in range(options.observations):
        for process, found in rows.items():
            ref = reference(process, index, options.folder)
            row = describe(case(process, index), ref["a"])
            row |= {k: float(v) for k, v in ref.items() if v.numel() == 1}
            found.append({k: round(v, 4) for k, v in row.items()})
            print(process, index, found[-1], flush=True)
    store(options.out, "references", rows, "python book/tools/references.py")


if __name__ == "__main__":
    main()
