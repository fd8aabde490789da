"""Generated trajectories given an event against simulated ones; for chapter 09.

python book/tools/event_samples.py lorenz63           # half an hour; with --bfloat16 half of it
python book/tools/event_samples.py fitzhugh-nagumo    # minutes of a GPU, hours of a CPU
python book/tools/event_samples.py double-pendulum    # the same; half an hour with --excess 2
python book/tools/event_samples.py double-pendulum --parts steered guided   # leaves the others out
python book/tools/event_samples.py lorenz63 --small --out FILE   # untrained: only to see it run

The share inside the event, the total variation of the histogram of C, 128 bins, and that of each
component of the states.  Guided samples follow moment matching all the way down; steered ones are
weighted and resampled at high noise, and follow it alone from sigma/alpha = 1 on; twisted ones are
weighted to the end; renewed ones are twisted ones that were made anew from a few noise levels
(`events.renew`), so that they have less in common, and take little longer where both are asked for;
smoothed ones are the mean of what the network makes of twisted ones with a little noise
(`sampling.smoothed`), beside simulated ones so treated, which should stay what they are.
Of guided and steered ones nothing is rejected or projected.  "levels" says where a network loses
the law: simulated trajectories in the event are made anew from one noise level each; "resolution",
how well one evaluation tells C of them, beside the mean of as many others that are simulated.
Where states are stretched by asinh, so is C for the guidance: the event is the same.  The
pendulum's network makes sines and cosines; what is judged are angles.  The floors are those of
other simulated trajectories of the same number; "scatter" is the standard deviation of the floor
of C when all that are simulated are parted otherwise.  "beyond" is the share above the last box of
C, which one simulated trajectory in a thousand is, "faint" the share below a C that one in fifty is
below.  Twisted spikes are drawn without fitted odds, and with them where --parts has "odds".
Results go to book/results/event-samples.json after every part; parts that were made with these
settings and weights are kept.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plain_samples
import results
import torch
from brute_force import CASES, Case
from judge import GUIDED, Judge
from plain_samples import (
    BINS,
    EVENTS,
    TOGETHER,
    as_flag,
    network,
    offer_bfloat16,
    states,
    weights,
)
from torch import Tensor

from ddmlib import events, sampling, targets
from ddmlib.recipes import trajectories

OUT = results.FOLDER / "event-samples.json"
# "-low": with a second network, for low noise
SYSTEMS = (
    "lorenz63",
    "fitzhugh-nagumo",
    "double-pendulum",
    "lorenz63-low",
    "fitzhugh-nagumo-low",
)
FIRST_SEED = 30_000  # far from those of training, test data and brute force
NUMBER, PILOT = 10**4, 256
PARTS = ("steered", "twisted", "renewed", "guided", "levels", "resolution", "odds", "smoothed")
USUAL = PARTS[:-2]
AT_ONCE = {"cpu": 2**10, "cuda": 2**15}  # long trajectories simulated at once
# weighted paths for each sample
EXCESS = {"lorenz63": 4, "fitzhugh-nagumo": 8, "double-pendulum": 8}
# of twisted samples, in place of fitted odds: those of spikes overlook what the window cuts
WITHOUT_ODDS: dict[str, dict[str, Any]] = {"fitzhugh-nagumo": {"fitted": False, "least": 0.5}}
SMOOTHED = {"ratio": 0.04, "draws": 4}  # of twisted samples, `sampling.smoothed`
UNTIL = 1.0  # sigma/alpha from which steered samples follow guidance alone
# sigma/alpha from which simulated trajectories in the event are made anew, one at a time
LEVELS = {
    "lorenz63": (0.1, 0.3, 1.0, 2.0),
    "fitzhugh-nagumo": (0.02, 0.1, 1.0),
    "double-pendulum": (0.02, 0.1, 1.0),
}
RESOLUTION = (0.05, 0.1, 0.2, 0.5)  # sigma/alpha at which one evaluation is asked for C
# and from which twisted samples are.  Of simulated trajectories in the event, at
# the highest of them one in seven of Lorenz 63 stays, one in two of the others, and keeps nothing
# of the order of its C; at 2 seven in ten stay on Lorenz 63 (chapter 09)
RENEWALS: dict[str, tuple[float, ...]] = {
    "lorenz63": (4.0, 4.0, 4.0, 2.0, 1.0),
    "fitzhugh-nagumo": (8.0, 4.0),
    "double-pendulum": (8.0, 4.0),
}
# C + level is a maximum of means of states; scale: knee · std of their units, in C
STRETCHED = {"fitzhugh-nagumo": (2.5, 0.86)}
# how far inside the event guided paths aim, in C: the last step, which has no noise, ends a few
# thousandths of a radian beside where it aims
AIM = {"lorenz63": 0.0, "fitzhugh-nagumo": 0.0, "double-pendulum": 0.02}


def for_guidance(system: str, event: events.Constraint, c: float = 0.0) -> events.Constraint:
    """Return the event C > c with a function that grows evenly in the network's units."""
    if system not in STRETCHED:
        return event.above(c)
    level, scale = STRETCHED[system]
    return event.above(c).stretched(level + c, scale)


def simulated(
    case: Case, event: events.Constraint, number: int, chunk: int, device: torch.device
) -> Tensor:
    """Return that many simulated trajectories in the event, (number, length, d), on the CPU."""
    found: list[Tensor] = []
    on = case.settings | {"device": device}
    while sum(map(len, found)) < number:
        length = event.shape[0] * case.windows
        x = case.simulate(chunk, length, seed=FIRST_SEED + len(found), **on)
        x = x.unflatten(1, (case.windows, event.shape[0])).flatten(0, 1)
        found.append(x[event.holds(x)].cpu())
    return torch.cat(found)[:number]


def draws(
    denoiser: Any,
    event: events.Constraint,
    number: int,
    sampler: dict[str, Any],
    pilot: int,
    excess: int,
    twist: dict[str, Any],
    renewal: dict[str, Any],
) -> dict[str, Callable[[], Tensor]]:
    """Return functions that draw trajectories given the event, standardised units, by name."""
    chunk = TOGETHER[denoiser.device.type]

    def guided() -> Tensor:
        return sampling.sample(
            events.EventGuidance(denoiser, event), (min(number, GUIDED), *event.shape),
            **sampler, method="multistep", eta=1.0, chunk=chunk,
            generator=torch.Generator().manual_seed(4),
        )  # fmt: skip

    def weighted(until: float, generator: torch.Generator, **twist: Any) -> Tensor:
        return events.twisted_samples(
            denoiser, event, number, excess=excess, **sampler, pilot=pilot, until=until,
            chunk=chunk, generator=generator, **twist,
        )  # fmt: skip

    @functools.cache
    def twisted() -> tuple[Tensor, torch.Generator]:
        generator = torch.Generator().manual_seed(6)
        return weighted(0.0, generator, **twist), generator

    def renewed() -> Tensor:  # as `renewals` of `twisted_samples` does it
        x, generator = twisted()
        on = {"chunk": chunk, "generator": generator} | sampler | renewal
        return events.renew(denoiser, event, x, **on)[0]

    return {
        "steered": lambda: weighted(UNTIL, torch.Generator().manual_seed(6)),
        "twisted": lambda: twisted()[0],
        "renewed": renewed,
        "guided": guided,
        "odds": lambda: weighted(0.0, torch.Generator().manual_seed(6)),
        "smoothed": lambda: smooth(denoiser, twisted()[0]),
    }


def smooth(denoiser: Any, z: Tensor) -> Tensor:
    """Return samples in standardised units without the part of the last error that is chance."""
    on = {"chunk": TOGETHER[denoiser.device.type], "generator": torch.Generator().manual_seed(10)}
    return sampling.smoothed(denoiser, z, **SMOOTHED, **on)


def as_seen(denoiser: Any, system: str, x: Tensor) -> Tensor:
    """Return simulated trajectories in the units of a network, on its device."""
    x = x.float().to(denoiser.device)
    return denoiser.standardizer(
        trajectories.PENDULUM.on_circle(x) if system == "double-pendulum" else x
    )


def made_anew(
    denoiser: Any, system: str, event: events.Constraint, judge: Judge, sampler: dict[str, Any]
) -> list[dict[str, Any]]:
    """Score simulated trajectories in the event after a move from each of some noise levels."""
    z, rows = as_seen(denoiser, system, judge.other), []
    for ratio in LEVELS[system]:
        moved, (taken,) = events.renew(
            denoiser, event, z, [ratio], **sampler, chunk=TOGETHER[denoiser.device.type],
            generator=torch.Generator().manual_seed(8),
        )  # fmt: skip
        score = judge.score(states(system, denoiser.standardizer.inverse(moved).cpu()))
        rows.append({"ratio": ratio, "taken": round(taken, 4), **score})
    return rows


def resolution(
    denoiser: Any, system: str, event: events.Constraint, judge: Judge
) -> list[dict[str, Any]]:
    """Return how far one evaluation is from C of simulated trajectories in the event.

    Beside the network stands the mean of other simulated trajectories in the event, given the
    noisy one (`targets.pooled_means`): what so many of them know of C.
    """
    units = denoiser.standardizer
    pool, z = (as_seen(denoiser, system, x) for x in (judge.reference, judge.other[:GUIDED]))
    c, one, rows = event.margin(units.inverse(z)), torch.ones(1, 1, 1).to(z), []
    generator = torch.Generator().manual_seed(9)
    for ratio in RESOLUTION:
        x_t = z + ratio * torch.randn(z.shape, generator=generator).to(z)
        parts = x_t.split(TOGETHER[denoiser.device.type])
        found = {
            "network": torch.cat([denoiser.denoise(v, one, ratio * one) for v in parts]),
            "others": torch.cat([targets.pooled_means(v, one, ratio * one, pool) for v in parts]),
        }
        row: dict[str, Any] = {"ratio": ratio}
        for name, x_hat in found.items():
            miss = event.margin(units.inverse(x_hat)) - c
            error = float((x_hat - z).square().mean().sqrt()) / ratio
            row[name] = {
                "mean": round(float(miss.mean()), 5),
                "median": round(float(miss.abs().median()), 5),
                "error_over_noise": round(error, 4),
            }
        rows.append(row)
    return rows


def main() -> None:
    """Measure one system as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("--small", action="store_true", help="untrained, tiny: only to run it")
    parser.add_argument("--excess", type=int, help="weighted paths for each sample")
    offer_bfloat16(parser)
    parser.add_argument("--number", type=int, default=NUMBER, help="of samples of each kind")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=USUAL, help="all but the last two"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if options.excess is not None and options.excess < 1:
        parser.error(f"--excess must be at least 1, got {options.excess}")
    if options.small and options.out == OUT:
        parser.error("--small needs --out: its numbers mean nothing")
    small, start = options.small, time.perf_counter()
    system = options.system.removesuffix("-low")
    twist = WITHOUT_ODDS.get(system, {})
    if "odds" in options.parts and not twist:
        parser.error(f"--parts odds: twisted samples of {system} are drawn with fitted odds")
    name, case = f"{system}-trajectories{options.system[len(system) :]}", CASES[system]
    number, pilot = (16, 16) if small else (options.number, PILOT)
    excess = options.excess or (2 if small else EXCESS[system])
    sampler = plain_samples.sampler(name) | ({"steps": 4} if small else {})
    denoiser = network(name, small, options.bfloat16)
    event = case.event.above(-2.0) if small else case.event
    for_network = EVENTS[system].above(-2.0) if small else EVENTS[system]
    aim = for_guidance(system, EVENTS[system], -2.0 if small else AIM[system])
    flags = as_flag(options.bfloat16) + f" --number {number}" * (number != NUMBER)
    flags += f" --excess {options.excess}" * bool(options.excess)
    flags += f" --parts {' '.join(options.parts)}" * (options.parts != USUAL)
    command = f"python book/tools/event_samples.py {options.system}{flags}"
    made_with = {
        **weights(name, small),
        "samples": number,
        "samples_guided": min(number, GUIDED),
        **sampler,
        "bins": BINS,
        "pilot": pilot,
        "until": UNTIL,
        "aim": AIM[system],
    }
    entry = results.entry(options.out, options.system, made_with)
    renewal = {"renewals": RENEWALS[system]}
    made_by: dict[str, dict[str, Any]] = {part: {"bfloat16": options.bfloat16} for part in PARTS}
    made_by["steered"] |= {"excess": excess}
    made_by["odds"] |= {"excess": excess}
    made_by["twisted"] |= {"excess": excess} | twist
    made_by["smoothed"] |= {"excess": excess} | twist | SMOOTHED
    made_by["renewed"] |= {"excess": excess} | renewal | twist
    for part in options.parts:
        if part in entry:
            results.same(
                f"{part} of {options.system} in {options.out.name}", entry[part], made_by[part]
            )
    wanted = [part for part in options.parts if part not in entry]
    if not wanted:
        print(f"{', '.join(options.parts)} of {options.system} are there, made with these settings")
        return

    def keep(part: str, value: dict[str, Any]) -> None:
        entry.update(results.made(command) | {part: value})
        results.save(results.load(options.out) | {options.system: entry}, options.out)
        print(f"{time.perf_counter() - start:.0f} s", part, json.dumps(value), flush=True)

    def scored(z: Tensor) -> dict[str, Any]:
        return judge.score(states(system, denoiser.standardizer.inverse(z).cpu()))

    chunk = 16 if small else AT_ONCE[denoiser.device.type]
    judge = Judge(event, simulated(case, event, 2 * number, chunk, denoiser.device))
    keep("floor", judge.floor)
    keep("floor_guided", judge.floor_guided)
    drawn = draws(denoiser, aim, number, sampler, pilot, excess, twist, renewal)
    for part in wanted:
        if part == "levels":
            rows = made_anew(denoiser, system, for_network, judge, sampler)
            keep(part, {"rows": rows} | made_by[part] | {"command": command})
            continue
        if part == "resolution":
            rows = resolution(denoiser, system, for_network, judge)
            keep(part, {"rows": rows} | made_by[part] | {"command": command})
            continue
        score = scored(drawn[part]())
        if part == "smoothed":
            score["simulated"] = scored(smooth(denoiser, as_seen(denoiser, system, judge.other)))
        keep(part, score | made_by[part] | {"command": command})


if __name__ == "__main__":
    main()
