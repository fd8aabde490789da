r"""Denoisers: the conditional mean E[x_0 | x_t], from which everything else follows.

Forward process x_t = alpha_t x_0 + sigma_t eps.  With x̂ = E[x_0 | x_t], Tweedie's formula
(Efron 2011) says

    x̂ = (x_t + sigma_t² ∇ log p_t(x_t)) / alpha_t,

so a denoiser, the expected noise eps = (x_t - alpha_t x̂)/sigma_t, the score -eps/sigma_t and,
where alpha² + sigma² = 1, the velocity v = alpha_t eps - sigma_t x̂ are one thing in four
coordinates.  The functions below convert between them.

The protocol: a denoiser has a ``schedule`` and a ``standardizer``, and ``denoiser(x_t, t)`` is x̂,
in standardised units, differentiable in x_t.  All of them see a noise level only as (alpha, sigma),
so `Denoiser.with_schedule` changes the schedule of any of them.

A state of d components is one sample to a denoiser of states, a trajectory (length, d) to one of
trajectories: `Denoiser.event` counts these axes.
"""

from .exact import EmpiricalDenoiser, GaussianDenoiser
from .network import HEADS, NetworkDenoiser, denoising_loss, loss_at_levels, normalise
from .parts import ByLevel, Symmetric
from .protocol import (
    Denoiser,
    diffuse,
    noise_from_state,
    score_from_state,
    state_from_noise,
    state_from_score,
    state_from_velocity,
    velocity_from_state,
)

__all__ = [
    "HEADS",
    "ByLevel",
    "Denoiser",
    "EmpiricalDenoiser",
    "GaussianDenoiser",
    "NetworkDenoiser",
    "Symmetric",
    "denoising_loss",
    "diffuse",
    "loss_at_levels",
    "noise_from_state",
    "normalise",
    "score_from_state",
    "state_from_noise",
    "state_from_score",
    "state_from_velocity",
    "velocity_from_state",
]
