r"""Event guidance: from a denoiser to one conditioned on an event (Finzi et al. 2023, Z23).

The score of x_t given the event E adds ∇ log P(E | x_t) to the score, so by Tweedie's formula

    E[x_0 | x_t, E] = x̂ + (sigma_t²/alpha_t) ∇ log P(E | x_t).

P(E | x_t) is not known.  *Moment matching* takes C(x_0) given x_t to be Gaussian, with the value
and the slope of C at x̂ and Tweedie's covariance Cov[x_0 | x_t] = (sigma_t²/alpha_t) J, J = ∂x̂/∂x_t:

    C(x_0) | x_t ~ N(C(x̂), s²),    s² = (sigma_t²/alpha_t) gᵀ J g,    g = ∇C(x̂),

so that P(C > 0 | x_t) = Φ(C(x̂)/s), and its gradient, with s and J held fixed as Z23 does, is
φ/Φ(C(x̂)/s) Jᵀg/s.  One vector-Jacobian product Jᵀg gives both.  For linear C and a Gaussian prior
all of this is exact.  Otherwise it is an approximation, and for a curved C a poor one at high
noise, where C(x̂) is not the mean of C(x_0).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ddmlib import checks, noise
from ddmlib.denoisers import Denoiser
from ddmlib.events.constraints import Constraint, Equality, Event

FLOOR = 1e-6


class Conditioned(NamedTuple):
    """What guidance knows at (x_t, t).

    ``x_0`` is x̂, ``guided`` is x̂ given the event, both of the shape of x_t; ``log_mass`` is
    log P(E | x_t) by moment matching, shape (*batch,).
    """

    x_0: Tensor
    guided: Tensor
    log_mass: Tensor


class EventGuidance(Denoiser):
    r"""A denoiser conditioned on an event by moment matching; a denoiser like any other.

    Parameters
    ----------
    denoiser : Denoiser
        Of states or of trajectories; also one that is guided already.
    constraint : Event
        `Constraint`, `Equality` or a conjunction of them, in physical units.  Several inequalities
        are taken to be independent given x_t, several equalities jointly Gaussian.
    floor : float
        Added to gᵀ J g as a share of |g|²/alpha_t, so that s stays positive where the Jacobian of a
        network is not.  Z23 adds 1e-3, which at high noise is more than the variance itself.

    Raises
    ------
    ValueError
        If the constraint is not differentiable (tried on eight random samples), or its number of
        components is not the denoiser's.
    """

    def __init__(self, denoiser: Denoiser, constraint: Event, floor: float = FLOOR) -> None:
        if not isinstance(constraint, Event):
            raise TypeError(
                f"constraint must be a Constraint, an Equality or a conjunction, "
                f"got {type(constraint).__name__}"
            )
        d = len(denoiser.standardizer.mean)
        if constraint.shape[-1] != d:
            raise ValueError(
                f"the constraint is for samples of shape {constraint.shape}, "
                f"but the denoiser has {d} components"
            )
        self.denoiser, self.constraint = denoiser, constraint
        self.floor = checks.positive("floor", floor)
        self.schedule, self.standardizer = denoiser.schedule, denoiser.standardizer
        # what `sampling.sample` takes its range of noise levels from
        self.ratios = getattr(denoiser, "ratios", (0.0, math.inf))
        probe = noise.normal((8, *constraint.shape), generator=torch.Generator().manual_seed(0))
        constraint.check_gradient(self.standardizer.inverse(probe))

    def denoise(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Return x̂ given the event; shapes as in `Denoiser.denoise`."""
        return self.condition(x_t, alpha_t, sigma_t).guided

    def condition(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Conditioned:
        """Return x̂, x̂ given the event, and log P(E | x_t).

        Costs one evaluation and one vector-Jacobian product a constraint.  Differentiable in x_t
        when x_t asks for it.
        """
        axes = len(self.constraint.shape)
        if x_t.ndim < axes or tuple(x_t.shape[-axes:]) != self.constraint.shape:
            raise ValueError(
                f"x_t must hold samples of shape {self.constraint.shape}, got {tuple(x_t.shape)}"
            )
        if any(size != 1 for size in (*alpha_t.shape[-axes:], *sigma_t.shape[-axes:])):
            raise ValueError("a sample must have one noise level")
        # as many axes as x_t, so that the axes of a sample can be counted from the end
        alpha_t, sigma_t = (
            v.expand((1,) * (x_t.ndim - v.ndim) + v.shape) for v in (alpha_t, sigma_t)
        )
        axes_of_sample = tuple(range(-axes, 0))
        create = torch.is_grad_enabled() and x_t.requires_grad
        with torch.enable_grad():
            x = x_t if create else x_t.detach().requires_grad_()
            x_0 = self.denoiser.denoise(x, alpha_t, sigma_t)
            physical = self.standardizer.inverse(x_0)
            parts = self.constraint.parts
            values = [part.value(physical) for part in parts]
            slopes, products = [], []
            for k, value in enumerate(values):
                (g,) = torch.autograd.grad(value.sum(), x_0, retain_graph=True, create_graph=create)
                keep = create or k + 1 < len(parts)
                (jg,) = torch.autograd.grad(x_0, x, g, retain_graph=keep, create_graph=create)
                slopes.append(g)
                products.append(jg)

        def inner(a: Tensor, b: Tensor) -> Tensor:
            return (a * b).sum(axes_of_sample, keepdim=True)

        with torch.set_grad_enabled(create):
            signal = alpha_t.clamp(min=torch.finfo(x.dtype).tiny ** 0.25)
            spread, share = sigma_t.square() / signal, self.floor / signal
            shift, log_mass = torch.zeros_like(x_0), x_0.new_zeros(x_t.shape[:-axes])
            equal = [k for k, part in enumerate(parts) if isinstance(part, Equality)]
            for k, part in enumerate(parts):
                if isinstance(part, Constraint):
                    g, jg = slopes[k], products[k]
                    own = inner(g, jg).abs() + share * inner(g, g)
                    variance = spread * own
                    c = values[k].reshape(variance.shape)
                    shift = shift + part.slope(c, variance) * jg
                    log_mass = log_mass + part.log_mass(c, variance).reshape(log_mass.shape)
            if equal:
                gs, jgs = (torch.stack([v[k] for k in equal], -1) for v in (slopes, products))
                flat = (*x_t.shape[:-axes], -1, len(equal))
                gs, jgs = gs.reshape(flat), jgs.reshape(flat)
                spread_, share_ = (v.flatten(-axes)[..., None] for v in (spread, share))
                matrix = gs.mT @ jgs
                matrix = (matrix + matrix.mT) / 2 + share_ * gs.mT @ gs
                variances = spread_ * matrix
                targets = [parts[k].target - values[k] for k in equal]  # type: ignore[union-attr]
                gap = torch.stack(targets, -1)[..., None]
                weights = torch.linalg.solve(variances, gap)
                shift = shift + (jgs @ weights).reshape(x_0.shape)
                log_mass = log_mass - 0.5 * (
                    (gap * weights).sum((-2, -1))
                    + torch.linalg.slogdet(math.tau * variances).logabsdet
                )
            guided = x_0 + spread * shift
        if not create:
            return Conditioned(x_0.detach(), guided.detach(), log_mass.detach())
        return Conditioned(x_0, guided, log_mass)
