"""Recipes of the shipped weights: data, network, training settings, and what is measured.

`RECIPES` holds all of them by name: those of Lorenz 63 after F24 (Finn et al. 2024), those of
trajectories of the noisy chain after R23 (Rozet & Louppe 2023), and those of the trajectories of
three systems, on which events are defined, after Z23 (Finzi et al. 2023), some with a second
network for low noise.
"""

from . import lorenz63, low_noise, noisy_lorenz63, trajectories
from .common import BUDGETS, CHUNK, CONTINUED, Recipe
from .lorenz63 import (
    measure_increments,
    measure_states,
    reference_floor,
    reference_histogram,
    states,
)
from .noisy_lorenz63 import measure_chain

RECIPES: dict[str, Recipe] = (
    lorenz63.RECIPES | noisy_lorenz63.RECIPES | trajectories.RECIPES | low_noise.RECIPES
)

__all__ = [
    "BUDGETS",
    "CHUNK",
    "CONTINUED",
    "RECIPES",
    "Recipe",
    "measure_chain",
    "measure_increments",
    "measure_states",
    "reference_floor",
    "reference_histogram",
    "states",
]
