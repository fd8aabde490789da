"""Run DAPPER's own methods in its sakov2012 setting; by the Python of .venv-dapper, not by ours.

python dapper_sakov2012.py METHOD SEED... prints, for each seed, the RMSE of the analysis as DAPPER
averages it, and the seconds that the method took for its cycles.
"""

import json
import sys
import time

import dapper
import dapper.tools.progressbar
from dapper import da_methods
from dapper.mods.Lorenz63.sakov2012 import HMM

METHODS = {
    "OptInterp": lambda: da_methods.OptInterp(),
    "Var3D": lambda: da_methods.Var3D(xB=0.1),
    "EnKF": lambda: da_methods.EnKF("Sqrt", N=10, infl=1.02, rot=True),
    "EnKF-N": lambda: da_methods.EnKF_N(N=3),
    "iEnKS": lambda: da_methods.iEnKS("Sqrt", N=10, infl=1.02, rot=True),
}


def main(name: str, seeds: list[int]) -> None:
    dapper.tools.progressbar.disable_progbar = True
    for seed in seeds:
        dapper.set_seed(3000 + seed)
        xx, yy = HMM.simulate()
        method = METHODS[name]()
        start = time.perf_counter()
        method.assimilate(HMM, xx, yy)
        seconds = time.perf_counter() - start
        method.stats.average_in_time()
        rmse = float(method.avrgs.err.rms.a.val)
        row = {"method": name, "seed": seed, "rmse": rmse, "seconds": seconds, "cycles": len(yy)}
        print("ROW", json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], [int(seed) for seed in sys.argv[2:]])
