"""R23's Figure 3, counted: the modes of a posterior, and who holds which share of them.

python book/tools/modes.py                 # some minutes of two cores

The third component of 49 states of the noisy Lorenz 63 is observed, every fourth of them.  The
modes are found by weak-constraint 4D-Var from trajectories of the prior; samples and paths of the
particle filter are counted by the mode that their own descent ends in.  A mode and its image under
(x, y) to (-x, -y) hold the same share exactly; "symmetric" are samples of the denoiser averaged
over this symmetry, at twice the cost.  Results go to book/results/posterior.json.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from posterior import OURS, network, samples
from references import CHAIN, OUT, SCALE, stationary, store
from torch import Tensor

from ddmlib import assimilation as da
from ddmlib import datasets
from ddmlib.denoisers import Symmetric

LENGTH, EVERY, STD = 49, 4, 0.1  # states, states between observations, standardised std
MIRROR = torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64)
NEAR = 1.0  # trajectories closer than this at all states are one mode


def modes_of(descent: da.Mode) -> tuple[Tensor, Tensor]:
    """Return the different modes among converged descents, (modes, 49, 3), lowest first, and their
    costs above the lowest."""
    found: list[Tensor] = []
    costs: list[float] = []
    for i in descent.cost.argsort().tolist():
        x = descent.trajectory[i]
        if bool(descent.converged[i]) and all(float((x - y).abs().max()) > NEAR for y in found):
            found.append(x)
            costs.append(float(descent.cost[i]))
    return torch.stack(found), torch.tensor(costs) - costs[0]


def shares(x: Tensor, observation: da.Observation, modes: Tensor) -> list[float]:
    """Return the share of trajectories whose descent ends in each mode, and in none, last."""
    ends = torch.cat(
        [da.weak_4d_var(CHAIN, observation, part).trajectory for part in x.double().split(256)]
    )
    distance = torch.stack([(ends - mode).abs().amax((-2, -1)) for mode in modes], -1)
    nearest = distance.min(-1)
    index = torch.where(nearest.values < NEAR, nearest.indices, len(modes))
    counts = torch.bincount(index, minlength=len(modes) + 1)
    return [round(v, 4) for v in (counts / len(x)).tolist()]


def main() -> None:
    """Find the modes and count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--weights", type=Path, help="folder of the weights (default: package)")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    truth = datasets.noisy_lorenz63(64, 65, seed=5)[1, :LENGTH]  # four likely modes, chapter 08
    g = torch.Generator().manual_seed(7)
    std = STD * float(SCALE.std[2])
    observation = da.observe(truth, da.component(2), std, every=EVERY, generator=g)

    start = datasets.noisy_lorenz63(256, LENGTH, seed=9)  # the prior knows nothing of y
    modes, costs = modes_of(da.weak_4d_var(CHAIN, observation, start))
    modes, costs = modes[costs < 8], costs[costs < 8]
    setting = OURS["ours"]
    denoiser = network(setting.weights, options.weights)
    drawn = {
        name: samples(setting, of, observation, options.samples, 0, LENGTH)
        for name, of in (("ours", denoiser), ("symmetric", Symmetric(denoiser, MIRROR.tolist())))
    }
    paths = da.bootstrap_filter(
        CHAIN,
        observation,
        length=LENGTH,
        particles=2**20,
        paths=options.samples,
        initial=stationary(2**20, seed=17),
        generator=g,
    ).paths
    distance = torch.stack([(modes - mode * MIRROR).abs().amax((-2, -1)) for mode in modes])
    rows: dict[str, Any] = {
        "costs": [round(v, 3) for v in costs.tolist()],
        "mirror": distance.argmin(-1).tolist(),
        "mirror_distance": round(float(distance.min(-1).values.max()), 4),
        **{name: shares(x, observation, modes) for name, x in drawn.items()},
        "filter": shares(paths, observation, modes),
        "samples": options.samples,
        "evaluations": setting.cost(denoiser),
    }
    print(rows)
    command = f"python book/tools/modes.py --samples {options.samples}"
    store(options.out, "modes", rows, command)


if __name__ == "__main__":
    main()
