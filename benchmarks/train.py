"""Training: samples a second of F24's network, against a plain loop and against the floor."""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from benchmarks.baselines import diffusion as plain
from benchmarks.timing import Row, alternate, compare, seconds, spread
from ddmlib import datasets, networks, schedules, training
from ddmlib.denoisers import NetworkDenoiser

WIDTH, BLOCKS, EMBEDDING, T = 256, 3, 512, 1000
BATCH, GROUPS = 16_384, 256


def networks_pair() -> tuple[networks.ResidualMLP, plain.Network]:
    """Return F24's network twice, ours and the plain one, with the same weights; checked."""
    torch.manual_seed(0)
    mine = networks.ResidualMLP(3, WIDTH, BLOCKS, EMBEDDING, "relu")
    with torch.no_grad():
        for name, parameter in mine.named_parameters():
            if name.endswith("gate"):  # as small as they start they would hide the blocks
                parameter.uniform_(0.1, 0.5)
    other = plain.Network(WIDTH, BLOCKS, EMBEDDING)
    other.load_state_dict(mine.state_dict())
    check(mine, other)
    return mine, other


def check(mine: nn.Module, other: nn.Module) -> None:
    """Stop unless two networks of equal weights agree."""
    x, level = torch.randn(8, 16, 3), torch.linspace(-4, 4, 8)[:, None]
    expected = other(x.reshape(-1, 3), level.expand(8, 16).reshape(-1))
    torch.testing.assert_close(mine(x, level).reshape(-1, 3), expected, rtol=1e-4, atol=1e-4)


def operations(batch: int, groups: int) -> float:
    """Return the operations of the matrix products of one training step, forward and backward.

    A product of (n, a) and (a, b) takes 2 n a b, and as much again for each gradient; inputs of the
    first layer and of FiLM need none.
    """
    ends = 2 * batch * 3 * WIDTH * (2 + 3)
    blocks = BLOCKS * 2 * 2 * batch * WIDTH * WIDTH * 3
    film = BLOCKS * 2 * groups * EMBEDDING * 2 * WIDTH * 2
    return float(ends + blocks + film)


def multiplier(batch: int) -> Callable[[], None]:
    """Return a function that runs the three products of one hidden layer: output and gradients."""
    x, gradient, out = (torch.randn(batch, WIDTH) for _ in range(3))
    weight, weight_out = torch.randn(WIDTH, WIDTH), torch.empty(WIDTH, WIDTH)

    def multiply() -> None:
        torch.mm(x, weight.T, out=out)
        torch.mm(gradient, weight, out=out)
        torch.mm(gradient.T, x, out=weight_out)

    return multiply


def rows(small: bool = False) -> Iterator[Row]:
    """Measure everything; ``small`` only tries the code."""
    batch, groups = (256, 16) if small else (BATCH, GROUPS)
    repeats, batches = (1, 1) if small else (9, 2)
    mine, other = networks_pair()
    schedule = schedules.Cosine(T)
    data = datasets.LORENZ63(datasets.lorenz63(64, 16 if small else 2**14, burn_in=30.0))
    data = data.reshape(-1, 3)

    denoiser = NetworkDenoiser(mine, schedule, datasets.LORENZ63, "velocity")
    ours = training.fit(
        denoiser,
        training.denoising_batches(denoiser, data, batch=batch, groups=groups, levels=T),
        steps=10**9,
        generator=torch.Generator().manual_seed(0),
        lr=3e-4,
        lr_schedule="constant",
        report_every=1,
    )
    alphas, sigmas = schedule(torch.arange(T + 1) / T)
    theirs = plain.training(other, data, alphas, sigmas, batch)

    multiply = multiplier(batch)
    times = alternate(
        lambda: seconds(lambda: [next(ours) for _ in range(batches)]),
        lambda: seconds(lambda: [next(theirs) for _ in range(batches)]),
        lambda: seconds(lambda: [multiply() for _ in range(2 * BLOCKS * batches)]),
        repeats=repeats,
    )
    settings: dict = {"batch": batch, "groups": groups, "width": WIDTH, "blocks": BLOCKS}
    yield compare(
        "training, F24's network, batch 16 384: plain loop",
        times,
        work=batch * batches,
        unit="samples/s",
        aim=3,
        note="DataLoader, FiLM for each sample, Adam",
        settings=settings,
    )
    flop = operations(batch, groups)
    measured = 2 * BLOCKS * 3 * 2 * batch * WIDTH * WIDTH  # in 2 * BLOCKS calls of multiply
    row = compare(
        "training, share of the floor",
        times,
        2,
        scale=flop / measured,
        work=batch * batches,
        unit="samples/s",
        aim=0.65,
        note="floor: the matrix products alone, at the rate measured here",
        settings=settings,
    )
    rates = [measured * batches / t[2] / 1e9 for t in times]
    row.settings |= {"gflop_per_step": flop / 1e9, "gflops_of_products": spread(rates)["ratio"]}
    yield row
