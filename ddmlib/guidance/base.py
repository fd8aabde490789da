"""What all guided denoisers share: the observation of x̂, its derivatives, Tweedie's formula."""

import math
from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from ddmlib.assimilation import Observation
from ddmlib.denoisers import Denoiser


class Evaluation(NamedTuple):
    """Of a guided denoiser: x̂ without and with the observation, and log p(y | x_t), (*batch,)."""

    free: Tensor
    guided: Tensor
    log_likelihood: Tensor


class Linearised(NamedTuple):
    """A denoiser at x_t, and the observation of its estimate."""

    x_t: Tensor  # (*batch, d) or (*batch, length, d), what gradients are taken for
    state: Tensor  # x̂, of that shape
    seen: Tensor  # A(x̂), (*batch, m) or (*batch, n, m)
    residual: Tensor  # (y - A(x̂)) / std, of that shape
    std: Tensor  # (m,)
    jacobian: Tensor  # of A / std at x̂, state by state: (*batch, m, d) or (*batch, n, m, d)
    scale: Tensor  # sigma_t² / alpha_t
    keep: bool  # whether the result is to be differentiated again

    def pull(self, weights: Tensor) -> Tensor:
        """Return the product of ``weights``, of the shape of ``residual``, with ∂(A(x̂)/std)/∂x_t:
        one product with the transposed Jacobian of the denoiser."""
        (product,) = torch.autograd.grad(
            self.seen, self.x_t, weights / self.std, retain_graph=True, create_graph=self.keep
        )
        return product


class Guided(Denoiser):
    """A denoiser given an observation; its subclasses are the rules above.

    Parameters
    ----------
    denoiser : Denoiser
        Of states, or of trajectories.
    observation : Observation
        ``y`` of shape (m,) or (*batch, m) for states; (n, m) or (*batch, n, m) for trajectories,
        n = 1 + (length - 1) // every.

    Raises
    ------
    ValueError
        If ``y`` has too few axes, or states are to be observed other than one by one; when it is
        evaluated, if the operator's output does not fit ``y``.
    """

    def __init__(self, denoiser: Denoiser, observation: Observation) -> None:
        self.denoiser, self.observation = denoiser, observation
        self.schedule, self.standardizer = denoiser.schedule, denoiser.standardizer
        self.event, self.ratios = denoiser.event, denoiser.ratios
        if observation.y.ndim < self.event:
            raise ValueError(
                f"y must have shape {'(*batch, n, m)' if self.event == 2 else '(*batch, m)'}, "
                f"got {tuple(observation.y.shape)}"
            )
        if self.event == 1 and observation.every != 1:
            raise ValueError(f"every must be 1 for a denoiser of states, got {observation.every}")

    @property
    def device(self) -> torch.device | None:
        """Device of the wrapped denoiser."""
        return self.denoiser.device

    def observe(self, x: Tensor) -> Tensor:
        """Return A(x), what is observed of standardised states, in physical units."""
        x = self.standardizer.inverse(x)
        seen = self.observation.predict(self.observation.observed(x) if self.event == 2 else x)
        if seen.shape[-self.event :] != self.observation.y.shape[-self.event :]:
            raise ValueError(
                f"y must have shape (*batch, n, m) = {tuple(seen.shape)} for trajectories of "
                f"{x.shape[-2]} states, got {tuple(self.observation.y.shape)}"
            )
        return seen

    def denoise(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Return E[x_0 | x_t, y] in the rule's approximation; see `Denoiser.denoise`.

        Raises
        ------
        RuntimeError
            If it is not finite.
        """
        return self.evaluate(x_t, alpha_t, sigma_t).guided

    def evaluate(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Evaluation:
        """Return x̂ with and without the observation, and its likelihood; see `denoise`."""
        with torch.enable_grad():
            at = self._linearise(x_t, alpha_t, sigma_t)
            self._check(at.residual, alpha_t, sigma_t)
            gradient, log_likelihood = self._gradient(at, alpha_t, sigma_t)
        guided = at.state + at.scale * gradient
        self._check(guided, alpha_t, sigma_t)
        if not at.keep:
            return Evaluation(at.state.detach(), guided.detach(), log_likelihood.detach())
        return Evaluation(at.state, guided, log_likelihood)

    def _check(self, x: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> None:
        if not bool(torch.isfinite(x).all()):
            raise RuntimeError(
                f"{type(self).__name__} left the finite numbers at sigma/alpha = "
                f"{float((sigma_t / alpha_t).max()):.3g}: its steps overshoot; take a larger std, "
                "more steps, or a rule with a larger covariance"
            )

    @abstractmethod
    def _gradient(self, at: Linearised, alpha_t: Tensor, sigma_t: Tensor) -> tuple[Tensor, Tensor]:
        """Return ∇ log p(y | x_t), of the shape of x_t, and log p(y | x_t), (*batch,)."""

    def _linearise(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Linearised:
        keep = torch.is_grad_enabled() and x_t.requires_grad
        x = x_t if keep else x_t.detach().requires_grad_()
        state = self.denoiser.denoise(x, alpha_t, sigma_t)
        seen = self.observe(state)
        y = self.observation.y.to(seen)
        fits(self.observation.y, self.event, x_t)
        std = torch.as_tensor(self.observation.std, dtype=seen.dtype, device=seen.device).expand(
            y.shape[-1]
        )
        z = state.detach().requires_grad_()
        rows = [
            torch.autograd.grad(value.sum(), z, retain_graph=True, materialize_grads=True)[0]
            for value in self.observe(z).unbind(-1)
        ]
        jacobian = torch.stack(rows, -2) / std[:, None]
        if self.event == 2:
            jacobian = jacobian[..., :: self.observation.every, :, :]
        # where no signal is left the product with the Jacobian, of order alpha, is zero
        scale = sigma_t**2 / alpha_t.clamp(min=torch.finfo(x.dtype).tiny)
        return Linearised(x, state, seen, (y - seen) / std, std, jacobian, scale, keep)

    def log_likelihood(self, x_0: Tensor) -> Tensor:
        """Return log p(y | x_0) of clean states, standardised, summed over a sample: (*batch,)."""
        seen = self.observe(x_0)
        std = torch.as_tensor(self.observation.std, dtype=seen.dtype, device=seen.device).expand(
            seen.shape[-1]
        )
        residual = (self.observation.y.to(seen) - seen) / std
        return -self._sum(residual.square()) / 2 + self._constant(residual, std)

    def _constant(self, residual: Tensor, std: Tensor) -> Tensor:
        """Return the part of log N(y; …) that the observation alone fixes."""
        count = math.prod(residual.shape[-self.event :])
        return -torch.log(std).sum() * (count // len(std)) - count / 2 * math.log(2 * math.pi)

    def _sum(self, values: Tensor) -> Tensor:
        """Sum over the observed values of a sample."""
        return values.sum(tuple(range(-self.event, 0)))


def fits(y: Tensor, event: int, x_t: Tensor) -> None:
    """Refuse observations whose batch is not that of the samples.

    Raises
    ------
    ValueError
        If ``y`` does not broadcast to the batch of ``x_t``, or would enlarge it.
    """
    seen, batch = tuple(y.shape[:-event]), tuple(x_t.shape[: x_t.ndim - event])
    try:
        good = torch.broadcast_shapes(seen, batch) == batch
    except RuntimeError:
        good = False
    if not good:
        raise ValueError(f"y must broadcast to the batch of the samples, {batch}, got {seen}")


def whitened(jacobian: Tensor, variance: Tensor) -> Tensor:
    """Return I + A V Aᵀ of whitened observations for diagonal V, (..., m, m), in float64."""
    jacobian = jacobian.double()
    eye = torch.eye(jacobian.shape[-2], dtype=jacobian.dtype, device=jacobian.device)
    return eye + (jacobian * variance[..., None, :].to(jacobian)) @ jacobian.mT
