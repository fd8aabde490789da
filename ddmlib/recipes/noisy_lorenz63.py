"""Recipes of R23's noisy Lorenz 63: local networks of windows, and a convolutional one.

R23 (Rozet & Louppe 2023) trains residual networks of windows of 2k+1 states, k = 1 … 4, and a
convolutional one on 32 states, with AdamW and noise predictions, for 4096 epochs of 13 batches of
64.  Here they have its depth, its data and its split, but the main weights' preconditioning,
log-uniform noise levels and average; half its width of 256 for windows, so that two cores suffice;
and 65 states for the convolution, of which 37 see no padding.  A U-Net of exactly 65 states, which
R23 has not, sees a trajectory from end to end.
"""

from typing import Any

import torch
from torch import Tensor

from ddmlib import datasets, dynamics, sampling, schedules, training
from ddmlib.denoisers import Denoiser, NetworkDenoiser
from ddmlib.networks import WindowMLP
from ddmlib.recipes.common import TRAIN_SEED, Recipe
from ddmlib.trajectories import TrajectoryDenoiser

LENGTH = 65  # states of a generated trajectory, R23's
STEPS = 128
RATIOS = (2e-3, 100.0)


def trajectories(settings: dict[str, Any], part: int) -> Tensor:
    """Return the standardised training (0), validation (1) or test (2) part, (n, length, 3)."""
    x = datasets.noisy_lorenz63(
        settings["trajectories"], settings["length"], burn_in=settings["burn_in"], seed=TRAIN_SEED
    )
    return datasets.NOISY_LORENZ63(datasets.split(x)[part])


def loss_of(denoiser: NetworkDenoiser, data: Tensor, settings: dict[str, Any]) -> training.Loss:
    """Return the denoising loss on windows of trajectories, at log-uniform noise levels."""
    return training.denoising_batches(
        denoiser.with_schedule(schedules.LogLinear(*RATIOS)),
        data,
        batch=settings["batch"],
        groups=settings["groups"],
        window=settings["window"],
    )


def denoising(denoiser: Any, settings: dict[str, Any], device: torch.device) -> training.Loss:
    """Return the denoising loss on the training part."""
    return loss_of(denoiser, trajectories(settings, 0).to(device), settings)


def whole(denoiser: NetworkDenoiser) -> Denoiser:
    """Return the denoiser of trajectories of any length that a network makes."""
    windows = isinstance(denoiser.network, WindowMLP)
    return TrajectoryDenoiser(denoiser) if windows else denoiser


@torch.no_grad()
def measure_trajectories(
    denoiser: Any, samples: int, features: Any = None, brief: bool = False
) -> dict[str, Any]:
    """Measure a denoiser of trajectories of the noisy chain.

    Parameters
    ----------
    denoiser : NetworkDenoiser
    samples : int
        States, in windows of R23's test part, that the denoising error is averaged over.
    brief : bool
        Only the denoising error.

    Returns
    -------
    dict of rounded numbers
        ``denoising_error``: mean squared error of the network's output over log-uniform noise
        levels; an output of zero would score 1.  Of generated trajectories of 65 states (128
        stochastic multistep steps on a log-ratio grid) and, beside it, of as many from the test
        part: ``log_prior``, the mean of log p(x_2 … x_65 | x_1); the std of each component; the
        autocorrelation of the first component after 8 states.
    """
    window = LENGTH if not isinstance(denoiser.network, WindowMLP) else denoiser.network.window
    device, settings = denoiser.device, DATA | {"window": window, "batch": 64, "groups": 64}
    test, generator = trajectories(settings, 2), torch.Generator().manual_seed(3)
    loss = loss_of(denoiser, test.to(device), settings)
    batches = max(1, samples // (64 * window))
    error = torch.stack([loss(generator) for _ in range(batches)]).mean()
    result = {"samples": samples, "denoising_error": round(float(error), 6)}
    if brief:
        return result
    n = min(1024, samples // LENGTH)
    x = sampling.sample(
        whole(denoiser),
        (n, LENGTH, 3),
        steps=STEPS,
        method="multistep",
        eta=1.0,
        generator=generator,
        chunk=64,
    ).cpu()
    cuts = datasets.windows(test, LENGTH, LENGTH).flatten(0, 1)
    truth = cuts[torch.randperm(len(cuts), generator=generator)[:n]]
    result |= {"trajectories": n, "evaluations": sampling.evaluations("multistep", STEPS)}
    for name, z in (("generated", x), ("data", truth)):
        result |= {f"{key}_{name}": value for key, value in describe(z).items()}
    return result


def describe(z: Tensor) -> dict[str, Any]:
    """Return log-prior, std and autocorrelation of standardised trajectories (n, length, 3)."""
    x = datasets.NOISY_LORENZ63.inverse(z.double())
    log_prior = dynamics.NoisyLorenz63().log_transition(x[:, :-1], x[:, 1:]).sum(-1)
    first = z[..., 0].double()
    correlation = (first[:, :-8] * first[:, 8:]).mean() / first.square().mean()
    return {
        "log_prior": round(float(log_prior.mean()), 2),
        "std": [round(float(v), 4) for v in z.double().std((0, 1))],
        "autocorrelation": round(float(correlation), 4),
    }


def _model(network: str, **settings: Any) -> dict[str, Any]:
    constants = datasets.NOISY_LORENZ63
    return {
        "kind": "denoiser",
        "network": network,
        "network_settings": {"dim": 3, **settings},
        "head": "velocity",
        "schedule": "CosineSquared",
        "schedule_settings": {},
        "ratios": list(RATIOS),
        "mean": [round(v, 4) for v in constants.mean.tolist()],
        "std": [round(v, 4) for v in constants.std.tolist()],
    }


DATA = {"trajectories": 1024, "length": 1024, "burn_in": 1024}
TINY = {"trajectories": 16, "length": 80, "burn_in": 16, "steps": 20, "batch": 32, "groups": 16}

RECIPES: dict[str, Recipe] = {
    f"noisy-lorenz63-window-k{k}": Recipe(
        description=f"Windows of {2 * k + 1} states of R23's noisy Lorenz 63 (k = {k}).",
        model=_model("WindowMLP", window=2 * k + 1, width=128, blocks=5, embedding=32),
        loss=denoising,
        measure=measure_trajectories,
        samples=2**20,
        budgets={
            "default": {
                **DATA,
                "steps": 40_000 if k == 2 else 20_000,
                "batch": 1024,
                "groups": 64,
                "window": 2 * k + 1,
            },
            "full": {**DATA, "steps": 262_144, "batch": 4096, "groups": 64, "window": 2 * k + 1},
            "smoke": {**TINY, "window": 2 * k + 1},
        },
        decay=0.9995,
        uses_features=False,
    )
    for k in (1, 2, 3, 4)
}
RECIPES["noisy-lorenz63-conv"] = Recipe(
    description="Trajectories of R23's noisy Lorenz 63, by a convolution of radius 14.",
    model=_model("ConvNet", width=64, blocks=6, embedding=32),
    loss=denoising,
    measure=measure_trajectories,
    samples=2**20,
    budgets={
        "default": {**DATA, "steps": 30_000, "batch": 64, "groups": 64, "window": LENGTH},
        "full": {**DATA, "steps": 262_144, "batch": 256, "groups": 256, "window": LENGTH},
        "smoke": {**TINY, "window": LENGTH},
    },
    decay=0.9995,
    uses_features=False,
)
RECIPES["noisy-lorenz63-unet"] = Recipe(
    description="Trajectories of 65 states of R23's noisy Lorenz 63, by a U-Net along time.",
    model=_model("TrajectoryUNet", widths=[48, 64, 96], blocks=2, kernel=5, embedding=64),
    loss=denoising,
    measure=measure_trajectories,
    samples=2**20,
    budgets={
        "default": {**DATA, "steps": 14_000, "batch": 128, "groups": 64, "window": LENGTH},
        "full": {**DATA, "steps": 131_072, "batch": 512, "groups": 256, "window": LENGTH},
        "smoke": {**TINY, "window": LENGTH},
    },
    decay=0.9995,
    uses_features=False,
)
