"""Guidance that needs no approximation: an observed component is one that has less noise."""

import torch
from torch import Tensor

from ddmlib.assimilation import Observation
from ddmlib.assimilation.observations import matrix
from ddmlib.datasets import Standardizer
from ddmlib.denoisers import Denoiser
from ddmlib.guidance.base import fits


class Fusion(Denoiser):
    """The exact posterior mean E[x_0 | x_t, y] for observations of single components.

    At the noise level r = sigma/alpha a component of x_t/alpha is the clean one plus noise of
    variance r².  An observation of that component, in standardised units, is the clean one plus
    noise of variance s².  The two together say as much as their mean, weighted with the precisions
    1/r² and 1/s², which is the clean one plus noise of variance 1/(1/r² + 1/s²).  So

        E[x_0 | x_t, y] = x̂(the fused x_t, the fused noise levels),

    exactly, for any prior and any number of observations; one evaluation, no product with a
    Jacobian.  The price: the denoiser must take a noise level for each component of each state.

    Parameters
    ----------
    denoiser : Denoiser
        ``elementwise``: the exact Gaussian ones, or a network trained so.
    observation : Observation
        Of components, up to constant factors; shapes as for `Guided`.

    Raises
    ------
    TypeError
        If the denoiser is not elementwise, or its units are no affine map of the physical ones.
    ValueError
        If the operator does anything else than pick and scale components, or ``y`` does not fit.
    """

    elementwise = True

    def __init__(self, denoiser: Denoiser, observation: Observation) -> None:
        if not denoiser.elementwise:
            raise TypeError(
                "denoiser must take a noise level for each component (elementwise), "
                f"got {type(denoiser).__name__}"
            )
        if type(denoiser.standardizer) is not Standardizer:
            raise TypeError(
                "denoiser must have an affine standardizer: in other units the likelihood of an "
                f"observation is not Gaussian, got {type(denoiser.standardizer).__name__}"
            )
        self.denoiser, self.observation = denoiser, observation
        self.schedule, self.standardizer = denoiser.schedule, denoiser.standardizer
        self.event, self.ratios = denoiser.event, denoiser.ratios
        y, scale = observation.y, denoiser.standardizer.std
        if y.ndim < self.event:
            raise ValueError(
                f"y must have shape {'(*batch, n, m)' if self.event == 2 else '(*batch, m)'}, "
                f"got {tuple(y.shape)}"
            )
        if self.event == 1 and observation.every != 1:
            raise ValueError(f"every must be 1 for a denoiser of states, got {observation.every}")
        reach = self.standardizer.mean.abs() + scale
        picks = matrix(observation.operator, len(scale), scale.double(), reach)  # (m, d)
        if picks.shape[0] != y.shape[-1] or not bool(((picks != 0).sum(1) == 1).all()):
            raise ValueError(
                "operator must pick components, one for each of the "
                f"{y.shape[-1]} values of y; for others take another rule of guidance"
            )
        std = torch.as_tensor(observation.std, dtype=torch.float64, device=picks.device)
        # y = picks (mean + scale x) + std noise: weights turn y into precision times component
        slopes = picks * scale.double()
        self.precision = ((slopes / std.expand(len(picks))[:, None]) ** 2).sum(0)  # (d,)
        weights = slopes / std.expand(len(picks))[:, None] ** 2
        offset = picks @ self.standardizer.mean.to(picks)
        self.information = (y.to(picks) - offset) @ weights  # (*batch, n, d) or (*batch, d)

    @property
    def device(self) -> torch.device | None:
        """Device of the wrapped denoiser."""
        return self.denoiser.device

    def denoise(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Return E[x_0 | x_t, y]; see `Denoiser.denoise`."""
        fits(self.observation.y, self.event, x_t)
        precision, information = self.precision.to(x_t), self.information.to(x_t)
        if self.event == 2:
            every, n = self.observation.every, information.shape[-2]
            if n != 1 + (x_t.shape[-2] - 1) // every:
                raise ValueError(
                    f"y must have shape (*batch, {1 + (x_t.shape[-2] - 1) // every}, m) for "
                    f"trajectories of {x_t.shape[-2]} states, got {tuple(self.observation.y.shape)}"
                )
            rows = torch.arange(0, x_t.shape[-2], every, device=x_t.device)
            spread = information.new_zeros(*information.shape[:-2], *x_t.shape[-2:])
            information = spread.index_copy(-2, rows, information)
            precision = precision.new_zeros(x_t.shape[-2:]).index_copy(
                0, rows, precision.expand(n, -1)
            )
        # alpha' x_0 + sigma noise with alpha'² = alpha² + sigma² / s²
        alpha = torch.sqrt(alpha_t**2 + sigma_t**2 * precision)
        fused = alpha_t * x_t + sigma_t**2 * information
        return self.denoiser.denoise(
            fused / alpha.clamp(min=torch.finfo(x_t.dtype).tiny), alpha, sigma_t
        )
