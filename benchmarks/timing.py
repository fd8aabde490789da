"""Side-by-side timing: alternating repeats, medians, and the spread of the ratio."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Row:
    """One line of the table.

    ``ratio`` is baseline over ours for a time or a count, ours over baseline for a rate: above one,
    ours is better.  ``low`` and ``high`` are the smallest and the largest ratio of the repeats.
    """

    quantity: str
    ours: float | None
    baseline: float | None
    unit: str
    aim: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""
    settings: dict = field(default_factory=dict)


def seconds(function: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def alternate(
    *timers: Callable[[], float], repeats: int, warm_up: bool = True
) -> list[tuple[float, ...]]:
    """Call every timer in turn, ``repeats`` times over; each returns the seconds that it measured.

    What slows the machine for a while slows all of them alike, so ratios are steadier than times.
    """
    if warm_up:
        for timer in timers:
            timer()
    return [tuple(timer() for timer in timers) for _ in range(repeats)]


def spread(ratios: list[float]) -> dict[str, float]:
    """Return the median, smallest and largest of the ratios of the repeats, as `Row` names them."""
    return {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def compare(
    quantity: str,
    repeats: list[tuple[float, ...]],
    column: int = 1,
    *,
    scale: float = 1.0,
    work: float | None = None,
    unit: str = "s",
    aim: float | None = None,
    note: str = "",
    settings: dict | None = None,
) -> Row:
    """Return the row of timer 0 (ours) against timer ``column`` (the baseline).

    ``scale`` multiplies the baseline's seconds, of which only a part was run.  With ``work`` the
    row shows rates, work a second, instead of seconds.  ``settings`` are stored with the row.
    """
    pairs = [(times[0], scale * times[column]) for times in repeats]
    ours, baseline = (statistics.median(side) for side in zip(*pairs, strict=True))
    if work is not None:
        ours, baseline = work / ours, work / baseline
    ratios = spread([b / a for a, b in pairs])
    return Row(quantity, ours, baseline, unit, aim, **ratios, note=note, settings=settings or {})
