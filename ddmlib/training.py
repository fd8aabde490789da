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

import torch
from torch import Tensor, nn

from ddmlib import checks, muon, noise
from ddmlib.checkpoints import assign as assign  # names of this module too
from ddmlib.checkpoints import load_checkpoint, save_checkpoint
from ddmlib.checkpoints import load_tensors as load_tensors
from ddmlib.checkpoints import save_tensors as save_tensors
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
        Draw windows of that many states, at random places of random trajectories; for a denoiser
        of trajectories.

    Returns
    -------
    Callable taking a generator, returning a scalar tensor.
    """
    checks.last_axis("data", checks.finite("data", data), len(denoiser.standardizer.mean))
    if denoiser.event == 2 and window is None:
        raise ValueError("window must be given: the denoiser is of trajectories")
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
    identity: dict[str, Any] | None = None,
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
    identity : dict, optional
        What else tells this run from others, as JSON knows it: data, network, seed.  It is stored
        in the checkpoint, and one of another run is refused.

    Yields
    ------
    Progress

    Raises
    ------
    ValueError
        On bad settings, or a checkpoint of another run.
    RuntimeError
        When the loss or a parameter is not finite any more; the checkpoint on disk stays as it was.
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
    run |= {"kernel_lr": kernel_lr, **json.loads(json.dumps({"identity": identity}))}
    done, spent = 0, 0.0
    if checkpoint is not None:
        Path(checkpoint).parent.mkdir(parents=True, exist_ok=True)
    if checkpoint is not None and Path(checkpoint).exists():
        done, spent = load_checkpoint(checkpoint, module, optimisers, average, generator, run)
    since, start, total = done, time.perf_counter(), None
    begun, advice = start - spent, f"lower lr={lr}?"
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
                raise RuntimeError(f"the loss is not finite at step {step + 1}; {advice}")
            if checkpoint is not None and (last or (step + 1) % checkpoint_every == 0):
                if not all(bool(torch.isfinite(p).all()) for p in module.parameters()):
                    raise RuntimeError(f"a parameter is not finite at step {step + 1}; {advice}")
                spent = time.perf_counter() - begun
                save_checkpoint(
                    checkpoint, module, optimisers, average, generator, run, step + 1, spent
                )
            if last or (step + 1) % report_every == 0:
                now = time.perf_counter()
                rate_of_samples = samples_per_step * (step + 1 - since) / (now - start)
                yield Progress(step + 1, mean, rate, rate_of_samples, now - begun)
                since, start, total = step + 1, time.perf_counter(), None
