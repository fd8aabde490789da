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

Far samples, spikes say, may be few, and a loss that counts all alike leaves them to the last.
`Far` draws them more often.  Where the loss of a sample is divided by how much more often it was
drawn, and the pool's weights likewise, the minimiser stays what it was.  And it may be multiplied
by any function of x_t alone, since E[x_0 | x_t] is the best answer at each x_t whatever that x_t
counts: by one that grows where x_t itself is far, which at low noise undoes the division.  The same
holds for each component of the answer, so that tops of spikes may count more than what lies about
them, and for the error along a direction, that in which some number of a sample changes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddmlib import checks
from ddmlib.denoisers import NetworkDenoiser
from ddmlib.denoisers.protocol import diffuse, state_from_velocity, velocity_from_state

WIDTH = 0.05  # of the edge between near and far, as a share of it


@dataclass(frozen=True)
class Far:
    """How much more a trajectory counts the farther it goes: 1 + boost S((max |x| - edge)/width).

    S is the logistic function, and the maximum that over all states and components.

    Parameters
    ----------
    edge, width, boost : float
        Standardised units; the boost has none.
    """

    edge: float
    width: float
    boost: float

    def __call__(self, x: Tensor) -> Tensor:
        """Return how much trajectories (*batch, length, d) count, shape (*batch,)."""
        reach = x.abs().amax((-2, -1))
        return 1 + self.boost * torch.sigmoid((reach - self.edge) / self.width)

    @classmethod
    def of(cls, data: Tensor, tail: float, share: float) -> "Far":
        """Return that by which the farthest ``tail`` of the data become ``share`` of the draws.

        Less than that where there is no gap between the far and the near, since the edge is soft.

        Parameters
        ----------
        data : Tensor of shape (n, length, d)
            Standardised units.
        tail, share : float
            0 < tail < share < 1.
        """
        if not 0 < tail < share < 1:
            raise ValueError(f"tail and share must satisfy 0 < tail < share < 1, got {tail, share}")
        reach = data.abs().amax((-2, -1)).double()
        edge = float(reach.sort().values[int((1 - tail) * len(reach))])
        boost = (share - tail) / (tail * (1 - share))
        return cls(edge, WIDTH * edge, boost)


@torch.no_grad()
def pooled_means(
    x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, pool: Tensor, often: Tensor | None = None
) -> Tensor:
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
    often : Tensor of shape (n,), optional
        How much more often than by their own law each was drawn.

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
        exponents = nearness / ratio**2
        exponents = exponents if often is None else exponents - often.log()
        return (torch.softmax(exponents, -1) @ points).reshape(x_t.shape)


def pooled_loss(
    denoiser: NetworkDenoiser,
    pool: Tensor,
    x_0: Tensor,
    t: Tensor | float,
    eps: Tensor,
    often: Tensor | None = None,
    far: Far | None = None,
    each: Callable[[Tensor], Tensor] | None = None,
    functional: Callable[[Tensor], Tensor] | None = None,
    weight: float = 1.0,
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
    often : Tensor of shape (n,), optional
        How much more often each of the pool was drawn; ``x_0`` are then its first samples.
    far : Far, optional
        How much the loss at x_t/√(alpha_t² + sigma_t²) counts.
    each : callable, optional
        How much the loss of each component counts, a positive function of the same; the mean of
        these weights over the batch is taken out.
    functional : callable, optional
        A differentiable number of each sample, (*batch, *event) to (*batch,).  The squared error
        along its gradient at the network's own answer, in units of that gradient's mean square,
        is added; the minimiser is the same, but what this number depends on is learnt first.
    weight : float
        How much that counts.

    Returns
    -------
    Tensor of shape ()
    """
    checks.choice("head", denoiser.head, ("velocity",))
    alpha_t, sigma_t = denoiser.levels(x_0, t)
    x_t = diffuse(x_0, alpha_t, sigma_t, eps)
    mean = pooled_means(x_t, alpha_t, sigma_t, pool, often)
    f, u, c, s = denoiser.output(x_t, alpha_t, sigma_t)
    wanted = velocity_from_state(mean, u, c, s)
    if often is None and far is None and each is None and functional is None:
        return torch.nn.functional.mse_loss(f, wanted)
    loss = (f - wanted).square()
    if each is not None:
        counts = each(u)
        loss = loss * counts / counts.mean()
    loss = loss.flatten(1 - pool.ndim).mean(-1)
    if functional is not None:
        x_hat = state_from_velocity(f.detach(), u, c, s).requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(functional(x_hat).sum(), x_hat)
        along = (slope * (f - wanted)).flatten(1 - pool.ndim).sum(-1).square()
        loss = loss + weight * along / slope.square().flatten(1 - pool.ndim).sum(-1).mean()
    if often is not None:
        loss = loss / often[: loss.numel()].reshape(loss.shape)
    return (loss if far is None else loss * far(u)).mean()
