"""What may be imported where, and what importing the package must not bring along.

The direction of imports is held by the contracts in pyproject.toml, which `make check` runs
through import-linter; here stands what those cannot say: that every package has its contract, that
the inner packages use the standard library only, and that heavy libraries stay out of
`import twostroke` and of the commands that do not need them.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from places import REPO

SOURCE = REPO / "src" / "twostroke"
STANDARD_LIBRARY_ONLY = ("spec", "core")
# May import anything, and nothing may import them: their own contract would be empty.
UNBOUND = {"cli", "bench"}
HEAVY = (
    "torch",
    "triton",
    "ray",
    "fastapi",
    "uvicorn",
    "pydantic",
    "tokenizers",
    "jinja2",
    "huggingface_hub",
    "typer",
    "rich",
)


def find_loaded(statement: str, names: tuple[str, ...]) -> list[str]:
    """Which of the named modules a fresh interpreter holds after the statement."""
    code = f"{statement}\nimport sys\nprint(*sorted(set({names!r}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.split()


def find_imports(path: Path) -> Iterator[str]:
    """The top-level names of everything a file imports, at any depth of the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]


def test_importing_the_package_brings_no_heavy_library() -> None:
    assert find_loaded("import twostroke", HEAVY) == []


def test_sampling_params_bring_no_heavy_library() -> None:
    assert find_loaded("from twostroke import SamplingParams, RequestOutput", HEAVY) == []


def test_generating_brings_no_server_library() -> None:
    statement = "import twostroke.cli.main, twostroke.cli.generate, twostroke.cli.compose"
    assert find_loaded(statement, ("torch", "fastapi", "uvicorn", "huggingface_hub")) == []


def test_what_surrounds_a_gpu_needs_no_native_kernels() -> None:
    statement = (
        "import sys; sys.modules['twostroke._native'] = None\n"
        "import twostroke.exec.build, twostroke.cli.compose, twostroke.cli.generate\n"
        "import twostroke.cli.limits, twostroke.cli.serve"
    )
    assert find_loaded(statement, ("torch", "twostroke.exec.cpu")) == []


def test_the_engine_of_a_gpu_needs_no_native_kernels() -> None:
    statement = (
        "import sys; sys.modules['twostroke._native'] = None\nimport twostroke.exec.cuda_open"
    )
    assert find_loaded(statement, ("twostroke.exec.cpu", "twostroke.kernels.cpu.weights")) == []


@pytest.mark.parametrize("package", STANDARD_LIBRARY_ONLY)
def test_the_inner_packages_import_the_standard_library_only(package: str) -> None:
    allowed = sys.stdlib_module_names | {"twostroke"}
    foreign = {
        f"{path.name}: {name}"
        for path in (SOURCE / package).rglob("*.py")
        for name in find_imports(path)
        if name not in allowed
    }
    assert foreign == set()


def test_every_package_is_under_an_import_contract() -> None:
    linter = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["importlinter"]
    bound = {contract["name"] for contract in linter["contracts"]}
    packages = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert packages == bound | (UNBOUND & packages)


def test_a_package_itself_holds_only_a_docstring() -> None:
    full = [
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.glob("*/__init__.py")
        if len(ast.parse(path.read_text(encoding="utf-8")).body) != 1
    ]
    assert full == []
