"""Metrics: how far generated samples and ensembles are from what they should be.

Two families live here.  Distances between two sets of samples (`hellinger`, `total_variation`,
`frechet`, `nearest_neighbour_distance`, `extremes`, `wasserstein1`, `energy_distance`) return a
number; scores of an ensemble against a truth (`crps`, `rank_histogram`, `coverage`, `rmse`,
`spread_ratio`, `block_bootstrap`) keep the axes that a reader may want to look along.

A distance between *finite* samples of one and the same law is not zero.  What it is, its floor,
depends on the sample sizes, so a distance without its floor says little: `floor` measures it for
any metric, `hellinger_floor` for large histograms, and `excess` removes it from a distance.

Everything takes torch tensors, batch first, on any device with double precision, and accumulates
in double precision.  Nothing here is differentiable.
"""

from .bootstrap import Interval, block_bootstrap
from .distances import (
    Extremes,
    energy_distance,
    extremes,
    nearest_neighbour_distance,
    wasserstein1,
)
from .ensembles import coverage, crps, rank_histogram, rmse, spread_ratio
from .features import Moments, frechet, moments
from .floors import Floor, excess, floor, hellinger_floor
from .histograms import hellinger, hellinger_counts, histogram, total_variation

__all__ = [
    "Extremes",
    "Floor",
    "Interval",
    "Moments",
    "block_bootstrap",
    "coverage",
    "crps",
    "energy_distance",
    "excess",
    "extremes",
    "floor",
    "frechet",
    "hellinger",
    "hellinger_counts",
    "hellinger_floor",
    "histogram",
    "moments",
    "nearest_neighbour_distance",
    "rank_histogram",
    "rmse",
    "spread_ratio",
    "total_variation",
    "wasserstein1",
]
