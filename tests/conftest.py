"""Fixtures that every test module shares."""

from collections.abc import Callable

import pytest
import torch

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device present in turn."""
    return torch.device(request.param)


@pytest.fixture
def generator() -> Callable[..., torch.Generator]:
    """A maker of seeded generators, on the CPU so that one seed serves all devices."""

    def make(seed: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    return make
