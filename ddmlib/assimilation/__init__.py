"""Data assimilation without diffusion models: observations, oracles, ensembles, cycling.

A package of its own that knows nothing of denoisers: ensemble samplers are passed in as functions.
Everything is in physical units, batch first.
"""

from ddmlib.assimilation.cycling import Scores, difference, twin
from ddmlib.assimilation.ensemble import (
    adaptive_inflation,
    enkf_n,
    enoi,
    etkf,
    ienks,
    inflate,
    rotate,
)
from ddmlib.assimilation.kalman import kalman_filter, rts_smoother, steady_state
from ddmlib.assimilation.methods import (
    ETKF,
    EnKFN,
    EnOI,
    IEnKS,
    Method,
    OptimalInterpolation,
    ThreeDVar,
)
from ddmlib.assimilation.observations import Observation, component, identity, observe
from ddmlib.assimilation.particle import Filtering, bootstrap_filter, particle_filter
from ddmlib.assimilation.perturbations import analogs, gaussian
from ddmlib.assimilation.variational import Mode, three_d_var, weak_4d_var

__all__ = [
    "ETKF",
    "EnKFN",
    "EnOI",
    "Filtering",
    "IEnKS",
    "Method",
    "Mode",
    "Observation",
    "OptimalInterpolation",
    "Scores",
    "ThreeDVar",
    "adaptive_inflation",
    "analogs",
    "bootstrap_filter",
    "component",
    "difference",
    "enkf_n",
    "enoi",
    "etkf",
    "gaussian",
    "identity",
    "ienks",
    "inflate",
    "kalman_filter",
    "observe",
    "particle_filter",
    "rotate",
    "rts_smoother",
    "steady_state",
    "three_d_var",
    "twin",
    "weak_4d_var",
]
