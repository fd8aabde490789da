"""What a recipe is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ddmlib import training

BUDGETS = ("default", "full", "smoke")
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
