"""Networks of single states."""

import math
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from ddmlib import checks

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}


class NoiseEmbedding(nn.Module):
    """Sines and cosines of log(sigma/alpha) at geometrically spaced frequencies.

    Parameters
    ----------
    size : int
        Number of features, even.
    lowest, highest : float
        Angular frequencies per unit of log(sigma/alpha).
    """

    frequencies: Tensor

    def __init__(self, size: int, lowest: float = 0.1, highest: float = 10.0) -> None:
        super().__init__()
        if size < 2 or size % 2:
            raise ValueError(f"embedding must be an even number of features, got {size}")
        exponents = torch.linspace(math.log(lowest), math.log(highest), size // 2)
        self.register_buffer("frequencies", exponents.exp(), persistent=False)

    def forward(self, level: Tensor) -> Tensor:
        """Map levels of any shape (...) to features of shape (..., size)."""
        angle = level[..., None] * self.frequencies
        return torch.cat((angle.sin(), angle.cos()), dim=-1)


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return FiLM of x (..., width) after LayerNorm: times 1 + scale, plus shift."""
    if scale.numel() == x.shape[-1]:  # one noise level for all: no pass over x of its own
        return nn.functional.layer_norm(x, x.shape[-1:], 1 + scale.flatten(), shift.flatten())
    return torch.addcmul(shift, nn.functional.layer_norm(x, x.shape[-1:]), 1 + scale)


class ResidualBlock(nn.Module):
    """x + gate * (LayerNorm, FiLM, Linear, activation, Linear), the gate starting near zero."""

    def __init__(self, width: int, embedding: int, activation: str) -> None:
        super().__init__()
        self.film = nn.Linear(embedding, 2 * width)
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)
        self.activation = ACTIVATIONS[activation]()
        self.gate = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map x (..., width) given an embedding that broadcasts against it."""
        h = modulated(x, *self.film(embedding).chunk(2, dim=-1))
        h = self.activation(self.inner(h))
        # gate * outer(h): the gate multiplies the weights, not the states, which are far more
        weight, bias = self.gate[:, None] * self.outer.weight, self.gate * self.outer.bias
        return x + nn.functional.linear(h, weight, bias)


class ResidualMLP(nn.Module):
    """F24's denoising network: Linear, residual blocks with FiLM of the noise level, Linear.

    Parameters
    ----------
    dim : int
        Components of a state.
    width, blocks : int
        Hidden features and residual blocks (F24: 256 and 3).
    embedding : int
        Features of the noise level (F24: 512, of the pseudo-time).
    activation : str
        "relu" (F24) or "silu".
    """

    kind: ClassVar[str] = "ResidualMLP"

    def __init__(
        self,
        dim: int = 3,
        width: int = 256,
        blocks: int = 3,
        embedding: int = 64,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        checks.choice("activation", activation, ACTIVATIONS)
        self.settings = {
            "dim": checks.count("dim", dim),
            "width": checks.count("width", width),
            "blocks": checks.count("blocks", blocks),
            "embedding": embedding,
            "activation": activation,
        }
        self.embedding = NoiseEmbedding(embedding)
        self.first = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(
            ResidualBlock(width, embedding, activation) for _ in range(blocks)
        )
        self.last = nn.Linear(width, dim)

    def hidden(self, x: Tensor, level: Tensor) -> Tensor:
        """Return the features of the last hidden layer (a representation of the state).

        Parameters
        ----------
        x : Tensor of shape (..., dim)
            States scaled to unit variance.
        level : Tensor
            log(sigma/alpha), of a shape that broadcasts to the leading axes of ``x``.  FiLM is
            computed once per level given, so a shared level costs nothing per state.

        Returns
        -------
        Tensor of shape (..., width)
        """
        h, embedding = self.first(x), self.embedding(level)
        for block in self.blocks:
            h = block(h, embedding)
        return h

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """Return the network's output, shape (..., dim); arguments as in `hidden`."""
        return self.last(self.hidden(x, level))


class Dense(nn.Module):
    """Fully connected network with ``layers`` hidden layers; F24's surrogate and its features.

    Parameters
    ----------
    inputs, outputs : int
        Components of argument and result.
    width, layers : int
        Features of each hidden layer, and their number.
    activation : str
        "relu" or "silu".
    """

    kind: ClassVar[str] = "Dense"

    def __init__(
        self,
        inputs: int = 3,
        outputs: int = 3,
        width: int = 256,
        layers: int = 2,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        checks.choice("activation", activation, ACTIVATIONS)
        self.settings = {
            "inputs": checks.count("inputs", inputs),
            "outputs": checks.count("outputs", outputs),
            "width": checks.count("width", width),
            "layers": checks.count("layers", layers),
            "activation": activation,
        }
        sizes = [inputs] + [width] * layers
        modules: list[nn.Module] = []
        for a, b in pairwise(sizes):
            modules += [nn.Linear(a, b), ACTIVATIONS[activation]()]
        self.body = nn.Sequential(*modules)
        self.last = nn.Linear(width, outputs)

    def hidden(self, x: Tensor) -> Tensor:
        """Return the features of the last hidden layer, shape (..., width)."""
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map x of shape (..., inputs) to (..., outputs)."""
        return self.last(self.hidden(x))
