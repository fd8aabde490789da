"""The package's versions, files and imports stay consistent."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from chapters import imported_modules
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ddmlib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
MODULES = sorted((ROOT / "ddmlib").rglob("*.py"))

# A module imports only from levels below its own.  Packages count as one module.
LEVELS = [
    {"checks"},
    {"noise", "muon", "checkpoints"},
    {"dynamics", "oscillators", "schedules", "networks", "metrics"},
    {"datasets", "ensembles", "assimilation"},
    {"denoisers", "tails"},
    {"steps", "grids"},
    {"training", "targets", "sampling", "trajectories"},
    {"guidance"},
    {"smc", "likelihoods", "surrogates"},
    {"events"},
    {"recipes"},
    {"pretrained"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
# Within a package the order is the one written (the others have no order of their own yet).
ASSIMILATION = [
    "observations",
    "particle",
    "kalman",
    "ensemble",
    "variational",
    "perturbations",
    "methods",
    "cycling",
]
EVENTS = [
    "constraints",
    "arguments",
    "estimates",
    "guidance",
    "paths",
    "pilot",
    "logistic",
    "odds",
    "trust",
    "subset",
    "renewal",
    "probability",
    "published",
]
INNER = {"assimilation": ASSIMILATION, "events": EVENTS}
ALLOWED = {"torch", "numpy", "scipy", "safetensors", "tqdm", "ddmlib"} | sys.stdlib_module_names


def pins(lines: list[str]) -> dict[str, str]:
    """Return {name: version} of lines ``name==version``; anything else is an error."""
    found = {}
    for line in lines:
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", line)
        assert match, f"expected name==version, found {line!r}"
        found[canonicalize_name(match[1])] = match[2]
    return found


CONSTRAINTS = pins(
    [
        line
        for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
        if line and not line.startswith("#")
    ]
)


def direct() -> list[Requirement]:
    lines = [*PROJECT["project"]["dependencies"], *EXTRAS["book"], *EXTRAS["test"]]
    return [Requirement(line) for line in lines]


# ---- versions


def test_runtime_dependencies_are_few():
    names = {Requirement(line).name for line in PROJECT["project"]["dependencies"]}
    assert names == {"torch", "numpy", "scipy", "safetensors", "tqdm"}
    assert set(EXTRAS) == {"book", "test"}


@pytest.mark.parametrize("requirement", direct(), ids=str)
def test_constraints_satisfy_pyproject(requirement):
    assert CONSTRAINTS[canonicalize_name(requirement.name)] in requirement.specifier


def test_the_build_uses_the_constrained_setuptools():
    assert PROJECT["build-system"]["requires"] == [f"setuptools=={CONSTRAINTS['setuptools']}"]


def test_environment_has_the_same_versions():
    parts = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))["dependencies"]
    (wheels,) = [part["pip"] for part in parts if isinstance(part, dict)]
    options = [line for line in wheels if line.startswith("-")]
    assert options == ["-c constraints.txt", "-e ."]
    found = pins([line for line in wheels if not line.startswith("-")])
    wanted = [canonicalize_name(requirement.name) for requirement in direct()]
    assert found == {name: CONSTRAINTS[name] for name in wanted}


def test_constraints_are_complete():
    """Everything that is installed along with the direct dependencies has its version fixed."""
    todo, needed = direct(), {"setuptools": importlib.metadata.version("setuptools")}
    seen = set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        needed[name] = importlib.metadata.version(name).partition("+")[0]  # torch 2.x.y+cpu
        for line in importlib.metadata.requires(name) or []:
            new = Requirement(line)
            extras = requirement.extras or {""}
            if not new.marker or any(new.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(new)
    if any(CONSTRAINTS.get(name, version) != version for name, version in needed.items()):
        pytest.skip("this environment was not made from constraints.txt")
    # CUDA builds of PyTorch fix the versions of their own libraries.
    free = {name for name in needed if name.startswith(("nvidia-", "cuda-")) or name == "triton"}
    assert set(needed) - free == set(CONSTRAINTS)


def test_version_is_stated_once_and_alike():
    version = PROJECT["project"]["version"]
    code = (ROOT / "ddmlib" / "__init__.py").read_text("utf-8")
    assert f'__version__ = "{version}"' in code
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


# ---- imports and sizes


def parts(path: Path) -> tuple[str, ...]:
    return path.relative_to(ROOT / "ddmlib").with_suffix("").parts


def imports_within(path: Path) -> set[tuple[str, ...]]:
    """Return the modules of ddmlib that a file imports, as the parts below ``ddmlib``."""
    inside = ".".join(path.relative_to(ROOT).parent.parts)
    names = imported_modules(path.read_text("utf-8"), inside=inside)
    return {tuple(name.split(".")[1:]) for name in names} - {()}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: "/".join(parts(path)))
def test_modules_import_downwards(path):
    module, *below = parts(path)
    if module == "__init__":
        assert not imports_within(path), "import ddmlib stays quick: modules load on demand"
        return
    assert module in LEVEL, f"give {module} its level in LEVELS"
    for other, *inner in imports_within(path):
        if other == module:
            order = INNER.get(module, [])
            if order and below != ["__init__"] and inner:
                assert order.index(inner[0]) < order.index(below[0])
        elif other in LEVEL:
            assert LEVEL[other] < LEVEL[module], f"{module} imports {other}"
        else:
            assert other == "__version__", f"{module} imports {other}: no module of ddmlib"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: "/".join(parts(path)))
def test_modules_import_only_the_runtime_dependencies(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        for name in names:
            assert name.split(".")[0] in ALLOWED, f"line {node.lineno} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: "/".join(parts(path)))
def test_modules_stay_readable_in_one_sitting(path):
    assert len(path.read_text("utf-8").splitlines()) <= 350


def test_import_is_quick_and_opens_nothing_but_code():
    code = (
        "import sys\n"
        "opened = []\n"
        "def hook(event, args):\n"
        "    if event == 'open' and 'ddmlib' in str(args[0]): opened.append(str(args[0]))\n"
        "sys.addaudithook(hook)\n"
        "import ddmlib\n"
        "bad = [name for name in opened if not name.endswith(('.py', '.pyc'))]\n"
        "bad = [name for name in bad if '.pyc.' not in name]  # a cache file being written\n"
        "assert not bad, bad\n"
        "heavy = {'torch', 'scipy', 'numpy', 'matplotlib', 'IPython'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_module_is_found_on_demand():
    public = {parts(path)[0] for path in MODULES} - {"__init__", "__main__", "checks", "noise"}
    code = f"import ddmlib; [getattr(ddmlib, name).__doc__ for name in {sorted(public)}]"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert set(ddmlib.__all__) == public | {"__version__"}


def test_every_module_has_a_page_of_its_docstrings():
    toc = (ROOT / "_toc.yml").read_text("utf-8")
    public = {parts(path)[0] for path in MODULES} - {"__init__", "__main__", "checks", "noise"}
    for module in sorted(public):
        page = ROOT / "book" / "api" / f"{module}.md"
        assert f".. automodule:: ddmlib.{module}\n" in page.read_text("utf-8")
        assert f"file: book/api/{module}\n" in toc


# ---- the README


def test_readme_code_runs():
    text = (ROOT / "README.md").read_text("utf-8")
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(code, names)
    assert names["x"].shape == (1024, 3)
    assert names["near"].shape == (1024, 50, 3)
    assert int(names["inside"].sum()) >= 30
