r"""Surrogates: cheap models x(t) ↦ x(t + dt), by a head on features of the state.

F24 (Finn et al. 2024) calls it *representation fine-tuning*: a frozen denoiser, shown the clean
state as if it were a noisy one of level sigma/alpha, computes features φ(x) in its last hidden
layer, and only a small head on them is fitted to the increment of the state over dt:

    x(t + dt) ≈ x(t) + b + Wᵀ φ(x(t)).

The head is a ridge regression with a free intercept.  Let C be the covariance of the features over
the training states, D² its diagonal, R = D⁻¹ C D⁻¹ their correlations, c the covariance of features
and increments.  Then W = D⁻¹ (R + penalty I)⁻¹ D⁻¹ c, so that a penalty means the same for features
of any scale and for any number of states.  C and c are sums over states: `moments` gathers them in
float64 in one pass, and no more than one batch of features is ever held.

Everything is in standardised units.  Features are callables (*batch, d) -> (*batch, k):
`DenoiserFeatures` is F24's, `RandomFourier` and `Polynomials` are controls, and any module does.
"""

from .features import F24_TIMES, DenoiserFeatures, Polynomials, RandomFourier
from .forecasts import Surrogate, lyapunov_exponents, rollout
from .regression import (
    LinearHead,
    Moments,
    ScaledHead,
    featured,
    merge,
    mlp_head,
    moments,
    regression_batches,
    ridge,
)

__all__ = [
    "F24_TIMES",
    "DenoiserFeatures",
    "LinearHead",
    "Moments",
    "Polynomials",
    "RandomFourier",
    "ScaledHead",
    "Surrogate",
    "featured",
    "lyapunov_exponents",
    "merge",
    "mlp_head",
    "moments",
    "regression_batches",
    "ridge",
    "rollout",
]
