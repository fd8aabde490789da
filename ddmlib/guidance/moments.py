"""MMPS: guidance by the covariance that the denoiser's own Jacobian gives."""

import math

import torch
from torch import Tensor

from ddmlib import checks
from ddmlib.assimilation import Observation
from ddmlib.denoisers import Denoiser
from ddmlib.guidance.base import Guided, Linearised, whitened


class MMPS(Guided):
    """Moment matching: the covariance of x_0 given x_t from the Jacobian of the denoiser.

    The system (R + A V Aᵀ) u = y - A(x̂) is solved by the method of minimal residuals in a Krylov
    space of ``products`` dimensions, each of which costs one product with the Jacobian; with as
    many as there are observed values it is exact.  In whitened units the matrix is I + A V Aᵀ with
    V a covariance, so no eigenvalue of its projection T on that space may lie below one: those that
    do (a network's Jacobian is no covariance) are raised to one.  Hence |u| never exceeds the
    residual |y - A(x̂)|, however few the products and however wrong the Jacobian.  The
    preconditioner is the same matrix under `PiGDM`'s V, which evens out observations of different
    accuracy.

    Parameters
    ----------
    denoiser, observation
        As in `Guided`.
    products : int, optional
        Dimensions of the Krylov space; default: all observed values of a sample, an exact solve.

    References
    ----------
    Rozet, Andry, Lanusse and Louppe (2024), Learning diffusion priors from observations by
    expectation maximization, NeurIPS 37.
    """

    def __init__(
        self, denoiser: Denoiser, observation: Observation, products: int | None = None
    ) -> None:
        super().__init__(denoiser, observation)
        values = math.prod(observation.y.shape[-self.event :])
        self.products = min(
            values, values if products is None else checks.count("products", products)
        )

    def _gradient(self, at: Linearised, alpha_t: Tensor, sigma_t: Tensor) -> tuple[Tensor, Tensor]:
        shape = at.residual.shape
        residual = at.residual.flatten(-self.event)
        exact = self.products == residual.shape[-1]
        prior = sigma_t**2 / (alpha_t**2 + sigma_t**2)
        inverse = torch.linalg.inv(whitened(at.jacobian, prior)).to(residual)

        def precondition(v: Tensor) -> Tensor:
            return (inverse @ v.reshape(shape)[..., None])[..., 0].reshape(residual.shape)

        basis: list[Tensor] = []
        images: list[Tensor] = []  # I + A V Aᵀ times the basis
        pulled: list[Tensor] = []  # the basis carried to x_t
        direction = precondition(residual)
        for k in range(self.products):
            if exact:
                basis.append(torch.zeros_like(residual))
                basis[-1][..., k] = 1
            else:
                basis.append(_orthonormal(direction, basis))
            pulled.append(at.pull(basis[-1].reshape(shape)))
            moved = at.scale * pulled[-1]
            moved = moved[..., :: self.observation.every, :] if self.event == 2 else moved
            image = (at.jacobian @ moved[..., None])[..., 0].reshape(residual.shape)
            images.append(basis[-1] + image)
            direction = precondition(images[-1])
        q, kq = torch.stack(basis, -1).double(), torch.stack(images, -1).double()
        inside = q.mT @ kq
        outside = kq - q @ inside
        inside = _raised((inside + inside.mT) / 2)
        value = residual.double()[..., None]
        right = q.mT @ value
        # The least |residual - K Q c|: its parts are |right - T c|² in the space and that of what
        # lies outside.  With T c for the unknown, |c| <= |T c| <= |residual| is plain to see.
        tilted = torch.linalg.solve(inside, outside.mT)
        eye = torch.eye(self.products, dtype=q.dtype, device=q.device)
        normal = right + tilted @ (value - q @ right)
        coefficients = torch.linalg.solve(eye + tilted @ tilted.mT, normal)
        coefficients = torch.linalg.solve(inside, coefficients)
        weights = coefficients[..., 0].movedim(-1, 0).to(residual)
        weights = weights.reshape(weights.shape + (1,) * self.event)
        quadratic = (coefficients * right).sum((-2, -1))
        half = torch.linalg.cholesky(inside).diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_likelihood = (-quadratic / 2 - half).to(residual) + self._constant(at.residual, at.std)
        return (torch.stack(pulled) * weights).sum(0), log_likelihood


def _orthonormal(v: Tensor, basis: list[Tensor]) -> Tensor:
    """Return v made orthogonal to a basis and of length one; zero where nothing of it is left."""
    before = v.norm(dim=-1, keepdim=True)
    for old in basis * 2:  # the second time removes what rounding left
        v = v - (old * v).sum(-1, keepdim=True) * old
    size = v.norm(dim=-1, keepdim=True)
    return torch.where(size > 1e-4 * before, v / size.clamp(min=torch.finfo(v.dtype).tiny), 0.0)


def _raised(matrix: Tensor) -> Tensor:
    """Return symmetric matrices (..., k, k) with every eigenvalue below one raised to one.

    The correction is a constant to gradients, for those of eigenvectors may not exist.
    """
    values, vectors = torch.linalg.eigh(matrix.detach())
    return matrix + ((vectors * values.clamp(min=1)[..., None, :]) @ vectors.mT - matrix.detach())
