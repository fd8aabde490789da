r"""Guidance: observations into a denoiser, E[x_0 | x_t] to E[x_0 | x_t, y].

By Bayes' rule the score given y is ∇ log p_t(x_t) + ∇ log p(y | x_t), so with Tweedie's formula

    E[x_0 | x_t, y] = x̂ + (sigma_t²/alpha_t) ∇ log p(y | x_t).

The likelihood of a *noisy* state is unknown.  With A(x) the observation of a standardised state,
R = std² and V = Cov[x_0 | x_t], all rules but DPS approximate it by N(y; A(x̂), R + A V Aᵀ), exact
for a Gaussian prior and a linear operator, and leave the derivative of the covariance aside.  They
differ in V:

- `GaussianLikelihood` (R23: Rozet & Louppe 2023): V = gamma (sigma_t/alpha_t)² I;
- `PiGDM` (Song et al. 2023): V = sigma_t²/(alpha_t² + sigma_t²) I, that of a standard normal prior;
- `MeasuredVariance`: V = diag of the error variance of x̂, measured at each noise level;
- `MMPS` (Rozet et al. 2024): V = (sigma_t²/alpha_t) ∂x̂/∂x_t, exact (Tweedie's second formula);
- `DPS` (Chung et al. 2023): a step of fixed length against |y - A(x̂)|, no likelihood at all.

`Fusion` approximates nothing, where single components are observed and the denoiser takes a noise
level for each component.

`posterior` draws trajectories by a few of them, each where it serves best; `evaluations` says what
that costs.

All of them are denoisers of what they wrap, differentiable like it, so guidance may be nested.
Observations are in physical units, states in standardised ones.  An evaluation costs one of the
wrapped denoiser and one product with its Jacobian; `MMPS` takes ``products`` of them.
"""

from .base import Evaluation, Guided
from .fusion import Fusion
from .moments import MMPS
from .ranges import evaluations, posterior
from .rules import (
    DPS,
    ErrorVariance,
    GaussianLikelihood,
    MeasuredVariance,
    PiGDM,
    error_variance,
)

__all__ = [
    "DPS",
    "MMPS",
    "ErrorVariance",
    "Evaluation",
    "Fusion",
    "GaussianLikelihood",
    "Guided",
    "MeasuredVariance",
    "PiGDM",
    "error_variance",
    "evaluations",
    "posterior",
]
