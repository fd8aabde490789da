"""Recipes of networks for low noise alone, which go on from those of `recipes.trajectories`.

A sampler meets noise levels one after the other, and each may be asked of another network (Balaji
et al. 2022, eDiff-I).  These begin as copies of the networks for all levels and take small steps,
with all bits, at low noise alone; `pretrained.joined` makes one denoiser of both.

The network of Lorenz 63 for all levels had eight bits in training.  Simulated stays made anew from
sigma/alpha = 0.1 have a total variation of C from simulated ones of 0.069 by it, of 0.058 with the
network for low noise, and of 0.055 if that is averaged over the mirror as well (floor 0.049).

Heights of spikes hang on few of 240 numbers, so a loss that counts all alike hardly sees them: at
sigma/alpha = 0.2 one evaluation of the cells' network misses C by 0.016 (median), the mean of
10 000 simulated spikes, given the same noisy one, by 0.005 (``--parts resolution`` of
``book/tools/event_samples.py``).  So errors count as in physical units there, ``heights``, and
three in four of what is seen are spikes.  Levels below 0.01 are left out: down to 0.0025 they were
most of that loss.  It still fell when the rate came down to zero, so that "more" goes on from
there, on fresh trajectories.  By "further" the error along the gradient of C counts apart
as well: what this number depends on was learnt last, and this network is told what will be asked.
"""

import functools
from typing import Any

import torch

from ddmlib.recipes import trajectories
from ddmlib.recipes.common import Recipe

# noise levels, sigma/alpha, that each is trained on, and the one below which it is used
RATIOS: dict[str, tuple[float, float]] = {
    "lorenz63": (1e-2, 1.5),
    "fitzhugh-nagumo": (1e-2, 1.5),
}
BELOW = {"lorenz63": 1.0, "fitzhugh-nagumo": 1.0}
# the law of stationary Lorenz 63 does not change where x and y change their signs
MIRROR = {"lorenz63": (-1.0, -1.0, 1.0)}
# of some, once and again from the weights that are there: how many of these small steps
MORE = {"fitzhugh-nagumo": 6000}
FURTHER = {"fitzhugh-nagumo": 8000}
ASKED = 0.3  # how much the error of C counts in the latter, `targets.pooled_loss`
# of all budgets
TRAINING: dict[str, dict[str, Any]] = {
    "lorenz63": {"lr": 4e-4, "kernel_lr": 8e-4},
    "fitzhugh-nagumo": {
        "lr": 4e-4,
        "kernel_lr": 1e-3,
        "far": {"tail": 0.032, "share": 0.75},  # three in four that are seen are spikes
        "heights": True,
    },
}


def _recipe(system: str) -> Recipe:
    start = trajectories.RECIPES[f"{system}-trajectories"]
    ratios = list(RATIOS[system])
    settings = TRAINING[system] | {"ratios": ratios, "bfloat16": False, "pool": 2**10}
    sizes = [
        ("default", 6, 2**18, 4000, 256, 64),
        ("full", 6, 2**20, 16_000, 1024, 256),
        ("smoke", 6, 16, 10, 8, 4),
    ]
    if system in MORE:
        sizes.append(("more", 7, 2**18, MORE[system], 256, 64))
    if system in FURTHER:
        sizes.append(("further", 8, 2**19, FURTHER[system], 256, 64))
    budgets = {
        name: {"trajectories": n, "steps": steps, "batch": batch, "groups": groups}
        | {"data_seed": seed, **settings}
        for name, seed, n, steps, batch, groups in sizes
    }
    if system in FURTHER:
        budgets["further"] |= {"event": ASKED}
    return Recipe(
        description=f"{start.description[:-1]}; for sigma/alpha below {BELOW[system]:g} alone.",
        model=start.model_for("full") | {"ratios": ratios},
        loss=functools.partial(trajectories.denoising, system),
        measure=start.measure,
        samples=start.samples,
        small=start.small,
        budgets=budgets,
        decay=start.decay,
        clip=start.clip,
        uses_features=False,
        stored=torch.float16,
        start=f"{system}-trajectories",
        below=BELOW[system],
        mirror=MIRROR.get(system, ()),
    )


RECIPES: dict[str, Recipe] = {f"{system}-trajectories-low": _recipe(system) for system in RATIOS}
