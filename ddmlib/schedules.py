r"""Noise schedules: pseudo-time t in [0, 1] to the pair (alpha_t, sigma_t) of the forward process.

    x_t = alpha_t x_0 + sigma_t eps,    eps ~ N(0, I).

t = 0 is (almost) data, t = 1 (almost) noise.  What a denoiser can know of the noise level is the
ratio sigma_t / alpha_t alone; a schedule only says at which pseudo-time that ratio is met, and by
how much the state is scaled.  Hence two schedules describe one diffusion, and a network trained
under one can be sampled under another.

F24 (Finn et al. 2024) uses `Cosine` and `Linear` with 1000 discrete steps: its pseudo-time k is
t = k/1000.
R23 (Rozet & Louppe 2023): `CosineSquared`.  Z23 (Finzi et al. 2023): `VarianceExploding`,
`VariancePreserving`, `SubVariancePreserving` (Song et al. 2021).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ddmlib import checks


class Schedule(ABC):
    """Map from pseudo-time to (alpha, sigma); calling it is what denoisers and samplers do."""

    preserves_variance: ClassVar[bool] = True
    """Whether alpha² + sigma² = 1, so that data of unit variance keep it."""

    @abstractmethod
    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha_t, sigma_t) for a float64 tensor ``t`` within [0, 1]."""

    def __call__(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return (alpha_t, sigma_t).

        Parameters
        ----------
        t : float or Tensor of any shape
            Pseudo-time in [0, 1].

        Returns
        -------
        Two tensors of the shape of ``t``, on its device
            Computed in float64 and returned in the dtype of ``t`` (float64 for a number or
            integers).
        """
        known = isinstance(t, Tensor) and t.is_floating_point()
        t = torch.as_tensor(t, dtype=None if known else torch.float64)
        alpha, sigma = self.levels(t.to(torch.float64).clamp(0, 1))
        return alpha.to(t.dtype), sigma.to(t.dtype)

    def ratio(self, t: Tensor | float) -> Tensor:
        """Return the noise-to-signal ratio sigma_t / alpha_t."""
        alpha, sigma = self(t)
        return sigma / alpha

    def time(self, ratio: Tensor | float) -> Tensor:
        """Return the pseudo-time at which sigma/alpha is ``ratio``, by bisection in float64.

        Parameters
        ----------
        ratio : float or Tensor of any shape
            Noise-to-signal ratio; outside the schedule's range the nearest end is returned.

        Returns
        -------
        Tensor of the shape of ``ratio``, float64.
        """
        target = torch.as_tensor(ratio, dtype=torch.float64)
        low, high = torch.zeros_like(target), torch.ones_like(target)
        for _ in range(60):
            middle = (low + high) / 2
            alpha, sigma = self.levels(middle)
            above = sigma > target * alpha
            high = torch.where(above, middle, high)
            low = torch.where(above, low, middle)
        return (low + high) / 2

    def __repr__(self) -> str:
        fields = ", ".join(f"{k}={v}" for k, v in self.settings().items())
        return f"{type(self).__name__}({fields})"

    def settings(self) -> dict[str, float]:
        """Return the arguments that make this schedule again."""
        return {k: v for k, v in vars(self).items() if isinstance(v, int | float)}


class _Discrete(Schedule):
    """A schedule given by betas of ``T`` steps; alpha² falls by the factor 1 - beta_k in step k.

    Between the steps log alpha² is linear in t (a constant rate of noising), so t = k/T meets the
    discrete values exactly and t = 0 is the clean state.
    """

    def __init__(self, betas: Tensor, names: str) -> None:
        if not bool(((betas > 0) & (betas < 1)).all()):  # false for what is no number
            raise ValueError(f"{names} must give betas between 0 and 1")
        decay = torch.cat((torch.zeros(1, dtype=torch.float64), torch.log1p(-betas).cumsum(0)))
        self._tables = {torch.device("cpu"): decay}

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha_t, sigma_t); see `Schedule.levels`."""
        if t.device not in self._tables:
            with torch.inference_mode(False):  # it is kept
                self._tables[t.device] = self._tables[torch.device("cpu")].to(t.device)
        table = self._tables[t.device]
        position = t * (len(table) - 1)
        k = position.long().clamp(max=len(table) - 2)
        log_alpha2 = torch.lerp(table[k], table[k + 1], position - k)
        return (log_alpha2 / 2).exp(), (-torch.expm1(log_alpha2)).sqrt()


class Cosine(_Discrete):
    """F24's cosine schedule: alpha²(k) ~ cos²(pi/2 (k/T + s)/(1 + s)), each beta capped.

    Source: Nichol & Dhariwal (2021), eq. 17; F24 with T = 1000, shift s = 0.008, cap 0.9.
    """

    def __init__(self, T: int = 1000, shift: float = 0.008, cap: float = 0.9) -> None:
        self.T, self.shift, self.cap = checks.count("T", T, 2), shift, cap
        k = torch.arange(T + 1, dtype=torch.float64) / T
        alpha2 = torch.cos(math.pi / 2 * (k + shift) / (1 + shift)) ** 2
        super().__init__((1 - alpha2[1:] / alpha2[:-1]).clamp(max=cap), "shift and cap")


class Linear(_Discrete):
    """F24's linear schedule: beta rises linearly from ``first`` to ``last`` over T steps.

    Source: Ho et al. (2020); F24 with T = 1000, beta 1e-4 to 0.03.
    """

    def __init__(self, T: int = 1000, first: float = 1e-4, last: float = 0.03) -> None:
        self.T, self.first, self.last = checks.count("T", T, 2), first, last
        super().__init__(torch.linspace(first, last, T, dtype=torch.float64), "first and last")


class LogLinear(Schedule):
    """Variance preserving, with log(sigma/alpha) linear in t: uniform t is log-uniform noise.

    The distribution of noise levels that the main weights are trained with.
    """

    def __init__(self, ratio_min: float = 2e-3, ratio_max: float = 80.0) -> None:
        self.ratio_min, self.ratio_max = checks.interval("ratio", ratio_min, ratio_max)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha_t, sigma_t); see `Schedule.levels`."""
        ratio = self.ratio_min * torch.exp(t * math.log(self.ratio_max / self.ratio_min))
        alpha = 1 / torch.sqrt(1 + ratio**2)
        return alpha, ratio * alpha

    def focused(self, t: Tensor, between: Sequence[float], share: float) -> Tensor:
        """Return pseudo-times of which a share lies evenly between two noise levels, in order.

        The others stay even over all levels.  The best answer at one level does not depend on how
        often another is seen, so this changes what is learnt first, not what is learnt.

        Parameters
        ----------
        t : Tensor
            Even in [0, 1].
        between : pair of float
            Least and largest sigma/alpha of those that have the share.
        share : float
            At least 0 and less than 1.
        """
        span = math.log(self.ratio_max / self.ratio_min)
        low, high = (math.log(r / self.ratio_min) / span for r in between)
        if not (0 <= low < high <= 1 and 0 <= share < 1):
            raise ValueError(f"between and share must lie in the range, got {between}, {share}")
        levels = torch.tensor([0.0, low, high, 1.0]).to(t)
        ends = (1 - share) * levels + share * torch.tensor([0.0, 0.0, 1.0, 1.0]).to(t)
        k = torch.bucketize(t, ends[1:-1])
        within = (t - ends[k]) / (ends[k + 1] - ends[k]).clamp(min=1e-9)  # a part may be empty
        return torch.lerp(levels[k], levels[k + 1], within)


class CosineSquared(Schedule):
    """R23's schedule: alpha = cos²(arccos(sqrt(eta)) t), sigma² = 1 - alpha² + eta²."""

    def __init__(self, eta: float = 1e-3) -> None:
        self.eta = checks.positive("eta", eta)
        if eta >= 1:
            raise ValueError(f"eta must lie in (0, 1), got {eta}")

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha_t, sigma_t); see `Schedule.levels`."""
        alpha = torch.cos(math.acos(math.sqrt(self.eta)) * t) ** 2
        return alpha, torch.sqrt(1 - alpha**2 + self.eta**2)


class VariancePreserving(Schedule):
    """Song et al.'s VP: log alpha = -(beta_max - beta_min) t²/4 - beta_min t/2, variance kept."""

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        self.beta_min = checks.positive("beta_min", beta_min)
        self.beta_max = checks.positive("beta_max", beta_max)

    def log_alpha(self, t: Tensor) -> Tensor:
        """Return log alpha_t."""
        return -(self.beta_max - self.beta_min) * t**2 / 4 - self.beta_min * t / 2

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha_t, sigma_t); see `Schedule.levels`."""
        log_alpha = self.log_alpha(t)
        return log_alpha.exp(), torch.sqrt(-torch.expm1(2 * log_alpha))


class SubVariancePreserving(VariancePreserving):
    """Song et al.'s sub-VP: alpha as in VP, sigma = 1 - alpha²."""

    preserves_variance = False

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha_t, sigma_t); see `Schedule.levels`."""
        log_alpha = self.log_alpha(t)
        return log_alpha.exp(), -torch.expm1(2 * log_alpha)


class VarianceExploding(Schedule):
    """Z23's VE: alpha = 1, sigma² = sigma_min² ((sigma_max/sigma_min)^(2t) - 1)."""

    preserves_variance = False

    def __init__(self, sigma_min: float = 1e-3, sigma_max: float = 300.0) -> None:
        self.sigma_min, self.sigma_max = checks.interval("sigma", sigma_min, sigma_max)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha_t, sigma_t); see `Schedule.levels`."""
        growth = torch.expm1(2 * math.log(self.sigma_max / self.sigma_min) * t)
        return torch.ones_like(t), self.sigma_min * growth.sqrt()


class Straight(Schedule):
    """The straight path of flow matching: alpha = 1 - t, sigma = t (Lipman et al. 2023)."""

    preserves_variance = False

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha_t, sigma_t); see `Schedule.levels`."""
        return 1 - t, t


def by_name(name: str, **settings: float) -> Schedule:
    """Return the schedule of class ``name``, as a weight file's card stores it."""
    kinds: dict[str, type[Schedule]] = {
        kind.__name__: kind
        for kind in (
            Cosine, Linear, LogLinear, CosineSquared, VariancePreserving,
            SubVariancePreserving, VarianceExploding, Straight,
        )
    }  # fmt: skip
    return kinds[checks.choice("schedule", name, kinds)](**settings)
