"""Gaussian noise that depends on the generator alone, not on the device it is used on."""

from collections.abc import Sequence

import torch
from torch import Tensor


def normal(
    shape: Sequence[int],
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Draw standard normal noise on the generator's device and move it to ``device``.

    With a CPU generator one seed gives one result on CPU and GPU alike; a CUDA generator is
    quicker on a GPU but has a stream of its own.

    Parameters
    ----------
    shape : sequence of int
        Shape of the result.
    generator : torch.Generator, optional
        Source of randomness; the default generator of ``device`` when missing.
    device, dtype : optional
        Where and in what precision the result is wanted.

    Returns
    -------
    Tensor of shape ``shape``.
    """
    drawn_on = device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, device=drawn_on, dtype=dtype).to(
        device=device
    )


def normal_like(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw standard normal noise of the shape, device and dtype of ``x`` (see `normal`)."""
    return normal(x.shape, generator=generator, device=x.device, dtype=x.dtype)
