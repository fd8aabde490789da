"""Ensembles around a state for `enoi`, made without a diffusion model.

An ensemble sampler maps states (*batch, d) and a generator to ensembles (*batch, members, d), in
physical units.
"""

from collections.abc import Callable

import torch
from scipy.spatial import cKDTree
from torch import Tensor

from ddmlib import checks, noise

Sampler = Callable[[Tensor, torch.Generator | None], Tensor]


def gaussian(covariance: Tensor, members: int) -> Sampler:
    """Return the sampler of N(state, covariance): static, the same wherever the state is.

    Parameters
    ----------
    covariance : Tensor of shape (d, d)
        Symmetric, positive semi-definite.
    members : int
    """
    checks.finite("covariance", covariance)
    checks.count("members", members, 2)
    values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    if float(values.min()) < -1e-6 * float(values.abs().max()):
        raise ValueError("covariance must be positive semi-definite")
    root = vectors * values.clamp(min=0).sqrt()

    def sample(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        shape = (*x.shape[:-1], members, x.shape[-1])
        z = noise.normal(shape, generator=generator, device=x.device, dtype=x.dtype)
        return x[..., None, :] + z @ root.mT.to(x)

    return sample


def analogs(archive: Tensor, members: int) -> Sampler:
    """Return the sampler of analogs: the states of an archive that lie nearest to the state.

    Parameters
    ----------
    archive : Tensor of shape (n, d)
        Past states, physical units; n sets how near the analogs are.
    members : int
        Analogs of each state.
    """
    checks.finite("archive", archive)
    checks.count("members", members, 2)
    if archive.ndim != 2 or len(archive) < members:
        raise ValueError(f"archive must have shape (n >= {members}, d), got {tuple(archive.shape)}")
    states = archive.cpu()
    tree = cKDTree(states.numpy())

    def sample(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        del generator  # the nearest are the nearest
        _, index = tree.query(x.detach().cpu().numpy(), k=members, workers=-1)
        return states[torch.from_numpy(index)].to(x)

    return sample
