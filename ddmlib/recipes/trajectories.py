"""Recipes of the shipped weights for trajectories: Z23's three systems, 60 states each.

Z23 (Finzi et al. 2023) trains on 4000 trajectories, which hold some 34 events of the stationary
Lorenz ensemble; here the main weights see many fresh ones, and ``lorenz63-trajectories-4000`` shows
what 4000 do to the tails.

Noise levels are log-uniform.  They go up to a ratio of 100, because trajectories are strongly
correlated, so their largest variance is many times that of a component, and noise drowns them later
than states.  They go down to a hundredth of a unit, since nothing in C is finer than that.

FitzHugh-Nagumo cells rest near zero, and their spikes reach fourteen standard deviations.  So their
states are stretched by asinh, `tails.AsinhStandardizer`.  Its knee was chosen by trainings of 1500
steps.  With 1, 2 and 3, that is from where it bends, the total variation of C given E was 0.87,
0.77 and 0.76 and P(E) 0.025, 0.027 and 0.019 (simulated 0.033).  After longer trainings little of
this difference was left.

The links of the pendulum turn by up to eighty radians.  Their network sees sines and cosines of the
angles, so that all turns look alike; full turns are counted afterwards, `unwound`.  Its law is lost
at sigma/alpha between 1.5 and 8, where the energy is decided, which only a whole trajectory tells.
So it has more blocks where resolution is coarsest, and those levels have a share of their own.
After 1200 steps without such a share, widths of 64, 64 and 128 without further blocks and of 48, 64
and 96 with three had a mean squared error of the velocity at 4.5 of 0.111 and 0.088, as far as two
pools of 65 536 trajectories tell it; the second took a quarter more time.

The default budget is for two cores and an hour.  What it leaves wrong is mostly heights of spikes.
The full budget is for a GPU: a network of two and a half times the products (the pendulum's stays
as it is), four times the batch and four to eight times the trajectories.  The shipped weights of
Lorenz 63 and the cells are of that; those of the cells went on from there by "more", with
trajectories that go far drawn more often, `targets.Far`, and by "further".  Those of the pendulum
are of the default budget and "further".

Targets are means over a pool of trajectories, `targets.pooled_loss`: of the loss at high noise by
far the most is otherwise the scatter of trajectories that one noisy trajectory may have come from.

Hidden convolutions are trained by Muon: after 1500 steps on FitzHugh-Nagumo cells the loss at
middle noise was half as far from the least that was seen as by AdamW.  With ``bfloat16`` the
network multiplies with eight bits in training: the loss of noise levels above 0.05 is the same to a
per cent, but a number of six units is then known to 1/32, and spikes of the cells are as high.  By
"further", without it, the error at noise of 0.01 fell from 0.154 to 0.130 of that noise, all bits
used; with eight bits in all layers either network has 0.20, and with all bits in the first 0.14.
Between 0.01 and 1 the pendulum's fell by 6 to 13 per cent.

What was still wrong at low noise is mended by networks of its own, `recipes.low_noise`.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddmlib import (
    ensembles,
    events,
    metrics,
    noise,
    oscillators,
    sampling,
    schedules,
    targets,
    training,
)
from ddmlib.datasets import LORENZ63, Standardizer
from ddmlib.denoisers import denoising_loss
from ddmlib.recipes.common import TEST_SEED, TRAIN_SEED, Recipe
from ddmlib.tails import AsinhStandardizer

# after the full budget, on fresh trajectories and with smaller steps
MORE: dict[str, Any] = {
    "trajectories": 2**20,
    "steps": 5000,
    "batch": 512,
    "groups": 128,
    "data_seed": 3,
    "lr": 1e-3,
    "kernel_lr": 6e-3,
}
# and again, with products of eleven bits instead of eight (on a GPU; a CPU has 24)
FURTHER: dict[str, Any] = {
    "trajectories": 2**20,
    "steps": 16_000,
    "batch": 1024,
    "groups": 256,
    "data_seed": 4,
    "bfloat16": False,
}
CHUNK = 2**10  # trajectories sampled at once
FAR = {"tail": 0.05, "share": 0.5}  # see `targets.Far.of`
# of noise levels, `schedules.LogLinear.focused`: where heights of spikes, energies are decided
LOW = {"between": [0.01, 0.3], "share": 0.3}
ENERGY = {"between": [1.5, 8.0], "share": 0.4}
MANY = 2**16  # where fewer are trained on, that is the point
BINS = 128  # of the histogram of C
PENDULUM = oscillators.DoublePendulum()
INTERVAL = 0.5  # between its states
LOSS = {"bfloat16": True, "pool": 2**12}  # its settings, of every training


def unwound(circle: Tensor) -> Tensor:
    """Return the pendulum's states (*batch, 60, 4) from what the network sees of them."""
    return PENDULUM.unwound(circle, INTERVAL)


def pendulum_on_circle(trajectories: int, **settings: Any) -> Tensor:
    """Return `ensembles.double_pendulum` as the network sees it, (trajectories, length, 6)."""
    return PENDULUM.on_circle(ensembles.double_pendulum(trajectories, **settings))


# trajectories as the networks see them, and the events of those
ENSEMBLES: dict[str, Callable[..., Tensor]] = {
    "lorenz63": ensembles.lorenz63,
    "fitzhugh-nagumo": ensembles.fitzhugh_nagumo,
    "double-pendulum": pendulum_on_circle,
}
EVENTS: dict[str, events.Constraint] = {
    "lorenz63": events.one_lobe(),
    "fitzhugh-nagumo": events.spike(),
    "double-pendulum": events.over_the_top().through(unwound, (ensembles.LENGTH, 6)),
}
RATIOS: dict[str, tuple[float, float]] = {  # noise levels, sigma/alpha
    "lorenz63": (1e-2, 100.0),
    "fitzhugh-nagumo": (1e-2, 80.0),
    "double-pendulum": (1e-2, 100.0),
}
# of FitzHugh-Nagumo cells and the pendulum the means and standard deviations of 2**12 and 2**13
# trajectories, all times pooled; sines and velocities are centred by symmetry
STANDARDIZERS: dict[str, Standardizer] = {
    "lorenz63": LORENZ63,
    "fitzhugh-nagumo": AsinhStandardizer(
        torch.tensor([0.0203, 0.0084, 0.0068, 0.0062]),
        torch.tensor([0.0975, 0.0724, 0.0110, 0.0147]),
        knee=2.0,
    ),
    "double-pendulum": Standardizer(
        torch.tensor([0.0, 0.0, 0.8281, 0.6601, 0.0, 0.0]),
        torch.tensor([0.4953, 0.6072, 0.2626, 0.4423, 0.6340, 0.8798]),
    ),
}


def denoising(
    system: str, denoiser: Any, settings: dict[str, Any], device: torch.device
) -> training.Loss:
    """Return the denoising loss on trajectories of an ensemble, noise levels stratified in groups.

    As `training.denoising_batches`, for trajectories (trajectories, length, d).  Where the settings
    give the size of a ``pool``, a batch is the first of that many trajectories, which all tell what
    the target is.  A ``focus`` gives some noise levels more of it, ``ratios`` leave others out.
    With ``heights`` squared errors count as in physical units, also where these are stretched, and
    the error along the gradient of C counts as ``event`` says, `targets.pooled_loss`.
    """
    evenly = schedules.LogLinear(*settings.get("ratios", RATIOS[system]))
    denoiser = denoiser.with_schedule(evenly)
    seed = settings.get("data_seed", TRAIN_SEED)
    x = ENSEMBLES[system](settings["trajectories"], seed=seed, device=device)
    data, groups, batch = denoiser.standardizer(x), settings["groups"], settings["batch"]
    number, eight_bits = settings.get("pool", 0), settings.get("bfloat16", False)
    strata, size = torch.arange(groups, device=device)[:, None], max(number, batch)
    far = targets.Far.of(data, **settings["far"]) if "far" in settings else None
    counts = torch.ones(len(data), device=device) if far is None else far(data)
    ends = counts.double().cumsum(0) / counts.double().sum()
    stretch = denoiser.standardizer.stretch if settings.get("heights") else None
    each = None if stretch is None else lambda u: stretch(u) ** 2
    asked, event, physical = settings.get("event"), EVENTS[system], denoiser.standardizer.inverse
    functional = None if asked is None else lambda z: event.margin(physical(z))

    def loss(generator: torch.Generator) -> Tensor:
        on: dict[str, Any] = {"generator": generator, "device": generator.device}
        often = None
        if far is None:
            index = torch.randint(len(data), (size,), **on).to(device)
        else:
            u = torch.rand(size, dtype=torch.float64, **on).to(device)
            index = torch.searchsorted(ends, u).clamp(max=len(data) - 1)
            often = counts[index] / counts.mean()
        pool = data[index]
        x_0 = pool[:batch].unflatten(0, (groups, -1))
        t = (strata + torch.rand(groups, 1, **on).to(device)) / groups
        if "focus" in settings:
            t = evenly.focused(t, **settings["focus"])
        eps = noise.normal_like(x_0, generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=eight_bits):
            if number or far is not None:
                return targets.pooled_loss(
                    denoiser, pool, x_0, t, eps, often, far, each, functional, asked or 0.0
                )
            return denoising_loss(denoiser, x_0, t, eps)

    return loss


@functools.lru_cache(maxsize=2)
def reference(system: str, trajectories: int) -> Tensor:
    """Return C of the test trajectories of an ensemble, shape (trajectories,)."""
    return EVENTS[system].margin(ENSEMBLES[system](trajectories, seed=TEST_SEED))


def measure_trajectories(
    system: str, denoiser: Any, samples: int, features: Any = None, brief: bool = False
) -> dict[str, Any]:
    """Measure a denoiser of trajectories by the statistics of its event's C.

    Parameters
    ----------
    system : str
        "lorenz63", "fitzhugh-nagumo" or "double-pendulum".
    denoiser : Denoiser
    samples : int
        Generated trajectories: 50 stochastic multistep steps, one evaluation each.
    features
        Not used; trajectories have no Fréchet distance.
    brief : bool
        Only the total variation and its floor.

    Returns
    -------
    dict of rounded numbers
        The total variation of histograms of C with 128 bins, between generated trajectories and as
        many simulated ones; its floor is that of two sets of simulated ones.
    """
    c, event = reference(system, 2 * samples), EVENTS[system]
    z = sampling.sample(
        denoiser,
        (samples, *event.shape),
        steps=50,
        method="multistep",
        eta=1.0,
        ratios=denoiser.ratios,
        generator=torch.Generator().manual_seed(3),
        chunk=CHUNK,
    )
    ours = event.margin(denoiser.standardizer.inverse(z)).cpu()
    limits = float(c.quantile(0.001)), float(c.quantile(0.999))
    distance = functools.partial(metrics.total_variation, bins=BINS, limits=limits)
    result: dict[str, Any] = {
        "samples": samples,
        "sampler": f"multistep, eta = 1, log-ratio grid up to {denoiser.ratios[1]:g}",
        "evaluations": sampling.evaluations("multistep", 50),
        "total_variation": round(distance(ours, c[:samples]), 5),
        "total_variation_floor": round(distance(c[samples:], c[:samples]), 5),
    }
    if brief:
        return result
    return result | {
        "probability": float(f"{float((ours > 0).double().mean()):.4g}"),
        "probability_simulated": float(f"{float((c > 0).double().mean()):.4g}"),
    }


def _recipe(
    system: str,
    trajectories: int,
    description: str,
    steps: int = 26_000,
    full: int = 20_000,
    more: dict[str, Any] | None = None,
    further: dict[str, Any] | None = None,
    network: dict[str, Any] | None = None,
    focus: dict[str, Any] | None = None,
) -> Recipe:
    standardizer = STANDARDIZERS[system]
    length, d = EVENTS[system].shape
    return Recipe(
        description=description,
        model={
            "kind": "denoiser",
            "network": "TrajectoryUNet",
            "network_settings": {
                "dim": d,
                "widths": [64, 64, 128],
                "blocks": 1,
                "kernel": 5,
                "embedding": 64,
            }
            | (network or {}),
            "length": length,
            "head": "velocity",
            "schedule": "Cosine",
            "schedule_settings": {},
            "ratios": list(RATIOS[system]),
            "mean": [round(v, 4) for v in standardizer.mean.tolist()],
            "std": [round(v, 4) for v in standardizer.std.tolist()],
        }
        | (
            {"tails": "asinh", "knee": standardizer.knee}
            if isinstance(standardizer, AsinhStandardizer)
            else {}
        ),
        loss=functools.partial(denoising, system),
        measure=functools.partial(measure_trajectories, system),
        samples=2**14,
        small=2**10,
        budgets={
            name: {"trajectories": n, "steps": k, "batch": batch, "groups": groups}
            | LOSS
            | ({"focus": focus} if focus else {})
            for name, n, k, batch, groups in (
                ("default", trajectories, steps, 128, 32),
                ("full", trajectories if trajectories < MANY else 2**20, full, 512, 128),
                ("smoke", 16, 10, 8, 4),
            )
        }
        | ({"more": MORE | LOSS | more} if more else {})
        | ({"further": LOSS | FURTHER | further} if further else {}),
        networks={} if network else {"full": {"widths": [112, 112, 128]}},
        lr=3e-3,
        decay=0.9995,
        clip=1.0,
        kernel_lr=0.02,
        uses_features=False,
        stored=torch.float16,
    )


RECIPES: dict[str, Recipe] = {
    "lorenz63-trajectories": _recipe(
        "lorenz63",
        2**18,
        "Stationary Lorenz-63 trajectories of 60 states, 0.1 time units apart.",
        steps=20_000,
    ),
    "lorenz63-trajectories-4000": _recipe(
        "lorenz63",
        4000,
        "The same trained on 4000 trajectories, as Z23: few of them hold events.",
        steps=8_000,
        full=8_000,
    ),
    "fitzhugh-nagumo-trajectories": _recipe(
        "fitzhugh-nagumo",
        2**17,
        "Trajectories of two coupled FitzHugh-Nagumo cells, 60 states.",
        more={"far": FAR},
        further={"far": FAR, "focus": LOW, "lr": 2e-3, "kernel_lr": 0.012},
    ),
    "double-pendulum-trajectories": _recipe(
        "double-pendulum",
        2**18,
        "Trajectories of the double pendulum, 60 states, angles as sine and cosine.",
        steps=28_000,
        network={"widths": [48, 64, 96], "coarse": 3},
        focus=ENERGY,
        further={"focus": ENERGY, "pool": 2**14},
    ),
}
