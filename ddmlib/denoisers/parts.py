"""Denoisers made of others: each where it serves best, or averaged over a symmetry."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ddmlib.datasets import Standardizer
from ddmlib.denoisers.protocol import Denoiser


class ByLevel(Denoiser):
    """Different denoisers at different noise levels.

    Parameters
    ----------
    parts : sequence of (float, Denoiser)
        Lowest sigma/alpha of each part, and its denoiser; from the highest part to the lowest,
        whose sigma/alpha is 0.  Schedule, standardizer and event are those of the first, and noise
        levels reach from the lowest of the last to the highest of the first.

    Raises
    ------
    ValueError
        If the levels do not descend to 0, or the denoisers are not of samples of one kind.
    """

    def __init__(self, parts: Sequence[tuple[float, Denoiser]]) -> None:
        lowest = [low for low, _ in parts]
        if not parts or lowest[-1] != 0 or sorted(set(lowest), reverse=True) != lowest:
            raise ValueError(f"parts must descend to a sigma/alpha of 0, got {lowest}")
        self.parts, first = list(parts), parts[0][1]
        self.schedule, self.standardizer = first.schedule, first.standardizer
        self.event, self.ratios = first.event, (parts[-1][1].ratios[0], first.ratios[1])
        units = first.standardizer
        for _, other in parts:
            if other.event != first.event or len(other.standardizer.mean) != len(units.mean):
                raise ValueError("parts must all be denoisers of states, or of trajectories")
            same = all(
                torch.allclose(a.cpu().double(), b.cpu().double())
                for a, b in (
                    (units.mean, other.standardizer.mean),
                    (units.std, other.standardizer.std),
                )
            )
            if type(other.standardizer) is not type(units) or not same:
                raise ValueError("parts must all have the same standardizer")

    @property
    def device(self) -> torch.device | None:
        """Device of the first part."""
        return self.parts[0][1].device

    def denoise(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Return x̂ of the part that a sample's level belongs to; see `Denoiser.denoise`."""
        x_0, above = None, torch.zeros_like(sigma_t, dtype=torch.bool)
        for low, denoiser in self.parts:
            mine = (sigma_t >= low * alpha_t) & ~above
            above = above | mine
            if bool(mine.any()):
                here = denoiser.denoise(x_t, alpha_t, sigma_t)
                x_0 = here if x_0 is None else torch.where(mine, here, x_0)
        assert x_0 is not None
        return x_0


class Symmetric(Denoiser):
    """A denoiser averaged over a mirror symmetry of the data: x̂(x) = (D(x) + M D(M x))/2.

    The conditional mean of a symmetric law has the symmetry, x̂(M x) = M x̂(x), which a network
    learns only roughly; the average has it exactly, and errors that the mirror turns round cancel.
    An evaluation costs two.

    Parameters
    ----------
    denoiser : Denoiser
    signs : sequence of float
        The diagonal of M in physical units, +1 or -1 for each component: (-1, -1, 1) for Lorenz 63.
        In standardised units, z = (x - m)/s, the mirror is z -> M z + (M - 1) m/s.

    Raises
    ------
    ValueError
        If ``signs`` does not fit, or a component that changes its sign has a mean other than zero
        in units that are no straight line of it.
    """

    def __init__(self, denoiser: Denoiser, signs: Sequence[float]) -> None:
        self.denoiser, self.signs = denoiser, torch.as_tensor(signs, dtype=torch.float32)
        self.schedule, self.standardizer = denoiser.schedule, denoiser.standardizer
        self.event, self.ratios = denoiser.event, denoiser.ratios
        self.elementwise = denoiser.elementwise
        units = denoiser.standardizer
        if self.signs.shape != units.mean.shape or not bool((self.signs.abs() == 1).all()):
            raise ValueError(
                f"signs must be {len(units.mean)} numbers, +1 or -1, got {list(signs)}"
            )
        self.shift = (self.signs.to(units.mean) - 1) * units.mean / units.std
        if bool(self.shift.any()) and type(units) is not Standardizer:
            raise ValueError(
                "signs must keep components of non-zero mean where units are stretched, "
                f"{units.mean.tolist()}"
            )

    @property
    def device(self) -> torch.device | None:
        """Device of the denoiser."""
        return self.denoiser.device

    def denoise(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Return the average of x̂ and its mirror image; see `Denoiser.denoise`."""
        signs, shift = self.signs.to(x_t), self.shift.to(x_t)
        mirrored = signs * x_t + alpha_t * shift
        here, there = self.denoiser.denoise(torch.stack((x_t, mirrored)), alpha_t, sigma_t)
        return (here + signs * there + shift) / 2
