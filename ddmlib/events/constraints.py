r"""Events as constraints on a sample: C(x) > 0, C(x) = c, and several of them at once.

C is any function of states (*batch, d) or trajectories (*batch, length, d) in physical units that
returns one number a sample, (*batch,).  Guidance differentiates it; estimating a probability by
plain sampling does not.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddmlib import checks

Function = Callable[[Tensor], Tensor]
SMALLEST = 1e-20  # of a variance: a constraint that is certain is still divided by its std
IMPOSSIBLE, CERTAIN = -20.0, 12.0  # standard deviations; φ/Φ at the latter is 2e-32


def mills(z: Tensor) -> Tensor:
    """Return φ(z)/Φ(z), the slope of log Φ; it and its derivative are accurate for any z.

    Far below zero by its asymptotic series, where the derivative of erfcx would cancel; far above
    held constant, where erfcx would overflow.
    """
    near = z.clamp(IMPOSSIBLE, CERTAIN)
    ratio = math.sqrt(2 / math.pi) / torch.special.erfcx(-near / math.sqrt(2))
    far = z.clamp(max=IMPOSSIBLE)
    w = 1 / far
    series = -far - w * (1 - w**2 * (2 - w**2 * (10 - w**2 * 74)))
    return torch.where(z < IMPOSSIBLE, series, ratio)


class Event(ABC):
    """What guidance and probabilities ask of an event; combine events with ``&``."""

    shape: tuple[int, ...]
    """Shape of one sample, (d,) or (length, d)."""

    @property
    @abstractmethod
    def parts(self) -> "tuple[Constraint | Equality, ...]":
        """The constraints that hold together."""

    @abstractmethod
    def margin(self, x: Tensor) -> Tensor:
        """Return a number, (*batch,), positive exactly where x (*batch, *shape) is in the event."""

    def holds(self, x: Tensor) -> Tensor:
        """Return whether each sample x (*batch, *shape), physical units, is in the event."""
        return self.sound_margin(x) > 0

    def sound_margin(self, x: Tensor) -> Tensor:
        """Return `margin`; refuse one that is not a number."""
        margin = self.margin(x)
        if bool(torch.isnan(margin).any()):
            checks.finite("x", x)
            raise ValueError("the constraint returned NaN for finite samples")
        return margin

    def __and__(self, other: "Event") -> "Conjunction":
        """Return the event that both hold."""
        if not isinstance(other, Event):
            return NotImplemented
        return Conjunction(self.parts + other.parts)

    def check_gradient(self, x: Tensor) -> None:
        """Raise a `ValueError` unless every part has a gradient that is finite, not all zero, at x.

        Parameters
        ----------
        x : Tensor of shape (n, *shape)
            Some samples in physical units.
        """
        for part in self.parts:
            slope = None
            with torch.enable_grad():
                probe = x.detach().requires_grad_()
                value = part.value(probe).sum()
                if value.requires_grad:
                    (slope,) = torch.autograd.grad(value, probe, allow_unused=True)
            if slope is None:
                raise ValueError(
                    f"{part.name} is not differentiable: its value has no gradient with respect to "
                    "x (is it a comparison, a count, or detached?)"
                )
            if not bool(torch.isfinite(slope).all()):
                raise ValueError(f"{part.name} has a gradient that is not finite")
            if not bool((slope != 0).any()):
                raise ValueError(
                    f"{part.name} has gradient zero at all of {len(x)} samples: it does not depend "
                    "on x, only in jumps, or is flat there, so guidance cannot follow it"
                )


class _Scalar(Event):
    """An event given by one function C."""

    function: Function
    name: str

    @property
    def parts(self) -> "tuple[Constraint | Equality, ...]":
        """Itself."""
        assert isinstance(self, Constraint | Equality)
        return (self,)

    def _check(self) -> None:
        if len(self.shape) not in (1, 2):
            raise ValueError(f"shape must be (d,) or (length, d), got {self.shape}")
        for size in self.shape:
            checks.count("shape", size)
        try:
            self.value(torch.ones(2, *self.shape))
        except RuntimeError as error:  # PyTorch's, of shapes, types or devices
            raise ValueError(
                f"{self.name} failed on two samples of ones, single precision, CPU (tensors that "
                f"it uses must be made like its x, as a.to(x)): {error}"
            ) from error

    def value(self, x: Tensor) -> Tensor:
        """Return C(x), shape (*batch,), of samples (*batch, *shape) in physical units.

        Raises
        ------
        ValueError
            If x is no batch of samples, or C does not return one number a sample.
        """
        n = len(self.shape)
        if checks.is_tensor("x", x).ndim < n or tuple(x.shape[x.ndim - n :]) != self.shape:
            raise ValueError(
                f"x must have shape (*batch, {', '.join(map(str, self.shape))}) for {self.name}, "
                f"got {tuple(x.shape)}"
            )
        value = self.function(x)
        batch = tuple(x.shape[: x.ndim - n])
        if not isinstance(value, Tensor) or tuple(value.shape) != batch:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{self.name} must return one number a sample, shape {batch} for x of shape "
                f"{tuple(x.shape)}, got {found}"
            )
        return value


@dataclass(frozen=True)
class Constraint(_Scalar):
    """The event C(x) > 0.

    Parameters
    ----------
    function : callable
        C, mapping samples (*batch, *shape) in physical units to (*batch,), of whatever precision
        and on whatever device: tensors that it uses are to be made like them, ``a.to(x)``.
    shape : tuple of int
        Shape of one sample: (d,) for states, (length, d) for trajectories.
    name : str
        For messages and figures.

    Raises
    ------
    ValueError
        If C does not return one number a sample (tried at once on two samples of ones).
    """

    function: Function
    shape: tuple[int, ...]
    name: str = "the constraint"

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        self._check()

    def margin(self, x: Tensor) -> Tensor:
        """Return C(x)."""
        return self.value(x)

    def through(self, states: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> "Constraint":
        """Return the same event for other variables y, C(x(y)) > 0.

        Parameters
        ----------
        states : callable
            x, mapping samples (*batch, *shape) to those that C takes; differentiable.
        shape : tuple of int
            Shape of one y.
        """
        return Constraint(lambda y: self.value(states(y)), shape, self.name)

    def above(self, c: float) -> "Constraint":
        """Return the event C(x) > c, as that of the function C - c."""
        return Constraint(lambda x: self.value(x) - c, self.shape, self.name)

    def stretched(self, level: float, scale: float) -> "Constraint":
        """Return the same event by the function asinh((C + level)/scale) - asinh(level/scale).

        Guidance follows the slope of a function in the network's units.  Where those are stretched,
        `tails.AsinhStandardizer`, C grows severalfold along them, so that a step which is to reach
        the event from far below goes far beyond it; this function grows evenly.

        Parameters
        ----------
        level : float
            C + level is a state's component, or a mean or maximum of some.
        scale : float
            Positive: knee · std of its units, in those of C.
        """
        checks.positive("scale", scale)
        edge = math.asinh(level / scale)
        return Constraint(
            lambda x: torch.asinh((self.value(x) + level) / scale) - edge, self.shape, self.name
        )

    def log_mass(self, c: Tensor, variance: Tensor) -> Tensor:
        """Return log Φ(c/s), the log-probability of C > 0 for C ~ N(c, s²)."""
        return torch.special.log_ndtr(c / variance.clamp(min=SMALLEST).sqrt())

    def slope(self, c: Tensor, variance: Tensor) -> Tensor:
        """Return the derivative of `log_mass` with respect to c."""
        s = variance.clamp(min=SMALLEST).sqrt()
        return mills(c / s) / s


@dataclass(frozen=True)
class Equality(_Scalar):
    """The constraint C(x) = target: guidance takes it, but its probability is zero.

    Parameters
    ----------
    function, shape, name
        As in `Constraint`.
    target : float
        The value that C is to have.
    """

    function: Function
    target: float
    shape: tuple[int, ...]
    name: str = "the equality"

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        self._check()

    def margin(self, x: Tensor) -> Tensor:
        """Raise: no sample fulfils an equality exactly, so there is nothing to count."""
        raise ValueError(
            f"{self.name} is an equality, of probability zero; ask for C(x) within an interval: "
            "Constraint(lambda x: width - (C(x) - target).abs(), shape)"
        )


class Conjunction(Event):
    """Several constraints on one sample, which hold together: what ``a & b`` returns.

    Parameters
    ----------
    parts : sequence of Constraint and Equality
        All for samples of one shape.
    """

    def __init__(self, parts: "tuple[Constraint | Equality, ...]") -> None:
        shapes = {part.shape for part in parts}
        if len(shapes) != 1:
            raise ValueError(f"parts must be for samples of one shape, got {sorted(shapes)}")
        self._parts = tuple(parts)
        (self.shape,) = shapes

    @property
    def parts(self) -> "tuple[Constraint | Equality, ...]":
        """The constraints that hold together."""
        return self._parts

    def margin(self, x: Tensor) -> Tensor:
        """Return the smallest C of all parts."""
        return torch.stack([part.margin(x) for part in self.parts]).amin(0)
