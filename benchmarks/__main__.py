"""``python -m benchmarks [NAME …] [--json PATH]``: print the table."""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import scipy
import torch

from benchmarks import assimilate, data, events, generate, train, twin
from benchmarks.timing import Row

NAMES = ("data", "train", "generate", "twin", "assimilate", "events", "steps")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--json", type=Path, help="store the results there as well")
    parser.add_argument("--threads", type=int, help="of PyTorch, for both sides (default: its own)")
    parser.add_argument(
        "--samples", type=int, default=2**15, help="generated states scored (F24 used 2**20)"
    )
    parser.add_argument("--folder", type=Path, help="where the weights lie (default: package)")
    parser.add_argument("--small", action="store_true", help="only try the code, in seconds")
    parser.add_argument(
        "--dapper", action="store_true", help=f"install {data.DAPPER_VERSION} in {data.DAPPER}"
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"unknown benchmarks {sorted(unknown)}; there are {', '.join(NAMES)}")
    return options


def measured(options: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows of the benchmarks that are wanted."""
    benchmarks: dict[str, Callable[[], Iterator[Row]]] = {
        "data": lambda: data.rows(options.small),
        "train": lambda: train.rows(options.small),
        "generate": lambda: generate.rows(options.small, options.samples, options.folder),
        "twin": lambda: twin.rows(options.small, options.folder),
        "assimilate": lambda: assimilate.rows(options.small, options.folder),
        "events": lambda: events.rows(options.small, options.folder),
        "steps": lambda: events.counted(options.small, options.folder),
    }
    for name in NAMES:
        if not options.names or name in options.names:
            yield from benchmarks[name]()


def number(value: float | None) -> str:
    """Return a number of three digits, in full."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def line(row: Row) -> str:
    """Return a row of the table."""
    ratio = "–" if row.ratio is None else number(row.ratio)
    if row.low is not None:
        ratio += f" ({number(row.low)}–{number(row.high)})"
    cells = (number(row.ours), number(row.baseline))
    aim = "–" if row.aim is None else f"≥ {row.aim:g}"
    return f"{row.quantity:70} {cells[0]:>10} {cells[1]:>10} {row.unit:13} {ratio:>22} {aim:>6}"


def record(rows: list[Row]) -> dict:
    """Return what a stored result holds."""
    return {
        "command": "python -m benchmarks " + shlex.join(sys.argv[1:]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "device": f"{processor()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "scipy": scipy.__version__,
        },
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def processor() -> str:
    """Return the processor's name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for entry in cpuinfo.read_text().splitlines():
            if entry.startswith("model name"):
                return entry.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main(arguments: list[str] | None = None) -> None:
    """Measure, print each row when it is there, and store all."""
    options = parse(arguments)
    if options.dapper:
        data.install_dapper()
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"PyTorch threads: {torch.get_num_threads()} on both sides.  {processor()}")
    print("ratio: median (smallest–largest) of alternating repeats; above 1 ours is better\n")
    head = (
        f"{'quantity: baseline':70} {'ours':>10} {'baseline':>10} {'':13} {'ratio':>22} {'aim':>6}"
    )
    print(head + "\n" + "-" * len(head))
    rows = []
    for row in measured(options):
        rows.append(row)
        print(line(row) + (f"\n    {row.note}" if row.note else ""), flush=True)
    if options.json:
        options.json.write_text(json.dumps(record(rows), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
