"""C of trajectories as the networks make them, without an event; for chapters 09 and 10.

python book/tools/plain_samples.py lorenz63-trajectories --bfloat16   # an hour of one core at most
python book/tools/plain_samples.py lorenz63-trajectories-4000         # all are resumable
python book/tools/plain_samples.py fitzhugh-nagumo-trajectories
python book/tools/plain_samples.py double-pendulum-trajectories
python book/tools/plain_samples.py lorenz63-trajectories-low --bfloat16  # with one for low noise
python book/tools/plain_samples.py NAME --small --out FILE   # untrained: only to see it run

Counted are the cells of a histogram, 128 between the 0.1 and 99.9 per cent points of as many
simulated trajectories, and the samples above each threshold of brute_force.py: the model's own
P(C > c) for the steps that all estimators have.  The total variation between generated and
simulated trajectories stands beside its floor, that of two sets of simulated ones.  Results go to
book/results/plain-samples.json after every chunk; the same command goes on from there.

With --bfloat16, here and in the other tools of the chapters on events, the networks multiply with
eight bits, which takes half the time on processors that know such numbers.  It moves x̂ by half a
per cent of the noise, or one per cent at low noise; how far it moves P(E) is seen by running a few
chunks with and without it.  Networks that were trained with more bits, those of the cells and the
pendulum, lose a tenth by it at the lowest noise: with --bfloat16 0.03 they have eight bits only
where sigma/alpha is larger than that.
"""

import argparse
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import brute_force
import results
import torch
from brute_force import CASES, Case
from torch import Tensor

from ddmlib import pretrained, sampling
from ddmlib.denoisers import ByLevel
from ddmlib.recipes import trajectories

OUT = results.FOLDER / "plain-samples.json"
SYSTEMS = {
    "lorenz63-trajectories": "lorenz63",
    "lorenz63-trajectories-4000": "lorenz63",
    "fitzhugh-nagumo-trajectories": "fitzhugh-nagumo",
    "double-pendulum-trajectories": "double-pendulum",
    "lorenz63-trajectories-low": "lorenz63",
    "fitzhugh-nagumo-trajectories-low": "fitzhugh-nagumo",
}
EVENTS = trajectories.EVENTS  # of what the networks see
# of every sampler of the chapters on events, one evaluation a step.  On the attractor what becomes
# of a trajectory is decided within a few levels of middle noise: "central" steps are finest there.
# The heights of spikes and the last of many turns are decided at low noise: even steps, and more
SAMPLERS: dict[str, dict[str, Any]] = {
    "lorenz63": {"steps": 48, "spacing": "central", "ratios": (0.04, 100.0)},
    "fitzhugh-nagumo": {"steps": 112, "spacing": "log-ratio", "ratios": (0.01, 80.0)},
    "double-pendulum": {"steps": 112, "spacing": "log-ratio", "ratios": (0.01, 100.0)},
}
# and where a network for low noise goes on, which is right further down
LOW = {
    "lorenz63": {"ratios": (0.02, 100.0)},
    "fitzhugh-nagumo": {},
}
CHUNK, CHUNKS = 1024, 98
FEW_CHUNKS = 20  # of the network that saw 4000 trajectories
DRAWN = {"cpu": 1, "cuda": 16}  # chunks drawn from one seed, on the device
TOGETHER = {"cpu": 256, "cuda": 4096}  # trajectories denoised at once
AT_ONCE = {"cpu": 2**12, "cuda": 2**22}  # trajectories simulated at once
BINS = 128
FIRST_SEED, SIMULATED_SEED = 40_000, 30_000


def sampler(name: str) -> dict[str, Any]:
    """Return the steps that samples of these weights are drawn with."""
    system = SYSTEMS[name]
    return SAMPLERS[system] | (LOW[system] if name.endswith("-low") else {})


def untrained(name: str) -> Any:
    """Return the network of a recipe as it is before training: enough to see that a tool runs."""
    torch.manual_seed(0)
    denoiser = pretrained.build(pretrained.RECIPES[name].model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return denoiser.to(device).eval().requires_grad_(False)


def offer_bfloat16(parser: argparse.ArgumentParser) -> None:
    """Give a tool the flag --bfloat16 [RATIO]."""
    about = "multiply with eight bits, from this sigma/alpha on (default: always)"
    parser.add_argument("--bfloat16", type=float, nargs="?", const=0.0, metavar="RATIO", help=about)


def as_flag(bfloat16: float | None) -> str:
    """Return the flag as it stands in a command."""
    return "" if bfloat16 is None else " --bfloat16" + f" {bfloat16:g}" * (bfloat16 > 0)


def rounded(denoiser: Any, bfloat16: float) -> None:
    """Make a network multiply with eight bits from this sigma/alpha on."""
    forward = denoiser.network.forward

    def eight_bits(x: Tensor, level: Tensor) -> Tensor:
        noisy = bfloat16 == 0 or bool((level.exp() >= bfloat16).all())
        with torch.autocast(x.device.type, torch.bfloat16, enabled=noisy):
            return forward(x, level).float()

    denoiser.network.forward = eight_bits


def network(name: str, small: bool = False, bfloat16: float | None = None) -> Any:
    """Return the denoiser that a tool is about: untrained if ``small``, and as the flag says.

    Weights for low noise come with those for all levels, which alone may have eight bits."""
    torch.backends.cudnn.allow_tf32 = False  # ten bits, on a GPU, blur heights at low noise
    start = pretrained.RECIPES[name].start
    if start is None:
        denoiser = high = untrained(name) if small else pretrained.load(name)[0]
    elif small:
        high, low = untrained(start), untrained(name)
        denoiser = ByLevel([(pretrained.RECIPES[name].below, high), (0.0, low)])
    else:
        denoiser, _ = pretrained.joined(name)
        high = denoiser.parts[0][1]
    if bfloat16 is not None:
        rounded(high, bfloat16)
    return denoiser


def states(system: str, x: Tensor) -> Tensor:
    """Return states as they are simulated, from those that the network of a system makes."""
    return trajectories.unwound(x) if system == "double-pendulum" else x


def weights(name: str, small: bool = False) -> dict[str, str]:
    """Return what a result says of the weights it was made with: their name and a digest."""
    if small:
        return {"weights": name, "sha256": "untrained"}
    data = (pretrained.WEIGHTS / f"{name}.safetensors").read_bytes()
    start = pretrained.RECIPES[name].start
    return {"weights": name, "sha256": hashlib.sha256(data).hexdigest()[:16]} | (
        {"start": weights(start)["sha256"]} if start else {}
    )


def simulated(case: Case, number: int, device: torch.device) -> Tensor:
    """Return C of that many simulated trajectories, (number,), on the CPU."""
    found: list[Tensor] = []
    length = case.event.shape[0]
    chunk = max(1, -(-min(AT_ONCE[device.type], number) // case.windows))
    on = case.settings | {"device": device}
    while sum(map(len, found)) < number:
        x = case.simulate(chunk, length * case.windows, seed=SIMULATED_SEED + len(found), **on)
        found.append(case.event.margin(x.unflatten(1, (case.windows, length))).flatten().cpu())
    return torch.cat(found)[:number]


def cells(c: Tensor, limits: tuple[float, float]) -> Tensor:
    """Return how many values lie below, in each of 128 cells between the limits, and above."""
    edges = torch.linspace(*limits, BINS + 1, dtype=torch.float64)
    return torch.bincount(torch.bucketize(c.double(), edges), minlength=BINS + 2)


def distance(a: Tensor, b: Tensor) -> float:
    """Return the total variation of two histograms of counts."""
    return round(float((a / a.sum() - b / b.sum()).abs().sum() / 2), 5)


def run(
    name: str,
    denoiser: Any,
    chunks: int,
    chunk: int,
    path: Path = OUT,
    flags: str = "",
    small: bool = False,
    bfloat16: float | None = None,
) -> Iterator[dict[str, Any]]:
    """Add chunks to the stored counts until there are ``chunks``; yield after each."""
    case, event = CASES[SYSTEMS[name]], EVENTS[SYSTEMS[name]]
    c = simulated(case, 2 * chunks * chunk, denoiser.device)
    at = brute_force.thresholds(case)
    made_with = {
        **weights(name, small),
        **sampler(name),
        "bfloat16": bfloat16,
        "thresholds": [round(float(v), 6) for v in at],
    }
    nothing = {"chunks": 0, "counts": [0] * len(at), "cells": [0] * (BINS + 2)}
    entry = nothing | results.entry(path, name, made_with)
    # counts that are there keep their boxes, however many chunks are asked for now
    quantiles = torch.tensor([0.001, 0.999], dtype=torch.float64)
    low, high = entry.get("limits") or torch.quantile(c.double()[: 2**20], quantiles).tolist()
    ours, theirs = (cells(half, (low, high)) for half in c.chunk(2))
    device = denoiser.device
    while entry["chunks"] < chunks:
        drawn = min(DRAWN[device.type], chunks - entry["chunks"])
        z = sampling.sample(
            denoiser, (drawn * chunk, *event.shape), **sampler(name), method="multistep",
            eta=1.0, chunk=TOGETHER[device.type],
            generator=torch.Generator(device).manual_seed(FIRST_SEED + entry["chunks"]),
        )  # fmt: skip
        margins = event.margin(denoiser.standardizer.inverse(z)).cpu()
        above = [int((margins > float(v)).sum()) for v in at]
        entry["counts"] = [a + b for a, b in zip(entry["counts"], above, strict=True)]
        held = torch.tensor(entry["cells"]) + cells(margins, (low, high))
        entry["chunks"] += drawn
        entry |= results.made(f"python book/tools/plain_samples.py {name}{flags}") | {
            "samples": entry["chunks"] * chunk,
            "limits": [low, high],
            "cells": held.tolist(),
            "simulated": ours.tolist(),
            "total_variation": distance(held, ours),
            "total_variation_floor": distance(theirs, ours),
        }
        results.save(results.load(path) | {name: entry}, path)
        yield entry


def main() -> None:
    """Count for one network as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=SYSTEMS)
    parser.add_argument("--small", action="store_true", help="untrained, tiny: only to run it")
    offer_bfloat16(parser)
    parser.add_argument("--chunks", type=int, help="of 1024 samples; default: 98, or 20 for 4000")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if options.small and options.out == OUT:
        parser.error("--small needs --out: its numbers mean nothing")
    start = time.perf_counter()
    denoiser = network(options.name, options.small, options.bfloat16)
    number = options.chunks or (FEW_CHUNKS if options.name.endswith("4000") else CHUNKS)
    chunks, chunk = (2, 8) if options.small else (number, CHUNK)
    flags = as_flag(options.bfloat16)
    flags += f" --chunks {options.chunks}" if options.chunks else ""
    made = {"flags": flags, "small": options.small, "bfloat16": options.bfloat16}
    for entry in run(options.name, denoiser, chunks, chunk, options.out, **made):
        inside = entry["counts"][entry["thresholds"].index(0.0)] / entry["samples"]
        print(
            f"{entry['samples']:7d} samples  P = {inside:.5g}  TV {entry['total_variation']:.4f} "
            f"floor {entry['total_variation_floor']:.4f}  {time.perf_counter() - start:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
