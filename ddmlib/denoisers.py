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
"""

import copy
import math
from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from torch import Tensor, nn

from ddmlib import checks, schedules
from ddmlib.datasets import Standardizer
from ddmlib.schedules import Schedule

HEADS = ("velocity", "noise", "state")


def diffuse(x_0: Tensor, alpha_t: Tensor, sigma_t: Tensor, noise: Tensor) -> Tensor:
    """Return x_t = alpha_t x_0 + sigma_t noise, all arguments broadcast together."""
    return alpha_t * x_0 + sigma_t * noise


def noise_from_state(x_0: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """Return eps = (x_t - alpha_t x_0) / sigma_t."""
    return (x_t - alpha_t * x_0) / sigma_t


def state_from_noise(noise: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """Return x_0 = (x_t - sigma_t eps) / alpha_t."""
    return (x_t - sigma_t * noise) / alpha_t


def score_from_state(x_0: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """Return the score ∇ log p_t(x_t) = (alpha_t x̂ - x_t) / sigma_t² (Tweedie)."""
    return (alpha_t * x_0 - x_t) / sigma_t**2


def state_from_score(score: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """Return x̂ = (x_t + sigma_t² score) / alpha_t (Tweedie)."""
    return (x_t + sigma_t**2 * score) / alpha_t


def velocity_from_state(x_0: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """Return v = alpha_t eps - sigma_t x_0, where alpha² + sigma² = 1 (Salimans & Ho 2022)."""
    return alpha_t * noise_from_state(x_0, x_t, alpha_t, sigma_t) - sigma_t * x_0


def state_from_velocity(velocity: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """Return x_0 = alpha_t x_t - sigma_t v, where alpha² + sigma² = 1."""
    return alpha_t * x_t - sigma_t * velocity


class Denoiser(ABC):
    """Base of all denoisers: implement `denoise`, get the rest."""

    schedule: Schedule
    standardizer: Standardizer

    @abstractmethod
    def denoise(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Return E[x_0 | x_t] of the shape of ``x_t``; alpha and sigma broadcast against it."""

    def levels(self, x_t: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return (alpha_t, sigma_t), shaped to broadcast against ``x_t`` and of its dtype.

        Parameters
        ----------
        x_t : Tensor of shape (*batch, d)
            Noisy states.
        t : float or Tensor
            Pseudo-time in [0, 1]: one for all, or one per sample (the axes of ``t`` are matched
            with the leading axes of ``x_t``).

        Raises
        ------
        ValueError
            If ``t`` leaves [0, 1], its axes do not match those of ``x_t``, or d is not the prior's.
        """
        checks.last_axis("x_t", x_t, len(self.standardizer.mean))
        t = torch.as_tensor(t, dtype=torch.float64, device=x_t.device)
        if not bool(((t >= 0) & (t <= 1)).all()):
            raise ValueError("t must lie within [0, 1]")
        if t.ndim >= max(x_t.ndim, 1) or any(
            a not in (1, b) for a, b in zip(t.shape, x_t.shape, strict=False)
        ):
            raise ValueError(
                f"t must be a number or match the leading axes of x_t, got shape {tuple(t.shape)} "
                f"for x_t of shape {tuple(x_t.shape)}"
            )
        alpha, sigma = self.schedule(t.reshape(t.shape + (1,) * (x_t.ndim - t.ndim)))
        return alpha.to(x_t.dtype), sigma.to(x_t.dtype)

    def __call__(self, x_t: Tensor, t: Tensor | float) -> Tensor:
        """Return x̂ = E[x_0 | x_t], shape and units (standardised) of ``x_t``."""
        return self.denoise(x_t, *self.levels(x_t, t))

    def noise(self, x_t: Tensor, t: Tensor | float) -> Tensor:
        """Return the expected noise E[eps | x_t]."""
        alpha, sigma = self.levels(x_t, t)
        return noise_from_state(self.denoise(x_t, alpha, sigma), x_t, alpha, sigma)

    def score(self, x_t: Tensor, t: Tensor | float) -> Tensor:
        """Return the score ∇ log p_t(x_t)."""
        alpha, sigma = self.levels(x_t, t)
        return score_from_state(self.denoise(x_t, alpha, sigma), x_t, alpha, sigma)

    def velocity(self, x_t: Tensor, t: Tensor | float) -> Tensor:
        """Return the expected velocity; an error unless the schedule preserves the variance."""
        if not self.schedule.preserves_variance:
            raise ValueError(
                "velocity is defined for alpha² + sigma² = 1 only, not for schedule "
                f"{self.schedule}"
            )
        alpha, sigma = self.levels(x_t, t)
        return velocity_from_state(self.denoise(x_t, alpha, sigma), x_t, alpha, sigma)

    def with_schedule(self, schedule: Schedule) -> Self:
        """Return the same denoiser (sharing its parameters) under another schedule."""
        other = copy.copy(self)
        other.schedule = schedule
        return other


class GaussianDenoiser(Denoiser):
    """The exact denoiser of a Gaussian prior N(mean, covariance).

    x̂ = m + alpha P (alpha² P + sigma² I)^-1 (x_t - alpha m), through the eigenvectors of P, so that
    it holds for every sample's own noise level.

    Parameters
    ----------
    mean : Tensor of shape (d,)
    covariance : Tensor of shape (d, d)
        Symmetric, positive semi-definite; both in standardised units.
    schedule, standardizer : optional
        Default `schedules.Cosine` and the identity.
    """

    def __init__(
        self,
        mean: Tensor,
        covariance: Tensor,
        schedule: Schedule | None = None,
        standardizer: Standardizer | None = None,
    ) -> None:
        checks.finite("mean", mean)
        checks.finite("covariance", covariance)
        d = len(mean) if mean.ndim == 1 else -1
        if covariance.shape != (d, d):
            raise ValueError(
                f"mean and covariance must have shapes (d,) and (d, d), got {tuple(mean.shape)} "
                f"and {tuple(covariance.shape)}"
            )
        scale = covariance.abs().max().clamp(min=torch.finfo(covariance.dtype).tiny)
        if not torch.allclose(covariance, covariance.mT, rtol=1e-5, atol=1e-6 * float(scale)):
            raise ValueError("covariance must be symmetric")
        variances, self.axes = torch.linalg.eigh((covariance + covariance.mT) / 2)
        if float(variances.min()) < -1e-6 * float(scale):
            raise ValueError("covariance must be positive semi-definite")
        self.mean, self.variances = mean, variances.clamp(min=0)
        self.schedule = schedule or schedules.Cosine()
        self.standardizer = standardizer or Standardizer.identity(d)

    def denoise(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Return x̂ by the formula above; shapes as in `Denoiser.denoise`."""
        mean, axes, variances = (
            v.to(x_t.device, x_t.dtype) for v in (self.mean, self.axes, self.variances)
        )
        signal = alpha_t * variances
        # where signal and noise both vanish the prior mean is certain: gain 0, not 0/0
        gain = signal / (alpha_t * signal + sigma_t**2).clamp(min=torch.finfo(x_t.dtype).tiny)
        return mean + (((x_t - alpha_t * mean) @ axes) * gain) @ axes.mT


class EmpiricalDenoiser(Denoiser):
    """The exact denoiser of a data set, i.e. of the mixture of points x_1 … x_n with equal weights.

    x̂ is the mean of the data under softmax weights -|x_t - alpha x_i|²/(2 sigma²).  It is what a
    perfect network would learn, and at low noise it returns the nearest data point: it memorises.

    Parameters
    ----------
    data : Tensor of shape (n, d)
        States in standardised units.
    schedule, standardizer : optional
        Default `schedules.Cosine` and the identity.
    chunk : int
        Most pairs (noisy state, data point) that are held in memory at once.
    """

    def __init__(
        self,
        data: Tensor,
        schedule: Schedule | None = None,
        standardizer: Standardizer | None = None,
        chunk: int = 2**22,
    ) -> None:
        checks.finite("data", data)
        if data.ndim != 2 or not len(data):
            raise ValueError(f"data must have shape (n, d) with n > 0, got {tuple(data.shape)}")
        self.data, self.chunk = data, checks.count("chunk", chunk)
        self.schedule = schedule or schedules.Cosine()
        self.standardizer = standardizer or Standardizer.identity(data.shape[1])

    def denoise(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Return x̂, the softmax mean of the data; shapes as in `Denoiser.denoise`."""
        data = self.data.to(x_t.device, x_t.dtype)
        checks.last_axis("x_t", x_t, data.shape[1])
        smallest = torch.finfo(x_t.dtype).tiny ** 0.25  # no square below overflows
        centres = (x_t / alpha_t.clamp(min=smallest)).reshape(-1, data.shape[1])
        ratio = sigma_t.clamp(min=smallest) / alpha_t.clamp(min=smallest)
        ratio = ratio.expand(*x_t.shape[:-1], 1).reshape(-1, 1)
        columns = min(len(data), self.chunk)
        rows = max(1, self.chunk // columns)
        parts = [
            self._mean(c, r, data, columns)
            for c, r in zip(centres.split(rows), ratio.split(rows), strict=True)
        ]
        return torch.cat(parts).reshape(x_t.shape)

    @staticmethod
    def _mean(centres: Tensor, ratio: Tensor, data: Tensor, columns: int) -> Tensor:
        """Softmax mean over the data, streamed over blocks of ``columns`` points."""
        top = centres.new_full((len(centres), 1), -torch.inf)
        total, mean = torch.zeros_like(top), torch.zeros_like(centres)
        for block in data.split(columns):
            # no matrix product here: |c|² - 2 c x + |x|² cancels catastrophically at low noise
            distance = torch.cdist(centres, block, compute_mode="donot_use_mm_for_euclid_dist")
            logits = -0.5 * (distance / ratio) ** 2
            new_top = torch.maximum(top, logits.amax(1, keepdim=True).detach())
            weights, fade = (logits - new_top).exp(), (top - new_top).exp()
            total = total * fade + weights.sum(1, keepdim=True)
            mean = mean * fade + weights @ block
            top = new_top
        return mean / total


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

    __call__ = Denoiser.__call__

    def output(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> tuple[Tensor, ...]:
        """Return (F, u, c, s) as in the class's description."""
        u, c, s = normalise(x_t, alpha_t, sigma_t)
        return self.network(u, self.level(c, s)), u, c, s

    def denoise(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Return x̂ as read from the network's output; shapes as in `Denoiser.denoise`."""
        f, u, c, s = self.output(x_t, alpha_t, sigma_t)
        if self.head == "velocity":
            return state_from_velocity(f, u, c, s)
        return f if self.head == "state" else state_from_noise(f, u, c, s)

    def hidden(self, x_t: Tensor, t: Tensor | float) -> Tensor:
        """Return the network's last hidden layer at (x_t, t), shape (..., width)."""
        u, c, s = normalise(x_t, *self.levels(x_t, t))
        return self.network.hidden(u, self.level(c, s))

    def level(self, c: Tensor, s: Tensor) -> Tensor:
        """Return log(s/c) clamped to the trained range, without its last axis."""
        low, high = self.ratios
        return torch.log(s / c).clamp(math.log(low), math.log(high))[..., 0]


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
    alpha, sigma = denoiser.levels(x_0, t)
    f, u, c, s = denoiser.output(diffuse(x_0, alpha, sigma, noise), alpha, sigma)
    if denoiser.head == "velocity":
        target = velocity_from_state(x_0, u, c, s)
    else:
        target = noise if denoiser.head == "noise" else x_0
    return nn.functional.mse_loss(f, target)
