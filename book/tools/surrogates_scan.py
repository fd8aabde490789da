"""Score every surrogate of chapter 05, over seeds; stored as ``book/results/surrogates.json``.

python book/tools/surrogates_scan.py             # all parts, about an hour on one core
python book/tools/surrogates_scan.py ridge dense # some of them
python book/tools/surrogates_scan.py --full      # F24's scale: 10⁷ states, networks of width 256

Each result is written as soon as it is there, and what is there is not computed again: a run that
was interrupted goes on where it stopped.  Delete the file to start afresh.
"""

import argparse
import copy
import functools
import itertools
import math
from pathlib import Path

import results
import torch
from scipy.spatial import cKDTree
from torch import Tensor, nn

from ddmlib import datasets, dynamics, metrics, networks, pretrained, training
from ddmlib import surrogates as s

SEEDS = (0, 1, 2)
STEPS = 10  # of dt = 0.01: the increment of F24
STATES, LARGE = 2**16, 2**20
PENALTIES = [10.0**-k for k in range(4, 13)]  # the first one is F24's
SIZES = [2**k for k in (3, 5, 7, 9, 11, 13)]
NOISES = (0.005, 0.02, 0.1, 0.3, 1.0)
LENGTHS = (1, 2, 5, 20, 50, 100)
LEADS = [*range(1, 11), *range(12, 31, 2), *range(35, 101, 5)]
STARTS, LATE = 1024, 50
FLAT = 0.1  # a network is trained until doubling the steps gains less than this share


class Store:
    """The result file as a dictionary, saved after each entry."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = results.load(path)

    def __call__(self, part: str, key: str, compute) -> dict | list:
        entries = self.data.setdefault(part, {})
        if key not in entries:
            entries[key] = rounded(compute())
            full = " --full" if self.path.stem.endswith("full") else ""
            self.data |= results.made(f"python book/tools/surrogates_scan.py{full}") | {
                "settings": {
                    "states": STATES, "seeds": SEEDS, "steps": STEPS, "leads": LEADS,
                    "penalties": PENALTIES, "starts": STARTS, "late": LATE,
                },
            }  # fmt: skip
            results.save(self.data, self.path)
            print(part, key, str(entries[key])[:150], flush=True)
        return entries[key]


def rounded(value):
    """Round floats within lists and dictionaries to four digits."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def rmse(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).square().mean().sqrt())


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- data


def trajectories(seed: int, number: int, tail: int) -> Tensor:
    """Return standardised trajectories, (n, length, 3), for ``number`` starts 10 steps apart."""
    n = min(4096, number)
    x = datasets.lorenz63(n, number // n * STEPS + tail, seed=seed)
    return datasets.LORENZ63(x)


@functools.lru_cache(maxsize=4)
def states(seed: int, number: int = STATES) -> tuple[Tensor, dict[int, Tensor]]:
    """Return states (number, 3) in random order and their increments over several lengths."""
    lengths = sorted({STEPS, *LENGTHS}) if number <= STATES else [STEPS]
    z = trajectories(seed, number, lengths[-1])
    order = torch.randperm(number, generator=seeded(seed))
    end = z.shape[1] - lengths[-1]
    start = z[:, :end:STEPS].reshape(-1, 3)[order]
    ends = {k: z[:, k : end + k : STEPS].reshape(-1, 3)[order] for k in lengths}
    return start, {k: v - start for k, v in ends.items()}


def train(seed: int, number: int = STATES):
    return states(100 + seed, number)


def validation():
    return states(50, 4096)


def test():
    return states(2, 8192)


@functools.lru_cache(maxsize=1)
def truth() -> Tensor:
    """Return test trajectories of 100 increments, integrated in float64: (STARTS, 101, 3)."""
    x0 = datasets.LORENZ63.inverse(states(2, 8192)[0][:STARTS].double())
    x = dynamics.integrate(dynamics.Lorenz63(), x0, dt=0.01, steps=1000, every=10)
    return datasets.LORENZ63(x)


@functools.lru_cache(maxsize=1)
def reference() -> tuple[Tensor, float]:
    """Return the histogram of the attractor and the floor of independent states, as many."""
    x = datasets.LORENZ63(datasets.lorenz63(4096, 512, every=2, seed=3))
    floor = metrics.hellinger_floor(x, STARTS * LATE, generator=seeded(0))
    return metrics.histogram(x), floor


# ---- scores


class Exact(nn.Module):
    """The true increment: the oracle of the roll-out scores."""

    def forward(self, z: Tensor) -> Tensor:
        x = start = datasets.LORENZ63.inverse(z)
        for _ in range(STEPS):
            x = dynamics.rk4(dynamics.Lorenz63().tendency, x, 0.01)
        return (x - start) / datasets.LORENZ63.std.to(z)


def forecast(model, dtype=torch.float32, exponents: bool = True) -> dict:
    """Score roll-outs: error by lead time, law of the late states, Lyapunov exponents."""
    path = s.rollout(model, truth()[:, 0].to(dtype), 100).double()
    alive = (path.abs() < 10).all(-1).all(-1)
    error = (path - truth()).square().mean(-1)  # (STARTS, 101)
    counts, floor = reference()
    result = {
        "rmse": [float(v) for v in error.mean(0).sqrt()[LEADS]],
        "median_error": [float(v) for v in error.sqrt().median(0).values[LEADS]],
        "diverged": float(1 - alive.double().mean()),
        "floor": floor,
    }
    late = path[alive, -LATE:].reshape(-1, 3)
    if len(late):
        h = metrics.hellinger_counts(metrics.histogram(late), counts)
        result |= {"hellinger": h, "excess": metrics.excess(h, floor)}
    if exponents:
        found = s.lyapunov_exponents(
            model, truth()[:64, 50].to(dtype), interval=0.1, steps=200, spin_up=20
        )
        found = found[found.isfinite().all(1)]
        if len(found) > 1:
            result["lyapunov"] = found.mean(0).tolist()
            result["lyapunov_error"] = (found.std(0) / len(found) ** 0.5).tolist()
    return result


# ---- ridge


class Ridge:
    """A ridge on features, for all targets and sizes of the studies at once."""

    def __init__(self, features, seed: int, number: int = STATES) -> None:
        self.features = features
        x, y = train(seed, number)
        self.names, columns, edges = ["clean"], [y[STEPS]], [0, 2**15, 2**17, number]
        if number <= STATES:
            g = seeded(seed)
            edges = [0, *SIZES, number]
            self.names += [f"noise {v}" for v in NOISES] + [f"length {k}" for k in LENGTHS]
            columns += [y[STEPS] + v * torch.randn(x.shape, generator=g) for v in NOISES]
            columns += [y[k] for k in LENGTHS]
        targets, total = torch.cat(columns, 1), None
        self.moments = {}
        for a, b in itertools.pairwise(edges):
            part = s.moments(s.featured(features, x[a:b], targets[a:b]))
            total = part if total is None else s.merge(total, part)
            self.moments[b] = total
        with torch.no_grad():
            self.inputs = {
                name: torch.cat([features(a) for a in data[0].split(s.regression.CHUNK)])
                for name, data in (("validation", validation()), ("test", test()))
            }

    def truths(self, data) -> Tensor:
        y = data[1]
        lengths = [int(v.split()[1]) if v.startswith("length") else STEPS for v in self.names]
        return torch.cat([y[k] for k in lengths], 1).double()

    def scores(self, n: int) -> tuple[dict, dict]:
        """Return {target: errors} and {"f24", "tuned": head} of n training states."""
        heads = [s.ridge(self.moments[n], penalty) for penalty in PENALTIES]
        errors = {}
        for name, data in (("validation", validation()), ("test", test())):
            truth = self.truths(data)
            errors[name] = [
                (head(self.inputs[name]) - truth).square().unflatten(1, (-1, 3)).mean((0, 2)).sqrt()
                for head in heads
            ]
        found, best = {}, {}
        for i, target in enumerate(self.names):
            best[target] = min(range(len(heads)), key=lambda j: float(errors["validation"][j][i]))
            found[target] = {
                "f24": float(errors["test"][0][i]),
                "tuned": float(errors["test"][best[target]][i]),
                "penalty": PENALTIES[best[target]],
            }
        pick = {"f24": heads[0], "tuned": heads[best["clean"]]}
        return found, {
            name: s.LinearHead(h.centre, h.weight[:, :3], h.mean[:3]) for name, h in pick.items()
        }


def high_times(denoiser, low: float, high: float, number: int) -> list[float]:
    """Return pseudo-times whose sigma/alpha is spaced evenly in its logarithm."""
    ratios = torch.logspace(math.log10(low), math.log10(high), number, dtype=torch.float64)
    return denoiser.schedule.time(ratios).tolist()


def main_denoiser():
    return pretrained.load("lorenz63-states", device="cpu")[0]


def untrained(seed: int, gates: float | None):
    """Return the main architecture as initialised, with its gates as F24's (1e-6) or opened."""
    denoiser = copy.deepcopy(main_denoiser())
    torch.manual_seed(seed)
    denoiser.network = networks.ResidualMLP(**denoiser.network.settings)
    if gates is not None:
        for block in denoiser.network.blocks:
            nn.init.constant_(block.gate, gates)
    return denoiser


def fourier(number: int, length: float):
    return lambda seed: s.RandomFourier(3, number, length=length, generator=seeded(seed))


def times_part(store: Store) -> None:
    """Which noise levels: one at a time, and several sets of them, on validation states."""
    denoiser = main_denoiser()

    def score(times):
        found, _ = Ridge(s.DenoiserFeatures(denoiser, times), 0).scores(STATES)
        return {
            "ratios": denoiser.schedule.ratio(torch.tensor(times)).abs().tolist(),
            **found["clean"],
        }

    for ratio in (0.002, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 40):
        store("single", f"{ratio}", lambda r=ratio: score(high_times(denoiser, r, r, 1)))
    store("times", "F24's six", lambda: score(s.F24_TIMES))
    for low, high, number in (
        (0.05, 10, 6),
        (0.3, 10, 6),
        (0.3, 40, 6),
        (0.002, 20, 12),
        (0.3, 40, 12),
    ):
        key = f"{number} from {low} to {high}"
        store("times", key, lambda v=(low, high, number): score(high_times(denoiser, *v)))
    for length in (1 / (2 * math.pi), 0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0):
        key = f"{length:.3f}"
        store(
            "fourier", key, lambda v=length: Ridge(fourier(256, v)(0), 0).scores(STATES)[0]["clean"]
        )


def best_length(store: Store) -> float:
    scores = store.data["fourier"]
    return float(min(scores, key=lambda k: scores[k]["tuned"]))


def feature_maps(store: Store) -> dict:
    """Return {name: (seeds, maker of features, roll-outs of the F24 and of the tuned penalty)}."""
    main, length = main_denoiser(), best_length(store)
    high = high_times(main, 0.3, 40, 6)
    maps = {
        "fine-tuned": (SEEDS, lambda seed: s.DenoiserFeatures(main)),
        "fine-tuned, one time": (SEEDS, lambda seed: s.DenoiserFeatures(main, (0.4,))),
        "fine-tuned, high noise": (SEEDS, lambda seed: s.DenoiserFeatures(main, high)),
        "untrained": (SEEDS, lambda seed: s.DenoiserFeatures(untrained(seed, None))),
        "untrained, gates open": (SEEDS, lambda seed: s.DenoiserFeatures(untrained(seed, 1.0))),
        "untrained, gates open, high noise": (
            SEEDS, lambda seed: s.DenoiserFeatures(untrained(seed, 1.0), high)
        ),
        "fourier 256, F24's length": (SEEDS, fourier(256, 1 / (2 * math.pi))),
        "fourier 1536, F24's length": (SEEDS, fourier(1536, 1 / (2 * math.pi))),
        "fourier 256": (SEEDS, fourier(256, length)),
        "fourier 768": (SEEDS, fourier(768, length)),
        "fourier 1536": (SEEDS, fourier(1536, length)),
        "polynomials": (SEEDS, lambda seed: s.Polynomials(3, 4)),
    }  # fmt: skip
    for head in ("velocity", "noise", "state"):
        for kind in ("cosine", "linear"):

            def make(seed, name=f"lorenz63-f24-{head}-{kind}"):
                return s.DenoiserFeatures(pretrained.load(f"{name}-{seed}", device="cpu")[0])

            maps[f"F24 {head} {kind}"] = ((0, 1), make)
    return maps


def ridge_part(store: Store) -> None:
    """Every feature map with a ridge: one step, roll-out, and the three studies."""
    for name, (seeds, make) in feature_maps(store).items():
        for seed in seeds:

            def compute(make=make, seed=seed, name=name):
                features = make(seed)
                study = Ridge(features, seed)
                result = {"features": study.inputs["test"].shape[1]}
                for n in study.moments:
                    found, heads = study.scores(n)
                    result.setdefault("sizes", {})[str(n)] = found["clean"]
                result["studies"] = found
                for kind, head in heads.items():
                    if kind == "f24" or not (name.startswith("F24") or name == "untrained"):
                        model = s.Surrogate(features, head)
                        result[kind] = forecast(model, exponents=seed == 0)
                return result

            store("ridge", f"{name} / {seed}", compute)


def large_part(store: Store) -> None:
    """Up to a million training states, one seed."""
    maps = feature_maps(store)
    for name in ("fine-tuned", "fourier 768", "polynomials"):

        def compute(name=name):
            model = Ridge(maps[name][1](0), 0, LARGE)
            return {str(n): model.scores(n)[0]["clean"] for n in model.moments}

        store("large", name, compute)


# ---- networks


class Residual(nn.Module):
    """The denoiser's own architecture without a noise level, trained from scratch."""

    def __init__(self, **settings) -> None:
        super().__init__()
        self.network = networks.ResidualMLP(**settings)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x, x.new_zeros(()))


NETWORKS = {
    "dense 1": lambda: networks.Dense(layers=1),
    "dense 2": lambda: networks.Dense(layers=2),
    "dense 3": lambda: networks.Dense(layers=3),
    "dense 3, silu": lambda: networks.Dense(layers=3, activation="silu"),
    "residual": lambda: Residual(width=128, blocks=4, activation="silu"),
}
RATES = (1e-3, 3e-3, 1e-2)
SHORT, FIRST, LAST = 1500, 4000, 16_000


def descend(make, x, y, *, steps: int, lr: float, seed: int, early: bool = False):
    """Train a network (or a head on given features); return it with its validation errors."""
    torch.manual_seed(seed)
    model = s.ScaledHead(make(), s.moments([(x, y)]))
    average = training.Average(model, 0.999)
    loss = s.regression_batches(model, x, y, batch=256)
    inputs, increments = validation()
    best, curve = (math.inf, None), []
    records = training.fit(
        model, loss, steps=steps, lr=lr, average=average, generator=seeded(seed),
        report_every=max(1, steps // 8),
    )  # fmt: skip
    for record in records:
        if early:
            with torch.no_grad():
                error = rmse(average.module(inputs), increments[early])
            curve.append([record.step, error])
            if error < best[0]:
                best = error, copy.deepcopy(average.module)
    return (best[1] or average.module), curve


def one_step(model, data) -> float:
    """Return the error of the increment over states (x, {length: increment})."""
    with torch.no_grad():
        return rmse(model(data[0]), data[1][STEPS])


@functools.lru_cache(maxsize=1)
def trained(name: str, seed: int, steps: int, lr: float):
    x, y = train(seed)
    return descend(NETWORKS[name], x, y[STEPS], steps=steps, lr=lr, seed=seed)[0]


def dense_part(store: Store) -> None:
    """Networks from scratch: learning rate swept, trained until doubling the steps is in vain."""
    for name in NETWORKS:
        rates = store(
            "rates",
            name,
            lambda name=name: {
                f"{lr:g}": one_step(trained(name, 0, SHORT, lr), validation()) for lr in RATES
            },
        )
        lr = float(min(rates, key=lambda k: rates[k] or math.inf))
        first, steps, best = lr, FIRST, (math.inf, FIRST, lr)
        while steps <= LAST:  # each doubling is a run of its own: the learning rate ends at zero

            def doubled(name=name, steps=steps, lr=lr):
                return one_step(trained(name, 0, steps, lr), validation())

            swept = "" if lr == first else f" / {lr:g}"
            now = store("doubling", f"{name} / {steps}{swept}", doubled)
            if now > best[0] and lr > min(RATES):  # unstable over so many steps: a smaller rate
                lr = max(rate for rate in RATES if rate < lr)
                continue
            flat = now > (1 - FLAT) * best[0]
            best = min(best, (now, steps, lr))
            if flat:
                break
            steps *= 2
        _, steps, lr = best
        for seed in SEEDS:

            def final(name=name, seed=seed, steps=steps, lr=lr):
                model = trained(name, seed, steps, lr)
                result = {"steps": steps, "lr": lr, "one_step": one_step(model, test())}
                return result | forecast(model, exponents=seed == 0)

            store("networks", f"{name} / {seed}", final)


def heads_part(store: Store) -> None:
    """MLP heads on frozen features, those of F24."""
    main = main_denoiser()
    for name, times in (("fine-tuned", s.F24_TIMES), ("fine-tuned, one time", (0.4,))):
        features = s.DenoiserFeatures(main, times)
        width = 128 * len(times)

        def train_head(seed, steps, lr, features=features, width=width):
            x, y = train(seed)
            phi = torch.cat([f for f, _ in s.featured(features, x, y[STEPS])])
            make = functools.partial(networks.Dense, width, 3, width=256, layers=1)
            return s.Surrogate(
                features, descend(make, phi, y[STEPS], steps=steps, lr=lr, seed=seed)[0]
            )

        rates = store("rates", f"MLP on {name}", lambda: {
            f"{lr:g}": one_step(train_head(0, SHORT, lr), validation()) for lr in (3e-4, *RATES)
        })  # fmt: skip
        lr = float(min(rates, key=lambda k: rates[k] or math.inf))
        for seed in SEEDS:

            def compute(seed=seed, lr=lr):
                model = train_head(seed, 2 * FIRST, lr)
                return {
                    "steps": 2 * FIRST,
                    "lr": lr,
                    "one_step": one_step(model, test()),
                } | forecast(model, exponents=False)

            store("networks", f"MLP on {name} / {seed}", compute)


def studies_part(store: Store) -> None:
    """The dense network in the three studies; stopped early where its validation error is least."""
    (x, y), (xt, yt) = train(0), test()
    make, lr = NETWORKS["dense 3, silu"], 3e-3

    def score(inputs, targets, length=STEPS):
        model, _ = descend(make, inputs, targets, steps=FIRST, lr=lr, seed=0, early=length)
        with torch.no_grad():
            return rmse(model(xt), yt[length])

    for n in [*SIZES, STATES]:
        store("dense studies", f"size {n}", lambda n=n: score(x[:n], y[STEPS][:n]))
    for level in NOISES:
        noise = level * torch.randn(x.shape, generator=seeded(7))
        store("dense studies", f"noise {level}", lambda e=noise: score(x, y[STEPS] + e))
    for length in LENGTHS:
        store("dense studies", f"length {length}", lambda k=length: score(x, y[k], k))


def oracle_part(store: Store) -> None:
    """The exact increment, analogs, and persistence: what the scores should be, and how bad."""
    for name, dtype in (("float64", torch.float64), ("float32", torch.float32)):

        def compute(dtype=dtype):
            xt, _ = test()
            exact = rmse(Exact()(xt.to(dtype)), Exact()(xt.double()))
            return {"one_step": exact, **forecast(Exact(), dtype)}

        store("oracle", name, compute)

    def analog(n):
        (x, y), (xt, yt) = train(0), test()
        _, index = cKDTree(x[:n].numpy()).query(xt.numpy())
        return rmse(y[STEPS][:n][torch.as_tensor(index)], yt[STEPS])

    for n in [*SIZES, STATES]:
        store("analog", str(n), lambda n=n: analog(n))
    store("oracle", "rms of the increment", lambda: {
        str(k): rmse(v, torch.zeros(1)) for k, v in test()[1].items()
    })  # fmt: skip


PARTS = {
    "oracle": oracle_part,
    "times": times_part,
    "ridge": ridge_part,
    "dense": dense_part,
    "studies": studies_part,
    "heads": heads_part,
    "large": large_part,
}


def main() -> None:
    """Run the parts that are named, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART")
    parser.add_argument("--full", action="store_true", help="F24's scale")
    arguments = parser.parse_args()
    if arguments.full:
        globals().update(LARGE=2**23, FIRST=32_000, LAST=2**18, SHORT=10_000)
    store = Store(
        results.FOLDER / ("surrogates-full.json" if arguments.full else "surrogates.json")
    )
    for name in arguments.parts or PARTS:
        PARTS[name](store)


if __name__ == "__main__":
    main()
