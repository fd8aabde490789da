"""What an estimate of an event's probability consists of, and when its error bar can be trusted."""

import math
from dataclasses import dataclass, replace

import scipy.stats
import torch
from torch import Tensor

LEAST = 50.0  # effective samples below which an error bar is not believed
WIDEST = 0.5  # relative standard error above which it is not believed
HEAVIEST = 0.7  # tail index of the weights above which means settle too slowly
FEWEST = 100  # values from which a tail index is estimated


@dataclass(frozen=True)
class Estimate:
    """An estimate of log P(E), natural logarithm.

    Attributes
    ----------
    method : str
        How it was made.
    log_probability : float
        The estimate; -inf if no sample was in E.
    standard_error : float
        Of the estimate, in nats, to first order; NaN if it cannot be given.
    interval : pair of float
        95 % confidence interval of log P(E).
    effective_samples : float
        Samples inside E, discounted for unequal weights.
    evaluations, products : int
        Denoiser evaluations, and vector-Jacobian products on top of them, for all samples.
    warning : str
        Why the error bar cannot be trusted; empty if it can.
    """

    method: str
    log_probability: float
    standard_error: float
    interval: tuple[float, float]
    effective_samples: float
    evaluations: int
    products: int
    warning: str = ""

    @property
    def trustworthy(self) -> bool:
        """Whether the error bar can be trusted."""
        return not self.warning

    @property
    def probability(self) -> float:
        """P(E)."""
        return math.exp(self.log_probability)


def effective_size(log_weights: Tensor) -> Tensor:
    """Return (Σ w)² / Σ w² along the last axis; zero where all weights are."""
    top = log_weights.amax(-1, keepdim=True)
    w = (log_weights - torch.where(torch.isfinite(top), top, 0.0)).exp()
    return w.sum(-1).square() / w.square().sum(-1).clamp(min=torch.finfo(w.dtype).tiny)


def from_count(method: str, hits: int, n: int, evaluations: int) -> Estimate:
    """Return the estimate of ``hits`` among n independent samples, with an exact interval.

    Source: the binomial interval of Clopper & Pearson (1934), Biometrika 26, 404-413.
    """
    low = float(scipy.stats.beta.ppf(0.025, hits, n - hits + 1)) if hits else 0.0
    high = float(scipy.stats.beta.ppf(0.975, hits + 1, n - hits)) if hits < n else 1.0
    warning = ""
    if not hits:
        high = 1 - 0.05 ** (1 / n)  # one-sided: there is no lower end
        warning = f"none of {n} samples is in the event: P(E) < {high:.2g} is all that is known"
    elif hits == n:
        low = 0.05 ** (1 / n)
        warning = f"all of {n} samples are in the event: P(E) > {low:.6g} is all that is known"
    elif min(hits, n - hits) < 10:
        warning = f"on one side of the event: only {min(hits, n - hits)} of {n} samples"
    return Estimate(
        method,
        _log(hits / n),
        math.sqrt((1 - hits / n) / hits) if hits else math.nan,
        (_log(low), _log(high)),
        float(hits),
        evaluations,
        0,
        warning,
    )


def from_values(
    method: str,
    values: Tensor,
    effective_samples: float,
    evaluations: int,
    products: int,
    warning: str = "",
) -> Estimate:
    """Return the estimate from independent, unbiased values of P(E), shape (n,).

    The interval is Student's for the mean of the values, carried over to the logarithm.
    """
    values = values.double()
    n, mean = len(values), float(values.mean())
    if mean == 0:
        return nothing(method, evaluations, products)
    error = float(values.std()) / math.sqrt(n) / mean
    reach = float(scipy.stats.t.ppf(0.975, n - 1)) * error
    log = _log(mean)
    return Estimate(
        method,
        log,
        error,
        (log - reach, log + reach),
        effective_samples,
        evaluations,
        products,
        "; ".join(filter(None, (warning, doubts(error, effective_samples, values)))),
    )


def from_populations(
    method: str,
    logs: Tensor,
    effective_samples: float,
    evaluations: int,
    products: int,
    warning: str = "",
) -> Estimate:
    """Return the estimate from independent populations, log of an unbiased value of P(E) each.

    Such values are nearly log-normal (Bérard et al. 2014), and where they scatter by a factor, a
    few of them mostly lie below their mean.  So the interval is that of the mean of a log-normal
    law, Cox's with Student's quantile; for a small scatter it is Student's.  Populations of value
    zero have no logarithm: with some of these it is Student's, and marked.

    Parameters
    ----------
    logs : Tensor of shape (populations,)

    References
    ----------
    Bérard, Del Moral & Doucet (2014), A lognormal central limit theorem for particle approximations
    of normalizing constants, Electron. J. Probab. 19, no. 94.
    Olsson (2005), Confidence intervals for the mean of a log-normal distribution, J. Stat. Educ.
    13(1).
    """
    logs = logs.double()
    n, zero = len(logs), int((logs == -torch.inf).sum())
    if zero and zero < n:
        some = f"{zero} of {n} populations did not reach the event"
        warning = "; ".join(filter(None, (warning, some)))
    plain = from_values(method, logs.exp(), effective_samples, evaluations, products, warning)
    if zero:
        return plain
    variance = float(logs.var())
    centre = float(logs.mean()) + variance / 2
    reach = float(scipy.stats.t.ppf(0.975, n - 1))
    reach *= math.sqrt(variance / n + variance**2 / (2 * (n - 1)))
    log = plain.log_probability
    return replace(plain, interval=(min(centre - reach, log), max(centre + reach, log)))


def from_logarithms(
    method: str, logs: Tensor, evaluations: int, products: int, warning: str
) -> Estimate:
    """Return the estimate that averages values of log P(E) themselves, shape (n,)."""
    logs = logs.double()
    n, mean, error = len(logs), float(logs.mean()), float(logs.std()) / math.sqrt(len(logs))
    reach = float(scipy.stats.t.ppf(0.975, n - 1)) * error
    interval = mean - reach, mean + reach
    return Estimate(method, mean, error, interval, float(n), evaluations, products, warning)


def nothing(method: str, evaluations: int, products: int) -> Estimate:
    """Return the estimate when no weighted sample reached the event: no bound follows from that."""
    warning = "no sample reached the event: the estimate is zero, and says nothing about P(E)"
    return Estimate(
        method, -math.inf, math.nan, (-math.inf, 0.0), 0.0, evaluations, products, warning
    )


def doubts(error: float, effective_samples: float, values: Tensor) -> str:
    """Return why a relative standard error cannot be trusted, or an empty string."""
    reasons: list[str] = []
    if math.isnan(error):
        return "some values are not numbers"
    if effective_samples < LEAST:
        reasons.append(f"the weights leave only {effective_samples:.3g} effective samples")
    if error > WIDEST:
        reasons.append(f"the relative standard error is {error:.2f}")
    share = float(values.max() / values.sum())
    if share > 0.5:
        reasons.append(f"one value makes up {share:.0%} of the sum")
    if len(values) >= FEWEST and (k := tail_index(values)) > HEAVIEST:
        reasons.append(f"the weights have a heavy tail, of index {k:.2f}")
    return "; ".join(reasons)


def tail_index(values: Tensor) -> float:
    """Return the index k of the generalised Pareto law fitted to the largest values, (n,).

    The largest 3√n values, or a fifth of all if fewer, are used.  Moments of order above 1/k do not
    exist; the error of a mean of positive weights can be trusted up to about k = 0.7.

    References
    ----------
    Zhang & Stephens (2009), Technometrics 51, 316-325 (the estimator).
    Vehtari et al. (2024), Pareto smoothed importance sampling, J. Mach. Learn. Res. 25 (its use).
    """
    n = len(values)
    m = int(min(n / 5, 3 * math.sqrt(n)))
    largest = values.double().sort().values[-m - 1 :]
    x = largest[1:] - largest[0]  # exceedances of the threshold, ascending
    if float(x[0]) == float(x[-1]):
        return 0.0  # all alike: no tail
    x = x.clamp(min=float(x[-1]) * 1e-12)
    points = 30 + int(math.sqrt(m))
    order = torch.arange(1, points + 1, dtype=torch.float64, device=x.device)
    quartile = float(x[max(0, int(m / 4 + 0.5) - 1)])
    b = 1 / x[-1] + (1 - torch.sqrt(points / (order - 0.5))) / (3 * quartile)
    k = torch.log1p(-b[:, None] * x).mean(1)
    weights = torch.softmax(m * (torch.log(-b / k) - k - 1), 0)
    index = float(torch.log1p(-(weights * b).sum() * x).mean())
    return (m * index + 5) / (m + 10)  # a weak prior, as if from ten values of index 1/2


def mean_exp(log_weights: Tensor) -> Tensor:
    """Return log of the mean of exp along the last axis."""
    return torch.logsumexp(log_weights, -1) - math.log(log_weights.shape[-1])


def _log(p: float) -> float:
    if math.isnan(p):
        return math.nan
    return math.log(p) if p > 0 else -math.inf
