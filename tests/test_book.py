"""The chapters are stored as they should be, and what stores and compares them works."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import chapters
import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from plain_docstrings import escape, escape_docstring
from tolerance import LOOSEST, NUMBER, agrees, is_float, tolerances

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "book"
TEXTS = chapters.texts()
TAGS = {"setup", "hide-input", "hide-output", "hide-cell", "remove-input", "full-width"}
MAX_LINES, MAX_BYTES = 25, 1_500_000
PIXEL = (  # a picture of one pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)

each_chapter = pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.stem)


def stored(text: Path) -> nbformat.NotebookNode:
    return nbformat.read(chapters.notebook_path(text), as_version=4)


def has_picture(output: nbformat.NotebookNode) -> bool:
    return any(kind.startswith("image/") for kind in output.get("data", {}))


# ---- the chapters


def test_texts_and_notebooks_pair_up():
    assert TEXTS
    assert {chapters.notebook_path(text) for text in TEXTS} == set(BOOK.glob("*.ipynb"))


@each_chapter
def test_chapter_is_in_the_table_of_contents(text):
    assert f"file: book/{text.stem}\n" in (ROOT / "_toc.yml").read_text("utf-8")


@each_chapter
def test_chapter_is_executed_without_errors_warnings_or_paths(text):
    assert list(chapters.problems(stored(text))) == []


@each_chapter
def test_text_and_notebook_agree(text):
    assert chapters.contents(chapters.read_text(text)) == chapters.contents(stored(text))


@each_chapter
def test_outputs_are_of_the_present_code_library_and_weights(text):
    assert chapters.stale(text) == [], "run `make chapters`"


@each_chapter
def test_set_up_cell_is_the_shared_one(text):
    first, *others = chapters.code_cells(stored(text))
    assert first.source == chapters.setup_cell(), "run `make setup-cells`"
    assert "setup" in first.metadata.tags
    assert not any("setup" in cell.metadata.get("tags", []) for cell in others)


@each_chapter
def test_notebook_is_small(text):
    assert chapters.notebook_path(text).stat().st_size < MAX_BYTES


@each_chapter
def test_code_cells_are_short(text):
    for cell in chapters.code_cells(stored(text)):
        assert len(cell.source.splitlines()) <= MAX_LINES, cell.source


@each_chapter
def test_no_cell_escapes_the_comparison(text):
    for cell in chapters.code_cells(stored(text)):
        tags = [tag for tag in cell.metadata.get("tags", []) if tag not in TAGS]
        assert all(tag.startswith(("nbval-rtol=", "nbval-atol=")) for tag in tags), tags
        assert not re.search(r"#\s*(NBVAL|PYTEST_VALIDATE)_", cell.source)


@each_chapter
def test_chapter_checks_itself_and_ends_with_exercises_and_references(text):
    headings, checked = [], False
    for cell in stored(text).cells:
        if cell.cell_type == "markdown":
            headings += re.findall(r"^##+ .*$", cell.source, re.MULTILINE)
        elif headings and re.search(r"\bCheck", headings[-1]):
            checked |= bool(re.search(r"^\s*assert\b", cell.source, re.MULTILINE))
    assert checked, "expected a code cell with an assertion under a heading with the word Check"
    sections = [heading for heading in headings if heading.startswith("## ")]
    assert sections[-2:] == ["## Exercises", "## References"]


@each_chapter
def test_pictures_have_caption_name_and_alternative_text(text):
    for cell in chapters.code_cells(stored(text)):
        pictures = sum(map(has_picture, cell.outputs))
        options = cell.metadata.get("mystnb", {})
        assert pictures == ("figure" in options), f"one captioned picture a cell:\n{cell.source}"
        if pictures:
            assert options.figure.caption.strip()
            assert options.figure.name.startswith("fig-")
            assert options.image.alt.strip()


def test_names_of_figures_are_unique():
    cells = [cell for text in TEXTS for cell in chapters.code_cells(stored(text))]
    figures = [cell.metadata.get("mystnb", {}).get("figure", {}) for cell in cells]
    names = [figure.name for figure in figures if figure]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("page", [*BOOK.glob("*.md"), *TEXTS], ids=lambda page: page.stem)
def test_pictures_in_prose_have_alternative_text(page):
    prose = page.read_text("utf-8")
    assert "![](" not in prose
    for block in re.findall(r"[`:]{3,}\{(?:figure|image)\}.*?[`:]{3,}\n", prose, re.DOTALL):
        assert re.search(r"^:?alt: \S", block, re.MULTILINE), block


def test_every_cited_work_is_in_the_bibliography():
    known = set(re.findall(r"^@\w+\{(\S+),", (BOOK / "references.bib").read_text("utf-8"), re.M))
    for page in [*BOOK.glob("*.md"), *TEXTS]:
        for keys in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", page.read_text("utf-8")):
            assert set(keys.replace(" ", "").split(",")) <= known, page.name


# ---- the tolerance


def falsified(number: str) -> str:
    """Return a number 20 % off; a zero one unit of its last digit off."""
    if not is_float(number):
        return str(int(number) + max(1, round(0.2 * abs(int(number)))))
    if float(number):
        return repr(1.2 * float(number))
    digits = len(number.partition(".")[2].partition("e")[0])
    return f"{10.0**-digits:.{max(digits, 1)}f}"


def missed(text: str, tags: list[str]) -> list[str]:
    """Return the numbers of a stored text whose falsification goes unnoticed."""
    return [
        match[0]
        for match in NUMBER.finditer(text)
        if agrees(
            text,
            text[: match.start()] + falsified(match[0]) + text[match.end() :],
            *tolerances(tags),
        )
    ]


@each_chapter
def test_every_falsified_number_is_caught(text):
    numbers = 0
    for cell in chapters.code_cells(stored(text)):
        for output in cell.outputs:
            for kind, content in chapters.output_texts(output):
                numbers += len(NUMBER.findall(content))
                assert missed(content, cell.metadata.get("tags", [])) == [], f"{kind}: {content}"
    assert numbers > 0


@pytest.mark.parametrize(
    ("stored_text", "fresh_text", "same"),
    [
        ("x = 1.0", "x = 1.000000001", True),
        ("x = 1.0", "x = 1.001", False),
        ("x = -1.0", "x = 1.0", False),
        ("x = 1.5e-3", "x = 0.0015", True),
        ("of 16384 states", "of 16385 states", False),
        ("3", "3.0", False),
        ("Lorenz63: 2.0", "Lorenz64: 2.0", False),
        ("version 2.13.0", "version 2.13.1", False),
        ("a  0.50\nb", "a 0.50 b", True),
        ("0.5 0.6", "0.5", False),
        ("nan", "0.0", False),
        ("0.00", "0.01", False),
        ("ends in 3.", "ends in 4.", False),
    ],
)
def test_agreement(stored_text, fresh_text, same):
    assert agrees(stored_text, fresh_text) is same


def test_tags_loosen_within_bounds():
    assert not agrees("0.50", "0.51", *tolerances([]))
    assert agrees("0.50", "0.51", *tolerances(["hide-input", "nbval-rtol=0.05"]))
    assert agrees("0.00", "0.01", *tolerances(["nbval-atol=0.02"]))
    assert not agrees("100", "101", *tolerances(["nbval-rtol=0.1"])), "integers are exact"
    for tag in (
        f"nbval-rtol={1.01 * LOOSEST}",
        "nbval-atol=0.2",
        "nbval-rtol=-1",
        "nbval-rtol=nan",
    ):
        with pytest.raises(ValueError, match="lies between"):
            tolerances([tag])
    with pytest.raises(ValueError, match="expected a number"):
        tolerances(["nbval-rtol=wide"])


def test_falsification_sees_a_tolerance_that_hides_a_number():
    assert missed("0.02 and 5 and 0.00 and -1.5e-3", []) == []
    assert missed("mean 0.02", ["nbval-atol=0.01"]) == ["0.02"]


def copy_machinery(root: Path) -> None:
    """Make a book without chapters."""
    shutil.copytree(BOOK / "tools", root / "book" / "tools")
    (root / "book" / "text").mkdir()
    shutil.copy(BOOK / "conftest.py", root / "book")
    shutil.copy(ROOT / "pyproject.toml", root)
    shutil.copy(ROOT / "_config.yml", root)


def test_nbval_uses_the_tolerance(tmp_path):
    """One notebook, executed by nbval as the book's are: which of its cells pass?"""
    copy_machinery(tmp_path)
    cases = [  # code, what is stored, tags, passes
        ("print(1.0)", "1.000000001", [], True),
        ("print(1.0)", "1.001", [], False),
        ("print(1.0)", "1.001", ["nbval-rtol=0.01"], True),
        ("print(100)", "101", ["nbval-rtol=0.1"], False),
        ("40 + 2;", None, [], True),
        ("import os; print(os.environ['TQDM_DISABLE'])", "1", [], True),
    ]
    notebook = new_notebook(metadata=chapters.METADATA)
    for i, (code, text, tags, _) in enumerate(cases):
        outputs = [] if text is None else [new_output("stream", name="stdout", text=f"{text}\n")]
        notebook.cells.append(
            new_code_cell(code, execution_count=i + 1, outputs=outputs, metadata={"tags": tags})
        )
    path = tmp_path / "book" / "01-cases.ipynb"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbval",
        "-rA",
        "-p",
        "no:cacheprovider",
        str(path),
    ]

    nbformat.write(notebook, path)
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    for i, (code, _, tags, passes) in enumerate(cases):
        verdict = "PASSED" if passes else "FAILED"
        assert f"{verdict} book/01-cases.ipynb::Cell {i}" in run.stdout, (code, tags, run.stdout)

    notebook.cells[0].metadata.tags = ["nbval-rtol=0.2"]
    nbformat.write(notebook, path)
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode != 0
    assert "a tolerance lies between 0 and 0.1" in run.stdout + run.stderr


# ---- executing and storing


TEXT = """\
# A chapter

```{code-cell} ipython3
:tags: [setup, hide-input]

```

```{code-cell} ipython3
from ddmlib import low

f"weights-{low.VALUE}"
```
"""


@pytest.fixture
def little_book(tmp_path):
    """A book of one chapter with a library of two modules, one of which imports the other."""
    copy_machinery(tmp_path)
    for name, content in {
        "ddmlib/__init__.py": "",
        "ddmlib/low.py": "from .lower import VALUE\n",
        "ddmlib/lower.py": "VALUE = 1\n",
        "ddmlib/other.py": "",
        "ddmlib/book.mplstyle": "",
        "ddmlib/weights/weights-1.json": "{}",
        "ddmlib/weights/others.json": "{}",
        "book/text/01-little.md": TEXT,
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    return tmp_path


def run_tool(root: Path, *options: str) -> subprocess.CompletedProcess:
    tool = str(root / "book" / "tools" / "chapters.py")
    return subprocess.run([sys.executable, tool, *options], capture_output=True, text=True)


def test_chapters_are_executed_when_and_only_when_stale(little_book):
    text = little_book / "book" / "text" / "01-little.md"
    (little_book / "book" / "tools" / "setup-cell.txt").write_text("source = '{repository}'\n")
    assert "never executed" in run_tool(little_book, "--check").stdout
    first = run_tool(little_book)
    assert first.returncode == 0, first.stdout + first.stderr
    assert re.search(r"executed in [\d.]+ s, peak memory [\d.]+ GB", first.stdout)
    path = chapters.notebook_path(text)
    bytes_ = path.read_bytes()
    assert list(chapters.problems(stored(text))) == []
    assert run_tool(little_book).stdout == "01-little: up to date\n"
    assert path.read_bytes() == bytes_

    def changed(name: str) -> list[str]:
        file = little_book / name
        old = file.read_text()
        file.write_text(f"{old}\n")
        why = chapters.stale(text, little_book)
        file.write_text(old)
        return why

    assert changed("ddmlib/lower.py") == ["library changed"]
    assert changed("ddmlib/other.py") == []
    assert changed("ddmlib/weights/weights-1.json") == ["data changed"]
    assert changed("ddmlib/weights/others.json") == []

    # Prose alone is copied across with the outputs kept.
    text.write_text(text.read_text().replace("# A chapter", "# A better title"))
    assert run_tool(little_book).stdout == "01-little: prose updated\n"
    assert stored(text).cells[0].source == "# A better title"
    assert list(chapters.problems(stored(text))) == []

    # A cell that fails, or warns, leaves the stored notebook as it was.
    bytes_ = path.read_bytes()
    for code in ("1 / 0", "import warnings; warnings.warn('beware')", "("):
        text.write_text(text.read_text().replace('f"weights', f'{code}\nf"weights'))
        run = run_tool(little_book)
        assert run.returncode == 1
        assert "FAILED, the stored notebook is as it was" in run.stdout
        assert path.read_bytes() == bytes_
        text.write_text(text.read_text().replace(f"{code}\n", ""))


def test_the_repository_url_has_one_place(little_book):
    config, text = little_book / "_config.yml", little_book / "book" / "text" / "01-little.md"
    url = "https://github.com/someone/somewhere"
    config.write_text(config.read_text().replace(chapters.repository_url(ROOT), url))
    assert run_tool(little_book, "--setup-cells").stdout == "01-little: set-up cell updated\n"
    assert run_tool(little_book, "--setup-cells").stdout == "01-little: up to date\n"
    first = chapters.code_cells(chapters.read_text(text, little_book))[0]
    assert f'"git+{url}"' in first.source
    assert chapters.repository_url(ROOT) not in text.read_text()
    text.write_text(TEXT.replace("setup", "start"))
    assert "expected one set-up cell" in run_tool(little_book, "--setup-cells").stdout


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (new_output("stream", name="stderr", text="careful\n"), "stderr"),
        (new_output("stream", name="stdout", text="in /usr/lib/x.py\n"), "path of this machine"),
        (new_output("stream", name="stdout", text="UserWarning: no\n"), "warning"),
        (new_output("execute_result", {"text/plain": "<f at 0x7f12ab34>"}), "memory address"),
        (new_output("error", ename="KeyError", evalue="'a'"), "raised KeyError"),
        (new_output("stream", name="stdout", text="9/16 and 1/2/3, m/s\n"), None),
    ],
)
def test_problems_are_seen(output, expected):
    notebook = new_notebook(cells=[new_code_cell("x", execution_count=1, outputs=[output])])
    found = " ".join(chapters.problems(notebook))
    assert expected in found if expected else not found


def test_an_unexecuted_cell_is_seen():
    assert list(chapters.problems(new_notebook(cells=[new_code_cell("x")])))


# ---- the pages


@pytest.mark.parametrize(
    ("plain", "escaped"),
    [
        ("x : Tensor (*batch, d)", r"x : Tensor (\*batch, d)"),
        ("(*batch, d) -> (*batch, 3)", r"(\*batch, d) -> (\*batch, 3)"),
        ("E|X - Y| with *finite* samples, **bold**", r"E\|X - Y\| with *finite* samples, **bold**"),
        ("``(*batch, d)`` and `a|b`", "``(*batch, d)`` and `a|b`"),
        ("2 * 3 * 4", r"2 \* 3 \* 4"),
    ],
)
def test_docstrings_may_be_plain(plain, escaped):
    assert escape(plain) == escaped


def test_literal_blocks_of_docstrings_stay():
    lines = ["Use::", "", "    f(*x)", "", "a * b", ">>> f(*x)"]
    escape_docstring(None, "function", "f", None, {}, lines)
    assert lines == ["Use::", "", "    f(*x)", "", r"a \* b", ">>> f(*x)"]


def test_pages_have_local_maths_captions_alternative_text_and_links(tmp_path):
    """A book of two pages under the book's configuration, built with warnings as errors."""
    copy_machinery(tmp_path)
    shutil.copytree(BOOK / "_static", tmp_path / "book" / "_static")
    shutil.copy(BOOK / "references.bib", tmp_path / "book")
    (tmp_path / "_toc.yml").write_text(
        "format: jb-book\nroot: book/index\nchapters:\n- file: book/01-page\n"
    )
    (tmp_path / "book" / "index.md").write_text("# Index\n\n$a = b$\n")
    figure = {"caption": "A pixel, $x_t$.", "name": "fig-pixel"}
    picture = new_output("display_data", {"image/png": PIXEL})
    notebook = new_notebook(
        cells=[
            new_markdown_cell("# Page\n\nSee {numref}`fig-pixel`."),
            new_code_cell(
                "plot();",
                execution_count=1,
                outputs=[picture],
                metadata={"mystnb": {"figure": figure, "image": {"alt": "One pixel."}}},
            ),
        ],
        metadata=chapters.METADATA,
    )
    nbformat.write(notebook, tmp_path / "book" / "01-page.ipynb")
    jupyter_book = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
    run = subprocess.run(
        [*jupyter_book, "build", str(tmp_path), "-W", "-n", "--keep-going"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    html = (tmp_path / "_build" / "html" / "book" / "01-page.html").read_text("utf-8")

    repository = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))["repository"]
    path = repository["url"].removeprefix("https://github.com/")
    link = f"https://colab.research.google.com/github/{path}/blob/{repository['branch']}/book/"
    assert f"{link}01-page.ipynb" in html
    assert 'alt="One pixel."' in html
    assert '<span class="caption-text">A pixel' in html
    (script,) = re.findall(r'src="([^"]*mathjax[^"]*\.js[^"]*)"', html, re.IGNORECASE)
    assert not script.startswith("http")
    local = tmp_path / "_build" / "html" / "book" / script.partition("?")[0]
    assert local.is_file()
