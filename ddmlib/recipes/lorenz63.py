"""Recipes of Lorenz 63.

F24 (Finn et al. 2024) compares noise, state and velocity heads under the cosine and the linear
schedule; here each is trained at one small budget, with two seeds.  The main weights have a budget
of their own.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ddmlib import datasets, metrics, sampling, schedules, training
from ddmlib.recipes.common import CHUNK, TEST_SEED, TRAIN_SEED, Recipe

DT, TRAJECTORIES, LENGTH = 0.01, 4096, 4096


def training_states(settings: dict[str, Any], device: torch.device) -> Tensor:
    """Return the standardised training states (n, 3) of Lorenz 63."""
    shape = settings["trajectories"], settings["length"]
    x = datasets.lorenz63(*shape, dt=DT, seed=TRAIN_SEED, device=device)
    return datasets.LORENZ63(x).reshape(-1, 3)


def denoising(denoiser: Any, settings: dict[str, Any], device: torch.device) -> training.Loss:
    """Return the denoising loss on Lorenz-63 states."""
    if "ratios" in settings:  # log-uniform noise levels, whatever schedule the denoiser ships with
        denoiser = denoiser.with_schedule(schedules.LogLinear(*settings["ratios"]))
    return training.denoising_batches(
        denoiser,
        training_states(settings, device),
        batch=settings["batch"],
        groups=settings["groups"],
        levels=settings.get("levels"),
    )


def increments(network: nn.Module, settings: dict[str, Any], device: torch.device) -> training.Loss:
    """Return the loss of a surrogate: predict x(t + 0.1) - x(t) from x(t), standardised units."""
    shape = settings["trajectories"], settings["length"]
    x = datasets.LORENZ63(datasets.lorenz63(*shape, dt=DT, seed=TRAIN_SEED, device=device))
    start, end = x[:, :-10].reshape(-1, 3), x[:, 10:].reshape(-1, 3)

    def loss(generator: torch.Generator) -> Tensor:
        on: dict[str, Any] = {"generator": generator, "device": generator.device}
        index = torch.randint(len(start), (settings["batch"],), **on).to(start.device)
        return nn.functional.mse_loss(network(start[index]), end[index] - start[index])

    return loss


@functools.lru_cache(maxsize=2)
def states(seed: int, device: str = "cpu") -> Tensor:
    """Return the standardised states of a seed, shape (4096, 4096, 3): 16.8M of them."""
    x = datasets.lorenz63(TRAJECTORIES, LENGTH, dt=DT, seed=seed, device=device)
    return datasets.LORENZ63(x)


@functools.lru_cache(maxsize=2)
def reference_histogram() -> Tensor:
    """Return the histogram of the test states, 70 bins a component."""
    return metrics.histogram(states(TEST_SEED))


@functools.lru_cache(maxsize=8)
def reference_floor(samples: int) -> float:
    """Return the Hellinger distance that ``samples`` perfect states have from the test states."""
    generator = torch.Generator().manual_seed(0)
    return metrics.hellinger_floor(states(TEST_SEED), samples, generator=generator)


def draw(x: Tensor, n: int, seed: int) -> Tensor:
    """Return n states of x (trajectories, length, d), spread evenly over its trajectories."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(x.shape[0] * x.shape[1], generator=generator)[:n]
    return x.reshape(-1, x.shape[-1])[index]


def measure_states(
    denoiser: Any, samples: int, features: Any = None, brief: bool = False
) -> dict[str, Any]:
    """Measure a denoiser of Lorenz-63 states as F24 does, each distance with its floor.

    Parameters
    ----------
    denoiser : Denoiser
    samples : int
        Generated states: 50 stochastic multistep steps on a log-ratio grid, one evaluation each.
    features : Module, optional
        Network whose last hidden layer gives the Fréchet distance its features.
    brief : bool
        Only the Hellinger distance.

    Returns
    -------
    dict of rounded numbers
        Distances in standardised units.  A floor is what as many states of the attractor itself
        score.
    """
    generator = torch.Generator().manual_seed(3)
    x = sampling.sample(
        denoiser,
        (samples, 3),
        steps=50,
        method="multistep",
        eta=1.0,
        generator=generator,
        chunk=CHUNK,
    ).cpu()
    test = states(TEST_SEED)
    h = metrics.hellinger_counts(metrics.histogram(x), reference_histogram())
    floor = reference_floor(samples)
    result: dict[str, Any] = {
        "samples": samples,
        "sampler": "multistep, eta = 1, log-ratio grid",
        "evaluations": sampling.evaluations("multistep", 50),
        "hellinger": round(h, 5),
        "hellinger_floor": round(floor, 5),
        "hellinger_excess": round(metrics.excess(h, floor), 5),
    }
    if brief:
        return result
    n = min(samples, 2**20)
    near_test, fresh, near_train = (
        draw(test, n, 4),
        draw(test, n, 5),
        draw(states(TRAIN_SEED), n, 6),
    )
    distance = metrics.nearest_neighbour_distance
    squared = distance(x[:n], near_train), distance(x[:n], near_test)
    plain = distance(x[:n], near_train, squared=False), distance(x[:n], near_test, squared=False)
    tails = metrics.extremes(x, test)
    result |= {
        "nearest_reference": n,
        "generated_to_test": float(f"{squared[1]:.4g}"),
        "test_to_generated": float(f"{distance(near_test, x[:n]):.4g}"),
        "nearest_floor": float(f"{distance(fresh, near_train):.4g}"),
        "train_over_test": round(plain[0] / plain[1], 4),
        "train_over_test_squared": round(squared[0] / squared[1], 4),  # a few strays weigh most
        "tails_low": [round(v, 5) for v in tails.tails[0].tolist()],
        "tails_high": [round(v, 5) for v in tails.tails[1].tolist()],
        "extremes": round(tails.total, 5),
    }
    if features is not None:
        a, b, c = (featured(features, v) for v in (x[:n], near_test, fresh))
        result |= {
            "frechet": float(f"{metrics.frechet(a, b):.4g}"),
            "frechet_floor": float(f"{metrics.frechet(c, b):.4g}"),
        }
    return result


def featured(network: Any, x: Tensor) -> metrics.Moments:
    """Return mean and covariance of the last hidden layer of a network over states x (n, 3)."""
    device = next(network.parameters()).device
    return metrics.moments(network.hidden(part.to(device)).cpu() for part in x.split(CHUNK))


def measure_increments(network: nn.Module, samples: int, *_: Any, **__: Any) -> dict[str, Any]:
    """Measure the root-mean-square error of the increment on test states, standardised units."""
    device = next(network.parameters()).device
    x = states(TEST_SEED)[:, : max(1, samples // TRAJECTORIES) + 10].to(device)
    start, end = x[:, :-10].reshape(-1, 3), x[:, 10:].reshape(-1, 3)
    error = [
        (network(a) - (b - a)).square().mean(-1)
        for a, b in zip(start.split(2**16), end.split(2**16), strict=True)
    ]
    return {
        "samples": len(start),
        "rmse": round(float(torch.cat(error).mean().sqrt()), 5),
        "rms_of_the_increment": round(float((end - start).square().mean().sqrt()), 5),
    }


MEAN_STD = {
    "mean": [round(v, 4) for v in datasets.LORENZ63.mean.tolist()],
    "std": [round(v, 4) for v in datasets.LORENZ63.std.tolist()],
}


def _denoiser(head: str, schedule: str, ratios: tuple[float, float], **network: Any) -> dict:
    return {
        "kind": "denoiser",
        "network": "ResidualMLP",
        "network_settings": {"dim": 3, "embedding": 64, **network},
        "head": head,
        "schedule": schedule,
        "schedule_settings": {},
        "ratios": list(ratios),
        **MEAN_STD,
    }


RATIOS = (2e-3, 40.0)
DATA = {"trajectories": TRAJECTORIES, "length": LENGTH}
TINY = {"trajectories": 16, "length": 64, "steps": 20, "batch": 64, "groups": 16}

RECIPES: dict[str, Recipe] = {
    "lorenz63-states": Recipe(
        description="States of the Lorenz-63 attractor; the main denoiser of the book.",
        model=_denoiser("velocity", "Cosine", RATIOS, width=128, blocks=4, activation="silu"),
        loss=denoising,
        measure=measure_states,
        samples=2**20,
        budgets={
            "default": {**DATA, "steps": 50_000, "batch": 2048, "groups": 64, "ratios": RATIOS},
            "full": {**DATA, "steps": 100_000, "batch": 16_384, "groups": 256, "ratios": RATIOS},
            "smoke": {**TINY, "ratios": RATIOS},
        },
        lr=2e-3,
        decay=0.9995,
    ),
    "lorenz63-features": Recipe(
        description="Dense surrogate of the 0.1-time-unit increment; its last 256 features are "
        "those of the Fréchet distance.",
        model={
            "kind": "network",
            "network": "Dense",
            "network_settings": {"inputs": 3, "outputs": 3, "width": 256, "layers": 2},
        },
        loss=increments,
        measure=measure_increments,
        samples=2**20,
        budgets={
            "default": {**DATA, "length": 512, "steps": 6000, "batch": 1024},
            "full": {**DATA, "steps": 100_000, "batch": 16_384},
            "smoke": TINY,
        },
        uses_features=False,
    ),
}
# sigma/alpha at the pseudo-times 1/1000 and 1: F24 trains at no lower level
TRAINED = {"Cosine": (0.0064254, 2029.1), "Linear": (0.0100005, 2001.1)}
for head in ("noise", "state", "velocity"):
    for kind in ("Cosine", "Linear"):
        for run in (0, 1):
            RECIPES[f"lorenz63-f24-{head}-{kind.lower()}-{run}"] = Recipe(
                description=f"F24's {head} head under its {kind.lower()} schedule, seed {run}, "
                "at a small budget equal for all six variants.",
                model=_denoiser(head, kind, TRAINED[kind], width=128, blocks=3, activation="relu"),
                loss=denoising,
                measure=measure_states,
                samples=2**16,
                budgets={
                    "default": {**DATA, "steps": 4000, "batch": 1024, "groups": 64, "levels": 1000},
                    "full": {
                        **DATA,
                        "steps": 97_700,
                        "batch": 16_384,
                        "groups": 256,
                        "levels": 1000,
                    },
                    "smoke": {**TINY, "levels": 1000},
                },
                seed=run,
                stored=torch.float16,
            )
