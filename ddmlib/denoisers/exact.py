"""Exact denoisers, the oracles that everything else is tested against."""

import torch
from torch import Tensor

from ddmlib import checks, schedules
from ddmlib.datasets import Standardizer
from ddmlib.denoisers.protocol import Denoiser
from ddmlib.schedules import Schedule


class GaussianDenoiser(Denoiser):
    """The exact denoiser of a Gaussian prior N(mean, covariance).

    x̂ = m + alpha P (alpha² P + sigma² I)^-1 (x_t - alpha m), through the eigenvectors of P, so that
    it holds for every sample's own noise level; where components have levels of their own, by a
    linear system for each sample.

    Parameters
    ----------
    mean : Tensor of shape (d,)
    covariance : Tensor of shape (d, d)
        Symmetric, positive semi-definite; both in standardised units.
    schedule, standardizer : optional
        Default `schedules.Cosine` and the identity.
    """

    def __init__(
        self,
        mean: Tensor,
        covariance: Tensor,
        schedule: Schedule | None = None,
        standardizer: Standardizer | None = None,
    ) -> None:
        checks.finite("mean", mean)
        checks.finite("covariance", covariance)
        d = len(mean) if mean.ndim == 1 else -1
        if covariance.shape != (d, d):
            raise ValueError(
                f"mean and covariance must have shapes (d,) and (d, d), got {tuple(mean.shape)} "
                f"and {tuple(covariance.shape)}"
            )
        scale = covariance.abs().max().clamp(min=torch.finfo(covariance.dtype).tiny)
        if not torch.allclose(covariance, covariance.mT, rtol=1e-5, atol=1e-6 * float(scale)):
            raise ValueError("covariance must be symmetric")
        variances, self.axes = torch.linalg.eigh((covariance + covariance.mT) / 2)
        if float(variances.min()) < -1e-6 * float(scale):
            raise ValueError("covariance must be positive semi-definite")
        self.mean, self.variances = mean, variances.clamp(min=0)
        self.schedule = schedule or schedules.Cosine()
        self.standardizer = standardizer or Standardizer.identity(d)
        self.elementwise = True

    def denoise(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Return x̂ by the formula above; shapes as in `Denoiser.denoise`."""
        mean, axes, variances = (
            v.to(x_t.device, x_t.dtype) for v in (self.mean, self.axes, self.variances)
        )
        if alpha_t.shape[-1:].numel() > 1 or sigma_t.shape[-1:].numel() > 1:
            alpha, sigma = torch.broadcast_tensors(alpha_t, sigma_t)
            covariance = (axes * variances) @ axes.mT
            seen = alpha[..., :, None] * covariance * alpha[..., None, :]
            seen = seen + torch.diag_embed(sigma**2)
            misfit = torch.linalg.solve(seen, (x_t - alpha * mean)[..., None])[..., 0]
            return mean + (alpha * misfit) @ covariance
        signal = alpha_t * variances
        # where signal and noise both vanish the prior mean is certain: gain 0, not 0/0
        gain = signal / (alpha_t * signal + sigma_t**2).clamp(min=torch.finfo(x_t.dtype).tiny)
        return mean + (((x_t - alpha_t * mean) @ axes) * gain) @ axes.mT


class EmpiricalDenoiser(Denoiser):
    """The exact denoiser of a data set, i.e. of the mixture of points x_1 … x_n with equal weights.

    x̂ is the mean of the data under softmax weights -|x_t - alpha x_i|²/(2 sigma²).  It is what a
    perfect network would learn, and at low noise it returns the nearest data point: it memorises.

    Parameters
    ----------
    data : Tensor of shape (n, d)
        States in standardised units.
    schedule, standardizer : optional
        Default `schedules.Cosine` and the identity.
    chunk : int
        Most pairs (noisy state, data point) that are held in memory at once; where a gradient is
        asked for, as guidance does, all pairs are.
    """

    def __init__(
        self,
        data: Tensor,
        schedule: Schedule | None = None,
        standardizer: Standardizer | None = None,
        chunk: int = 2**22,
    ) -> None:
        checks.finite("data", data)
        if data.ndim != 2 or not len(data):
            raise ValueError(f"data must have shape (n, d) with n > 0, got {tuple(data.shape)}")
        self.data, self.chunk = data, checks.count("chunk", chunk)
        self.schedule = schedule or schedules.Cosine()
        self.standardizer = standardizer or Standardizer.identity(data.shape[1])

    def denoise(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Return x̂, the softmax mean of the data; shapes as in `Denoiser.denoise`."""
        data = self.data.to(x_t.device, x_t.dtype)
        checks.last_axis("x_t", x_t, data.shape[1])
        smallest = torch.finfo(x_t.dtype).tiny ** 0.25  # no square below overflows
        centres = (x_t / alpha_t.clamp(min=smallest)).reshape(-1, data.shape[1])
        ratio = sigma_t.clamp(min=smallest) / alpha_t.clamp(min=smallest)
        ratio = ratio.expand(*x_t.shape[:-1], 1).reshape(-1, 1)
        columns = min(len(data), self.chunk)
        rows = max(1, self.chunk // columns)
        parts = [
            self._mean(c, r, data, columns)
            for c, r in zip(centres.split(rows), ratio.split(rows), strict=True)
        ]
        return torch.cat(parts).reshape(x_t.shape)

    @staticmethod
    def _mean(centres: Tensor, ratio: Tensor, data: Tensor, columns: int) -> Tensor:
        """Softmax mean over the data, streamed over blocks of ``columns`` points."""
        top = centres.new_full((len(centres), 1), -torch.inf)
        total, mean = torch.zeros_like(top), torch.zeros_like(centres)
        for block in data.split(columns):
            # no matrix product here: |c|² - 2 c x + |x|² cancels catastrophically at low noise
            distance = torch.cdist(centres, block, compute_mode="donot_use_mm_for_euclid_dist")
            logits = -0.5 * (distance / ratio) ** 2
            new_top = torch.maximum(top, logits.amax(1, keepdim=True).detach())
            weights, fade = (logits - new_top).exp(), (top - new_top).exp()
            total = total * fade + weights.sum(1, keepdim=True)
            mean = mean * fade + weights @ block
            top = new_top
        return mean / total
