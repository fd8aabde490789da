r"""Dynamical systems and Markov chains, their integration, Lyapunov exponents (physical units).

A system is an object with ``dim`` (number of components) and ``tendency(x)``, the right-hand side
of dx/dt = f(x), on states of shape (..., dim).  `rk4` turns a tendency into a step of fourth order,

    x(t + dt) = x + dt/6 (k_1 + 2 k_2 + 2 k_3 + k_4) + O(dt^5),

and `integrate` repeats it over a whole batch of initial states at once.  Lyapunov exponents follow
from pushing an orthonormal frame through the derivative of the step and re-orthonormalising it by
QR: the mean logarithm of each diagonal entry of R per unit of time is an exponent (Benettin et al.
1980).

`Lorenz63`: E. N. Lorenz (1963), Deterministic nonperiodic flow, J. Atmos. Sci. 20, 130-141.

A chain is a Markov chain with Gaussian steps, x_{k+1} = M(x_k) + q with q ~ N(0, Q) from
x_0 ~ N(m, P): `LinearGaussian`, whose smoother is exact, and `NoisyLorenz63`, R23's (Rozet & Louppe
2023).  `simulate` draws trajectories of either.
"""

from .chains import Chain, LinearGaussian, NoisyLorenz63, simulate
from .systems import Lorenz63, System, integrate, lyapunov_exponents, rk4

__all__ = [
    "Chain",
    "LinearGaussian",
    "Lorenz63",
    "NoisyLorenz63",
    "System",
    "integrate",
    "lyapunov_exponents",
    "rk4",
    "simulate",
]
