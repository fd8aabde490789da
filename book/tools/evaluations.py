"""Score the main weights for every sampler and number of evaluations; stored for chapter 04.

python book/tools/evaluations.py            # a few minutes on two cores
"""

import results
import torch

from ddmlib import metrics, pretrained, recipes, sampling

SAMPLES = 2**15
RUNS = [
    (method, eta, spacing, evaluations)
    for method, eta, spacing in (
        ("ddim", 0, "log-ratio"), ("multistep", 0, "log-ratio"), ("multistep", 1, "log-ratio"),
        ("heun", 0, "log-ratio"), ("ddpm", 1, "time"),
    )
    for evaluations in (5, 9, 19, 49)
]  # fmt: skip
RUNS += [("ddpm", 1, "time", 1000)]


def main() -> None:
    """Run all samplers and write ``book/results/evaluations.json``."""
    denoiser, _ = pretrained.load("lorenz63-states")
    floor = recipes.reference_floor(SAMPLES)
    rows = []
    for method, eta, spacing, evaluations in RUNS:
        steps = (evaluations + 1) // 2 if method == "heun" else evaluations
        x = sampling.sample(
            denoiser,
            (SAMPLES, 3),
            steps=steps,
            method=method,
            eta=float(eta),
            spacing=spacing,
            generator=torch.Generator().manual_seed(0),
            chunk=recipes.CHUNK,
        ).cpu()
        h = metrics.hellinger_counts(metrics.histogram(x), recipes.reference_histogram())
        row = {"method": method, "eta": eta, "spacing": spacing, "evaluations": evaluations}
        rows.append(row | {"hellinger": round(h, 5), "excess": round(metrics.excess(h, floor), 5)})
        print(rows[-1], flush=True)
    result = results.made("python book/tools/evaluations.py") | {
        "samples": SAMPLES,
        "floor": round(floor, 5),
        "rows": rows,
    }
    results.save(result, results.FOLDER / "evaluations.json")


if __name__ == "__main__":
    main()
