r"""Standardised units for states with long tails: z = k asinh((x - mean)/(k std)).

Most systems rest near some state and leave it rarely and far: FitzHugh-Nagumo cells spike to
fourteen standard deviations, a pendulum that goes over the top turns by eighty radians.  In affine
units a denoiser's error is then that of the few far states, and the many near ones are lost beside
them.  asinh is the identity near zero and a logarithm far away, so that both are told apart.  The
knee k says where one turns into the other, in standard deviations: up to it trajectories are as in
affine units, and beyond it a given share of a height is as many units whatever the height.

The events of an ensemble are functions of physical states; densities gain the factor
|dz/dx| = 1/√(((x - mean)/k)² + std²).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ddmlib import checks
from ddmlib.datasets import Standardizer


@dataclass(frozen=True)
class AsinhStandardizer(Standardizer):
    """The map z = knee asinh((x - mean) / (knee std)) from physical to standardised units.

    Parameters
    ----------
    mean, std : Tensor of shape (d,)
        Where the map is steepest, and the inverse of its slope there; physical units.
    knee : float
        How many std around the mean it is nearly affine.
    """

    knee: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.positive("knee", self.knee)

    def __call__(self, x: Tensor) -> Tensor:
        """Map x of shape (..., d) to standardised units."""
        return self.knee * torch.asinh(super().__call__(x) / self.knee)

    def inverse(self, z: Tensor) -> Tensor:
        """Map z of shape (..., d) to physical units."""
        checks.last_axis("z", z, len(self.mean))
        return super().inverse(self.knee * torch.sinh(z / self.knee))

    def stretch(self, z: Tensor) -> Tensor:
        """Return how much a step in z is in physical units, beside one at the mean: dx/dz / std."""
        return torch.cosh(z / self.knee)
