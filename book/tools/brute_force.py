"""Probabilities of Z23's events by simulation alone: the truth that chapters 09 and 10 measure
against.

python book/tools/brute_force.py lorenz63 --number 1e8 --compile  # minutes of one core; resumable
python book/tools/brute_force.py lorenz63-burn-in-3 --number 1e6 --compile
python book/tools/brute_force.py fitzhugh-nagumo --number 1e6
python book/tools/brute_force.py double-pendulum --number 1e6

Results go to book/results/brute-force.json after every chunk of trajectories; the same command goes
on from there, and a larger number adds to what is done.  The stationary trajectories of Lorenz 63
are long, and cut into consecutive windows of 60 states; their intervals count trajectories, not
windows, because the windows of one trajectory are not independent.

With --compile, which needs a C++ compiler, the ten Runge-Kutta steps between two states of Lorenz
63 are one compiled loop instead of some three hundred passes over memory: 18 times as fast.
"""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import results
import torch
from torch import Tensor

from ddmlib import dynamics, ensembles, events

OUT = results.FOLDER / "brute-force.json"
FIRST_SEED = 10_000  # far from those of training and test data


@dataclass(frozen=True)
class Case:
    """One ensemble and its event, with the thresholds c at which P(C > c) is counted."""

    simulate: Callable[..., Tensor]
    settings: dict[str, Any]
    event: events.Constraint
    thresholds: tuple[float, float, float]  # first, last, step
    windows: int = 1  # cut from one trajectory


CASES = {
    "lorenz63": Case(
        ensembles.lorenz63, {"burn_in": 100.0}, events.one_lobe(), (-0.4, 0.5, 0.02), windows=100
    ),
    "lorenz63-burn-in-3": Case(
        ensembles.lorenz63, {"burn_in": 3.0}, events.one_lobe(), (-0.4, 0.5, 0.02)
    ),
    "fitzhugh-nagumo": Case(ensembles.fitzhugh_nagumo, {}, events.spike(), (-2.0, 2.5, 0.1)),
    "double-pendulum": Case(ensembles.double_pendulum, {}, events.over_the_top(), (-3.0, 3.0, 0.1)),
}


def advance(rows: Tensor, dt: float, steps: int) -> Tensor:
    """Return states of Lorenz 63, (3, n), after so many Runge-Kutta steps, component by component.

    As `dynamics.rk4` does it, but without a matrix product, so that a compiler can fuse all of it.
    """
    sigma, rho, beta = (getattr(dynamics.Lorenz63, name) for name in ("sigma", "rho", "beta"))

    def tendency(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        return sigma * (y - x), x * (rho - z) - y, x * y - beta * z

    now = tuple(rows.unbind(0))
    for _ in range(steps):
        k_1 = tendency(*now)
        k_2 = tendency(*(x + dt / 2 * k for x, k in zip(now, k_1, strict=True)))
        k_3 = tendency(*(x + dt / 2 * k for x, k in zip(now, k_2, strict=True)))
        k_4 = tendency(*(x + dt * k for x, k in zip(now, k_3, strict=True)))
        slopes = zip(k_1, k_2, k_3, k_4, strict=True)
        now = tuple(
            x + dt / 6 * (a + 2 * b + 2 * c + d)
            for x, (a, b, c, d) in zip(now, slopes, strict=True)
        )
    return torch.stack(now)


def fused(step: Callable[[Tensor, float, int], Tensor]) -> Callable[..., Tensor]:
    """Return a function like `ensembles.lorenz63` that advances states by ``step``."""
    substeps = ensembles.SUBSTEPS["lorenz63"]

    def simulate(
        trajectories: int, length: int, *, burn_in: float, seed: int, device: str | None = None
    ) -> Tensor:
        x = ensembles.lorenz63(trajectories, 1, burn_in=0.0, seed=seed, device=device)[:, 0].mT
        for _ in range(round(burn_in / 0.1)):
            x = step(x, 0.1 / substeps, substeps)
        states = [x]
        for _ in range(length - 1):
            states.append(step(states[-1], 0.1 / substeps, substeps))
        return torch.stack(states).permute(2, 0, 1)  # (trajectories, length, 3)

    return simulate


def thresholds(case: Case) -> Tensor:
    """Return the thresholds of a case, 0 among them."""
    first, last, step = case.thresholds
    return step * torch.arange(round(first / step), round(last / step) + 1, dtype=torch.float64)


def count(
    case: Case, trajectories: int, seed: int, device: str | None = None
) -> tuple[Tensor, ...]:
    """Return, for each threshold, the sum over trajectories of the windows above it, and of their
    squares, (thresholds,) each."""
    length = case.event.shape[0]
    x = case.simulate(
        trajectories, length * case.windows, seed=seed, device=device, **case.settings
    )
    c = case.event.margin(x.unflatten(1, (case.windows, length))).cpu()  # (trajectories, windows)
    above = torch.stack([(c > float(at)).sum(1) for at in thresholds(case)]).long()
    return above.sum(1), above.square().sum(1)


def interval(counts: int, squares: int, trajectories: int, windows: int) -> tuple[float, ...]:
    """Return P, and its 95 % confidence interval from the scatter over independent trajectories.

    Where nothing was counted the upper end is that of the binomial law of the trajectories.
    """
    n = trajectories
    p = counts / (n * windows)
    if counts == 0:
        return 0.0, 0.0, 1 - 0.05 ** (1 / n)
    variance = (squares - counts**2 / n) / (n - 1) / n / windows**2
    reach = 1.959964 * math.sqrt(variance)
    # on the scale of log P, where the law of a count is more nearly symmetric
    return p, p * math.exp(-reach / p), p * math.exp(reach / p)


def run(
    name: str,
    number: float,
    chunk: int,
    path: Path = OUT,
    device: str | None = None,
    compiled: bool = False,
) -> Iterator[dict[str, Any]]:
    """Add chunks to the stored counts until ``number`` windows are reached; yield after each.

    Parameters
    ----------
    name : str
        One of `CASES`.
    number : float
        Windows of 60 states wanted in all.
    chunk : int
        Trajectories simulated side by side; chunk k has seed 10 000 + k.
    path : Path
        The file of results.
    device : str, optional
        Where to simulate.
    compiled : bool
        Fuse the steps of Lorenz 63 with a C++ compiler.
    """
    case = CASES[name]
    if compiled:
        if case.simulate is not ensembles.lorenz63:
            raise ValueError(f"compiled steps are for Lorenz 63, not {name}")
        case = dataclasses.replace(case, simulate=fused(torch.compile(advance)))
    made = f"python book/tools/brute_force.py {name} --number {number:g}" + " --compile" * compiled
    at = thresholds(case)
    entry: dict[str, Any] = results.load(path).get(name) or {
        "chunk": chunk,
        "chunks": 0,
        "windows": case.windows,
        "thresholds": [round(float(v), 6) for v in at],
        "counts": [0] * len(at),
        "squares": [0] * len(at),
    }
    if entry["chunk"] != chunk or entry["windows"] != case.windows:
        raise ValueError(f"{path.name} holds chunks of {entry['chunk']} trajectories: give --chunk")
    while entry["chunks"] * chunk * case.windows < number:
        counts, squares = count(case, chunk, FIRST_SEED + entry["chunks"], device)
        entry["counts"] = [a + int(b) for a, b in zip(entry["counts"], counts, strict=True)]
        entry["squares"] = [a + int(b) for a, b in zip(entry["squares"], squares, strict=True)]
        entry["chunks"] += 1
        n, zero = entry["chunks"] * chunk, int(at.abs().argmin())
        p, low, high = interval(entry["counts"][zero], entry["squares"][zero], n, case.windows)
        entry |= results.made(made) | {
            "trajectories": n,
            "number": n * case.windows,
            "probability": p,
            "interval": [low, high],
        }
        # read again: another case may run beside this one
        results.save(results.load(path) | {name: entry}, path)
        yield entry


def main() -> None:
    """Run one case as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--number", type=float, default=1e6, help="windows of 60 states in all")
    parser.add_argument("--chunk", type=int, default=2**12, help="trajectories side by side")
    parser.add_argument("--device", help="cpu or cuda")
    parser.add_argument("--compile", action="store_true", help="fuse steps; needs a compiler")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    start = time.perf_counter()
    where = options.out, options.device, options.compile
    try:
        for entry in run(options.case, options.number, options.chunk, *where):
            low, high = entry["interval"]
            print(
                f"{entry['number']:12d} windows  P = {entry['probability']:.5g} "
                f"[{low:.5g}, {high:.5g}]  {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
