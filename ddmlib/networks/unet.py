"""A network of whole trajectories: a one-dimensional U-Net along the time axis.

Z23 (Finzi et al. 2023) denoises trajectories of 60 states with a 1-d U-Net (Ronneberger, Fischer &
Brox 2015).  Residual blocks of convolutions work at several resolutions in time, each half the one
before, so that a few of them reach from one end of a trajectory to the other; events such as a
maximum over time, or a mean over frequencies, need this reach.

The noise level enters every block by FiLM, as in `ResidualMLP`, and as one number per
trajectory, log(sigma/alpha).  The place in the trajectory enters as further input channels, because
an ensemble need not be stationary: the double pendulum starts from given angles.  A trajectory of
any length is taken, but only the length seen in training gives sensible results.

The first layer never multiplies with eight bits, `torch.autocast` or not: where states are large
and noise is small, that would round away what the network is to see.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from .states import NoiseEmbedding

GROUPS = 8  # of channels that are normalised together
POSITIONS = 4  # cosines of the place in the trajectory


class UNetBlock(nn.Module):
    """x + gate * (GroupNorm, FiLM, Conv, SiLU, Conv), the gate starting near zero."""

    def __init__(self, width: int, kernel: int, embedding: int) -> None:
        super().__init__()
        self.film = nn.Linear(embedding, 2 * width)
        self.inner = nn.Conv1d(width, width, kernel, padding=kernel // 2)
        self.outer = nn.Conv1d(width, width, kernel, padding=kernel // 2)
        self.gate = nn.Parameter(torch.full((width, 1, 1), 1e-6))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map x (n, width, length), given an embedding (groups, features) with groups dividing n.

        Consecutive trajectories of one group share a noise level, so FiLM is computed once a group.
        """
        scale, shift = (
            self.film(embedding).repeat_interleave(len(x) // len(embedding), 0).chunk(2, dim=-1)
        )
        h = nn.functional.group_norm(x, GROUPS)
        h = torch.addcmul(shift[..., None], h, 1 + scale[..., None])
        h = nn.functional.silu(self.inner(h))
        # gate * outer(h): the gate multiplies the weights, not the states, which are far more
        weight, bias = self.outer.weight, self.outer.bias
        assert bias is not None
        gated = self.gate * weight, self.gate[:, 0, 0] * bias
        return x + nn.functional.conv1d(h, *gated, padding=self.outer.padding)


class TrajectoryUNet(nn.Module):
    """U-Net along time: (*batch, length, dim) and a noise level to the same shape.

    Parameters
    ----------
    dim : int
        Components of a state.
    widths : sequence of int
        Channels at each resolution, the finest first; multiples of 8.
    blocks : int
        Residual blocks at each resolution, on the way down and again on the way up.
    kernel : int
        States that a convolution sees, odd.
    embedding : int
        Features of the noise level.
    coarse : int
        Further residual blocks at the coarsest resolution: cheap, and they reach far.
    """

    event = 2  # axes of one sample, see `Denoiser.event`

    def __init__(
        self,
        dim: int = 3,
        widths: Sequence[int] = (48, 64, 96),
        blocks: int = 2,
        kernel: int = 5,
        embedding: int = 64,
        coarse: int = 0,
    ) -> None:
        super().__init__()
        if not widths or any(w < GROUPS or w % GROUPS for w in widths):
            raise ValueError(f"widths must be multiples of {GROUPS}, got {list(widths)}")
        if checks.count("kernel", kernel) % 2 == 0:
            raise ValueError(f"kernel must be odd, got {kernel}")
        self.settings = {
            "dim": checks.count("dim", dim),
            "widths": list(widths),
            "blocks": checks.count("blocks", blocks),
            "kernel": kernel,
            "embedding": embedding,
            "coarse": checks.count("coarse", coarse, 0),
        }
        self.embedding = NoiseEmbedding(embedding)
        self.first = nn.Conv1d(dim + POSITIONS, widths[0], kernel, padding=kernel // 2)

        def level(width: int, further: int = 0) -> nn.ModuleList:
            number = blocks + further
            return nn.ModuleList(UNetBlock(width, kernel, embedding) for _ in range(number))

        # lists of lists of blocks, which the type checker takes for plain modules
        self.down: Any
        self.up: Any
        pairs = list(pairwise(widths))
        self.down = nn.ModuleList(level(width) for width in widths[:-1])
        self.down.append(level(widths[-1], coarse))
        self.up = nn.ModuleList(level(width) for width in widths[:-1])
        self.coarsen = nn.ModuleList(nn.Conv1d(a, b, 3, stride=2, padding=1) for a, b in pairs)
        self.refine = nn.ModuleList(nn.Conv1d(b, a, 3, padding=1) for a, b in pairs)
        self.last = nn.Conv1d(widths[0], dim, 1)

    def features(self, x: Tensor, level: Tensor) -> Tensor:
        """Return the last hidden layer with channels before time, (n, widths[0], length)."""
        dim, length = self.settings["dim"], x.shape[-2] if x.ndim > 1 else 0
        if x.ndim < 2 or x.shape[-1] != dim:
            raise ValueError(f"x must have shape (*batch, length, {dim}), got {tuple(x.shape)}")
        if level.ndim and level.shape[-1] != 1:
            raise ValueError(
                "level must be one for a whole trajectory, i.e. have a last axis of size 1, "
                f"got shape {tuple(level.shape)}"
            )
        batch = x.shape[:-2]
        levels = level[..., 0] if level.ndim else level
        levels = levels.reshape((1,) * (len(batch) - levels.ndim) + levels.shape)
        # leading axes along which the level varies; the others are expanded only if they must be
        varying = max((k + 1 for k, size in enumerate(levels.shape) if size > 1), default=0)
        groups = levels.reshape(levels.shape[:varying]).expand(batch[:varying]).reshape(-1)
        embedding = self.embedding(groups)
        place = torch.linspace(0, math.pi, length, dtype=x.dtype, device=x.device)
        orders = torch.arange(1, POSITIONS + 1, dtype=x.dtype, device=x.device)
        place = torch.cos(orders[:, None] * place)
        rows = x.reshape(-1, length, dim).mT
        rows = torch.cat((rows, place.expand(len(rows), -1, -1)), dim=1)
        kind = x.device.type
        with torch.autocast(kind, enabled=False):
            h = self.first(rows.to(self.first.weight.dtype))
        if h.dtype == torch.float32 and torch.is_autocast_enabled(kind):
            h = h.to(torch.get_autocast_dtype(kind))
        skips = []
        for k, blocks in enumerate(self.down):
            if k:
                skips.append(h)
                h = self.coarsen[k - 1](h)
            for block in blocks:
                h = block(h, embedding)
        for k in reversed(range(len(skips))):
            h = nn.functional.interpolate(h, size=skips[k].shape[-1])
            h = self.refine[k](h) + skips[k]
            for block in self.up[k]:
                h = block(h, embedding)
        return h

    def hidden(self, x: Tensor, level: Tensor) -> Tensor:
        """Return the features of the last hidden layer.

        Parameters
        ----------
        x : Tensor of shape (*batch, length, dim)
            Trajectories scaled to unit variance.
        level : Tensor
            log(sigma/alpha), of a shape that broadcasts to (*batch, length) and does not vary along
            a trajectory: its last axis, if any, has size 1.

        Returns
        -------
        Tensor of shape (*batch, length, widths[0])
        """
        return self.features(x, level).mT.reshape(*x.shape[:-1], -1)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """Return the network's output, shape (*batch, length, dim); arguments as in `hidden`."""
        return self.last(self.features(x, level)).mT.reshape(x.shape)
