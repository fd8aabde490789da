"""Cycled assimilation without ddmlib, as F24 runs it: 16 trajectories, one cycle after another."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.baselines.lorenz63 import rk4


def forecast(x: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        x = rk4(x, 0.01)
    return x


def etkf(ensemble: Tensor, y: Tensor, std: float, inflation: float) -> Tensor:
    """Symmetric ensemble transform; all components observed.  (trajectories, members, 3)."""
    n = ensemble.shape[1]
    mean = ensemble.mean(1, keepdim=True)
    anomalies = inflation**0.5 * (ensemble - mean)
    observed = anomalies / std
    values, vectors = torch.linalg.eigh(
        (n - 1) * torch.eye(n) + observed @ observed.transpose(1, 2)
    )
    inverse = vectors / values[:, None, :] @ vectors.transpose(1, 2)
    weights = (y[:, None, :] - mean) / std @ observed.transpose(1, 2) @ inverse
    root = vectors * ((n - 1) / values).sqrt()[:, None, :] @ vectors.transpose(1, 2)
    return mean + (weights + root) @ anomalies


def enoi(background: Tensor, ensemble: Tensor, y: Tensor, std: float) -> Tensor:
    """The increment of an ensemble around one state; all components observed."""
    anomalies = ensemble - ensemble.mean(1, keepdim=True)
    covariance = anomalies.transpose(1, 2) @ anomalies / (ensemble.shape[1] - 1)
    gain = covariance @ torch.linalg.inv(covariance + std**2 * torch.eye(3))
    return background + (gain @ (y - background)[:, :, None])[:, :, 0]


def cycled_etkf(
    truth: Tensor, cycles: int, members: int, inflation: float, steps: int, std: float
) -> list[float]:
    """Cycle the ETKF; return the mean squared errors."""
    ensemble = truth[:, None, :] + torch.randn(len(truth), members, 3)
    errors = []
    for _ in range(cycles):
        truth = forecast(truth, steps)
        y = truth + std * torch.randn(truth.shape)
        ensemble = etkf(forecast(ensemble, steps), y, std, inflation)
        errors.append(float(((ensemble.mean(1) - truth) ** 2).mean()))
    return errors


def cycled_enoi(
    truth: Tensor, cycles: int, sample: Callable[[Tensor], Tensor], steps: int, std: float
) -> list[float]:
    """Cycle EnOI with ensembles from ``sample``; return the mean squared errors."""
    state, errors = truth + torch.randn(truth.shape), []
    for _ in range(cycles):
        truth = forecast(truth, steps)
        y = truth + std * torch.randn(truth.shape)
        state = forecast(state, steps)
        state = enoi(state, sample(state), y, std)
        errors.append(float(((state - truth) ** 2).mean()))
    return errors
