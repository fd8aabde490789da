"""Features of a state: of a frozen denoiser, random Fourier features, polynomials."""

import copy
import math
from collections.abc import Sequence
from itertools import combinations_with_replacement

import torch
from torch import Tensor, nn

from .. import checks, noise
from ..denoisers import NetworkDenoiser

F24_TIMES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.6)


class DenoiserFeatures(nn.Module):
    """The last hidden layer of a frozen denoiser at clean states, for several noise levels.

    Parameters
    ----------
    denoiser : NetworkDenoiser
        Copied: neither later training of it nor of a head changes the other.
    times : sequence of float
        Pseudo-times in [0, 1] of its schedule; the default is F24's, in units of 1000 steps.  Where
        sigma/alpha leaves the range that the network was trained on (at t = 0 it does), the network
        is told the nearest end.  FiLM is computed once per time, not per state.
    """

    levels: Tensor

    def __init__(self, denoiser: NetworkDenoiser, times: Sequence[float] = F24_TIMES) -> None:
        super().__init__()
        if denoiser.event != 1:
            raise ValueError("denoiser must be one of states: those of trajectories mix states")
        t = torch.as_tensor(times, dtype=torch.float64)
        if t.ndim != 1 or not len(t) or not bool(((t >= 0) & (t <= 1)).all()):
            raise ValueError(f"times must be one or more numbers within [0, 1], got {times}")
        self.network = copy.deepcopy(denoiser.network).requires_grad_(False)
        self.d, parameter = len(denoiser.standardizer.mean), next(self.network.parameters())
        alpha, sigma = (v[:, None].to(parameter) for v in denoiser.schedule(t))
        self.register_buffer("levels", denoiser.level(alpha, sigma))

    def forward(self, x: Tensor) -> Tensor:
        """Map states (*batch, d) to features (*batch, times * width)."""
        checks.last_axis("x", x, self.d)
        return torch.cat([self.network.hidden(x, level) for level in self.levels], dim=-1)


class RandomFourier(nn.Module):
    """Random Fourier features of a Gaussian kernel: sines and cosines of w·x.

    φ(x)·φ(y) has the mean exp(-|x - y|² / (2 length²)) and a scatter of the order 1/sqrt(number).

    Parameters
    ----------
    d, number : int
        Components of a state; features, an even number.
    length : float
        Length scale of the kernel, in standard deviations (F24: 1/(2 pi)).
    generator : torch.Generator, optional
        Source of the frequencies w ~ N(0, I / length²).

    References
    ----------
    Rahimi and Recht (2007), Random features for large-scale kernel machines, NeurIPS 20.
    """

    frequencies: Tensor

    def __init__(
        self, d: int, number: int, *, length: float, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        checks.positive("length", length)
        if checks.count("number", number, 2) % 2:
            raise ValueError(f"number must be even, got {number}")
        shape = checks.count("d", d), number // 2
        self.register_buffer("frequencies", noise.normal(shape, generator=generator) / length)

    def forward(self, x: Tensor) -> Tensor:
        """Map states (*batch, d) to features (*batch, number)."""
        angle = checks.last_axis("x", x, len(self.frequencies)) @ self.frequencies.to(x.dtype)
        return torch.cat((angle.sin(), angle.cos()), dim=-1) / math.sqrt(angle.shape[-1])


class Polynomials(nn.Module):
    """All monomials of degree 1 to ``degree``: (d + degree choose d) - 1 of them.

    The constant is left to the head's intercept.  With a linear head and without delays this is
    next-generation reservoir computing (Gauthier et al. 2021) in its simplest form.

    Parameters
    ----------
    d, degree : int
        Components of a state, highest degree.
    """

    def __init__(self, d: int, degree: int = 4) -> None:
        super().__init__()
        self.d, degrees = checks.count("d", d), range(1, checks.count("degree", degree) + 1)
        self.terms = [t for n in degrees for t in combinations_with_replacement(range(d), n)]

    def forward(self, x: Tensor) -> Tensor:
        """Map states (*batch, d) to features (*batch, number of monomials)."""
        columns = checks.last_axis("x", x, self.d).unbind(-1)
        known: dict[tuple[int, ...], Tensor] = {(): torch.ones_like(columns[0])}
        for term in self.terms:  # each is a shorter one times one component
            known[term] = known[term[:-1]] * columns[term[-1]]
        return torch.stack([known[term] for term in self.terms], dim=-1)
