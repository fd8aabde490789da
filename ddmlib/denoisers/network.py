"""A trained network as a denoiser, and the loss it is trained with."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ddmlib import checks
from ddmlib.datasets import Standardizer
from ddmlib.denoisers.protocol import (
    Denoiser,
    diffuse,
    state_from_noise,
    state_from_velocity,
    velocity_from_state,
)
from ddmlib.schedules import Schedule

HEADS = ("velocity", "noise", "state")


class NetworkDenoiser(nn.Module, Denoiser):
    """A trained network as a denoiser, on variance-normalised input.

    The network sees u = x_t / sqrt(alpha² + sigma²), of unit variance at every noise level when the
    data have it, and log(sigma/alpha).  With (c, s) = (alpha, sigma)/sqrt(alpha² + sigma²),
    u = c x_0 + s eps, and its output F is read as

    - "velocity": F ≈ c eps - s x_0, x̂ = c u - s F.  This is the preconditioning of Karras et al.
      (2022) with data of unit variance, up to the sign of F;
    - "noise": F ≈ eps, x̂ = (u - s F)/c;
    - "state": F ≈ x_0, x̂ = F.

    Parameters
    ----------
    network : Module
        Called as ``network(u, level)``, see `networks.ResidualMLP`.
    schedule, standardizer : Schedule, Standardizer
    head : str
        "velocity", "noise" or "state".
    ratios : tuple of float
        Range of sigma/alpha that the network was trained on.  Outside it the network is told the
        nearest end, while the formulas above keep the true (c, s).
    """

    network: Any  # a Module whose `hidden` the type checker does not know

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        standardizer: Standardizer,
        head: str = "velocity",
        ratios: tuple[float, float] = (1e-4, 1e4),
    ) -> None:
        super().__init__()
        self.network, self.head = network, checks.choice("head", head, HEADS)
        self.schedule, self.standardizer = schedule, standardizer
        self.ratios = checks.interval("ratio", *ratios)
        self.event = getattr(network, "event", 1)
        self.elementwise = getattr(network, "elementwise", False)

    __call__ = Denoiser.__call__

    @property
    def device(self) -> torch.device | None:
        """Device of the network's parameters."""
        return next((p.device for p in self.parameters()), None)

    def output(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> tuple[Tensor, ...]:
        """Return (F, u, c, s) as in the class's description."""
        u, c, s = normalise(x_t, alpha_t, sigma_t)
        return self.network(u, self.level(c, s)), u, c, s

    def denoise(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Return x̂; shapes as in `Denoiser.denoise`."""
        return self.read(*self.output(x_t, alpha_t, sigma_t))

    def read(self, f: Tensor, u: Tensor, c: Tensor, s: Tensor) -> Tensor:
        """Return x̂ for the network's output ``f``, as in the class's description."""
        if self.head == "velocity":
            return state_from_velocity(f, u, c, s)
        return f if self.head == "state" else state_from_noise(f, u, c, s)

    def hidden(self, x_t: Tensor, t: Tensor | float) -> Tensor:
        """Return the network's last hidden layer at (x_t, t), shape (..., width)."""
        u, c, s = normalise(x_t, *self.levels(x_t, t))
        return self.network.hidden(u, self.level(c, s))

    def level(self, c: Tensor, s: Tensor) -> Tensor:
        """Return log(s/c) clamped to the trained range; without its last axis, unless components
        may have levels of their own."""
        low, high = self.ratios
        level = torch.log(s / c).clamp(math.log(low), math.log(high))
        return level if self.elementwise else level[..., 0]


def normalise(x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return u = x_t / r, c = alpha_t / r, s = sigma_t / r with r = sqrt(alpha_t² + sigma_t²)."""
    r = torch.sqrt(alpha_t**2 + sigma_t**2)
    return x_t / r, alpha_t / r, sigma_t / r


def denoising_loss(
    denoiser: NetworkDenoiser, x_0: Tensor, t: Tensor | float, noise: Tensor
) -> Tensor:
    """Return the mean squared error of the network's output against its head's target.

    Its minimiser is the conditional mean (Vincent 2011).  For the velocity head the error of x̂ is
    thereby weighted with 1/s², the weights of Karras et al. (2022).

    Parameters
    ----------
    denoiser : NetworkDenoiser
    x_0 : Tensor of shape (*batch, d)
        Clean states, standardised.
    t : float or Tensor
        Pseudo-time, axes matching the leading axes of ``x_0``.
    noise : Tensor of the shape of ``x_0``
        Standard normal.

    Returns
    -------
    Tensor of shape ()
    """
    return loss_at_levels(denoiser, x_0, *denoiser.levels(x_0, t), noise)


def loss_at_levels(
    denoiser: NetworkDenoiser, x_0: Tensor, alpha_t: Tensor, sigma_t: Tensor, noise: Tensor
) -> Tensor:
    """Return `denoising_loss` at given (alpha, sigma), which broadcast as in `Denoiser.denoise`."""
    x_t = diffuse(x_0, alpha_t, sigma_t, noise)
    f, u, c, s = denoiser.output(x_t, alpha_t, sigma_t)
    if denoiser.head == "velocity":
        target = velocity_from_state(x_0, u, c, s)
    else:
        target = noise if denoiser.head == "noise" else x_0
    return nn.functional.mse_loss(f, target)
