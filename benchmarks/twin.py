"""Cycled assimilation: cycles a second against F24's 16 trajectories, and against DAPPER."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import data, generate
from benchmarks.baselines import assimilation as plain
from benchmarks.baselines import diffusion
from benchmarks.timing import Row, alternate, compare, seconds
from ddmlib import assimilation as da
from ddmlib import datasets, dynamics, pretrained, sampling

STD, STEPS, F24_TRAJECTORIES, MEMBERS, TAU = 2.0, 10, 16, 50, 0.13
DAPPER_SCRIPT = Path(__file__).parent / "baselines" / "dapper_sakov2012.py"


def forecast(x: Tensor, steps: int = STEPS) -> Tensor:
    """Propagate to the next observation."""
    return dynamics.integrate(dynamics.Lorenz63(), x, dt=0.01, steps=steps, every=steps)[..., -1, :]


def ours(
    method: da.Method, trajectories: int, cycles: int, std: float = STD, steps: int = STEPS
) -> Callable[[], float]:
    """Return a timer of a twin experiment."""
    truth = data.starts(trajectories)

    def run() -> None:
        da.twin(
            lambda x: forecast(x, steps),
            truth,
            {"it": method},
            std=std,
            cycles=cycles,
            burn_in=0,
            block=cycles,
            generator=torch.Generator().manual_seed(0),
        )

    return lambda: seconds(run)


def sampler(denoiser: Any, **rule: Any) -> da.perturbations.Sampler:
    """Return partial diffusion with ddmlib."""
    standardizer = denoiser.standardizer

    def sample(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        z = sampling.resample(
            denoiser, standardizer(x), t=TAU, members=MEMBERS, generator=generator, **rule
        )
        return standardizer.inverse(z)

    return sample


def plain_sampler(denoiser: Any, steps: int) -> Callable[[Tensor], Tensor]:
    """Return partial diffusion written plainly: the same network, FiLM for each state."""
    network = generate.plain_copy(denoiser)
    grid = sampling.times(denoiser.schedule, steps, start=TAU)
    alphas, sigmas = (v.tolist() for v in denoiser.schedule(grid.flip(0)))

    def sample(x: Tensor) -> Tensor:
        z = datasets.LORENZ63(x)[:, None, :].expand(-1, MEMBERS, -1)
        z = (alphas[-1] * z + sigmas[-1] * torch.randn(z.shape)).reshape(-1, 3)
        g = torch.Generator().manual_seed(0)
        z = diffusion.ancestral(network, z, alphas, sigmas, denoiser.ratios, g)
        return datasets.LORENZ63.inverse(z).reshape(len(x), MEMBERS, 3)

    return sample


def check() -> None:
    """Stop unless the plain analyses are ours."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(4, 12, 3, generator=g), torch.randn(4, 3, generator=g)
    mine = da.etkf(x, da.Observation(y, std=STD), inflation=1.07)
    torch.testing.assert_close(plain.etkf(x, y, STD, 1.07), mine, rtol=1e-3, atol=1e-4)
    mine = da.enoi(x[:, 0], x, da.Observation(y, std=STD))
    torch.testing.assert_close(plain.enoi(x[:, 0], x, y, STD), mine, rtol=1e-3, atol=1e-4)


def dapper() -> float:
    """Return DAPPER's cycles a second with its EnKF, in its own environment."""
    command = [str(data.DAPPER / "bin" / "python"), str(DAPPER_SCRIPT), "EnKF", "1"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    found = next(json.loads(v[4:]) for v in lines if v.startswith("ROW "))
    return found["seconds"] / found["cycles"]


def rows(small: bool = False, folder: Path | None = None) -> Iterator[Row]:
    """Measure everything; ``small`` only tries the code."""
    check()
    repeats, many, cycles = (1, 64, 2) if small else (3, 4096, 10)
    plain_cycles = 2 if small else 100
    x16 = data.starts(F24_TRAJECTORIES)
    yield compare(
        "assimilation, ETKF of 12: F24's 16 trajectories",
        alternate(
            ours(da.ETKF(12, inflation=1.07), many, cycles),
            lambda: seconds(lambda: plain.cycled_etkf(x16, plain_cycles, 12, 1.07, STEPS, STD)),
            repeats=repeats,
        ),
        scale=many * cycles / (F24_TRAJECTORIES * plain_cycles),
        work=many * cycles,
        unit="cycles/s",
        aim=5,
        note=f"{many} trajectories side by side; {plain_cycles} baseline cycles timed, scaled",
    )
    denoiser, _ = pretrained.load("lorenz63-states", "cpu", folder)
    some, few, plain_few = (4, 1, 1) if small else (256, 2, 5)
    theirs = plain_sampler(denoiser, 13)
    for note, rule in (
        ("13 ancestral steps on both sides", {"steps": 13}),
        (
            "4 stochastic multistep steps for 13 ancestral ones; equal score, see chapter 06",
            {"steps": 4, "method": "multistep", "eta": 1.0},
        ),
    ):
        yield compare(
            f"assimilation, EnOI with diffusion, {rule['steps']} steps: F24's 16 trajectories",
            alternate(
                ours(da.EnOI(sampler(denoiser, **rule)), some, few),
                lambda: seconds(lambda: plain.cycled_enoi(x16, plain_few, theirs, STEPS, STD)),
                repeats=repeats,
            ),
            scale=some * few / (F24_TRAJECTORIES * plain_few),
            work=some * few,
            unit="cycles/s",
            aim=5,
            note=note,
        )
    quantity = "assimilation, EnKF of 10, sakov2012: DAPPER"
    if not (data.DAPPER / "bin" / "python").exists():
        note = f"DAPPER not installed: {data.DAPPER_COMMAND}"
        yield Row(quantity, None, None, "cycles/s", 100, note=note)
        return
    method = da.ETKF(10, analysis_inflation=1.02, rotation=True)
    yield compare(
        quantity,
        alternate(ours(method, many, cycles, 2**0.5, 25), dapper, repeats=repeats, warm_up=False),
        scale=many * cycles,
        work=many * cycles,
        unit="cycles/s",
        aim=100,
        note="DAPPER's own loop with its statistics, one trajectory",
    )
