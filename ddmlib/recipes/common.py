"""What a recipe is."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ddmlib import training

BUDGETS = ("default", "full", "smoke")  # of every recipe
CONTINUED = ("more", "further")  # of some, from the weights that are there
CHUNK = 2**14  # states handled at once, so that activations stay in the cache
TRAIN_SEED, TEST_SEED = 1, 2


@dataclass(frozen=True)
class Recipe:
    """How one weight file is made and measured."""

    description: str
    model: dict[str, Any]
    loss: Callable[[Any, dict[str, Any], torch.device], training.Loss]
    measure: Callable[..., dict[str, Any]]
    samples: int
    budgets: dict[str, dict[str, Any]]
    lr: float = 1e-3
    decay: float = 0.999
    clip: float | None = None  # largest norm of a gradient
    kernel_lr: float | None = None  # of Muon, for hidden convolutions
    seed: int = 0
    uses_features: bool = True
    small: int = 2**14  # samples of the test that measures the weights anew
    stored: torch.dtype = torch.float32  # on disk; halves where the metric does not notice
    networks: dict[str, dict[str, Any]] = field(default_factory=dict)  # of budgets, where others
    # of weights for low noise alone: the name of those that training begins with and that are used
    # above, the sigma/alpha below which they are, and signs of a mirror that they are averaged over
    start: str | None = None
    below: float = 0.0
    mirror: tuple[float, ...] = ()

    def model_for(self, budget: str) -> dict[str, Any]:
        """Return the ``model`` of a budget: some train a larger network."""
        settings = self.model["network_settings"] | self.networks.get(budget, {})
        return self.model | {"network_settings": settings}
