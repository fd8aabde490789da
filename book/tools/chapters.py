"""Execute the chapters: ``book/text/NN-name.md`` becomes ``book/NN-name.ipynb``, outputs included.

The text is the source.  Its notebook is what readers, Colab and ``pytest --nbval`` open, so it is
stored executed.  A chapter is executed again when something its outputs depend on has changed: its
code cells, the modules of ``ddmlib`` it imports (directly or through others), the weights and the
stored results it names.  The notebook's metadata keeps a fingerprint of these.  A change of prose
alone is copied across without executing.
"""

import argparse
import ast
import hashlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jupytext
import nbformat
import yaml
from IPython.core.inputtransformer2 import TransformerManager
from jupytext.config import load_jupytext_configuration_file
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal, DeadKernelError
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = Path(__file__).with_name("setup-cell.txt")
SETUP_CELL = re.compile(r"(```\{code-cell\} ipython3\n:tags: \[setup\b.*\]\n\n)[^`]*(```\n)")
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
    "accelerator": "GPU",  # asks Colab for one
    "colab": {"gpuType": "T4"},
}
# Outputs are stored under the conditions in which nbval executes them again (book/conftest.py).
ENVIRONMENT = {"TQDM_DISABLE": "1", "DDMLIB_BUDGET": "default"}
MACHINE_PATH = re.compile(r"(?<![\w./:<])/[\w.-]+/[\w.-]+|\b[A-Z]:\\\\?\w")
ADDRESS = re.compile(r" at 0x[0-9a-f]{6,}")


# ---- texts and notebooks


def texts(root: Path = ROOT) -> list[Path]:
    """Return the chapters' sources in order."""
    return sorted((root / "book" / "text").glob("[0-9][0-9]-*.md"))


def notebook_path(text: Path) -> Path:
    """Return where the executed notebook of a text is stored."""
    return text.parents[1] / f"{text.stem}.ipynb"


def repository_url(root: Path = ROOT) -> str:
    """Return the address of the repository, which ``_config.yml`` alone states."""
    return yaml.safe_load((root / "_config.yml").read_text("utf-8"))["repository"]["url"]


def setup_cell(root: Path = ROOT) -> str:
    """Return the code of the set-up cell, the same in every chapter."""
    return TEMPLATE.read_text("utf-8").replace("{repository}", repository_url(root)).rstrip("\n")


def synchronise_setup_cell(text: Path, code: str) -> bool:
    """Write ``code`` into the set-up cell of a text; say whether that changed it."""
    old = text.read_text("utf-8")
    new, count = SETUP_CELL.subn(lambda m: f"{m[1]}{code}\n{m[2]}", old)
    if count != 1:
        raise ValueError(
            f"{text.name}: expected one set-up cell (```{{code-cell}} ipython3, "
            f":tags: [setup, hide-input], an empty line), found {count}"
        )
    if new != old:
        _write(text, new)
    return new != old


def read_text(text: Path, root: Path = ROOT) -> NotebookNode:
    """Return a text as a notebook without outputs, with the metadata that is stored."""
    config = load_jupytext_configuration_file(str(root / "pyproject.toml"))
    notebook = jupytext.read(text, fmt="md:myst", config=config)
    notebook.metadata = nbformat.from_dict(METADATA)
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i:03d}"  # random ones would change on each run
    return notebook


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Return the code cells of a notebook."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def contents(notebook: NotebookNode) -> list[tuple]:
    """Return what a text and its notebook have in common: the cells without their outputs."""
    return [(cell.cell_type, cell.source, cell.metadata) for cell in notebook.cells]


def problems(notebook: NotebookNode) -> Iterator[str]:
    """Yield what must not stand in a stored notebook: unexecuted cells, errors, warnings, paths."""
    for i, cell in enumerate(code_cells(notebook)):
        if cell.execution_count is None:
            yield f"code cell {i} has not been executed"
        for output in cell.outputs:
            if output.output_type == "error":
                yield f"code cell {i} raised {output.ename}: {output.evalue}"
            if output.get("name") == "stderr":
                yield f"code cell {i} wrote to stderr: {output.text.strip()}"
            for kind, text in output_texts(output):
                if re.search(r"Warning\b", text):
                    yield f"code cell {i} shows a warning in its {kind}"
                if MACHINE_PATH.search(text):
                    yield f"code cell {i} shows a path of this machine in its {kind}"
                if ADDRESS.search(text):
                    yield f"code cell {i} shows a memory address in its {kind}"


def output_texts(output: NotebookNode) -> Iterator[tuple[str, str]]:
    """Yield the textual parts of an output as (kind, text)."""
    if output.output_type == "stream":
        yield output.name, output.text
    for kind, value in output.get("data", {}).items():
        if isinstance(value, str) and kind not in ("image/png", "image/jpeg"):
            yield kind, value


# ---- what the outputs depend on


def imported_modules(source: str, package: str = "ddmlib", inside: str | None = None) -> set[str]:
    """Return the dotted names below ``package`` that Python source imports.

    ``inside`` is the dotted name of the package that holds the source; relative imports need it.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level and inside:
                parents = inside.split(".")[: len(inside.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == package}


def module_file(name: str, root: Path = ROOT) -> Path | None:
    """Return the file of a dotted module name, or None when it names something inside a module."""
    base = root.joinpath(*name.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


def library_files(source: str, root: Path = ROOT) -> set[Path]:
    """Return the files of ``ddmlib`` that Python source imports, directly or through others."""
    found: set[Path] = set()
    todo = imported_modules(source)
    while todo:
        name = todo.pop()
        path = module_file(name, root)
        if path is None or path in found:
            continue
        found.add(path)
        inside = name if path.name == "__init__.py" else name.rpartition(".")[0]
        todo |= imported_modules(path.read_text("utf-8"), inside=inside)
    return found


def data_files(source: str, root: Path = ROOT) -> set[Path]:
    """Return the style sheet, and the weights, cards and stored results that the source names.

    The start of a name counts, so that f"lorenz63-{head}" names all that begin with lorenz63-.
    """
    strings = (
        node.value.split("/")[-1]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    starts = tuple(string for string in strings if len(string) > 3)
    weights, results = root / "ddmlib" / "weights", root / "book" / "results"
    files = [*weights.glob("*.*"), *results.glob("*.json")]
    named = {path for path in files if path.name.startswith(starts)}
    return named | {root / "ddmlib" / "book.mplstyle"}


def fingerprint(notebook: NotebookNode, root: Path = ROOT) -> dict[str, str]:
    """Return digests of what the outputs of a chapter depend on."""
    to_python = TransformerManager().transform_cell  # magics are not Python
    code = [cell.source for cell in code_cells(notebook)]
    source = "\n".join(to_python(cell) for cell in code)

    def digest(parts: list[bytes]) -> str:
        return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]

    def of_files(paths: set[Path]) -> str:
        named = sorted((path.relative_to(root).as_posix(), path) for path in paths)
        return digest([part for name, path in named for part in (name.encode(), path.read_bytes())])

    return {
        "code": digest([cell.encode() for cell in code]),
        "library": of_files(library_files(source, root)),
        "data": of_files(data_files(source, root)),
    }


def stale(text: Path, root: Path = ROOT) -> list[str]:
    """Return why the stored outputs of a chapter are not those of its present source."""
    stored = notebook_path(text)
    if not stored.exists():
        return ["never executed"]
    old = nbformat.read(stored, as_version=4)
    marks = old.metadata.get("ddm", {})
    now = fingerprint(read_text(text, root), root)
    return [f"{part} changed" for part in now if marks.get(part) != now[part]]


# ---- executing and storing


def execute(notebook: NotebookNode, folder: Path) -> int:
    """Execute a notebook in place and return the peak memory of its kernel in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    probe = f"import resource as r; r.getrusage(r.RUSAGE_SELF).ru_maxrss * {unit}"
    notebook.cells.append(nbformat.v4.new_code_cell(probe))
    client = NotebookClient(
        notebook,
        timeout=900,
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],  # kernels warn about their own transport
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    return int(notebook.cells.pop().outputs[0].data["text/plain"])


def store(notebook: NotebookNode, path: Path) -> None:
    """Write a notebook with nothing in it that differs from run to run."""
    notebook.metadata = nbformat.from_dict(METADATA | {"ddm": notebook.metadata["ddm"]})
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    nbformat.validate(notebook)
    _write(path, nbformat.writes(notebook) + "\n")


def _write(path: Path, content: str) -> None:
    """Replace a file in one go, so that an interruption leaves the old one."""
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=".", delete=False, encoding="utf-8"
    ) as file:
        file.write(content)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def update(text: Path, root: Path = ROOT, *, force: bool = False) -> str:
    """Bring the notebook of a text up to date and say in a line what was done."""
    path = notebook_path(text)
    new = read_text(text, root)
    marks = fingerprint(new, root)
    why = stale(text, root) or (["forced"] if force else [])
    if why:
        start = time.perf_counter()
        memory = execute(new, path.parent)
        seconds = time.perf_counter() - start
        if found := list(problems(new)):
            raise ValueError("not stored: " + "; ".join(found))
        done = f"executed in {seconds:.1f} s, peak memory {memory / 1e9:.2f} GB ({', '.join(why)})"
    else:
        old = nbformat.read(path, as_version=4)
        for fresh, kept in zip(code_cells(new), code_cells(old), strict=True):
            fresh.outputs, fresh.execution_count = kept.outputs, kept.execution_count
        if contents(new) == contents(old):
            return "up to date"
        done = "prose updated"
    new.metadata["ddm"] = marks
    store(new, path)
    return done


def main() -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chapter", help="only this one: its number or the start of its name")
    parser.add_argument("--check", action="store_true", help="say what is stale; write nothing")
    parser.add_argument("--force", action="store_true", help="execute even what is up to date")
    parser.add_argument(
        "--setup-cells", action="store_true", help="only write the set-up cell into every text"
    )
    options = parser.parse_args()

    chosen = [text for text in texts() if text.name.startswith(options.chapter or "")]
    if not chosen:
        parser.error(f"no chapter in book/text begins with {options.chapter!r}")
    os.environ.update(ENVIRONMENT)
    os.environ["PYTHONPATH"] = str(ROOT)  # kernels run in book/

    failed = False
    for text in chosen:
        try:
            if options.check:
                why = stale(text)
                failed |= bool(why)
                done = ", ".join(why) or "up to date"
            elif synchronise_setup_cell(text, setup_cell()) and options.setup_cells:
                done = "set-up cell updated"
            else:
                done = "up to date" if options.setup_cells else update(text, force=options.force)
        except (CellControlSignal, DeadKernelError, SyntaxError, ValueError) as error:
            failed = True
            done = f"FAILED, the stored notebook is as it was\n{error}"
        print(f"{text.stem}: {done}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
