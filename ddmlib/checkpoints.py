"""Files of tensors, safetensors with a JSON note, and the checkpoints of `training.fit`.

They are written atomically, hold no code, and are refused by name where they do not fit.
"""

import copy
import json
import os
from pathlib import Path
from typing import Protocol

import safetensors.torch
import torch
from torch import Tensor, nn


class Averaged(Protocol):
    """What a checkpoint asks of an average of parameters, `training.Average`."""

    module: nn.Module


def save_tensors(path: str | os.PathLike, tensors: dict[str, Tensor], note: dict) -> None:
    """Write tensors and a JSON note to a safetensors file, atomically."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    held = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    # weights that are shared, tied say, are written once for each name
    first: dict[int, str] = {}
    for k, v in held.items():
        if first.setdefault(v.untyped_storage().data_ptr(), k) != k:
            held[k] = v.clone()
    try:
        with open(partial, "wb") as file:
            file.write(safetensors.torch.save(held, {"note": json.dumps(note)}))
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
    average: Averaged | None,
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
    average: Averaged | None,
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
    # trials before any change
    if average is not None:
        assign(copy.deepcopy(average.module), parts["average"], path)
    try:
        torch.Generator(generator.device).set_state(tensors["generator"])
    except RuntimeError as error:
        raise RuntimeError(
            f"{path} holds a generator of another device than {generator.device}: {error}"
        ) from error
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
