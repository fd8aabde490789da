"""Probabilities of events under the trajectory networks, by every estimator; for chapter 10.

python book/tools/events_scan.py lorenz63 --bfloat16   # one to three hours of one core; resumable
python book/tools/events_scan.py fitzhugh-nagumo --bfloat16 0.03  # at the event itself only
python book/tools/events_scan.py lorenz63 --small --out FILE   # untrained: only to see it run

The truth is that of brute_force.py, which comes first: thresholds are chosen where it finds
P(C > c) nearest to round values, down to 1e-5.  The model's own P(C > c), with the same steps, is
counted by plain_samples.py.  Settings are fixed here beforehand, the same at every threshold;
importance sampling, and subset simulation, a cross-check without guidance, are run at every third.
Estimates of Lorenz 63 are repeated where P is nearest to 1e-3, and to 1e-4, which takes a
million plain samples to judge; one pilot serves five repetitions.
Results go to book/results/events-scan.json after every estimate; the same command goes on from
there, unless weights or settings are others.  Whoever changes guidance deletes the entry first.
"""

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import brute_force
import results
import torch
from event_samples import for_guidance
from plain_samples import SAMPLERS, TOGETHER, as_flag, network, offer_bfloat16, weights

from ddmlib import events, sampling
from ddmlib.events import odds, paths

OUT = results.FOLDER / "events-scan.json"
TARGETS = (0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
REPEATED = {"repetitions": 1e-3, "rare": 1e-4}  # where an estimate is repeated
REPETITIONS = {"lorenz63": 20, "fitzhugh-nagumo": 0}
REPETITION_SEEDS = {"repetitions": 70_000, "rare": 90_000}
SHARED = 5  # repetitions that one pilot serves
PUBLISHED = {"lorenz63": 5, "fitzhugh-nagumo": 5}  # runs of Z23's estimator
# system: weights, and the thresholds' targets; the event itself is always there
SYSTEMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "lorenz63": ("lorenz63-trajectories", TARGETS),
    "fitzhugh-nagumo": ("fitzhugh-nagumo-trajectories", ()),
}
CHECKS = ("importance", "subset")
CROSS_CHECKED = 3  # every third threshold, by importance sampling and subset simulation
METHODS: dict[str, dict[str, Any]] = {
    "smc": {"samples": 4096, "pilot": 256},
    "importance": {"samples": 1024, "pilot": 256},
    "subset": {"samples": 1024, "runs": 4},
    "likelihood-ratio": {"samples": 5, "probes": 8},
}
SMALL: dict[str, dict[str, Any]] = {
    "smc": {"samples": 16, "runs": 2, "pilot": 16},
    "importance": {"samples": 16, "pilot": 16},
    "subset": {"samples": 16, "runs": 2, "moves": 1},
    "likelihood-ratio": {"samples": 2, "probes": 2},
}


def finite(value: Any) -> Any:
    """Return a value with None for numbers that JSON does not know, others rounded."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return [finite(v) for v in value] if isinstance(value, tuple | list) else value


def chosen(truth: dict[str, Any], targets: tuple[float, ...] = TARGETS) -> list[float]:
    """Return the thresholds at which brute force finds P nearest to the targets, and zero."""
    found = []
    for target in targets:
        logs = [
            abs(math.log(count / truth["number"] / target)) if count else math.inf
            for count in truth["counts"]
        ]
        if min(logs) < 1:
            found.append(truth["thresholds"][logs.index(min(logs))])
    return sorted(set(found) | {0.0})


class Scan:
    """One system: its network, its event, and what the estimators find."""

    def __init__(self, system: str, small: bool, bfloat16: float | None, truth: Path) -> None:
        name, targets = SYSTEMS[system]
        self.system, self.event = system, brute_force.CASES[system].event
        self.denoiser = network(name, small, bfloat16)
        self.chunk = TOGETHER[self.denoiser.device.type]
        known = results.load(truth).get(system)
        if known is None:
            raise SystemExit(f"error: no {system} in {truth.name}: run brute_force.py first")
        self.thresholds: list[float] = known["thresholds"]
        self.chosen, self.methods, self.on = chosen(known, targets), METHODS, SAMPLERS[system]
        p = [count / known["number"] for count in known["counts"]]
        self.repeated = {
            part: min(
                self.chosen,
                key=lambda c: abs(math.log(max(p[self.thresholds.index(c)], 1e-12) / target)),
            )
            for part, target in REPEATED.items()
        }
        if small:
            self.chosen, self.repeated = [-2.0, -1.5], {"repetitions": -2.0, "rare": -1.5}
            self.methods, self.on = SMALL, self.on | {"steps": 4}

    def wanted(self) -> list[tuple[str, float]]:
        """Return which method is run at which threshold, in order."""
        checked = [(method, c) for c in self.chosen[::CROSS_CHECKED] for method in CHECKS]
        return [("smc", c) for c in self.chosen] + checked

    def prepared(self, c: float, seed: int) -> tuple[events.EventGuidance, int]:
        """Return guidance to C > c that a pilot has corrected, and the evaluations that it cost."""
        guidance, paths_before = odds.prepare(
            self.denoiser, for_guidance(self.system, self.event, c),
            sampling.times_for(self.denoiser, **self.on), self.methods["smc"]["pilot"],
            chunk=self.chunk, rule="multistep", like=torch.zeros((), device=self.denoiser.device),
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        return guidance, paths_before * self.on["steps"]

    def estimate(self, method: str, c: float, seed: int, **given: Any) -> dict[str, Any]:
        """Return one estimate of log P(C > c)."""
        settings = dict(self.methods[method]) | given
        if method in ("smc", "importance"):
            settings["chunk"] = self.chunk
        found = events.log_probability(
            self.denoiser, for_guidance(self.system, self.event, c), method=method,
            generator=torch.Generator().manual_seed(seed), **settings, **self.on,
        )  # fmt: skip
        return {"threshold": c} | {k: finite(v) for k, v in dataclasses.asdict(found).items()}

    def gap(self, c: float, seed: int) -> dict[str, Any]:
        """Return, of guided paths inside E, the mean of log p/q, and the log of the mean of p/q."""
        event = for_guidance(self.system, self.event, c)
        grid = sampling.times_for(self.denoiser, **self.on)
        like = torch.zeros((), device=self.denoiser.device)
        on: dict[str, Any] = {"rule": "multistep", "like": like}
        on["generator"] = torch.Generator().manual_seed(seed)
        n = self.methods["importance"]["samples"] // 4  # no chunks here: bounds the memory
        done = paths.importance(events.EventGuidance(self.denoiser, event), grid, n,
                                defensive=0.0, **on)  # fmt: skip
        inside = torch.isfinite(done.log_weights[0])
        mean = float(done.log_weights[0][inside].mean()) if bool(inside.any()) else math.nan
        return {
            "threshold": c,
            "paths": n,
            "inside": float(inside.double().mean()),
            "mean_of_log": finite(mean),
            "log_of_mean": finite(float(done.log_probability[0])),
        }


def main() -> None:
    """Estimate for one system as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("--small", action="store_true", help="untrained, tiny: only to run it")
    offer_bfloat16(parser)
    parser.add_argument("--truth", type=Path, default=brute_force.OUT)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if options.small and options.out == OUT:
        parser.error("--small needs --out: its numbers mean nothing")
    start, flags = time.perf_counter(), as_flag(options.bfloat16)
    scan = Scan(options.system, options.small, options.bfloat16, options.truth)
    made_with = {
        **weights(SYSTEMS[options.system][0], options.small),
        **scan.on,
        "bfloat16": options.bfloat16,
        "settings": scan.methods,
        "chosen": scan.chosen,
        "repeated": scan.repeated,
    }
    nothing: dict[str, Any] = {"scan": [], "gap": [], "published": []}
    nothing |= {part: [] for part in REPEATED}
    entry = nothing | results.entry(options.out, options.system, made_with)

    def keep(part: str, value: Any) -> None:
        entry[part].append(value)
        entry.update(results.made(f"python book/tools/events_scan.py {options.system}{flags}"))
        results.save(results.load(options.out) | {options.system: entry}, options.out)
        print(f"{time.perf_counter() - start:.0f} s", part, json.dumps(value)[:150], flush=True)

    for k, (method, c) in enumerate(scan.wanted()[len(entry["scan"]) :], len(entry["scan"])):
        keep("scan", scan.estimate(method, c, 50_000 + k))
    for c in scan.chosen[len(entry["gap"]) :]:
        keep("gap", scan.gap(c, 60_000))
    repetitions = 2 if options.small else REPETITIONS[options.system]
    for part, c in scan.repeated.items():
        guidance, cost, seed = None, 0, REPETITION_SEEDS[part]
        for k in range(len(entry[part]), repetitions):
            if guidance is None or k % SHARED == 0:
                guidance, cost = scan.prepared(c, seed + 5000 + k // SHARED)
            found = scan.estimate("smc", c, seed + k, guidance=guidance)
            keep(part, found | {"pilot": k // SHARED, "pilot_evaluations": cost})
    published = 1 if options.small else PUBLISHED[options.system]
    for k in range(len(entry["published"]), published):
        keep("published", scan.estimate("likelihood-ratio", 0.0, 80_000 + k))


if __name__ == "__main__":
    main()
