"""Lorenz-63 data: 16.8M states with their burn-in, against three ways to make them elsewhere."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.baselines import lorenz63 as plain
from benchmarks.timing import Row, alternate, compare, seconds
from ddmlib import datasets, dynamics

SHAPES = ((4096, 4096), (8192, 2048), (2048, 8192))
BURN_IN, F24_BURN_IN, F24_TRAJECTORIES = 10_000, 100_000, 16
DAPPER = Path(".venv-dapper")
DAPPER_VERSION = "dapper==1.7.1"
DAPPER_SCRIPT = Path(__file__).parent / "baselines" / "dapper_lorenz63.py"
DAPPER_COMMAND = "python -m benchmarks --dapper"


def starts(n: int) -> Tensor:
    """Return n states on the attractor."""
    return datasets.lorenz63(n, 1, seed=3)[:, 0]


def ours(shape: tuple[int, int], steps: int = BURN_IN) -> Callable[[], float]:
    """Return a timer of `datasets.lorenz63`, all of it."""
    return lambda: seconds(lambda: datasets.lorenz63(*shape, burn_in=steps * 0.01, seed=1))


def dapper(shape: tuple[int, int], part: int, dtype: str) -> Callable[[], float]:
    """Return a timer of DAPPER's RK4 on one ``part``-th of the steps, in its own environment."""
    numbers = [shape[0], BURN_IN // part, shape[1] // part]
    command = [DAPPER / "bin" / "python", DAPPER_SCRIPT, *numbers, dtype]

    def timer() -> float:
        done = subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True)
        time, step = done.stdout.strip().splitlines()[-2:]
        check_step([float(v) for v in step.split()])
        return float(time)

    return timer


def check_step(step: list[float]) -> None:
    """Stop if a baseline's step from (1, 2, 3) is not ours."""
    x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    mine = dynamics.integrate(dynamics.Lorenz63(), x, dt=0.01, steps=1)[-1]
    torch.testing.assert_close(torch.tensor(step, dtype=torch.float64), mine, rtol=1e-9, atol=1e-9)


def check() -> None:
    """Stop unless the baselines compute what we compute."""
    x0 = starts(2).double()
    mine = dynamics.integrate(dynamics.Lorenz63(), x0, dt=0.01, steps=50)
    torch.testing.assert_close(plain.trajectories(x0, 0, 51), mine, rtol=1e-9, atol=1e-9)
    solved = torch.from_numpy(plain.solved(x0[0].numpy(), 0.0, 51))
    torch.testing.assert_close(solved, mine[0], rtol=0, atol=1e-2)


def install_dapper() -> None:
    """Make DAPPER's environment, apart from ours: it drags old packages along."""
    subprocess.run(["python3", "-m", "venv", str(DAPPER)], check=True)
    pip = [str(DAPPER / "bin" / "pip"), "install", "--only-binary=:all:"]
    subprocess.run([*pip, DAPPER_VERSION], check=True)


def rows(small: bool = False) -> Iterator[Row]:
    """Measure everything; ``small`` only tries the code."""
    check()
    repeats = 1 if small else 5
    if small:
        shape, burn_in = (64, 64), 100
    else:
        shape = min(SHAPES, key=lambda s: min(ours(s)() for _ in range(2)))
        burn_in = BURN_IN
    work = shape[0] * shape[1]
    name = f"{work / 1e6:.1f}M states of Lorenz 63"
    settings: dict = {"trajectories": shape[0], "length": shape[1], "burn_in": burn_in, "dt": 0.01}
    mine = ours(shape, burn_in)

    steps = 20 if small else 3000
    x0 = starts(F24_TRAJECTORIES)
    yield compare(
        f"{name}: F24's 16 trajectories",
        alternate(mine, lambda: seconds(lambda: plain.trajectories(x0, 0, steps)), repeats=repeats),
        scale=(F24_BURN_IN + work / F24_TRAJECTORIES) / steps,
        aim=50,
        note=f"eager PyTorch RK4, 10⁵ steps burn-in; {steps} steps timed, scaled",
        settings=settings,
    )

    few = 1 if small else 3
    y0 = starts(few).double().numpy()
    yield compare(
        f"{name}: solve_ivp",
        alternate(
            mine,
            lambda: seconds(lambda: [plain.solved(y, burn_in * 0.01, shape[1]) for y in y0]),
            repeats=min(repeats, 3),
        ),
        scale=shape[0] / few,
        aim=100,
        note=f"DOP853, tolerance 1e-6, per trajectory; {few} trajectories timed, scaled",
        settings=settings,
    )

    part_of = 1 if small else 10
    for dtype in ("float64", "float32"):
        quantity = f"{name}: DAPPER's RK4, {dtype}"
        if not (DAPPER / "bin" / "python").exists():
            yield Row(
                quantity, None, None, "s", 1.5, note=f"DAPPER not installed: {DAPPER_COMMAND}"
            )
            continue
        other = dapper(shape, part_of, dtype)
        yield compare(
            quantity,
            alternate(mine, other, repeats=min(repeats, 3), warm_up=False),
            scale=part_of,
            aim=1.5,
            note=f"the same ensemble, NumPy; 1/{part_of} of the steps timed, scaled",
            settings=settings,
        )
