r"""Muon: steps whose matrices are orthogonal, for the weights between hidden layers.

Adam scales each number of a gradient by itself.  Muon (Jordan et al. 2024) treats the weights of a
layer as the matrix that they are: of its momentum G = U S Vᵀ it keeps the directions and forgets
the sizes, so a step is lr U Vᵀ, and directions in which the gradient is small move as far as those
in which it is large.  Where a network must be right to a per cent, as denoisers of smooth
trajectories, these are what is left to learn.

U Vᵀ needs no decomposition: an odd polynomial of G, repeated, drives all singular values towards
one (Newton-Schulz).  With Muon's coefficients they end between 0.7 and 1.2, which is near enough.
Kernels of convolutions (out, in, kernel) count as matrices (out, in · kernel).  Inputs, outputs,
biases and gates are left to Adam.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ddmlib import checks

COEFFICIENTS = 3.4445, -4.7750, 2.0315
REPEATS = 5
NARROWEST = 16  # channels on either side of a hidden convolution


def hidden_kernels(module: nn.Module) -> list[nn.Parameter]:
    """Return the kernels of a module's convolutions between hidden layers, 16 channels or more.

    Those of layers that are named ``first`` or ``last``, as in the networks of this library, are
    inputs and outputs however many channels they have.
    """
    return [
        p
        for name, p in module.named_parameters()
        if p.ndim == 3
        and min(p.shape[:2]) >= NARROWEST
        and not {"first", "last"} & {*name.split(".")}
    ]


def orthogonal(g: Tensor) -> Tensor:
    """Return nearly U Vᵀ of matrices g = U S Vᵀ: singular values between 0.7 and 1.2.

    Those far below the largest, by a factor of a thousand or more, stay smaller.

    Parameters
    ----------
    g : Tensor of shape (*batch, rows, columns)

    Returns
    -------
    Tensor of the shape of ``g``
    """
    a, b, c = COEFFICIENTS
    x = g / g.norm(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(g.dtype).tiny)
    wide = x if x.shape[-2] <= x.shape[-1] else x.mT
    for _ in range(REPEATS):
        square = wide @ wide.mT
        wide = a * wide + (b * square + c * square @ square) @ wide
    return wide if x.shape[-2] <= x.shape[-1] else wide.mT


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal, as an optimiser.

    Parameters
    ----------
    params : iterable of Parameter
        Matrices (out, in), or kernels (out, in, kernel) taken as matrices.
    lr : float
        Length of a step in each direction, times √(rows/columns) where there are more rows.
    momentum : float
        Weight of the past gradients, in [0, 1), in Nesterov's form.

    References
    ----------
    Jordan et al. (2024), Muon: an optimizer for hidden layers in neural networks.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float = 0.02, momentum: float = 0.95
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
        super().__init__(params, {"lr": checks.positive("lr", lr), "momentum": momentum})
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.ndim < 2:
                raise ValueError(f"params must be matrices or kernels, got shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Take one step along the gradients; a closure is refused."""
        if closure is not None:
            raise ValueError("closure must be None")
        for group in self.param_groups:
            alike: dict[torch.Size, list[tuple[Tensor, ...]]] = {}  # one shape goes together
            for p in group["params"]:
                if p.grad is not None:
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                    alike.setdefault(p.shape, []).append((p, p.grad, self.state[p]["momentum"]))
            for shape, members in alike.items():
                params, gradients, past = (list(each) for each in zip(*members, strict=True))
                torch._foreach_lerp_(past, gradients, 1 - group["momentum"])
                ahead = torch._foreach_lerp(gradients, past, group["momentum"])
                matrices = torch.stack([g.flatten(1) for g in ahead])
                longer = max(1.0, shape[0] / matrices.shape[-1]) ** 0.5
                steps = [u.reshape(shape) for u in orthogonal(matrices).unbind()]
                torch._foreach_add_(params, steps, alpha=-group["lr"] * longer)


def optimisers(
    module: nn.Module, lr: float, weight_decay: float, kernel_lr: float | None
) -> tuple[list[float], list[torch.optim.Optimizer]]:
    """Return peak learning rates and optimisers of a module: AdamW, and Muon for its hidden kernels
    where ``kernel_lr`` is given.

    Raises
    ------
    ValueError
        If ``kernel_lr`` is not positive, or there are no hidden kernels.
    """
    if kernel_lr is not None:
        checks.positive("kernel_lr", kernel_lr)
    kernels = [] if kernel_lr is None else hidden_kernels(module)
    if kernel_lr is not None and not kernels:
        raise ValueError(
            "kernel_lr is for modules with one-dimensional convolutions (torch.nn.Conv1d) between "
            f"hidden layers of {NARROWEST} channels or more"
        )
    taken = set(map(id, kernels))
    others = [p for p in module.parameters() if id(p) not in taken]
    adam = torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay, fused=True)
    if kernel_lr is None:
        return [lr], [adam]
    return [lr, kernel_lr], [adam, Muon(kernels, kernel_lr)]
