"""The events of Z23 (Finzi et al. 2023) on its three systems, for trajectories in physical units.

`ensembles` makes the trajectories: 60 states each.
"""

import torch
from torch import Tensor

from ddmlib import checks
from ddmlib.events.constraints import Constraint


def one_lobe(length: int = 60) -> Constraint:
    """Return the event that a Lorenz-63 trajectory stays in one lobe.

    C = 0.6 - mean over frequencies ≥ 1 of |rfft(x/20)|, the Fourier transform over time not
    normalised, as in Z23: x of a trajectory that changes lobes has large slow components.
    """
    checks.count("length", length, 2)

    def stays(x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x[..., 0] / 20, dim=-1)
        return 0.6 - spectrum[..., 1:].abs().mean(-1)

    return Constraint(stays, (length, 3), "one lobe")


def spike(length: int = 60) -> Constraint:
    """Return the event that the FitzHugh-Nagumo cells spike: C = max over time of mean x - 2.5.

    In Z23's units, five times ours.
    """

    def excites(x: Tensor) -> Tensor:
        return 5 * (x[..., 0] + x[..., 1]).amax(-1) / 2 - 2.5

    return Constraint(excites, (checks.count("length", length), 4), "spike")


def over_the_top(length: int = 60) -> Constraint:
    """Return the event that a link of the double pendulum goes over the top: max |θ| > π.

    Z23 leaves its event on this system undefined; this one is ours.
    """

    def turns(x: Tensor) -> Tensor:
        return x[..., :2].abs().flatten(-2).amax(-1) - torch.pi

    return Constraint(turns, (checks.count("length", length), 4), "over the top")
