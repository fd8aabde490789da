"""Guidance by a covariance that is known beforehand, and DPS, which has none."""

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from ddmlib import checks, noise
from ddmlib.assimilation import Observation
from ddmlib.denoisers import Denoiser, diffuse
from ddmlib.guidance.base import Guided, Linearised, whitened


class _Isotropic(Guided):
    """V diagonal and known beforehand: one small system for each observed state."""

    @abstractmethod
    def variance(self, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Return the assumed variance of x_0 given x_t, broadcasting to states (..., d)."""

    def _gradient(self, at: Linearised, alpha_t: Tensor, sigma_t: Tensor) -> tuple[Tensor, Tensor]:
        root = torch.linalg.cholesky(whitened(at.jacobian, self.variance(alpha_t, sigma_t)))
        solved = torch.cholesky_solve(at.residual.double()[..., None], root)[..., 0]
        solved = solved.to(at.residual)
        quadratic = self._sum(at.residual * solved)
        half = root.diagonal(dim1=-2, dim2=-1).log().to(solved)
        return at.pull(solved), -quadratic / 2 - self._sum(half) + self._constant(
            at.residual, at.std
        )


class GaussianLikelihood(_Isotropic):
    """R23's likelihood: the covariance of x_0 given x_t is gamma (sigma_t/alpha_t)² I.

    For an operator that picks standardised components this is R23's std² + gamma (sigma/alpha)²; in
    general gamma is carried to the units of y by the operator's derivative.

    Parameters
    ----------
    denoiser, observation
        As in `Guided`.
    gamma : float
        R23's paper has 1e-2, its code 3e-2.
    """

    def __init__(self, denoiser: Denoiser, observation: Observation, gamma: float = 1e-2) -> None:
        super().__init__(denoiser, observation)
        self.gamma = checks.positive("gamma", gamma)

    def variance(self, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Return gamma (sigma_t/alpha_t)²."""
        return self.gamma * (sigma_t / alpha_t.clamp(min=1e-12)) ** 2


class PiGDM(_Isotropic):
    """ΠGDM's likelihood: the covariance of x_0 given x_t under a standard normal prior."""

    def variance(self, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Return sigma_t²/(alpha_t² + sigma_t²)."""
        return sigma_t**2 / (alpha_t**2 + sigma_t**2)


class ErrorVariance(NamedTuple):
    """Error variance of x̂, (levels, d), at the noise levels sigma/alpha = ``ratios``, (levels,)."""

    ratios: Tensor
    variances: Tensor


@torch.no_grad()
def error_variance(
    denoiser: Denoiser,
    x_0: Tensor,
    ratios: Tensor,
    *,
    generator: torch.Generator | None = None,
) -> ErrorVariance:
    """Measure the error variance E|x̂ - x_0|² of a denoiser at some noise levels.

    Parameters
    ----------
    denoiser : Denoiser
    x_0 : Tensor of shape (*batch, d) or (*batch, length, d)
        Data in standardised units, of the kind that the denoiser takes.
    ratios : Tensor of shape (levels,)
        Noise levels sigma/alpha, ascending.
    generator : torch.Generator, optional
        Source of the noise.

    Returns
    -------
    ErrorVariance
        Averaged over samples and, for trajectories, over states; standardised units.

    Raises
    ------
    ValueError
        If ``x_0`` or ``ratios`` are not finite, or ``ratios`` are not positive and ascending.
    """
    if checks.finite("x_0", x_0).ndim <= denoiser.event:
        raise ValueError(
            f"x_0 must have more than {denoiser.event} axes, a batch first, got {tuple(x_0.shape)}"
        )
    if checks.finite("ratios", ratios).ndim != 1 or len(ratios) < 2:
        raise ValueError(f"ratios must have shape (levels,), got {tuple(ratios.shape)}")
    if not bool((ratios > 0).all()) or not bool((ratios.diff() > 0).all()):
        raise ValueError("ratios must be positive and ascend")
    rows = []
    for ratio in ratios.to(x_0)[:, None]:
        alpha = 1 / torch.sqrt(1 + ratio**2)
        x_t = diffuse(x_0, alpha, ratio * alpha, noise.normal_like(x_0, generator))
        error = denoiser.denoise(x_t, alpha, ratio * alpha) - x_0
        rows.append(error.square().flatten(0, -2).mean(0))
    return ErrorVariance(ratios.to(x_0), torch.stack(rows))


class MeasuredVariance(_Isotropic):
    """R23's form with the measured error variance of x̂ in place of gamma (sigma_t/alpha_t)².

    Parameters
    ----------
    denoiser, observation
        As in `Guided`.
    errors : ErrorVariance
        Of that denoiser, from `error_variance`.  Between its levels it is interpolated in the
        logarithms; below them it falls with (sigma/alpha)², above it stays.
    """

    def __init__(self, denoiser: Denoiser, observation: Observation, errors: ErrorVariance) -> None:
        super().__init__(denoiser, observation)
        d = len(denoiser.standardizer.mean)
        if errors.variances.shape != (len(errors.ratios), d):
            raise ValueError(
                f"errors must hold variances of shape ({len(errors.ratios)}, {d}), got "
                f"{tuple(errors.variances.shape)}"
            )
        self.errors = errors

    def variance(self, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Return the measured variance at sigma_t/alpha_t, (..., d)."""
        knots, values = (v.to(alpha_t).clamp(min=1e-12).log() for v in self.errors)
        level = torch.log(sigma_t.clamp(min=1e-12) / alpha_t.clamp(min=1e-12))  # (..., 1)
        above = torch.searchsorted(knots, level[..., 0]).clamp(1, len(knots) - 1)
        low, high = knots[above - 1], knots[above]
        share = ((level[..., 0] - low) / (high - low)).clamp(0, 1)[..., None]
        below = (level - knots[0]).clamp(max=0)
        return torch.exp(torch.lerp(values[above - 1], values[above], share) + 2 * below)


class DPS(Guided):
    """Diffusion posterior sampling as R23 has it: the score of y is -2 zeta ∇|y - A(x̂)|.

    That is the gradient of the squared misfit divided by its root.  It is no score of any
    likelihood: its strength, in units of 1/y, does not depend on std, and the steps of a sampler
    decide what it amounts to.

    Parameters
    ----------
    denoiser, observation
        As in `Guided`.
    zeta : float
        Strength; R23 has 1 for standardised observations.
    """

    def __init__(self, denoiser: Denoiser, observation: Observation, zeta: float = 1.0) -> None:
        super().__init__(denoiser, observation)
        self.zeta = checks.positive("zeta", zeta)

    def _gradient(self, at: Linearised, alpha_t: Tensor, sigma_t: Tensor) -> tuple[Tensor, Tensor]:
        misfit = at.residual * at.std
        distance = self._sum(misfit.square()).sqrt()
        scale = 2 * self.zeta / distance.clamp(min=1e-12)
        scale = scale.reshape(scale.shape + (1,) * self.event)
        return at.pull(scale * misfit * at.std), -2 * self.zeta * distance
