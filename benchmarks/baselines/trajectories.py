"""R23's algorithms without ddmlib: composed windows, guidance, its sampler, its particle filter."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

Denoise = Callable[[Tensor, float, float], Tensor]  # (x_t, alpha, sigma) to x̂


def composed(network: nn.Module, x: Tensor, level: Tensor, window: int) -> Tensor:
    """Return a network's output along trajectories (n, length, d): unfold, network, fold.

    ``level`` is of shape (1,), or (n (length - 2k),): FiLM for each window.
    """
    k, d = window // 2, x.shape[-1]
    windows = x.unfold(1, window, 1).transpose(-1, -2)  # (n, length - 2k, window, d)
    out = network(windows.reshape(-1, window * d), level).reshape(windows.shape)
    return torch.cat((out[:, 0, :k], out[:, :, k], out[:, -1, k + 1 :]), dim=1)


def guided_noise(
    denoise: Denoise,
    x: Tensor,
    alpha: float,
    sigma: float,
    y: Tensor,
    every: int,
    std: float,
    gamma: float,
) -> Tensor:
    """Return the expected noise given observations y of the first component, standardised."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        x_0 = denoise(x, alpha, sigma)
        variance = std**2 + gamma * (sigma / alpha) ** 2
        log_p = -((y - x_0[:, ::every, :1]) ** 2).sum() / (2 * variance)
        (gradient,) = torch.autograd.grad(log_p, x)
    return (x - alpha * x_0.detach()) / sigma - sigma * gradient


def sampler(
    noise: Callable[[Tensor, float, float], Tensor],
    x: Tensor,
    alphas: list[float],
    sigmas: list[float],
    corrections: int,
    tau: float,
    generator: torch.Generator,
) -> Tensor:
    """Run exponential-integrator steps, each with Langevin corrections, along falling noise."""
    for k in range(len(alphas) - 1):
        alpha, sigma, alpha_s, sigma_s = alphas[k], sigmas[k], alphas[k + 1], sigmas[k + 1]
        r = alpha_s / alpha
        x = r * x + (sigma_s - r * sigma) * noise(x, alpha, sigma)
        for _ in range(corrections):
            z = torch.randn(x.shape, generator=generator)
            eps = noise(x, alpha_s, sigma_s)
            delta = tau / eps.square().mean(dim=(-2, -1), keepdim=True)
            x = x - (delta * eps + torch.sqrt(2 * delta) * z) * sigma_s
    return x


def forecast(x: np.ndarray, dt: float) -> np.ndarray:
    """Return the states (n, 3) of Lorenz 63 one Runge-Kutta step later."""

    def f(x: np.ndarray) -> np.ndarray:
        a, b, c = x[:, 0], x[:, 1], x[:, 2]
        return np.stack((10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c), axis=1)

    k_1 = f(x)
    k_2 = f(x + dt / 2 * k_1)
    k_3 = f(x + dt / 2 * k_2)
    k_4 = f(x + dt * k_3)
    return x + dt / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)


def particle_filter(
    rng: np.random.Generator, x: np.ndarray, y: np.ndarray, every: int, std: float, dt: float
) -> np.ndarray:
    """Return paths (n, length, 3) from first states (n, 3), given y of the first component.

    Whole paths are resampled, multinomially, at each observation.
    """
    paths = np.empty((len(x), 1 + (len(y) - 1) * every, 3), x.dtype)
    for k in range(paths.shape[1]):
        if k > 0:
            z = rng.standard_normal(x.shape, dtype=x.dtype)
            x = forecast(paths[:, k - 1], dt) + math.sqrt(dt) * z
        paths[:, k] = x
        if k % every == 0:
            log_w = -(((y[k // every] - x[:, 0]) / std) ** 2) / 2
            w = np.exp(log_w - log_w.max(), dtype=np.float64)
            chosen = rng.choice(len(x), len(x), p=w / w.sum())
            paths[:, : k + 1] = paths[chosen, : k + 1]
    return paths
