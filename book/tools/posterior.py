"""Posteriors of the noisy Lorenz 63 of chapter 08 by diffusion: R23's settings, and ours.

python book/tools/posterior.py r23 --networks noisy-lorenz63-conv --observations 4 --samples 256
python book/tools/posterior.py figure --observations 1 --samples 64   # R23's Figure 2, in small
python book/tools/posterior.py same --observations 4 --samples 256   # R23's, our network
python book/tools/posterior.py past           # one setting for both processes
python book/tools/posterior.py parts          # what each part of the setting is good for
python book/tools/posterior.py calibration    # against the truth, over many observations

The references that they are judged by are made where they are missing (references.py); scores are
kept in --folder, so that a later run of the same setting does not compute them again.  Results go
to book/results/posterior.json.
"""

import argparse
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from references import (
    FOLDER,
    LENGTH,
    OUT,
    PATHS,
    PROCESSES,
    SCALE,
    Case,
    case,
    describe,
    filtered,
    reference,
    store,
    w1,
)
from torch import Tensor

from ddmlib import assimilation as da
from ddmlib import guidance, metrics, pretrained, sampling
from ddmlib.denoisers import Denoiser
from ddmlib.recipes import noisy_lorenz63


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


@functools.cache
def network(name: str, weights: Path | None) -> Denoiser:
    """Return a denoiser of trajectories from shipped weights."""
    return noisy_lorenz63.whole(pretrained.load(name, folder=weights)[0])


class Setting(NamedTuple):
    """A network, how to draw (n, length, 3) standardised samples with it, and what one costs."""

    weights: str
    draw: Callable[[Denoiser, da.Observation, tuple[int, ...], torch.Generator], Tensor]
    cost: Callable[[Denoiser], int]


def r23(weights: str, corrections: int) -> Setting:
    """Return R23's recipe: 256 even steps, each with Langevin corrections."""

    def draw(
        denoiser: Denoiser, seen: da.Observation, shape: tuple[int, ...], g: torch.Generator
    ) -> Tensor:
        guided = guidance.GaussianLikelihood(denoiser, seen, gamma=3e-2)
        options: dict[str, Any] = {"corrections": corrections, "tau": 0.5, "generator": g}
        return sampling.sample(guided, shape, steps=256, spacing="time", **options)

    cost = 2 * sampling.evaluations("ddim", 256, corrections)  # each with a product
    return Setting(weights, draw, lambda _: cost)


def ours(**settings: Any) -> Setting:
    """Return `guidance.posterior`."""

    def draw(
        denoiser: Denoiser, seen: da.Observation, shape: tuple[int, ...], g: torch.Generator
    ) -> Tensor:
        return guidance.posterior(denoiser, seen, shape, **settings, generator=g)

    return Setting(
        "noisy-lorenz63-levels", draw, lambda denoiser: guidance.evaluations(denoiser, **settings)
    )


OURS = {"ours": ours(), "cheap": ours(steps=39, products=(2, 1), corrections=3, tau=0.7)}
# one thing changed at a time, measured where the weights of two histories are hard to get right
CHANGED = {
    "ours": OURS["ours"],
    "no corrections": ours(corrections=0),
    "corrections from 1 on": ours(corrected=(0.1, 1.0)),
    "MMPS from 1 on": ours(fused=1.0),
    "MMPS from 1 on, corrections from 1 on": ours(fused=1.0, corrected=(0.1, 1.0)),
    "fusion to 0.11": ours(fused=0.11),
    "one product": ours(products=(1, 1)),
}
HARD = (("lo", 8), ("lo", 13))


def samples(
    setting: Setting, denoiser: Denoiser, seen: da.Observation, n: int, seed: int, length: int
) -> Tensor:
    """Return n trajectories, physical units; by 32, which a cache holds."""
    generator = torch.Generator().manual_seed(seed)
    parts = [min(32, n - first) for first in range(0, n, 32)]
    drawn = [setting.draw(denoiser, seen, (k, length, 3), generator) for k in parts]
    return SCALE.inverse(torch.cat(drawn))


def scored(
    name: str, setting: Setting, process: str, index: int, options: argparse.Namespace
) -> dict[str, float]:
    """Return the scores of one setting on one problem; from the folder, or made."""
    path = options.folder / f"{name}-{options.samples}-{process}-{index}.json"
    if path.exists():
        return json.loads(path.read_text())
    problem, ref = case(process, index), reference(process, index, options.folder)
    denoiser = network(setting.weights, options.weights)
    x = samples(setting, denoiser, problem.observation, options.samples, index, LENGTH)
    found = score(problem, x, ref) | {"cost": setting.cost(denoiser)}
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
        key: round(float(value.quantile(0.5) if key in median else value.mean()), 4)
        for key, value in table.items()
        if key not in ("cost", "seconds")
    }
    if len(rows) > 1:
        result["coverage_error"] = round(standard_error(table["coverage"]), 4)
    paths = [reference(process, index, options.folder)["a"] for index in every]
    variance = torch.stack([x.var(0).sum() for x in paths]).double()
    pooled = (table["spread"].square() * variance).sum() / variance.sum()
    result["spread_pooled"] = round(float(pooled.sqrt()), 4)
    return result | {
        "observations": len(rows),
        "samples": options.samples,
        "evaluations": rows[0]["cost"],
        "w1_each": [round(v, 3) for v in table["w1"].tolist()],
        "spread_each": [round(v, 3) for v in table["spread"].tolist()],
    }


def recipes_of(
    networks: list[str], corrections: tuple[int, ...], options: argparse.Namespace
) -> dict[str, Any]:
    """Return the scores of R23's recipe, network by network."""
    return {
        f"{weights} C={c} {process}": summary(
            f"r23-{weights}-{c}", r23(weights, c), process, options
        )
        for weights in networks
        for c in corrections
        for process in PROCESSES
    }


def reproduced(options: argparse.Namespace) -> dict[str, Any]:
    """R23's settings."""
    return recipes_of(options.networks, (1, 4), options)


def figure(options: argparse.Namespace) -> dict[str, Any]:
    """R23's Figure 2 in small: windows of all sizes and the convolution against corrections."""
    windows = [f"noisy-lorenz63-window-k{k}" for k in range(1, 5)]
    return recipes_of([*windows, "noisy-lorenz63-conv"], (0, 1, 4), options)


def same(options: argparse.Namespace) -> dict[str, Any]:
    """R23's recipe with the network of our setting, which leaves the recipe as the difference."""
    return recipes_of([OURS["ours"].weights], (4,), options)


def past(options: argparse.Namespace) -> dict[str, Any]:
    """Our setting, and a cheap one with fewer steps and products."""
    return {
        f"{name} {process}": summary(name, setting, process, options)
        for name, setting in OURS.items()
        for process in PROCESSES
    }


def parts(options: argparse.Namespace) -> dict[str, Any]:
    """Our setting with one thing changed at a time, on the hardest of the observations."""
    keys = ("w1", "floor", "spread", "missed", "missed_reference")
    rows: dict[str, Any] = {}
    for name, setting in CHANGED.items():
        label = "-".join(["part", *name.replace(",", "").split()])
        cases = [scored(label, setting, process, index, options) for process, index in HARD]
        rows[name] = {key: [round(case[key], 4) for case in cases] for key in keys}
        rows[name]["evaluations"] = cases[0]["cost"]
    return rows


def against_truth(members: Tensor, truth: Tensor) -> dict[str, Any]:
    """Return rank counts of every eighth state (m + 1, 3), coverage and CRPS of an ensemble."""
    members = members.movedim(0, -2)  # (65, m, 3)
    return {
        "ranks": metrics.rank_histogram(members[::8], truth[::8]).tolist(),
        "coverage": metrics.coverage(members, truth).tolist(),
        "crps": (metrics.crps(members, truth).mean(0) / SCALE.std).tolist(),
    }


def calibration(options: argparse.Namespace) -> dict[str, Any]:
    """Our setting, and the particle filter, against the truth: averages over observations."""
    setting, m, rows = OURS["ours"], 20, {}
    denoiser = network(setting.weights, options.weights)
    for process in PROCESSES:
        found: dict[str, list[dict[str, Any]]] = {"ours": [], "filter": []}
        for index in range(options.observations):
            path = options.folder / f"calibration-{process}-{index}.json"
            if not path.exists():
                problem = case(process, index)
                x = samples(setting, denoiser, problem.observation, m, index, LENGTH)
                paths = filtered(problem, index, 5, 2**17, False).paths[:m]
                each = {"ours": x, "filter": paths}
                scores = {k: against_truth(x, problem.truth) for k, x in each.items()}
                path.write_text(json.dumps(scores))
            for name, value in json.loads(path.read_text()).items():
                found[name].append(value)
        for name, values in found.items():
            table = {k: torch.tensor([v[k] for v in values]).double() for k in values[0]}
            rows[f"{name} {process}"] = {
                "ranks": table["ranks"].sum(0).long().tolist(),
                "coverage": [round(v, 4) for v in table["coverage"].mean(0).tolist()],
                "coverage_error": round(standard_error(table["coverage"].mean(1)), 4),
                "crps": [round(v, 4) for v in table["crps"].mean(0).tolist()],
                "observations": len(values),
                "members": m,
            }
    return rows


def standard_error(x: Tensor) -> float:
    """Return the standard error of a mean."""
    return float(x.std() / math.sqrt(len(x)))


PARTS = {
    "r23": reproduced,
    "figure": figure,
    "same": same,
    "past": past,
    "parts": parts,
    "calibration": calibration,
}


def main() -> None:
    """Run one part and store what it found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--observations", type=int, default=16)
    parser.add_argument("--samples", type=int, default=PATHS)
    parser.add_argument("--networks", nargs="+", default=["noisy-lorenz63-window-k2"])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of references and scores")
    parser.add_argument("--weights", type=Path, help="folder of the weights (default: package)")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    rows = PARTS[options.part](options)
    command = f"python book/tools/posterior.py {options.part}"
    command += "" if options.part == "parts" else f" --observations {options.observations}"
    command += "" if options.part == "calibration" else f" --samples {options.samples}"
    command += f" --networks {' '.join(options.networks)}" if options.part == "r23" else ""
    store(options.out, options.part, rows, command)


if __name__ == "__main__":
    main()
