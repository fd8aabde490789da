"""Heads on features: ridge regression from streamed moments, and networks trained by descent."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import checks, networks
from ..training import Loss

Map = Callable[[Tensor], Tensor]

CHUNK = 4096  # states whose features are held at once: 50 MB for 1536 of them in float64


class Moments(NamedTuple):
    """Means and summed products of deviations of k features and, behind them, ``targets`` targets.

    ``mean`` (k + targets,) and ``scatter`` (k + targets, k + targets) are float64; ``size`` is the
    number of states.
    """

    mean: Tensor
    scatter: Tensor
    size: int
    targets: int


def moments(batches: Iterable[tuple[Tensor, Tensor]]) -> Moments:
    """Gather the moments of features and targets in one pass over batches.

    Each batch is centred on its own mean, and then merged with what came before, so that nothing
    is lost to a large mean.  Memory is that of the result and of one batch.

    Parameters
    ----------
    batches : iterable of (features, targets)
        Shapes (n, k) and (n, m); sizes n may differ, and the order does not matter.

    Returns
    -------
    Moments

    Raises
    ------
    TypeError, ValueError
        If a batch is not finite, shapes disagree, or there are fewer than two states in all.
    """
    total: Moments | None = None
    for features, y in batches:
        checks.finite("features", features)
        checks.finite("targets", y)
        if features.ndim != 2 or y.ndim != 2 or len(features) != len(y):
            raise ValueError(
                "features and targets must have shapes (n, k) and (n, m), got "
                f"{tuple(features.shape)} and {tuple(y.shape)}"
            )
        if not len(y):
            continue
        rows = torch.cat((features.detach().double(), y.detach().double()), dim=1)
        mean = rows.mean(0)
        rows -= mean
        part = Moments(mean, rows.mT @ rows, len(rows), y.shape[1])
        total = part if total is None else merge(total, part)
    if total is None or total.size < 2:
        raise ValueError("batches must hold at least two states in all")
    return total


def merge(a: Moments, b: Moments) -> Moments:
    """Return the moments of two sets of states taken together (Chan, Golub and LeVeque)."""
    if (len(a.mean), a.targets) != (len(b.mean), b.targets):
        raise ValueError(
            f"batches must all have {len(a.mean) - a.targets} features and {a.targets} targets, "
            f"got {len(b.mean) - b.targets} and {b.targets}"
        )
    size, shift = a.size + b.size, b.mean - a.mean
    scatter = a.scatter + b.scatter
    scatter.addr_(shift, shift, alpha=a.size * b.size / size)
    return Moments(a.mean + shift * (b.size / size), scatter, size, a.targets)


def featured(
    features: Map, x: Tensor, y: Tensor, chunk: int = CHUNK
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (features(x), y) in chunks of states; x (n, d) and y (n, m)."""
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(
            f"x and y must have shapes (n, d) and (n, m), got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    for a, b in zip(x.split(chunk), y.split(chunk), strict=True):
        with torch.no_grad():
            phi = features(a)
        yield phi, b


class LinearHead(nn.Module):
    """The map of features (*batch, k) to mean + (features - centre) @ weight, in float64.

    The weights of collinear features are large and cancel: float32 would not do.
    """

    centre: Tensor
    weight: Tensor
    mean: Tensor

    def __init__(self, centre: Tensor, weight: Tensor, mean: Tensor) -> None:
        super().__init__()
        self.register_buffer("centre", centre)
        self.register_buffer("weight", weight)
        self.register_buffer("mean", mean)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (*batch, k) to targets (*batch, m), float64."""
        checks.last_axis("features", features, len(self.centre))
        return self.mean + (features.double() - self.centre) @ self.weight


def _split(total: Moments) -> tuple[int, Tensor, Tensor]:
    """Return the number of features, the means, and the standard deviations (1 if constant)."""
    std = (total.scatter.diagonal() / total.size).sqrt()
    # a feature that varies by less than float32 can tell is a constant and its rounding errors
    constant = std <= torch.finfo(torch.float32).eps * torch.hypot(total.mean, std)
    return len(total.mean) - total.targets, total.mean, torch.where(constant, 1.0, std)


def ridge(total: Moments, penalty: float = 1e-4) -> LinearHead:
    """Solve the ridge regression of the targets on the features (see `ddmlib.surrogates`).

    Parameters
    ----------
    total : Moments
        From `moments`; several penalties cost one pass.
    penalty : float
        Added to the diagonal of the correlation matrix of the features (F24: 1e-4).

    Returns
    -------
    LinearHead
    """
    checks.positive("penalty", penalty)
    k, mean, std = _split(total)
    system = total.scatter[:k, :k] / (total.size * std[:k] * std[:k, None])
    system.diagonal().add_(penalty)
    right = total.scatter[:k, k:] / (total.size * std[:k, None])
    weight = torch.linalg.solve(system, right) / std[:k, None]
    return LinearHead(mean[:k], weight, mean[k:])


class ScaledHead(nn.Module):
    """A network between standardised features and standardised targets.

    Parameters
    ----------
    network : Module
        Maps (*batch, k) to (*batch, m).
    total : Moments
        Of the features and targets: their means and standard deviations.
    """

    centre: Tensor
    scale: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, total: Moments) -> None:
        super().__init__()
        self.network = network
        k, mean, std = _split(total)
        values = {"centre": mean[:k], "scale": std[:k], "mean": mean[k:], "std": std[k:]}
        for name, value in values.items():
            self.register_buffer(name, value.to(torch.get_default_dtype()))

    def forward(self, features: Tensor) -> Tensor:
        """Map features (*batch, k) to targets (*batch, m)."""
        return self.mean + self.std * self.network((features - self.centre) / self.scale)


def mlp_head(total: Moments, width: int = 256, layers: int = 1) -> ScaledHead:
    """Return an untrained `ScaledHead` with a dense network; arguments as in `networks.Dense`."""
    k = len(total.mean) - total.targets
    return ScaledHead(networks.Dense(k, total.targets, width=width, layers=layers), total)


def regression_batches(model: Map, x: Tensor, y: Tensor, *, batch: int = 1024) -> Loss:
    """Return the loss of a regression for `training.fit`: mean squared error over the variance.

    Parameters
    ----------
    model : callable
        Maps states (n, d) to targets (n, m), for instance a `Surrogate` with an `mlp_head`.
    x, y : Tensor of shape (n, d) and (n, m)
        States and targets.
    batch : int
        States a step, drawn with replacement.

    Returns
    -------
    Callable taking a generator, returning a scalar tensor.
    """
    checks.finite("x", x)
    checks.finite("y", y)
    checks.count("batch", batch)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or not len(x):
        raise ValueError(
            f"x and y must have shapes (n, d) and (n, m), got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    std = y.std(0, correction=0).clamp(min=torch.finfo(y.dtype).tiny)

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(x), (batch,), generator=generator, device=generator.device)
        index = index.to(x.device)
        return ((model(x[index]) - y[index]) / std).square().mean()

    return loss
