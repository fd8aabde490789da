r"""What a denoiser is trained towards: the mean of many clean samples instead of one.

The usual target is the clean x_0 behind a noisy x_t.  Its mean is E[x_0 | x_t], which the network
should learn, and its scatter about that mean is noise in every gradient; at middle and high noise
levels there is more of this scatter than of what the network still gets wrong.  Let x_0 be one of n
samples drawn alike, the pool.  Given x_t and the pool, each of them may have been x_0, and their
mean

    x̄(x_t) = Σ_i w_i x_i,    w_i ∝ exp(-|x_t - alpha x_i|²/(2 sigma²)),

is known.  It is E[x_0 | x_t, pool], so by the law of total expectation its mean over pools is again
E[x_0 | x_t]: the network learns the same, from targets that scatter less (Xu, Tong & Jaakkola 2023,
Stable target field for reduced variance score estimation in diffusion models, ICLR).  Where noise
is low no other sample comes near, and x̄ = x_0.
"""

import torch
from torch import Tensor

from ddmlib import checks
from ddmlib.denoisers import NetworkDenoiser
from ddmlib.denoisers.protocol import diffuse, velocity_from_state


@torch.no_grad()
def pooled_means(x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, pool: Tensor) -> Tensor:
    """Return x̄, the mean of a pool of clean samples given noisy ones.

    As `denoisers.EmpiricalDenoiser`, but by one product of matrices: quick, and at low noise, where
    rounding spoils the weights of samples that lie nearly equally near, less exact.

    Parameters
    ----------
    x_t : Tensor of shape (*batch, *event)
        Noisy samples, standardised units.
    alpha_t, sigma_t : Tensor
        Positive; broadcast against ``x_t`` without varying within a sample.
    pool : Tensor of shape (n, *event)
        Clean samples.

    Returns
    -------
    Tensor of the shape of ``x_t``
    """
    event = pool.ndim - 1
    if not event or x_t.shape[-event:] != pool.shape[1:]:
        raise ValueError(
            f"pool must hold samples of the shape of those in x_t, got {tuple(pool.shape)} "
            f"for x_t of shape {tuple(x_t.shape)}"
        )
    first = (...,) + (slice(1),) * event
    ratio = (sigma_t / alpha_t).expand(x_t.shape)[first].flatten(-event)
    centres, points = (x_t / alpha_t).flatten(-event), pool.flatten(1)
    with torch.autocast(x_t.device.type, enabled=False):  # weights need all digits
        nearness = centres @ points.mT - points.square().sum(1) / 2  # -|c - x|²/2 but for |c|²/2
        return (torch.softmax(nearness / ratio**2, -1) @ points).reshape(x_t.shape)


def pooled_loss(
    denoiser: NetworkDenoiser, pool: Tensor, x_0: Tensor, t: Tensor | float, eps: Tensor
) -> Tensor:
    """Return the mean squared error of a velocity head against the pool's velocity.

    Its minimiser is that of `denoisers.denoising_loss`; its value is less, by the scatter of x_0
    about x̄.

    Parameters
    ----------
    denoiser : NetworkDenoiser
        With the head "velocity".
    pool : Tensor of shape (n, *event)
        Clean samples, standardised units, drawn independently.
    x_0 : Tensor of shape (*batch, *event)
        Some of them, chosen without looking; otherwise the minimiser is another.
    t : float or Tensor
        Pseudo-time, axes matching the leading axes of ``x_0``.
    eps : Tensor of the shape of ``x_0``
        Standard normal.

    Returns
    -------
    Tensor of shape ()
    """
    checks.choice("head", denoiser.head, ("velocity",))
    alpha_t, sigma_t = denoiser.levels(x_0, t)
    x_t = diffuse(x_0, alpha_t, sigma_t, eps)
    mean = pooled_means(x_t, alpha_t, sigma_t, pool)
    f, u, c, s = denoiser.output(x_t, alpha_t, sigma_t)
    return torch.nn.functional.mse_loss(f, velocity_from_state(mean, u, c, s))
