r"""Trajectories: from a denoiser of short windows to one of trajectories of any length.

The score of a Markov chain's trajectory has a short range: given the noisy neighbours of state i,
it hardly depends on states far away.  R23 (Rozet & Louppe 2023) therefore learns the score of
windows of 2k+1 states only, and lets state i take the centre output of the window around it; the
first and last k states take the outputs of the first and last window.  This *pseudo-blanket* is an
approximation: it replaces E[x_i | all noisy states] by E[x_i | those of the window], and the field
so composed need not be the gradient of anything.

`GaussianTrajectoryDenoiser` is exact, for windows and for whole trajectories alike, where the law
is Gaussian: between the two lies the error of the composition alone.
"""

import torch
from torch import Tensor

from ddmlib import checks
from ddmlib.datasets import Standardizer
from ddmlib.denoisers import Denoiser, GaussianDenoiser, NetworkDenoiser, normalise
from ddmlib.networks import WindowMLP
from ddmlib.schedules import Schedule


def one_level(name: str, value: Tensor) -> Tensor:
    """Return alpha or sigma, one for each trajectory, without the axis of states.

    Raises
    ------
    ValueError
        If the noise level changes along a trajectory.
    """
    if value.ndim >= 2 and value.shape[-2] != 1:
        raise ValueError(f"{name} must be the same for all states of a trajectory")
    return value[..., 0, :] if value.ndim >= 2 else value


class GaussianTrajectoryDenoiser(Denoiser):
    """The exact denoiser of trajectories of fixed length whose law is Gaussian.

    Parameters
    ----------
    mean : Tensor of shape (length, d)
    covariance : Tensor of shape (length d, length d)
        Both in standardised units, for instance from `dynamics.LinearGaussian.law`.
    schedule, standardizer : optional
        Default `schedules.Cosine` and the identity.
    """

    event = 2
    elementwise = True

    def __init__(
        self,
        mean: Tensor,
        covariance: Tensor,
        schedule: Schedule | None = None,
        standardizer: Standardizer | None = None,
    ) -> None:
        if checks.finite("mean", mean).ndim != 2:
            raise ValueError(f"mean must have shape (length, d), got {tuple(mean.shape)}")
        self.window, d = mean.shape
        self.flat = GaussianDenoiser(mean.flatten(), covariance, schedule)
        self.schedule = self.flat.schedule
        self.standardizer = standardizer or Standardizer.identity(d)

    def denoise(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Return x̂ for trajectories (*batch, length, d); see `Denoiser.denoise`."""
        if x_t.shape[-2:] != (self.window, len(self.standardizer.mean)):
            raise ValueError(
                f"x_t must have shape (*batch, {self.window}, {len(self.standardizer.mean)}), "
                f"got {tuple(x_t.shape)}"
            )
        level = alpha_t, sigma_t
        if any(v.shape[-2:].numel() > 1 for v in level):
            flat = [v.expand(*v.shape[:-2], *x_t.shape[-2:]).flatten(-2) for v in level]
        else:
            flat = [
                one_level(name, v) for name, v in zip(("alpha_t", "sigma_t"), level, strict=True)
            ]
        return self.flat.denoise(x_t.flatten(-2), *flat).reshape(x_t.shape)


class TrajectoryDenoiser(Denoiser):
    """A denoiser of windows composed into one of trajectories of any length (R23, algorithm 2).

    Every window costs one evaluation.  A `networks.WindowMLP` is evaluated on the windows side by
    side, without computing outputs that the composition drops; the result is the same.

    Parameters
    ----------
    denoiser : Denoiser
        Of windows (*batch, 2k+1, d): a `NetworkDenoiser` with a network of windows, or a
        `GaussianTrajectoryDenoiser` of odd length.

    Raises
    ------
    TypeError, ValueError
        If the denoiser is not one of windows, or their length is even.
    """

    event = 2

    def __init__(self, denoiser: Denoiser) -> None:
        owner = denoiser.network if isinstance(denoiser, NetworkDenoiser) else denoiser
        window = getattr(owner, "window", None)
        if window is None:
            raise TypeError(f"denoiser must be one of windows of states, got {denoiser}")
        if window % 2 == 0:
            raise ValueError(f"denoiser must be one of windows of odd length, got {window}")
        self.denoiser, self.window = denoiser, window
        self.schedule, self.standardizer = denoiser.schedule, denoiser.standardizer
        self.ratios = denoiser.ratios

    @property
    def device(self) -> torch.device | None:
        """Device of the window's denoiser."""
        return self.denoiser.device

    def denoise(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Return x̂ for trajectories (*batch, length, d); see `Denoiser.denoise`."""
        if x_t.ndim < 2 or x_t.shape[-2] < self.window:
            raise ValueError(
                f"x_t must have shape (*batch, length, d) with length >= {self.window}, "
                f"got {tuple(x_t.shape)}"
            )
        one_level("alpha_t", alpha_t)
        denoiser = self.denoiser
        if isinstance(denoiser, NetworkDenoiser) and isinstance(denoiser.network, WindowMLP):
            u, c, s = normalise(x_t, alpha_t, sigma_t)
            return denoiser.read(denoiser.network.along(u, denoiser.level(c, s)), u, c, s)
        windows = x_t.unfold(-2, self.window, 1).mT  # (*batch, length - 2k, 2k + 1, d)
        alpha, sigma = (v[..., None, :, :] if v.ndim >= 2 else v for v in (alpha_t, sigma_t))
        return compose(denoiser.denoise(windows, alpha, sigma))


def compose(windows: Tensor) -> Tensor:
    """Return a trajectory from the outputs of its windows, as the module's description says.

    Parameters
    ----------
    windows : Tensor of shape (*batch, length - 2k, 2k + 1, d)

    Returns
    -------
    Tensor of shape (*batch, length, d)
    """
    k = windows.shape[-2] // 2
    first, last = windows[..., 0, :k, :], windows[..., -1, k + 1 :, :]
    return torch.cat((first, windows[..., k, :], last), -2)
