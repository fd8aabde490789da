"""How ``pytest --nbval book/`` executes the chapters and compares their outputs.

nbval compares texts letter by letter.  Here floats are compared to a tolerance (see
``tools/tolerance.py``), and a trailing semicolon silences a cell as it does in a notebook.  nbval
has no setting for either, so two of its methods are wrapped; its version is pinned for that.
"""

import os
import sys
from pathlib import Path

import pytest
from nbval.kernel import RunningKernel
from nbval.plugin import IPyNbCell

BOOK = Path(__file__).resolve().parent
sys.path.insert(0, str(BOOK / "tools"))

from chapters import ENVIRONMENT  # noqa: E402
from tolerance import ToleratedText, tolerances  # noqa: E402

os.environ.update(ENVIRONMENT)
# Kernels run in book/, and read this even where the library is not installed.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(BOOK.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
)

_sanitize = IPyNbCell.sanitize


def _sanitize_with_tolerance(cell, value):
    value = _sanitize(cell, value)
    if isinstance(value, str):
        value = ToleratedText(value)
        value.rtol, value.atol = cell.tolerances
    return value


def _execute_as_notebooks_do(kernel, cell_input, allow_stdin=None):
    return kernel.kc.execute(
        cell_input, store_history=True, allow_stdin=allow_stdin, stop_on_error=False
    )


IPyNbCell.sanitize = _sanitize_with_tolerance
RunningKernel.execute_cell_input = _execute_as_notebooks_do


def pytest_itemcollected(item):
    if isinstance(item, IPyNbCell):
        try:
            item.tolerances = tolerances(item.cell.metadata.get("tags", []))
        except ValueError as error:
            raise pytest.UsageError(f"{item.nodeid}: {error}") from None
