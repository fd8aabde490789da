"""Draw the picture of the front page, ``book/_static/attractor.png``: the attractor out of noise.

    python book/tools/attractor.py           # the shipped network, ``lorenz63-states``
    python book/tools/attractor.py --exact   # the exact denoiser of a small data set instead

The reverse process starts from pure noise; five panels show all states at five noise levels
sigma/alpha, scaled to unit variance and seen along the y axis (x to the right, z upwards).
"""

import argparse
import io
import itertools
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import FancyArrowPatch
from PIL import Image
from scipy.ndimage import gaussian_filter

from ddmlib import datasets, denoisers, noise, pretrained, sampling

matplotlib.use("agg")
import matplotlib.pyplot as plt

COLOURS = 64
RATIOS = (80.0, 1.0, 0.3, 0.1, 0.0)  # the panels' noise levels
CARD, INK, DIM = "#0b0f1e", "#f2eee3", "#9aa3b8"
GLOW = LinearSegmentedColormap.from_list(
    "glow", [CARD, "#1d2a5c", "#3d56b2", "#7d8ff0", "#f0b47a", "#fff3d6"]
)


def exact_denoiser(points: int) -> denoisers.Denoiser:
    """Return the exact denoiser of ``points`` independent states of Lorenz 63."""
    states = datasets.lorenz63(points, 1, dt=0.02, seed=1)[:, 0]
    return denoisers.EmpiricalDenoiser(datasets.LORENZ63(states), standardizer=datasets.LORENZ63)


def panels(denoiser: denoisers.Denoiser, number: int, steps: int) -> list[np.ndarray]:
    """Return the states at each of `RATIOS`, of unit variance, each of shape (number, 3)."""
    generator = torch.Generator().manual_seed(0)
    module = denoiser if isinstance(denoiser, torch.nn.Module) else None
    device = next(module.parameters()).device if module else torch.device("cpu")
    schedule = denoiser.schedule
    high = min(RATIOS[0], getattr(denoiser, "ratios", (0.0, RATIOS[0]))[1])
    shown = torch.tensor([high, *RATIOS[1:-1]], dtype=torch.float64)
    inner = sampling.times(schedule, steps, spacing="log-ratio", ratios=(2e-3, high))[:-1]
    grid = torch.cat([schedule.time(shown), inner, torch.zeros(1, dtype=torch.float64)])
    grid = grid.unique().flip(0)
    grid = grid[torch.cat([torch.tensor([True]), grid.diff() < -1e-9])]
    stops = [int((grid - t).abs().argmin()) for t in [*schedule.time(shown), torch.tensor(0.0)]]

    x = noise.normal((number, 3), generator=generator, device=device)
    pictures = [x.cpu().numpy()]
    for start, stop in itertools.pairwise(stops):
        part = grid[start : stop + 1]
        x = torch.cat([sampling.reverse(denoiser, y, part, method="heun") for y in x.split(2**14)])
        alpha, sigma = (float(v) for v in schedule(grid[stop]))
        pictures.append((x / (alpha**2 + sigma**2) ** 0.5).cpu().numpy())
    return pictures


def draw(pictures: list[np.ndarray], path: Path) -> None:
    """Draw the panels on a dark card of 1400 x 560 pixels, in a palette to keep the file small."""
    figure = plt.figure(figsize=(14, 5.6), dpi=100, facecolor=CARD)
    width, height = 2.75, 3.8
    blur = max(0.6, 1.9 * (2**13 / len(pictures[0])) ** 0.3)
    fade = np.outer(*(np.clip(6 * (1 - abs(np.linspace(-1, 1, n))), 0, 1) for n in (372, 268)))
    for k, (states, ratio) in enumerate(zip(pictures, RATIOS, strict=True)):
        left = 0.012 + k * 0.1964
        ax = figure.add_axes((left, 0.16, 0.19, 0.67))
        counts, *_ = np.histogram2d(
            states[:, 2],
            states[:, 0],
            bins=(372, 268),
            range=[(-height, height), (-width, width)],
        )
        density = gaussian_filter(counts, blur)
        top = np.quantile(density[density > 1e-3 * density.max()], 0.995)
        light = fade * np.sqrt(np.clip(density / top, 0, 1))  # no hard edge where noise is cut off
        ax.imshow(light, origin="lower", cmap=GLOW, aspect="auto", vmin=0, vmax=1)
        ax.axis("off")
        label = rf"$\sigma/\alpha = {ratio:g}$"
        label = {0: "pure noise", len(RATIOS) - 1: "the attractor"}.get(k, label)
        figure.text(left + 0.095, 0.07, label, color=INK, fontsize=15, ha="center")
    figure.text(0.5, 0.925, "the reverse process", color=DIM, fontsize=13, ha="center")
    figure.add_artist(
        FancyArrowPatch(
            (0.25, 0.9), (0.75, 0.9), arrowstyle="-|>", mutation_scale=14, color=DIM, lw=1.2
        )
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, facecolor=CARD)
    Image.open(buffer).convert("RGB").quantize(COLOURS).save(path, optimize=True)


def main() -> None:
    """Draw the picture as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--exact", action="store_true", help="use the exact kernel denoiser")
    parser.add_argument("--number", type=int, default=2**18, help="states in each panel")
    parser.add_argument("--points", type=int, default=2**14, help="data points of --exact")
    parser.add_argument("--steps", type=int, default=25, help="Heun steps of the sampler")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parents[1] / "_static" / "attractor.png"
    )
    options = parser.parse_args()
    if options.exact:
        denoiser = exact_denoiser(options.points)
    else:
        denoiser, _ = pretrained.load("lorenz63-states")
    draw(panels(denoiser, options.number, options.steps), options.out)


if __name__ == "__main__":
    main()
