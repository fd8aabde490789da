"""Score-based assimilation: composed windows, guided evaluations, posteriors, particles."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.baselines import diffusion
from benchmarks.baselines import trajectories as plain
from benchmarks.timing import Row, alternate, compare, seconds, spread
from ddmlib import assimilation as da
from ddmlib import datasets, dynamics, guidance, networks, pretrained, sampling
from ddmlib.trajectories import TrajectoryDenoiser

WINDOWS, CONVOLUTION = "noisy-lorenz63-window-k2", "noisy-lorenz63-conv"
LEVELS = "noisy-lorenz63-levels"
LENGTH, CHUNK = 65, 16  # states of a trajectory; trajectories at a time
LEVEL = 0.5  # pseudo-time of single evaluations, whose cost is the same at all
LO, HI = {"every": 8, "std": 0.05}, {"every": 1, "std": 0.25}  # R23's, of standardised states
PARTICLES = 2**14


# Their quality with LEVELS: "cheap" and "same" in book/results/posterior.json, chapter 08.
R23: dict[str, Any] = {"steps": 256, "corrections": 4, "tau": 0.5, "gamma": 3e-2}
OURS: dict[str, Any] = {"steps": 39, "products": (2, 1), "corrections": 3, "tau": 0.7}
R23_COST = 2 * sampling.evaluations("ddim", R23["steps"], R23["corrections"])


def denoiser_of(name: str) -> Any:
    """Return a denoiser of trajectories; untrained, for weights take no time, with open gates."""
    torch.manual_seed(0)
    denoiser: Any = pretrained.build(pretrained.RECIPES[name].model).requires_grad_(False)
    for parameter_name, parameter in denoiser.network.named_parameters():
        if parameter_name.endswith("gate"):  # as small as they start they would hide the blocks
            parameter.uniform_(0.1, 0.5)
    windows = isinstance(denoiser.network, networks.WindowMLP)
    return TrajectoryDenoiser(denoiser) if windows else denoiser


def observed(process: dict[str, Any], n: int) -> da.Observation:
    """Return observations of the first component along n trajectories of the noisy chain."""
    chain, g = dynamics.NoisyLorenz63(), torch.Generator().manual_seed(1)
    x = dynamics.simulate(chain, chain.initial(n, g), steps=LENGTH - 1, generator=g)
    std = process["std"] * float(datasets.NOISY_LORENZ63.std[0])
    return da.observe(x, da.component(0), std, every=process["every"], generator=g)


def level_of(denoiser: Any, t: float = LEVEL) -> tuple[Tensor, Tensor]:
    """Return (alpha_t, sigma_t) as a sampler has them."""
    alpha, sigma = denoiser.schedule(torch.tensor([t], dtype=torch.float64))
    return alpha.float(), sigma.float()


def trajectories(n: int) -> Tensor:
    """Return noise to evaluate networks on, (n, 65, 3)."""
    return torch.randn(n, LENGTH, 3, generator=torch.Generator().manual_seed(2))


def product(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return a product with the transposed Jacobian, and compute the function for it."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x), x, x.detach())[0]


def timer(function: Callable[..., object], *arguments: Any) -> Callable[[], float]:
    """Return a function that times one call."""
    return functools.partial(seconds, functools.partial(function, *arguments))


def composition(small: bool) -> Iterator[Row]:
    """Time the composition of windows, alone and with a product with its Jacobian."""
    n, repeats = (2, 1) if small else (4 * CHUNK, 15)
    mine = denoiser_of(WINDOWS).denoiser.network
    s, body = mine.settings, mine.body
    other = diffusion.Network(
        s["width"], s["blocks"], s["embedding"], nn.SiLU, body.first.in_features
    )
    other.load_state_dict(body.state_dict())
    other.requires_grad_(False)
    x, level = trajectories(n), torch.tensor(0.3)
    rows = n * (LENGTH - mine.window + 1)

    def ours(x: Tensor) -> Tensor:
        return mine.along(x, level)

    def shared(x: Tensor) -> Tensor:
        return plain.composed(other, x, level.reshape(1), mine.window)

    def each(x: Tensor) -> Tensor:
        return plain.composed(other, x, level.expand(rows), mine.window)

    for function in (shared, each):
        torch.testing.assert_close(ours(x), function(x), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(product(ours, x), product(function, x), rtol=1e-3, atol=1e-3)
    for what, run in (
        ("forward", torch.no_grad()(lambda function, x: function(x))),
        ("forward and Jacobian product", product),
    ):
        times = alternate(*[timer(run, f, x) for f in (ours, each, shared)], repeats=repeats)
        for column, note in ((1, "FiLM for each window"), (2, "FiLM shared by all windows")):
            yield compare(
                f"composition of windows, {what}: unfold, network, fold",
                times,
                column,
                work=n,
                unit="trajectories/s",
                aim=1.5,
                note=f"{note}; k = 2, width {s['width']}, {n} trajectories of {LENGTH} states",
            )


def operations(network: Any, length: int = LENGTH) -> float:
    """Return the operations of the matrix products of one evaluation of a trajectory.

    A product of (n, a) and (a, b) takes 2 n a b.  FiLM of the one level is left out.
    """
    if not isinstance(network, networks.WindowMLP):
        layers = [m for m in network.modules() if isinstance(m, networks.Convolution)]
        return 2.0 * length * sum(layer.weight.numel() for layer in layers)
    body: Any = network.body
    rows, layers = length - network.window + 1, [body.first]
    for block in body.blocks:
        layers += [block.inner, block.outer]
    last = length * network.dim * body.last.in_features  # no output that is dropped
    return 2.0 * (rows * sum(layer.weight.numel() for layer in layers) + last)


def multiplier(network: Any, rows: int) -> tuple[Callable[[int], None], float]:
    """Return a function that runs the products of hidden layers, outputs and gradients of inputs,
    and the operations that each layer takes."""
    body: Any = network.body if isinstance(network, networks.WindowMLP) else network
    weight = body.blocks[0].inner.weight.detach()
    x, out = torch.randn(rows, weight.shape[1]), torch.empty(rows, weight.shape[0])
    gradient, back = torch.randn_like(out), torch.empty_like(x)

    def multiply(layers: int) -> None:
        for _ in range(layers):
            torch.mm(x, weight.T, out=out)
            torch.mm(gradient, weight, out=back)

    return multiply, 4.0 * rows * weight.numel()


def guided(small: bool) -> Iterator[Row]:
    """Time evaluations given observations, as a share of their matrix products."""
    n, repeats = (2, 1) if small else (CHUNK, 15)
    x, observation = trajectories(n), observed(HI, n)
    for name in (WINDOWS, CONVOLUTION):
        denoiser = denoiser_of(name)
        network = denoiser.denoiser.network if name == WINDOWS else denoiser.network
        multiply, one = multiplier(network, n * LENGTH)
        measured = 10 * one
        flop = 2 * n * operations(network)
        for rule in (
            guidance.GaussianLikelihood(denoiser, observation, gamma=3e-2),
            guidance.MMPS(denoiser, observation, products=1),
        ):
            times = alternate(
                timer(rule.denoise, x, *level_of(denoiser)),
                timer(multiply, 10),
                repeats=repeats,
            )
            row = compare(
                f"guided evaluation, {type(rule).__name__}, {name}: floor",
                times,
                scale=flop / measured,
                work=n,
                unit="trajectories/s",
                aim=0.5,
                note="share of the matrix products, forward and one Jacobian product, "
                f"{n} trajectories, all states observed",
            )
            rates = [measured / t[1] / 1e9 for t in times]
            row.settings |= {"gflop": flop / 1e9, "gflops_of_products": spread(rates)["ratio"]}
            yield row


def check(denoiser: Any) -> None:
    """Stop unless the plain guidance, sampler and forecast are ours."""
    x, observation = trajectories(2), observed(LO, 2)
    rule = guidance.GaussianLikelihood(denoiser, observation, gamma=R23["gamma"])
    alpha, sigma = level_of(denoiser, 0.2)
    eps = plain_noise(denoiser, observation)(x, float(alpha), float(sigma))
    expected = rule.denoise(x, alpha, sigma)
    torch.testing.assert_close((x - sigma * eps) / alpha, expected, rtol=1e-3, atol=1e-3)
    grid = torch.tensor([0.2, 0.19, 0.18], dtype=torch.float64)
    alphas, sigmas = (v.tolist() for v in denoiser.schedule(grid))
    run: dict[str, Any] = {"corrections": 1, "tau": 0.25}
    mine = sampling.reverse(rule, x, grid, **run, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    noise = plain_noise(denoiser, observation)
    other = plain.sampler(noise, x, alphas, sigmas, **run, generator=generator)
    torch.testing.assert_close(other, mine, rtol=1e-3, atol=1e-3)


def plain_noise(
    denoiser: Any, observation: da.Observation
) -> Callable[[Tensor, float, float], Tensor]:
    """Return R23's guided noise, written plainly, with the same network."""
    standardizer = datasets.NOISY_LORENZ63
    y = (observation.y - standardizer.mean[:1]) / standardizer.std[:1]
    std, gamma = float(observation.std) / float(standardizer.std[0]), R23["gamma"]

    def denoise(x: Tensor, alpha: float, sigma: float) -> Tensor:
        return denoiser.denoise(x, torch.tensor([alpha]), torch.tensor([sigma]))

    def noise(x: Tensor, alpha: float, sigma: float) -> Tensor:
        return plain.guided_noise(denoise, x, alpha, sigma, y, observation.every, std, gamma)

    return noise


def posterior(small: bool, folder: Path | None) -> Iterator[Row]:
    """Compare posterior samples of equal quality: how many evaluations, and what one takes."""
    try:
        denoiser: Any = pretrained.load(LEVELS, "cpu", folder)[0]
    except RuntimeError:
        denoiser = denoiser_of(LEVELS)  # as quick as the trained one
    settings = {"ours": OURS, "baseline": R23}
    cost = guidance.evaluations(denoiser, **OURS)
    yield Row(
        "posterior of noisy Lorenz 63, evaluations for equal quality: R23's recipe",
        cost,
        R23_COST,
        "evaluations",
        8,
        ratio=R23_COST / cost,
        note="the same network; a Jacobian product counts as one evaluation",
        settings=settings,
    )
    check(denoiser)
    n, steps, repeats = (2, 2, 1) if small else (4 * CHUNK, 8, 5)
    seen, x = observed(LO, 1), trajectories(n)
    noise = plain_noise(denoiser, seen)
    tried = OURS | ({"steps": 3} if small else {})
    grid = sampling.times(denoiser.schedule, R23["steps"])[: steps + 1]
    alphas, sigmas = (v.tolist() for v in denoiser.schedule(grid))
    corrections, tau = R23["corrections"], R23["tau"]

    def ours() -> Tensor:
        g = torch.Generator().manual_seed(0)
        parts = [part.shape for part in x.split(CHUNK)]
        drawn = [guidance.posterior(denoiser, seen, s, **tried, generator=g) for s in parts]
        return torch.cat(drawn)

    def theirs() -> Tensor:
        g = torch.Generator().manual_seed(0)
        return plain.sampler(noise, x, alphas, sigmas, corrections, tau, g)

    times = alternate(lambda: seconds(ours), lambda: seconds(theirs), repeats=repeats)
    share = cost / guidance.evaluations(denoiser, **tried)
    runs = steps * (1 + corrections)
    yield from posterior_times([(share * a, b) for a, b in times], cost, n, runs, settings)


def posterior_times(
    times: list[tuple[float, float]], cost: int, n: int, runs: int, settings: dict
) -> Iterator[Row]:
    """Yield rows of the time of an evaluation and of a trajectory, with ``runs`` guided
    evaluations of R23's timed."""
    scale = R23_COST / (2 * runs)
    each: list[tuple[float, ...]] = []
    for mine, other in times:
        each.append((1e6 * mine / cost / n, 1e6 * other / (2 * runs) / n))
    yield compare(
        "posterior, time of one evaluation: R23's recipe, plain",
        each,
        unit="µs",
        note="network or Jacobian product, a trajectory; multiplies with the row above",
        settings=settings,
    )
    yield compare(
        "posterior of equal quality, trajectories a second: R23's recipe, plain",
        [*times],
        scale=scale,
        work=n,
        unit="trajectories/s",
        aim=8,
        note=f"the two rows above together; {runs} guided evaluations of R23's timed, scaled",
        settings=settings,
    )


def particles(small: bool) -> Row:
    """Time the bootstrap particle filter."""
    n, repeats = (256, 1) if small else (PARTICLES, 7)
    chain, seen = dynamics.NoisyLorenz63(), observed(LO, 1)
    observation = dataclasses.replace(seen, y=seen.y[0])
    x = chain.initial(n, torch.Generator().manual_seed(3))
    start, y = x.numpy(), observation.y[:, 0].numpy()
    torch.testing.assert_close(
        torch.from_numpy(plain.forecast(start, chain.dt)), chain.forecast(x), rtol=1e-4, atol=1e-4
    )

    def ours() -> da.Filtering:
        g = torch.Generator().manual_seed(0)
        return da.bootstrap_filter(
            chain, observation, length=LENGTH, particles=n, paths=n, initial=x, generator=g
        )

    def theirs() -> np.ndarray:
        rng, std = np.random.default_rng(0), float(observation.std)
        return plain.particle_filter(rng, start, y, observation.every, std, chain.dt)

    if not small:  # both posteriors' means, to the degeneracy of so few particles
        mean = torch.from_numpy(theirs()).mean(0)
        torch.testing.assert_close(ours().paths.mean(0), mean, rtol=0, atol=3.0)
    return compare(
        f"particle filter, {n} particles: NumPy, whole paths resampled",
        alternate(lambda: seconds(ours), lambda: seconds(theirs), repeats=repeats),
        work=n * (LENGTH - 1),
        unit="steps/s",
        note=f"R23's bootstrap filter; {LENGTH} states, 9 observations, as many paths kept",
    )


def rows(small: bool = False, folder: Path | None = None) -> Iterator[Row]:
    """Measure everything; ``small`` only tries the code."""
    yield from composition(small)
    yield from guided(small)
    yield from posterior(small, folder)
    yield particles(small)
