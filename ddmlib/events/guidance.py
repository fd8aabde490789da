r"""Event guidance: from a denoiser to one conditioned on an event (Finzi et al. 2023, Z23).

The score of x_t given the event E adds ∇ log P(E | x_t) to the score, so by Tweedie's formula

    E[x_0 | x_t, E] = x̂ + (sigma_t²/alpha_t) ∇ log P(E | x_t).

P(E | x_t) is not known.  *Moment matching* takes C(x_0) given x_t to be Gaussian, with the value
and the slope of C at x̂ and Tweedie's covariance Cov[x_0 | x_t] = (sigma_t²/alpha_t) J, J = ∂x̂/∂x_t:

    C(x_0) | x_t ~ N(C(x̂), s²),    s² = (sigma_t²/alpha_t) gᵀ J g,    g = ∇C(x̂),

so that P(C > 0 | x_t) = Φ(C(x̂)/s), and its gradient, with s and J held fixed as Z23 does, is
φ/Φ(C(x̂)/s) Jᵀg/s.  One vector-Jacobian product Jᵀg gives both.  For linear C and a Gaussian prior
all of this is exact.  Otherwise it is an approximation, and for a curved C a poor one at high
noise, where C(x̂) is not the mean of C(x_0); a `Calibration` corrects its mean and variance.

*Steps are bounded.*  Where C is nearly flat at x̂ its tangent reaches zero only far away: near the
centre of |x|² > c the pull (c - |x̂|²)/(2 |x̂|) has no bound.  A calibrated variance far below that
of the tangent lengthens steps too: it is zero at the last levels, where the sampler adds no noise
any more, and a path that was still outside E was thrown out to 1e12.  For a convex C Jensen's
inequality gives C(E[x_0 | x_t, E]) ≤ E[C(x_0) | x_t, E] = m + S φ/Φ(m/S) with m and S² the mean and
variance that are taken.  A step is shortened where it would bring C(x̂) beyond this; for a linear C
without calibration none is.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ddmlib import checks, noise
from ddmlib.denoisers import Denoiser
from ddmlib.events import arguments
from ddmlib.events.constraints import SMALLEST, Constraint, Equality, Event

FLOOR = 1e-6
# added to P(E | x_t): what moment matching takes for impossible is only most unlikely
LEAST = 1e-10
HALVINGS = 40  # at most, of a step along which C saturates or jumps


class Conditioned(NamedTuple):
    """What guidance knows at (x_t, t).

    ``x_0`` is x̂, ``guided`` is x̂ given the event, both of the shape of x_t; ``log_mass`` is
    log P(E | x_t) by moment matching, shape (*batch,).
    """

    x_0: Tensor
    guided: Tensor
    log_mass: Tensor


@dataclass(frozen=True)
class Calibration:
    """Corrections of moment matching, level by level, as `pilot.calibrate` measures them.

    C(x_0) given x_t is taken to be N(intercept + slope C(x̂), scale slope² s² + extra).

    Parameters
    ----------
    log_ratios : Tensor of shape (levels,)
        log(sigma/alpha), ascending; in between the corrections are interpolated.
    intercept, slope, scale, extra : Tensor of shape (parts, levels)
        For each part of the event.
    least : float
        What twisted paths add to P(E | x_t), so that none is dropped that moment matching takes for
        impossible by mistake.
    inside : float
        Share of the pilot's paths that ended in the event.
    """

    log_ratios: Tensor
    intercept: Tensor
    slope: Tensor
    scale: Tensor
    extra: Tensor
    least: float = LEAST
    inside: float = math.nan

    def at(self, part: int, ratio: Tensor) -> tuple[Tensor, ...]:
        """Return (intercept, slope, scale, extra) of a part at sigma/alpha, of its shape."""
        rows = (self.intercept, self.slope, self.scale, self.extra)
        if len(self.log_ratios) == 1:
            return tuple(row[part].to(ratio).expand(ratio.shape) for row in rows)
        x = self.log_ratios.to(ratio)
        u = ratio.clamp(min=torch.finfo(ratio.dtype).tiny).log().clamp(x[0], x[-1])
        right = torch.searchsorted(x, u.contiguous()).clamp(1, len(x) - 1)
        share = (u - x[right - 1]) / (x[right] - x[right - 1])
        found = (row[part].to(ratio) for row in rows)
        return tuple(torch.lerp(v[right - 1], v[right], share) for v in found)


class EventGuidance(Denoiser):
    r"""A denoiser conditioned on an event by moment matching; a denoiser like any other.

    Parameters
    ----------
    denoiser : Denoiser
        Of states or of trajectories; also one that is guided already.
    constraint : Event
        `Constraint`, `Equality` or a conjunction of them, in physical units.  Several equalities
        are taken to be jointly Gaussian given x_t, several inequalities to be independent, which is
        a bias where their margins are correlated: guided samples of 1 < x < 2 of a standard normal
        number have the mean 1.40 instead of 1.38 and the variance 0.074 instead of 0.073, those of
        3 < x < 3.2 the mean 3.11 instead of 3.09 and 0.0030 instead of 0.0033.  Weighted estimates
        and `twisted_samples` correct it.
    floor : float
        Share of the Jacobian of standard normal data, alpha/(alpha² + sigma²), that is added to J
        in s², so that s stays positive where the Jacobian of a network is not.  Z23 adds
        1e-3/alpha, which at high noise is more than J itself.
    calibration : Calibration, optional
        Corrections for a curved C; default: none, as Z23.

    Raises
    ------
    ValueError
        If the constraint is not differentiable (tried on eight random samples), or not for samples
        that the denoiser makes.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        constraint: Event,
        floor: float = FLOOR,
        calibration: Calibration | None = None,
    ) -> None:
        self.denoiser, self.constraint = denoiser, arguments.suited(denoiser, constraint)
        self.floor = checks.positive("floor", floor)
        self.calibration = calibration
        self.schedule, self.standardizer = denoiser.schedule, denoiser.standardizer
        self.event, self.ratios = len(constraint.shape), denoiser.ratios
        probe = noise.normal((8, *constraint.shape), generator=torch.Generator().manual_seed(0))
        constraint.check_gradient(self.standardizer.inverse(probe))

    @property
    def device(self) -> torch.device | None:
        """Device of the wrapped denoiser."""
        return self.denoiser.device

    def denoise(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Return x̂ given the event; shapes as in `Denoiser.denoise`."""
        return self.condition(x_t, alpha_t, sigma_t).guided

    def condition(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Conditioned:
        """Return x̂, x̂ given the event, and log P(E | x_t).

        Costs one evaluation and one vector-Jacobian product a constraint.  Differentiable in x_t
        when x_t asks for it.
        """
        alpha_t, sigma_t = self._check(x_t, alpha_t, sigma_t)
        create = torch.is_grad_enabled() and x_t.requires_grad
        with torch.enable_grad():
            known = self._linearise(x_t, alpha_t, sigma_t, create)
        axes, parts = len(self.constraint.shape), self.constraint.parts
        equal = [k for k, part in enumerate(parts) if isinstance(part, Equality)]
        with torch.set_grad_enabled(create):
            x_0, spread = known.x_0, known.spread
            guided, log_mass = x_0, x_0.new_zeros(x_t.shape[:-axes])
            for k, part in enumerate(parts):
                if isinstance(part, Constraint):
                    variance, product = known.variances[k], known.products[k]
                    c = start = known.values[k].reshape(variance.shape)
                    if self.calibration is not None:
                        a, b, scale, extra = self.calibration.at(k, sigma_t / alpha_t)
                        c, variance = a + b * c, scale * b * b * variance + extra
                        product = b * product
                    slope = part.slope(c, variance)
                    rise = variance.clamp(min=SMALLEST) * slope + (c - start).clamp(min=0)
                    step = spread * slope * product
                    guided = guided + self._share(known, k, step, rise) * step
                    log_mass = log_mass + part.log_mass(c, variance).reshape(log_mass.shape)
            if equal:
                pull, log_density = self._equalities(known, equal)
                step, log_mass = spread * pull.reshape(x_0.shape), log_mass + log_density
                shares = []
                for k, part in enumerate(parts):
                    if isinstance(part, Equality):
                        gap = (part.target - known.values[k]).reshape(known.variances[k].shape)
                        shares.append(self._share(known, k, step, gap))
                guided = guided + torch.stack(shares).amin(0) * step
        if not create:
            return Conditioned(x_0.detach(), guided.detach(), log_mass.detach())
        return Conditioned(x_0, guided, log_mass)

    @property
    def least(self) -> float:
        """What twisted paths add to P(E | x_t)."""
        return LEAST if self.calibration is None else self.calibration.least

    @property
    def undecided(self) -> tuple[float, float]:
        """sigma/alpha between which it is decided whether a path ends in the event, if known."""
        return 0.0, math.inf

    def restrained(self, shift: Tensor, ratio: Tensor) -> Tensor:
        """Return the shift of a weighted step, in units of its noise, as far as it is believed.

        Parameters
        ----------
        shift : Tensor of shape (*batch, *shape)
            What guidance adds to the mean of the step's kernel, over its std.
        ratio : Tensor
            sigma/alpha before the step.
        """
        return shift

    def moments(
        self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return x̂, C(x̂) and s² of each part, (parts, *batch), without any correction."""
        alpha_t, sigma_t = self._check(x_t, alpha_t, sigma_t)
        with torch.enable_grad():
            known = self._linearise(x_t, alpha_t, sigma_t, False)
        values = torch.stack(known.values).detach()
        variances = torch.stack(known.variances).detach().reshape(values.shape)
        return known.x_0.detach(), values, variances

    def _check(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the levels with as many axes as x_t; refuse samples of another shape."""
        axes = len(self.constraint.shape)
        if x_t.ndim < axes or tuple(x_t.shape[-axes:]) != self.constraint.shape:
            raise ValueError(
                f"x_t must hold samples of shape {self.constraint.shape}, got {tuple(x_t.shape)}"
            )
        if any(size != 1 for size in (*alpha_t.shape[-axes:], *sigma_t.shape[-axes:])):
            raise ValueError("a sample must have one noise level")
        # the axes of a sample can then be counted from the end
        alpha_t, sigma_t = (
            v.expand((1,) * (x_t.ndim - v.ndim) + v.shape) for v in (alpha_t, sigma_t)
        )
        return alpha_t.clamp(min=torch.finfo(x_t.dtype).tiny ** 0.25), sigma_t

    def _linearise(
        self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, create: bool
    ) -> "_Linearised":
        """Return x̂ and, for each part, C(x̂), g, Jᵀg and s²."""
        over = tuple(range(-len(self.constraint.shape), 0))
        x = x_t if create else x_t.detach().requires_grad_()
        x_0 = self.denoiser.denoise(x, alpha_t, sigma_t)
        physical = self.standardizer.inverse(x_0)
        parts = self.constraint.parts
        values = [part.value(physical) for part in parts]
        spread = sigma_t.square() / alpha_t
        least = self.floor * alpha_t / (alpha_t.square() + sigma_t.square())
        slopes, products, variances = [], [], []
        for k, value in enumerate(values):
            (g,) = torch.autograd.grad(value.sum(), x_0, retain_graph=True, create_graph=create)
            keep = create or k + 1 < len(parts)
            (jg,) = torch.autograd.grad(x_0, x, g, retain_graph=keep, create_graph=create)
            own = (g * jg).sum(over, keepdim=True).abs()
            share = least * g.square().sum(over, keepdim=True)
            slopes.append(g)
            products.append(jg)
            variances.append(spread * (own + share))
        return _Linearised(x_0, spread, least, values, slopes, products, variances)

    def _share(self, known: "_Linearised", k: int, step: Tensor, rise: Tensor) -> Tensor:
        """Return the share of a step from x̂ over which C rises by ``rise`` and no more; at most 1.

        One step along a parabola gives it, which keeps it differentiable; where C is none, halving.
        """
        start, part = known.values[k].reshape(rise.shape), self.constraint.parts[k]
        over = tuple(range(-len(self.constraint.shape), 0))
        sign, most = torch.where(rise < 0, -1.0, 1.0).to(rise), rise.abs()
        gain = (sign * (known.slopes[k] * step).sum(over, keepdim=True)).clamp(min=0)

        def rises(share: Tensor | float) -> Tensor:
            value = part.value(self.standardizer.inverse(known.x_0 + share * step))
            return sign * (value.reshape(rise.shape) - start)

        # not a number: the step leaves the range of the units; it is halved below
        bend = (rises(1.0) - gain).nan_to_num(0.0).clamp(min=0)
        tiny = torch.finfo(rise.dtype).tiny
        root = (gain.square() + 4 * bend * most + tiny).sqrt()
        share = ((2 * most + tiny) / (gain + root + tiny)).clamp(max=1)
        with torch.no_grad():
            slack = most / 2 + 100 * torch.finfo(rise.dtype).eps * start.abs()
            for _ in range(HALVINGS):
                far = ~(rises(share).abs() <= most + slack)  # not a number counts as far
                if not bool(far.any()):
                    break
                share = torch.where(far, share / 2, share)
        return share

    def _equalities(self, known: "_Linearised", equal: list[int]) -> tuple[Tensor, Tensor]:
        """Return Σ Jᵀg times the weights of jointly Gaussian equalities, and their log-density."""
        axes, parts = len(self.constraint.shape), self.constraint.parts
        gs, jgs = (
            torch.stack([v[k] for k in equal], -1).flatten(-axes - 1, -2)
            for v in (known.slopes, known.products)
        )  # (*batch, components, equalities)
        spread, share = (v.flatten(-axes)[..., None] for v in (known.spread, known.least))
        matrix = gs.mT @ jgs
        variances = spread * ((matrix + matrix.mT) / 2 + share * gs.mT @ gs)
        targets = [part.target for part in parts if isinstance(part, Equality)]
        gap = torch.stack([t - known.values[k] for t, k in zip(targets, equal, strict=True)], -1)
        weights = torch.linalg.solve(variances, gap[..., None])
        distance = (gap[..., None] * weights).sum((-2, -1))
        log_density = -0.5 * (distance + torch.linalg.slogdet(math.tau * variances).logabsdet)
        return jgs @ weights, log_density


class _Linearised(NamedTuple):
    """The denoiser and the constraints at x_t, to first order; lists have one entry a part."""

    x_0: Tensor
    spread: Tensor  # sigma²/alpha
    least: Tensor  # added to the Jacobian's diagonal
    values: list[Tensor]
    slopes: list[Tensor]
    products: list[Tensor]
    variances: list[Tensor]
