"""Recipes of R23's noisy Lorenz 63: local networks of windows, and a convolutional one.

R23 (Rozet & Louppe 2023) trains residual networks of windows of 2k+1 states, k = 1 … 4, and a
convolutional one on 32 states, with AdamW and noise predictions, for 4096 epochs of 13 batches of
64.  Here they have its depth, its data and its split, but the main weights' preconditioning,
log-uniform noise levels and average; half its width of 256 for windows, so that two cores suffice;
and 65 states for the convolution, of which 37 see no padding.

R23 has no counterpart of ``noisy-lorenz63-levels``: a convolution whose dilations let it see all of
a trajectory, and which takes a noise level for each component of each state.  An observed component
is one that has less noise, so this network knows conditional means that others have to guess: see
`guidance.Fusion`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddmlib import datasets, dynamics, noise, sampling, schedules, training
from ddmlib.denoisers import Denoiser, NetworkDenoiser, loss_at_levels
from ddmlib.networks import WindowMLP
from ddmlib.recipes.common import TRAIN_SEED, Recipe
from ddmlib.trajectories import TrajectoryDenoiser

LENGTH = 65  # states of a generated trajectory, R23's
STEPS = 128
RATIOS = (2e-3, 100.0)
# shares and ends of the parts of noise levels in `with_levels`: two in three lie where a trajectory
# is decided, below it any network is near the optimum, and above it nothing is at stake
LEVELS = [0.0, 0.15, 0.8, 1.0], [2e-3, 0.05, 5.0, 100.0]


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


def with_levels(denoiser: Any, settings: dict[str, Any], device: torch.device) -> training.Loss:
    """Return the denoising loss on trajectories of which some components have less noise.

    A trajectory's noise level r is log-uniform within each of the three parts of `LEVELS`.  To five
    in six, observations are added: of some components, every 1st, 2nd, 4th, 8th or 16th state from
    a random one on, now and then with gaps, with a std s that is log-uniform.  Their components
    then have the level 1/sqrt(1/r² + 1/s²).  One batch in three holds shorter trajectories.
    """
    data, groups = trajectories(settings, 0).to(device), settings["groups"]
    n, length = settings["batch"], settings["window"]
    strata = torch.arange(groups, device=device)
    shares, edges = (torch.tensor(v, device=device) for v in LEVELS)

    def loss(generator: torch.Generator) -> Tensor:
        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, device=generator.device).to(device)

        shorter, share = uniform(2).tolist()
        states = length if shorter < 2 / 3 else round(length * (1 + share) / 2)
        t = ((strata + uniform(groups)) / groups).repeat_interleave(n // groups)
        part = torch.searchsorted(shares, t).clamp(1, len(shares) - 1)
        within = (t - shares[part - 1]) / (shares[part] - shares[part - 1])
        r = torch.exp(torch.lerp(edges[part - 1].log(), edges[part].log(), within))
        precision = observed(n, states, uniform) + r[:, None, None] ** -2
        start = (uniform(n, 1) * (data.shape[1] - states + 1)).long()
        rows = (uniform(n, 1) * len(data)).long()
        x_0 = data[rows, start + torch.arange(states, device=device)]
        one, level = torch.ones_like(x_0), precision.rsqrt()
        return loss_at_levels(denoiser, x_0, one, level, noise.normal_like(x_0, generator))

    return loss


def observed(n: int, states: int, uniform: Callable[..., Tensor]) -> Tensor:
    """Return the precisions (n, states, 3) of random observations, as `with_levels` has them."""
    std = 0.02 * 50 ** uniform(n, 1, 1)  # 0.02 … 1
    every = 2 ** (5 * uniform(n, 1)).long()  # 1 … 16
    offset = (uniform(n, 1) * every).long() * (uniform(n, 1) < 0.5)
    times = (torch.arange(states, device=std.device) - offset) % every == 0
    kept = uniform(n, states) < torch.where(uniform(n, 1) < 0.25, 0.7, 1.0)
    pattern = (uniform(n) * 7).long() + 1  # any set of components but none
    pattern = torch.where(uniform(n) < 0.5, 1, pattern)  # the first alone more often than others
    components = (pattern[:, None] >> torch.arange(3, device=std.device)) & 1
    some = uniform(n, 1) < 5 / 6
    return ((times & kept & some)[..., None] & (components[:, None, :] > 0)) / std**2


def whole(denoiser: NetworkDenoiser) -> Denoiser:
    """Return the denoiser of trajectories of any length that a network makes."""
    windows = isinstance(denoiser.network, WindowMLP)
    return TrajectoryDenoiser(denoiser) if windows else denoiser


@torch.no_grad()
def measure_chain(
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
        model=_model(
            "WindowMLP", window=2 * k + 1, width=128, blocks=5, embedding=32, activation="silu"
        ),
        loss=denoising,
        measure=measure_chain,
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
    model=_model("ConvNet", width=64, blocks=6, embedding=32, activation="silu"),
    loss=denoising,
    measure=measure_chain,
    samples=2**20,
    budgets={
        "default": {**DATA, "steps": 30_000, "batch": 64, "groups": 64, "window": LENGTH},
        "full": {**DATA, "steps": 262_144, "batch": 256, "groups": 256, "window": LENGTH},
        "smoke": {**TINY, "window": LENGTH},
    },
    decay=0.9995,
    uses_features=False,
)
RECIPES["noisy-lorenz63-levels"] = Recipe(
    description="Trajectories of R23's noisy Lorenz 63, each component with its own noise level.",
    model=_model(
        "ConvNet",
        width=64,
        blocks=6,
        embedding=32,
        activation="silu",
        dilations=[1, 1, 2, 4, 6, 1],  # radius 32: half of 65 states
        elementwise=True,
        shortest=33,
    ),
    loss=with_levels,
    measure=measure_chain,
    samples=2**20,
    budgets={
        "default": {**DATA, "steps": 70_000, "batch": 64, "groups": 64, "window": LENGTH},
        "full": {**DATA, "steps": 262_144, "batch": 256, "groups": 256, "window": LENGTH},
        "smoke": {**TINY, "window": LENGTH},
    },
    decay=0.9998,
    uses_features=False,
)
