r"""Logistic regression: log-odds linear in what is known, and how well they part what is not seen.

The loss of weights w is -Σ log σ(±(w_0 + w · x)) + Σ w²/2 over rows x of either kind, all columns
being standardised, and Newton's method finds its minimum in a few steps.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

RIDGE = 1.0  # penalty of a squared weight, features being standardised
EASE = 1e-3  # penalty of the first weight: keeps a regression solvable
NEWTON, SETTLED = 40, 1e-7  # its steps at most, and the one that is the last


def regression(x: Tensor, y: Tensor, offset: Tensor | float = 0.0) -> Tensor:
    """Return weights (1 + columns,) of a logistic regression, all but the first penalised.

    Parameters
    ----------
    x : Tensor of shape (n, columns)
    y : Tensor of shape (n,)
        Zeros and ones.
    offset : Tensor of shape (n,), optional
        Log-odds that are added to those of the columns.
    """
    mean = x.mean(0)
    std = (x - mean).square().mean(0).sqrt().clamp(min=torch.finfo(x.dtype).tiny)
    rows = torch.cat((torch.ones_like(y)[:, None], (x - mean) / std), 1)
    penalty = torch.full_like(rows[0], RIDGE)
    penalty[0] = EASE
    w = torch.zeros_like(penalty)
    for _ in range(NEWTON):
        p = torch.sigmoid(rows @ w + offset)
        hessian = (rows * (p * (1 - p))[:, None]).mT @ rows + torch.diag(penalty)
        step = torch.linalg.solve(hessian, rows.mT @ (y - p) - penalty * w)
        size = float(step.abs().max())
        w = w + step / max(1.0, size)  # no leaps where p is next to 0 or 1
        if size < SETTLED:
            break
    slopes = w[1:] / std
    return torch.cat(((w[0] - slopes @ mean)[None], slopes))


def held_out(near: Tensor, y: Tensor, k: int = 0, offset: Tensor | float = 0.0) -> float:
    """Return the mean log-loss at level k of either half of the rows under the fit of the others.

    Parameters
    ----------
    near : Tensor of shape (levels, n, columns)
        Rows of this level and of those near, all of which are fitted.
    y : Tensor of shape (n,)
        Zeros and ones, the same at all levels.
    k : int
        The level among those near.
    offset : Tensor of shape (n,), optional
        Log-odds that are added to those of the columns.
    """
    offset = torch.as_tensor(offset).expand(len(y)).to(y)
    half, loss = len(y) // 4 * 2, 0.0
    for fitted, judged in ((slice(half), slice(half, None)), (slice(half, None), slice(half))):
        rows, times = near[:, fitted].flatten(0, 1), len(near)
        w = regression(rows, y[fitted].repeat(times), offset[fitted].repeat(times))
        odds = w[0] + near[k, judged] @ w[1:] + offset[judged]
        loss -= float(logsigmoid(torch.where(y[judged] > 0, odds, -odds)).sum())
    return loss / len(y)
