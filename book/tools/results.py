"""The stored results of long runs: where they lie, how they are written, and what made them."""

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parents[1] / "results"


def load(path: Path) -> dict[str, Any]:
    """Return what is stored so far; nothing where there is no file."""
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def save(results: dict[str, Any], path: Path) -> None:
    """Write results atomically: a kill at any moment loses only what came last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)


def entry(path: Path, key: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the stored entry of that name to go on with, or a new one with these settings.

    Raises
    ------
    SystemExit
        If what is stored was made with other settings: numbers of both would stand side by side.
    """
    settings = json.loads(json.dumps(settings))  # tuples are lists in a file
    stored = load(path).get(key)
    if stored is None:
        return settings
    same(f"{key} in {path.name}", stored, settings)
    return stored


def same(name: str, stored: dict[str, Any], settings: dict[str, Any]) -> None:
    """Refuse to go on with what was made with other settings.

    Raises
    ------
    SystemExit
        Naming the entry and the settings that differ.
    """
    settings = json.loads(json.dumps(settings))
    other = [k for k, v in settings.items() if k not in stored or stored[k] != v]
    if other:
        raise SystemExit(
            f"error: {name} was made with other {', '.join(other)}: delete it to make it anew"
        )


def made(command: str) -> dict[str, str]:
    """Return what a result says of its making: the command, the date and the versions."""
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
