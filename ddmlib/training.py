"""Training: a loop that yields progress records, weight averages, checkpoints that resume exactly.

`fit` is a generator: the caller iterates over it, and logs, plots or stops as it likes::

    loss = training.denoising_batches(denoiser, data, batch=2048, groups=64)
    for progress in training.fit(denoiser, loss, steps=10_000, generator=g):
        print(progress.step, progress.loss)

Checkpoints are safetensors files (no pickle), written beside their target and moved into place, so
a kill at any moment leaves the previous one whole.
"""

import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ddmlib import checks, muon, noise
from ddmlib.denoisers import NetworkDenoiser, denoising_loss

Loss = Callable[[torch.Generator], Tensor]


class Progress(NamedTuple):
    """What `fit` reports: the step, the mean loss since the last report, the rate, and the seconds
    of training so far, those before a resumption included."""

    step: int
    loss: float
    lr: float
    samples_per_second: float
    seconds: float


class Average:
    """Exponential moving average of a module's parameters, in a copy of the module.

    The decay is min(decay, (1 + n)/(10 + n)) in update n, so the first steps are soon forgotten.

    Parameters
    ----------
    module : Module
        Copied at once; the copy is `Average.module`.
    decay : float
        Weight of the past in each update, in [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.module = copy.deepcopy(module).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move the average towards the parameters of ``module`` after step number ``step``."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        ours: list[Tensor] = list(self.module.parameters())
        theirs: list[Tensor] = list(module.parameters())
        torch._foreach_lerp_(ours, theirs, weight)  # one call for all parameters


def learning_rate(step: int, steps: int, peak: float, kind: str, warmup: int) -> float:
    """Return the learning rate of step 0 … steps - 1: a linear warm-up, then ``kind``."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if kind == "cosine":
        return peak * (1 + math.cos(math.pi * done)) / 2
    return peak * (1 - done) if kind == "linear" else peak


def denoising_batches(
    denoiser: NetworkDenoiser,
    data: Tensor,
    *,
    batch: int,
    groups: int,
    levels: int | None = None,
    window: int | None = None,
) -> Loss:
    """Return a loss that draws a batch of states, noise levels and noise, for `fit`.

    The states of a batch share noise levels in ``groups``: FiLM is then computed once a group
    instead of once a state, and stratified levels (one uniform draw in each of ``groups`` equal
    parts of [0, 1]) lower the variance of the loss.  Each state still meets every level equally
    often.

    Parameters
    ----------
    denoiser : NetworkDenoiser
    data : Tensor of shape (n, d), or (n, length, d) with ``window``
        Clean states or trajectories in standardised units, on the denoiser's device.
    batch, groups : int
        States and noise levels a step; ``groups`` divides ``batch``.
    levels : int, optional
        Draw pseudo-times from {1, …, levels}/levels (F24: 1000) instead of the whole interval.
    window : int, optional
        Draw windows of that many states, at random places of random trajectories.

    Returns
    -------
    Callable taking a generator, returning a scalar tensor.
    """
    checks.last_axis("data", checks.finite("data", data), len(denoiser.standardizer.mean))
    checks.count("groups", groups)
    checks.count("levels", 1 if levels is None else levels)
    shape = "(n, d)" if window is None else f"(n, length, d) with length >= {window}"
    if data.ndim != 2 + (window is not None) or data.shape[-2] < (window or 1) or not len(data):
        raise ValueError(f"data must have shape {shape} and n > 0, got {tuple(data.shape)}")
    if checks.count("batch", batch) % groups:
        raise ValueError(f"batch must be a multiple of groups, got {batch} and {groups}")
    strata = torch.arange(groups, device=data.device)[:, None]
    within = torch.arange(0 if window is None else checks.count("window", window)).to(strata)

    def loss(generator: torch.Generator) -> Tensor:
        on: dict[str, Any] = {"generator": generator, "device": generator.device}
        index = torch.randint(len(data), (groups, batch // groups), **on).to(data.device)
        t = (strata + torch.rand(groups, 1, **on).to(data.device)) / groups
        t = t if levels is None else torch.ceil(t * levels).clamp(min=1) / levels
        if window is None:
            x_0 = data[index]
        else:
            start = torch.randint(data.shape[1] - window + 1, index.shape, **on).to(data.device)
            x_0 = data[index[..., None], start[..., None] + within]  # (groups, each, window, d)
        return denoising_loss(denoiser, x_0, t, noise.normal_like(x_0, generator))

    return loss


def fit(
    module: nn.Module,
    loss: Loss,
    *,
    steps: int,
    generator: torch.Generator,
    lr: float = 1e-3,
    lr_schedule: str = "cosine",
    warmup: int = 0,
    weight_decay: float = 0.0,
    clip: float | None = None,
    kernel_lr: float | None = None,
    average: Average | None = None,
    samples_per_step: int = 0,
    report_every: int = 100,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int = 1000,
) -> Iterator[Progress]:
    """Minimise ``loss`` over the parameters of ``module`` with AdamW; yield progress records.

    Parameters
    ----------
    module : Module
        Trained in place.
    loss : callable
        Takes ``generator``, returns a scalar tensor; all its randomness comes from the generator.
    steps : int
        Optimiser steps in all, those before a resumption included.
    generator : torch.Generator
        Source of all randomness; its state is part of a checkpoint.
    lr, lr_schedule, warmup, weight_decay
        Peak learning rate, its decline ("cosine", "linear", "constant"), linear warm-up in steps,
        and decoupled weight decay.
    clip : float, optional
        Largest norm of a gradient; longer ones are shortened to it.
    kernel_lr : float, optional
        Peak learning rate of `muon.Muon`, which then trains the `muon.hidden_kernels`;
        it declines as ``lr`` does.  Default: AdamW trains everything.
    average : Average, optional
        Updated after each step.
    samples_per_step : int
        Only for the reported rate.
    report_every : int
        Steps between two records; a last one always comes at the end.
    checkpoint : path, optional
        Written every ``checkpoint_every`` steps and at the end; if the file exists, training goes
        on from it, bit for bit as if it had never stopped (same machine, same settings).

    Yields
    ------
    Progress

    Raises
    ------
    ValueError
        On bad settings, or a checkpoint of another run.
    RuntimeError
        When the loss is not finite any more; the checkpoint on disk stays as it was.
    """
    checks.count("steps", steps)
    checks.positive("lr", lr)
    checks.count("warmup", warmup, 0)
    if clip is not None:
        checks.positive("clip", clip)
    checks.choice("lr_schedule", lr_schedule, ("cosine", "linear", "constant"))
    checks.count("report_every", report_every)
    checks.count("checkpoint_every", checkpoint_every)
    peaks, optimisers = muon.optimisers(module, lr, weight_decay, kernel_lr)
    run = {"steps": steps, "lr": lr, "lr_schedule": lr_schedule, "warmup": warmup}
    run |= {"weight_decay": weight_decay, "clip": clip, "decay": average.decay if average else None}
    run |= {"kernel_lr": kernel_lr}
    done, spent = 0, 0.0
    if checkpoint is not None and Path(checkpoint).exists():
        done, spent = load_checkpoint(checkpoint, module, optimisers, average, generator, run)
    since, start, total = done, time.perf_counter(), None
    begun = start - spent
    for step in range(done, steps):
        for peak, optimiser in zip(peaks, optimisers, strict=True):
            rate = learning_rate(step, steps, peak, lr_schedule, warmup)
            optimiser.param_groups[0]["lr"] = rate
            optimiser.zero_grad(set_to_none=True)
        rate = learning_rate(step, steps, lr, lr_schedule, warmup)
        value = loss(generator)
        value.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        for optimiser in optimisers:
            optimiser.step()
        if average is not None:
            average.update(module, step)
        total = value.detach() if total is None else total + value.detach()
        last = step + 1 == steps
        if last or (step + 1) % report_every == 0 or (step + 1) % checkpoint_every == 0:
            mean = float(total) / (step + 1 - since)  # the only synchronisation with a GPU
            if not math.isfinite(mean):
                raise RuntimeError(f"the loss is not finite at step {step + 1}; lower lr={lr}?")
            if checkpoint is not None and (last or (step + 1) % checkpoint_every == 0):
                spent = time.perf_counter() - begun
                save_checkpoint(
                    checkpoint, module, optimisers, average, generator, run, step + 1, spent
                )
            if last or (step + 1) % report_every == 0:
                now = time.perf_counter()
                rate_of_samples = samples_per_step * (step + 1 - since) / (now - start)
                yield Progress(step + 1, mean, rate, rate_of_samples, now - begun)
                since, start, total = step + 1, time.perf_counter(), None


def save_tensors(path: str | os.PathLike, tensors: dict[str, Tensor], note: dict) -> None:
    """Write tensors and a JSON note to a safetensors file, atomically."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    try:
        with open(partial, "wb") as file:
            file.write(safetensors.torch.save(tensors, {"note": json.dumps(note)}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_tensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict]:
    """Read a file of `save_tensors`; a clear `RuntimeError` if it is truncated or foreign."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            note = json.loads((file.metadata() or {}).get("note", "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise RuntimeError(f"{path} is truncated or no safetensors file: {error}") from error
    except json.JSONDecodeError:
        note = None
    if not isinstance(note, dict):
        raise RuntimeError(f"{path} was not written by ddmlib (it has no note)")
    return tensors, note


def assign(module: nn.Module, tensors: dict[str, Tensor], source: str | os.PathLike) -> None:
    """Copy tensors into the parameters of ``module``; names and shapes must agree exactly.

    Raises
    ------
    RuntimeError
        Naming the first tensors that are missing, unknown or of the wrong shape.
    """
    state = module.state_dict()
    missing, unknown = sorted(state.keys() - tensors.keys()), sorted(tensors.keys() - state.keys())
    wrong = [k for k in state.keys() & tensors.keys() if state[k].shape != tensors[k].shape]
    if missing or unknown or wrong:
        raise RuntimeError(
            f"{source} does not fit the network: missing {missing[:3]}, unknown {unknown[:3]}, "
            f"wrong shape {sorted(wrong)[:3]}"
        )
    module.load_state_dict(tensors)


def save_checkpoint(
    path: str | os.PathLike,
    module: nn.Module,
    optimisers: list[torch.optim.Optimizer],
    average: Average | None,
    generator: torch.Generator,
    run: dict,
    step: int,
    seconds: float = 0.0,
) -> None:
    """Write all that `fit` needs to go on: parameters, average, optimiser and generator."""
    tensors = {f"module.{k}": v for k, v in module.state_dict().items()}
    if average is not None:
        tensors |= {f"average.{k}": v for k, v in average.module.state_dict().items()}
    for i, optimiser in enumerate(optimisers):
        for number, state in optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{i}.{number}.{k}": v for k, v in state.items()}
    tensors["generator"] = generator.get_state()
    save_tensors(path, tensors, {"run": run, "step": step, "seconds": seconds})


def load_checkpoint(
    path: str | os.PathLike,
    module: nn.Module,
    optimisers: list[torch.optim.Optimizer],
    average: Average | None,
    generator: torch.Generator,
    run: dict,
) -> tuple[int, float]:
    """Restore what `save_checkpoint` wrote; return step and seconds.  No change on an error."""
    tensors, note = load_tensors(path)
    if note.get("run") != run:
        raise ValueError(f"{path} is a checkpoint of other settings: {note.get('run')}, not {run}")
    parts: dict[str, dict[str, Tensor]] = {"module": {}, "average": {}, "optimiser": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if part in parts:
            parts[part][rest] = tensor
    if not parts["optimiser"] or "generator" not in tensors:
        raise RuntimeError(f"{path} is no checkpoint: its optimiser or generator is missing")
    if average is not None:
        assign(copy.deepcopy(average.module), parts["average"], path)  # a trial before any change
    assign(module, parts["module"], path)
    if average is not None:
        assign(average.module, parts["average"], path)
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimisers]
    for name, tensor in parts["optimiser"].items():
        i, number, rest = name.split(".", 2)
        states[int(i)].setdefault(int(number), {})[rest] = tensor
    for optimiser, state in zip(optimisers, states, strict=True):
        groups = optimiser.state_dict()["param_groups"]
        optimiser.load_state_dict({"state": state, "param_groups": groups})
    generator.set_state(tensors["generator"])
    return int(note["step"]), float(note.get("seconds", 0.0))
