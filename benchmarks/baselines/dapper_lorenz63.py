"""Time DAPPER's Lorenz-63 step on an ensemble; run by the Python of .venv-dapper, not by ours.

python dapper_lorenz63.py MEMBERS BURN_IN LENGTH DTYPE prints the seconds for BURN_IN steps that are
dropped and LENGTH states that are kept, then one step from (1, 2, 3), to check its mathematics.
"""

import sys
import time

import numpy as np
from dapper.mods.Lorenz63 import step

DT = 0.01


def trajectories(x: np.ndarray, burn_in: int, length: int) -> np.ndarray:
    for _ in range(burn_in):
        x = step(x, np.nan, DT)
    states = np.empty((length, *x.shape), x.dtype)
    states[0] = x
    for k in range(1, length):
        x = states[k] = step(x, np.nan, DT)
    return states


def main(members: int, burn_in: int, length: int, dtype: str) -> None:
    x0 = np.random.default_rng(0).normal(0, 8, (members, 3)).astype(dtype)
    trajectories(x0, 10, 10)
    start = time.perf_counter()
    trajectories(x0, burn_in, length)
    print(time.perf_counter() - start)
    print(*step(np.array([1.0, 2.0, 3.0]), np.nan, DT))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
