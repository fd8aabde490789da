"""A diffusion model without ddmlib, as F24 writes it: the noise level is a column of the batch.

Every state carries its own pseudo-time, so the embedding and its FiLM layers are computed for each
state.  Names of parameters agree with `ddmlib.networks.ResidualMLP`: weights can be exchanged.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Block(nn.Module):
    def __init__(self, width: int, embedding: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.film = nn.Linear(embedding, 2 * width)
        self.inner = nn.Linear(width, width)
        self.activation = activation()
        self.outer = nn.Linear(width, width)
        self.gate = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.film(embedding).chunk(2, dim=-1)
        h = self.norm(x) * (1 + scale) + shift
        h = self.outer(self.activation(self.inner(h)))
        return x + self.gate * h


class Network(nn.Module):
    frequencies: Tensor

    def __init__(
        self,
        width: int,
        blocks: int,
        embedding: int,
        activation: type[nn.Module] = nn.ReLU,
        dim: int = 3,
    ) -> None:
        super().__init__()
        frequencies = torch.logspace(-1, 1, embedding // 2)  # per unit of log(sigma/alpha)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.first = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(Block(width, embedding, activation) for _ in range(blocks))
        self.last = nn.Linear(width, dim)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        angle = level[:, None] * self.frequencies  # (n, embedding / 2)
        embedding = torch.cat((angle.sin(), angle.cos()), dim=-1)
        h = self.first(x)
        for block in self.blocks:
            h = block(h, embedding)
        return self.last(h)


def training(
    network: Network, data: Tensor, alphas: Tensor, sigmas: Tensor, batch: int
) -> Iterator[float]:
    """Train with Adam on the velocity loss, with a DataLoader and F24's discrete pseudo-times.

    ``alphas`` and ``sigmas`` hold the noise levels at pseudo-times 0 … T.  Yields the losses.
    """
    loader = DataLoader(TensorDataset(data), batch_size=batch, shuffle=True)
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-4)
    while True:
        for (x_0,) in loader:
            k = torch.randint(1, len(alphas), (len(x_0),))
            alpha, sigma = alphas[k][:, None], sigmas[k][:, None]
            eps = torch.randn_like(x_0)
            x_t = alpha * x_0 + sigma * eps
            velocity = network(x_t, torch.log(sigma / alpha)[:, 0])
            loss = torch.mean((velocity - (alpha * eps - sigma * x_0)) ** 2)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            yield loss.item()


@torch.no_grad()
def ancestral(
    network: Network,
    x: Tensor,
    alphas: list[float],
    sigmas: list[float],
    ratios: tuple[float, float],
    generator: torch.Generator,
) -> Tensor:
    """Sample with DDPM's ancestral steps through the noise levels, the last of which is the first.

    The network is told no noise level outside ``ratios``, the range it was trained on.
    """
    for k in range(len(alphas) - 1, 0, -1):
        alpha, sigma, alpha_s, sigma_s = alphas[k], sigmas[k], alphas[k - 1], sigmas[k - 1]
        ratio = torch.full((len(x),), sigma / alpha).clamp(*ratios)
        x_0 = alpha * x - sigma * network(x, torch.log(ratio))
        beta = 1 - (alpha / alpha_s) ** 2
        x = alpha_s * beta / sigma**2 * x_0 + alpha / alpha_s * sigma_s**2 / sigma**2 * x
        if k > 1:
            x = x + beta**0.5 * sigma_s / sigma * torch.randn(x.shape, generator=generator)
    return x
