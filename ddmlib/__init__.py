"""Denoising diffusion models for dynamical systems.

One idea carries the library: everything is a denoiser, a map from a noisy state ``x_t`` and a
pseudo-time ``t`` to the conditional mean ``E[x_0 | x_t]``.  Exact ones
(`denoisers.GaussianDenoiser`, `denoisers.EmpiricalDenoiser`) and trained ones
(`denoisers.NetworkDenoiser`) share one protocol, and one sampler (`sampling.sample`) serves them
all.

Modules are imported on demand, so ``import ddmlib`` is quick and opens no file.
"""

import importlib
from types import ModuleType

__version__ = "0.1.0"

_modules = (
    "dynamics",
    "oscillators",
    "schedules",
    "networks",
    "metrics",
    "datasets",
    "ensembles",
    "tails",
    "assimilation",
    "denoisers",
    "grids",
    "steps",
    "muon",
    "targets",
    "checkpoints",
    "training",
    "sampling",
    "trajectories",
    "guidance",
    "smc",
    "surrogates",
    "likelihoods",
    "events",
    "recipes",
    "pretrained",
)
__all__ = [*_modules, "__version__"]


def __getattr__(name: str) -> ModuleType:
    if name in _modules:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
