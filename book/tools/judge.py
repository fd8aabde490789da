"""What trajectories given an event are held against: simulated ones of the same number."""

from typing import Any

import torch
from plain_samples import BINS
from torch import Tensor

from ddmlib import events, metrics

GUIDED = 2048  # samples by moment matching alone: enough to see what it lacks
PARTED = 100  # times, to see how much floors scatter


class Judge:
    """Scores trajectories given an event, against simulated ones of the same number."""

    def __init__(self, event: events.Constraint, reference: Tensor) -> None:
        self.event, half = event, len(reference) // 2
        self.reference, self.other = reference[:half], reference[half:]
        self.margins = self.event.margin(self.reference)
        self.limits = 0.0, float(self.margins.quantile(0.999))
        self.faint = float(self.margins.quantile(0.02))
        self.floor = self.score(self.other) | {"scatter": self.scatter()}
        self.floor_guided = self.score(self.other[:GUIDED])

    def scatter(self) -> float:
        """Return the standard deviation of the floor of C: of the total variation of two sets of
        simulated trajectories, parted by chance in many ways."""
        c, generator = self.event.margin(self.reference), torch.Generator().manual_seed(5)
        c = torch.cat([c, self.event.margin(self.other)])
        found = []
        for _ in range(PARTED):
            halves = c[torch.randperm(len(c), generator=generator)].chunk(2)
            found.append(metrics.total_variation(*halves, bins=BINS, limits=self.limits))
        return round(float(torch.tensor(found).std()), 5)

    def score(self, x: Tensor) -> dict[str, Any]:
        """Return the shares inside, faint and beyond the boxes of C, and the total variations of C
        and of each component."""
        c, states = self.event.margin(x), self.reference.flatten(0, 1)
        limits = states.quantile(torch.tensor([0.001, 0.999]).to(states), 0).mT.tolist()
        return {
            "inside": round(float((c > 0).double().mean()), 5),
            "faint": round(float((c < self.faint).double().mean()), 5),
            "beyond": round(float((c > self.limits[1]).double().mean()), 5),
            "total_variation": round(
                metrics.total_variation(c, self.margins, bins=BINS, limits=self.limits), 5
            ),
            "states": [
                round(metrics.total_variation(a, b, bins=BINS, limits=(low, high)), 5)
                for a, b, (low, high) in zip(
                    x.flatten(0, 1).unbind(-1), states.unbind(-1), limits, strict=True
                )
            ],
        }
