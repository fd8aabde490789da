"""DAPPER's sakov2012 setting, run by DAPPER itself and by ddmlib; stored for chapter 06.

python -m benchmarks --dapper       # installs DAPPER in .venv-dapper, once
python book/tools/sakov2012.py      # about 15 minutes of one core

DAPPER runs each method on its own truths, one seed after another; ours on many truths side by side.
Both average the instantaneous RMSE of the analysis over about 1000 observations after a burn-in.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import results
import torch

from ddmlib import assimilation as da
from ddmlib import datasets, dynamics

ROOT = Path(__file__).resolve().parents[2]
PYTHON, SCRIPT = ROOT / ".venv-dapper/bin/python", ROOT / "benchmarks/baselines/dapper_sakov2012.py"
SEEDS, TRAJECTORIES, CYCLES, BURN_IN = 12, 200, 1000, 100
STD = 2**0.5


def forecast(x: torch.Tensor) -> torch.Tensor:
    """Propagate by 25 steps of 0.01."""
    return dynamics.integrate(dynamics.Lorenz63(), x, dt=0.01, steps=25, every=25)[..., -1, :]


def methods() -> dict[str, da.Method]:
    """Return our methods under DAPPER's names, with the climatology of a long run."""
    x = datasets.lorenz63(1024, 256, every=10, seed=7, dtype=torch.float64).reshape(-1, 3)
    mean, covariance = x.mean(0), x.mT.cov()
    return {
        "OptInterp": da.OptimalInterpolation(mean, covariance),
        "Var3D": da.ThreeDVar(0.1 * covariance),
        "EnKF": da.ETKF(10, analysis_inflation=1.02, rotation=True),
        "EnKF-N": da.EnKFN(3),
        "iEnKS": da.IEnKS(10, analysis_inflation=1.02, rotation=True),
    }


def summary(values: torch.Tensor) -> dict[str, Any]:
    """Return mean and standard error over independent runs."""
    error = float(values.std() / len(values) ** 0.5)
    return {"runs": len(values), "rmse": round(float(values.mean()), 4), "error": round(error, 4)}


def theirs(name: str) -> dict[str, Any]:
    """Run DAPPER's method over all seeds."""
    command = [str(PYTHON), str(SCRIPT), name, *map(str, range(1, SEEDS + 1))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    rows = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("ROW ")]
    return summary(torch.tensor([row["rmse"] for row in rows], dtype=torch.float64))


def ours(method: da.Method) -> dict[str, Any]:
    """Run our method over all trajectories; also the median, which rare losses do not move."""
    truth = datasets.lorenz63(TRAJECTORIES, 1, seed=8, dtype=torch.float64)[:, 0]
    scores = da.twin(
        forecast,
        truth,
        {"it": method},
        std=STD,
        cycles=CYCLES,
        burn_in=BURN_IN,
        generator=torch.Generator().manual_seed(0),
    )
    runs = scores["it"].instantaneous.mean(0)
    return summary(runs) | {"median": round(float(runs.quantile(0.5)), 4)}


def main() -> None:
    """Run both and write ``book/results/sakov2012.json``."""
    rows = {}
    for name, method in methods().items():
        rows[name] = {"ours": ours(method), "dapper": theirs(name)}
        print(name, rows[name], flush=True)
    result = results.made("python book/tools/sakov2012.py") | {
        "dapper": "1.7.1",
        "rows": rows,
    }
    results.save(result, results.FOLDER / "sakov2012.json")


if __name__ == "__main__":
    if not PYTHON.exists():
        sys.exit("DAPPER is not installed: python -m benchmarks --dapper")
    main()
