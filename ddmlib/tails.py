r"""Standardised units for states with long tails: z = asinh((x - mean)/std).

Most systems rest near some state and leave it rarely and far: FitzHugh-Nagumo cells spike to
fourteen standard deviations, a pendulum that goes over the top turns by eighty radians.  In affine
units a denoiser's error is then that of the few far states, and the many near ones are lost beside
them.  asinh is the identity near zero and a logarithm far away, so that both are told apart.

The events of an ensemble are functions of physical states, and a density gains the factor
|dz/dx| = 1/√((x - mean)² + std²), whatever the map.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ddmlib import checks
from ddmlib.datasets import Standardizer


@dataclass(frozen=True)
class AsinhStandardizer(Standardizer):
    """The map z = asinh((x - mean) / std) from physical to standardised units.

    Parameters
    ----------
    mean, std : Tensor of shape (d,)
        Where the map is steepest, and how far around it is nearly affine; physical units.
    """

    def __call__(self, x: Tensor) -> Tensor:
        """Map x of shape (..., d) to standardised units."""
        return torch.asinh(super().__call__(x))

    def inverse(self, z: Tensor) -> Tensor:
        """Map z of shape (..., d) to physical units."""
        return super().inverse(torch.sinh(checks.last_axis("z", z, len(self.mean))))
