"""Networks of trajectories: each state's output depends on its neighbours alone."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ddmlib import checks
from ddmlib.networks.states import ACTIVATIONS, NoiseEmbedding, ResidualMLP, modulated


class WindowMLP(nn.Module):
    """A `ResidualMLP` of windows of 2k+1 states, each taken as one vector (R23's local network).

    Parameters
    ----------
    dim : int
        Components of a state.
    window : int
        States in a window, odd: 2k+1.
    width, blocks, embedding, activation
        As in `ResidualMLP` (R23: 256, 5, 32, "silu").
    """

    kind: ClassVar[str] = "WindowMLP"
    event: ClassVar[int] = 2

    def __init__(
        self,
        dim: int = 3,
        window: int = 5,
        width: int = 128,
        blocks: int = 5,
        embedding: int = 32,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        if checks.count("window", window, 3) % 2 == 0:
            raise ValueError(f"window must be an odd number of states, got {window}")
        self.dim, self.window = checks.count("dim", dim), window
        self.body = ResidualMLP(dim * window, width, blocks, embedding, activation)
        self.settings = self.body.settings | {"dim": dim, "window": window}

    def hidden(self, x: Tensor, level: Tensor) -> Tensor:
        """Return the features of the last hidden layer, (..., width); arguments as in `forward`."""
        if x.shape[-2:] != (self.window, self.dim):
            raise ValueError(
                f"x must have shape (..., {self.window}, {self.dim}), got {tuple(x.shape)}"
            )
        return self.body.hidden(x.flatten(-2), _one_level(level))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """Map windows (..., window, dim) to outputs of that shape.

        ``level`` is log(sigma/alpha), a number or of shape (..., 1): one for a whole window.
        """
        return self.body.last(self.hidden(x, level)).unflatten(-1, (self.window, self.dim))

    def along(self, x: Tensor, level: Tensor) -> Tensor:
        """Return the outputs composed along trajectories (..., length, dim), of that shape.

        A state takes the centre output of the window around it, the first and last k states the
        outputs of the first and last window; no other output is computed.
        """
        _long_enough(x, self.window)
        k, d = self.window // 2, self.dim
        windows = x.unfold(-2, self.window, 1).mT.flatten(-2)  # (..., length - 2k, window d)
        h, last = self.body.hidden(windows, level), self.body.last
        ends = [slice(0, k * d), slice(k * d, (k + 1) * d), slice((k + 1) * d, None)]
        left, centre, right = (
            nn.functional.linear(part, last.weight[rows], last.bias[rows])
            for part, rows in zip((h[..., 0, :], h, h[..., -1, :]), ends, strict=True)
        )
        left, right = left.unflatten(-1, (k, d)), right.unflatten(-1, (k, d))
        return torch.cat((left, centre, right), -2)


def _one_level(level: Tensor) -> Tensor:
    """Return levels (..., 1), one for each trajectory, without the axis of states."""
    if level.ndim and level.shape[-1] != 1:
        raise ValueError("the noise level must be the same for all states of a trajectory")
    return level[..., 0] if level.ndim else level


def _long_enough(x: Tensor, window: int) -> None:
    if x.ndim < 2 or x.shape[-2] < window:
        raise ValueError(
            f"x must have shape (..., length, d) with length >= {window}, got {tuple(x.shape)}"
        )


class Convolution(nn.Linear):
    """A convolution of kernel 3 along (..., length, inputs), zeros beyond the ends.

    With a dilation, of neighbours that many states away.  Channels stay the last axis.  On a CPU by
    the library's convolution, which copies nothing; on a GPU, where that would round to TF32, as a
    product with the three neighbours side by side.
    """

    def __init__(self, inputs: int, outputs: int, dilation: int = 1) -> None:
        super().__init__(3 * inputs, outputs)
        self.dilation = dilation

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Map (..., length, inputs) to (..., length, outputs), times a gate (outputs,)."""
        d = self.dilation
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if gate is not None:  # on the weights, not on the states, which are far more
            weight, bias = gate[:, None] * weight, gate * bias
        if x.device.type == "cpu":
            rows = x.reshape(-1, 1, *x.shape[-2:]).permute(0, 3, 1, 2)  # (n, inputs, 1, length)
            kernel = weight.view(-1, 1, 3, x.shape[-1]).permute(0, 3, 1, 2)
            out = nn.functional.conv2d(rows, kernel, bias, padding=(0, d), dilation=(1, d))
            return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)
        padded = nn.functional.pad(x, (0, 0, d, d))
        neighbours = torch.cat((padded[..., : -2 * d, :], x, padded[..., 2 * d :, :]), -1)
        return nn.functional.linear(neighbours, weight, bias)


class ConvolutionBlock(nn.Module):
    """x + gate * (LayerNorm of each state, FiLM, convolution, activation, convolution)."""

    def __init__(self, width: int, embedding: int, activation: str, dilation: int = 1) -> None:
        super().__init__()
        self.film = nn.Linear(embedding, 2 * width)
        self.inner, self.outer = (Convolution(width, width, dilation) for _ in range(2))
        self.activation = ACTIVATIONS[activation]()
        self.gate = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map x (..., length, width) given an embedding that broadcasts against it."""
        h = modulated(x, *self.film(embedding).chunk(2, dim=-1))
        return x + self.outer(self.activation(self.inner(h)), self.gate)


class ConvNet(nn.Module):
    """R23's convolutional network: residual blocks along the trajectory, kernel 3 throughout.

    Each output depends on the states within ``radius`` of it: 2 + 2 blocks, or more with dilations.
    Beyond the ends lie zeros, and a constant input channel tells a state from that padding.  A
    state that sees less than all of one end stands in some window of 2 radius + 1 states exactly as
    in any longer trajectory, so training on windows at least that long shows every kind of padding
    there is; a shorter trajectory, whose states see both ends, is refused, unless ``shortest`` says
    that training has shown such ones.

    Parameters
    ----------
    dim : int
        Components of a state.
    width, blocks, embedding, activation
        Channels, residual blocks of two convolutions, features of the noise level (R23: 64, 6, 32,
        "silu").
    dilations : sequence of int, optional
        Of each block's convolutions, by default all 1: a wider view at the same cost.
    elementwise : bool
        Each component of each state may have a noise level of its own.  All of them enter as
        further input channels, the highest of a trajectory by FiLM.
    shortest : int, optional
        States of the shortest trajectory that is taken; default: 2 radius + 1.
    """

    kind: ClassVar[str] = "ConvNet"
    event: ClassVar[int] = 2

    def __init__(
        self,
        dim: int = 3,
        width: int = 64,
        blocks: int = 6,
        embedding: int = 32,
        activation: str = "silu",
        dilations: Sequence[int] | None = None,
        elementwise: bool = False,
        shortest: int | None = None,
    ) -> None:
        super().__init__()
        checks.choice("activation", activation, ACTIVATIONS)
        self.settings: dict[str, Any] = {
            "dim": checks.count("dim", dim),
            "width": checks.count("width", width),
            "blocks": checks.count("blocks", blocks),
            "embedding": embedding,
            "activation": activation,
        }
        each = [checks.count("dilations", d) for d in dilations or [1] * blocks]
        if len(each) != blocks:
            raise ValueError(f"dilations must be {blocks}, one for each block, got {each}")
        self.radius, self.elementwise = 2 + 2 * sum(each), elementwise
        self.window = 2 * self.radius + 1
        if dilations is not None:
            self.settings["dilations"] = each
        if elementwise:
            self.settings["elementwise"] = True
        if shortest is not None:
            self.window = self.settings["shortest"] = checks.count("shortest", shortest)
        self.embedding = NoiseEmbedding(embedding)
        self.first = Convolution((3 if elementwise else 1) * dim + 1, width)
        self.blocks = nn.ModuleList(
            ConvolutionBlock(width, embedding, activation, dilation) for dilation in each
        )
        self.last = Convolution(width, dim)

    def hidden(self, x: Tensor, level: Tensor) -> Tensor:
        """Return features (..., length, width) of each state; arguments as in `forward`."""
        _long_enough(x, self.window)
        inputs = [x, torch.ones_like(x[..., :1])]
        if self.elementwise:
            level = level.expand(x.shape)
            # sigmoid(2 log(sigma/alpha)) = sigma²/(alpha² + sigma²)
            inputs += [level / 4, torch.sigmoid(2 * level)]
            level = level.amax((-2, -1))[..., None]
        h = self.first(torch.cat(inputs, -1))
        embedding = self.embedding(level)
        for block in self.blocks:
            h = block(h, embedding)
        return h

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """Map trajectories (..., length, dim), length >= ``window``, to outputs of that shape.

        ``level`` is log(sigma/alpha), a number or of a shape that broadcasts to (..., length); if
        ``elementwise``, to (..., length, dim).
        """
        return self.last(self.hidden(x, level))
