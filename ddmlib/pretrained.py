"""Shipped weights: load them, re-train them, measure them.

Weights lie in ``ddmlib/weights/NAME.safetensors``, each beside a card ``NAME.json`` that says how
they were made and how good they are.  `recipes` holds the settings; ``python -m ddmlib`` is the
command line.
"""

import json
import platform
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddmlib import checks, datasets, networks, schedules, tails, training
from ddmlib.denoisers import ByLevel, NetworkDenoiser, Symmetric
from ddmlib.recipes import CONTINUED, RECIPES, Recipe

WEIGHTS = Path(str(resources.files("ddmlib") / "weights"))


def names() -> list[str]:
    """Return the names of all weights that can be trained; shipped ones have a card."""
    return sorted(RECIPES)


def card(name: str, folder: Path | None = None) -> dict[str, Any]:
    """Return the card of shipped weights.

    Raises
    ------
    ValueError
        For an unknown name.
    RuntimeError
        If the weights are known but not there.
    """
    checks.choice("name", name, RECIPES)
    path = (folder or WEIGHTS) / f"{name}.json"
    if not path.exists():
        raise RuntimeError(f"{path.name} is not there; train it: python -m ddmlib train {name}")
    try:
        return json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise RuntimeError(f"{path.name} is truncated or no card: {error}") from error


def build(settings: dict[str, Any]) -> nn.Module:
    """Return the untrained module that the ``model`` entry of a card describes."""
    network = networks.from_settings(settings["network"], settings["network_settings"])
    if settings["kind"] == "network":
        return network
    schedule = schedules.by_name(settings["schedule"], **settings["schedule_settings"])
    centre_and_spread = torch.tensor(settings["mean"]), torch.tensor(settings["std"])
    standardizer = datasets.Standardizer(*centre_and_spread)
    if settings.get("tails"):
        standardizer = tails.AsinhStandardizer(*centre_and_spread, knee=settings.get("knee", 1.0))
    head, ratios = settings["head"], settings["ratios"]
    return NetworkDenoiser(network, schedule, standardizer, head, (ratios[0], ratios[1]))


def load(
    name: str, device: torch.device | str | None = None, folder: Path | None = None
) -> tuple[Any, dict[str, Any]]:
    """Load shipped weights.

    Parameters
    ----------
    name : str
        One of `names`.
    device : optional
        Default: CUDA when there is one, else the CPU.
    folder : Path, optional
        Where the weights lie; default: in the package.

    Returns
    -------
    The denoiser (or plain network) in evaluation mode without gradients, and its card.

    Raises
    ------
    ValueError
        For an unknown name.
    RuntimeError
        If the file is missing, truncated, foreign, or does not fit its card.
    """
    details = card(name, folder)
    path = (folder or WEIGHTS) / f"{name}.safetensors"
    if not path.exists():
        raise RuntimeError(f"{path.name} is not there; train it: python -m ddmlib train {name}")
    module = build(details["model"])
    tensors, _ = training.load_tensors(path)
    training.assign(module, {k: v.float() for k, v in tensors.items()}, path.name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return module.to(device).eval().requires_grad_(False), details


def _holding(name: str, folder: Path | None) -> Path | None:
    """Return the folder if it holds weights of that name; those of the package will do else."""
    return folder if folder is not None and (folder / f"{name}.json").exists() else None


def joined(
    name: str, device: torch.device | str | None = None, folder: Path | None = None
) -> tuple[ByLevel, dict[str, Any]]:
    """Load weights for low noise together with those that they went on from.

    Parameters
    ----------
    name : str
        Of weights whose recipe has a ``start``: "lorenz63-trajectories-low",
        "fitzhugh-nagumo-trajectories-low".
    device, folder
        As for `load`; weights for higher noise that the folder does not hold are the shipped ones.

    Returns
    -------
    The denoiser that is the one below a certain sigma/alpha, `Recipe.below`, averaged over the
    mirror of the data where there is one, and the other above; and the card of the former.

    Raises
    ------
    ValueError
        For an unknown name, or weights for all levels.
    RuntimeError
        As `load`.
    """
    recipe = RECIPES[checks.choice("name", name, RECIPES)]
    if recipe.start is None:
        raise ValueError(
            f"name must be that of weights for low noise, got {name}: they are for all"
        )
    low, details = load(name, device, folder)
    high, _ = load(recipe.start, low.device, _holding(recipe.start, folder))
    low = Symmetric(low, recipe.mirror) if recipe.mirror else low
    return ByLevel([(recipe.below, high), (0.0, low)]), details


def train(
    name: str,
    *,
    budget: str = "default",
    steps: int | None = None,
    compiled: bool = False,
    device: torch.device | str | None = None,
    folder: Path | None = None,
    checkpoint: Path | None = None,
    report: Callable[[training.Progress], None] | None = None,
) -> dict[str, Any]:
    """Train weights from scratch, write them and their card (without metrics: see `measure`).

    Parameters
    ----------
    name : str
        One of `names`.
    budget : str
        "default" (an hour of two cores at most), "full" (the paper's scale, for a GPU) or "smoke"
        (seconds, for tests).  The card of a shipped file says which made it.  Some have "more" and
        "further", which go on from the weights that are there.
    steps : int, optional
        Of the optimiser; default: the budget's.
    compiled : bool
        Whether `torch.compile` fuses what lies between the network's products; needs a compiler.
    device : optional
        Default: CUDA when there is one.
    folder, checkpoint : Path, optional
        Where to write; a checkpoint makes the training resumable.
    report : callable, optional
        Called with each progress record.

    Returns
    -------
    The card.
    """
    recipe = RECIPES[checks.choice("name", name, RECIPES)]
    checks.choice("budget", budget, recipe.budgets)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = folder or WEIGHTS
    before = None
    if budget in CONTINUED:
        module, before = load(name, device, folder)
        module.train().requires_grad_()
        model = before["model"]
    else:
        torch.manual_seed(recipe.seed)  # initial parameters are drawn from torch's own generator
        model = recipe.model_for(budget)
        module = build(model).to(device)
        if recipe.start:
            started, before = load(recipe.start, device, _holding(recipe.start, folder))
            module.load_state_dict(started.state_dict())
    folder.mkdir(parents=True, exist_ok=True)
    if compiled:
        network: Any = module.network if model["kind"] == "denoiser" else module
        network.compile()
    generator = torch.Generator(device).manual_seed(recipe.seed)
    settings = dict(recipe.budgets[budget])
    if steps is not None:
        settings["steps"] = checks.count("steps", steps)
    rates = {k: settings.pop(k, getattr(recipe, k)) for k in ("lr", "kernel_lr")}
    loss = recipe.loss(module, settings, device)
    average = training.Average(module, recipe.decay) if recipe.decay else None
    last, seconds = None, 0.0
    for progress in training.fit(
        module,
        loss,
        steps=settings["steps"],
        **rates,
        clip=recipe.clip,
        warmup=settings["steps"] // 100,
        generator=generator,
        average=average,
        samples_per_step=settings["batch"],
        report_every=max(1, settings["steps"] // 100),
        checkpoint=checkpoint,
        identity={"name": name, "model": model, "settings": settings, "seed": recipe.seed},
    ):
        last, seconds = round(progress.loss, 6), progress.seconds
        if report is not None:
            report(progress)
    if last is None and checkpoint is not None:  # it was complete: no record came
        seconds = float(training.load_tensors(checkpoint)[1]["seconds"])
    trained = average.module if average is not None else module
    details = {
        "name": name,
        "description": recipe.description,
        "command": ("" if before is None else f"{before['command']} && ")
        + f"python -m ddmlib train {name} --budget {budget}"
        + (f" --steps {steps}" if steps is not None else "")
        + " --compile" * compiled,
        "model": model,
        "training": settings
        | {k: rate for k, rate in rates.items() if rate}
        | {"lr_schedule": "cosine", "average": recipe.decay, "seed": recipe.seed}
        | ({"clip": recipe.clip} if recipe.clip else {})
        | {"final_loss": last}
        | ({} if before is None else {"before": before["training"] | before["made_on"]}),
        "made_on": {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "minutes": round(seconds / 60, 1),
            "python": platform.python_version(),
            "torch": str(torch.__version__),
        },
        "metrics": {},
    }
    tensors = {k: v.to(recipe.stored) for k, v in trained.state_dict().items()}
    training.save_tensors(folder / f"{name}.safetensors", tensors, {"name": name})
    write_card(details, folder)
    return details


def write_card(details: dict[str, Any], folder: Path | None = None) -> None:
    """Write a card beside its weights, atomically."""
    path = (folder or WEIGHTS) / f"{details['name']}.json"
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(details, indent=1) + "\n")
    partial.replace(path)


def measure(
    name: str,
    samples: int | None = None,
    *,
    device: torch.device | str | None = None,
    folder: Path | None = None,
    brief: bool = False,
) -> dict[str, Any]:
    """Measure weights as their card does.

    Parameters
    ----------
    name : str
        One of `names`.
    samples : int, optional
        Generated states; default: the full number of the recipe (1 048 576 for the main weights).
    brief : bool
        Only the headline metric, which needs no other weights.

    Returns
    -------
    dict of metric to value, floors beside them.
    """
    recipe: Recipe = RECIPES[checks.choice("name", name, RECIPES)]
    model, _ = (joined if recipe.start else load)(name, device, folder)
    features = None
    if recipe.uses_features and not brief:
        features, _ = load("lorenz63-features", device, folder)
    if samples is not None:
        checks.count("samples", samples)
    return recipe.measure(model, samples or recipe.samples, features, brief)
