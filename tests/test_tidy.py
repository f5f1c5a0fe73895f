"""The size and shape rules of the house, held over every file that is kept in the repository.

The limits come from the project's style and only ratchet down. An exemption names its place and
its reason in a table below; a table entry that no longer applies fails too, so the tables shrink.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from places import REPO

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 70
MAX_PARAMETERS = 6
MAX_CORE_LINES = 1_500
MAX_KV_LINES = 450
MAX_ENVIRONMENT_VARIABLES = 5

SOURCE = REPO / "src" / "twostroke"
PYTHON_FILES = sorted([*SOURCE.rglob("*.py"), *(REPO / "tests").rglob("*.py")])
NATIVE_FILES = sorted(
    path for path in (REPO / "native").rglob("*") if path.suffix in (".cpp", ".h", ".inl")
)
TEXT_FILES = sorted(
    [
        *PYTHON_FILES,
        *NATIVE_FILES,
        *(REPO / "docs").rglob("*.md"),
        *REPO.glob("*.md"),
        *REPO.glob("*.toml"),
        *REPO.glob("*.txt"),
        REPO / "Makefile",
        REPO / ".ci" / "run",
    ]
)

# The outermost frame of a loop answers for whatever happens inside it; nothing else may catch
# everything. Each of these files does so once; the value says whom it answers.
OUTERMOST_LOOPS = {
    "src/twostroke/bench/gpu/drive.py": "a section that fails costs the others nothing",
    "src/twostroke/engine/thread.py": "those who wait for the engine hear that it died",
    "src/twostroke/exec/child_main.py": "the parent hears why a child cannot go on",
    "src/twostroke/exec/cuda.py": "every plan is answered, also one that could not be queued",
    "src/twostroke/exec/rank_worker.py": "the group hears why a rank ends",
    "src/twostroke/exec/local.py": "every plan is answered, also one that could not be computed",
    "src/twostroke/server/errors.py": "every HTTP request gets a reply",
    "tests/dst.py": "a seed that fails is named, and costs the others nothing",
}

# Words of unfinished work, and the places of one machine. Written in pieces so that this file
# does not name them itself.
UNFINISHED = re.compile("|".join(["TO" + "DO", "FIX" + "ME", "X" * 3, "HA" + "CK:"]))
MACHINE_PATHS = re.compile(
    "|".join("/" + place + "/" for place in ["root", "home", "work", "Users"])
)

Function = ast.FunctionDef | ast.AsyncFunctionDef


def get_name(path: Path) -> str:
    """Path inside the repository, for messages and tables."""
    return path.relative_to(REPO).as_posix()


def parse(path: Path) -> ast.Module:
    """The file's syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def find_functions(tree: ast.AST) -> Iterator[Function]:
    """Every function and method of the tree, nested ones included."""
    for node in ast.walk(tree):
        if isinstance(node, Function):
            yield node


def count_parameters(function: Function) -> int:
    """Parameters a caller sees: all but self and cls."""
    arguments = function.args
    names = [each.arg for each in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]]
    names += [each.arg for each in (arguments.vararg, arguments.kwarg) if each is not None]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def find_public(tree: ast.Module | ast.ClassDef) -> Iterator[Function | ast.ClassDef]:
    """Public functions and classes of a module, and the public methods of its public classes."""
    for node in tree.body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        yield node
        if isinstance(node, ast.ClassDef) and not is_protocol(node):
            yield from find_public(node)


def is_protocol(node: ast.ClassDef) -> bool:
    """True for a Protocol: its docstring speaks for all its methods."""
    return any(isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases)


def count_catch_alls(path: Path) -> int:
    """How often a file has a bare except or an except (Base)Exception."""
    handlers = (node for node in ast.walk(parse(path)) if isinstance(node, ast.ExceptHandler))
    return sum(map(catches_everything, handlers))


def catches_everything(handler: ast.ExceptHandler) -> bool:
    """True for a bare except and for except Exception or BaseException, alone or in a tuple."""
    if handler.type is None:
        return True
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(isinstance(kind, ast.Name) and kind.id.endswith("Exception") for kind in kinds)


def test_a_file_stops_at_500_lines() -> None:
    lengths = {
        get_name(path): len(path.read_text(encoding="utf-8").splitlines())
        for path in [*PYTHON_FILES, *NATIVE_FILES]
    }
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


def test_the_scheduler_stays_under_1500_lines() -> None:
    lines = sum(len(path.read_text().splitlines()) for path in (SOURCE / "core").glob("*.py"))
    assert lines < MAX_CORE_LINES


def test_the_memory_under_the_scheduler_stays_small_too() -> None:
    lines = sum(len(path.read_text().splitlines()) for path in (SOURCE / "kv").glob("*.py"))
    assert lines < MAX_KV_LINES


def test_a_function_stops_at_70_lines() -> None:
    long = {
        f"{get_name(path)}: {function.name}": function.end_lineno - function.lineno + 1
        for path in PYTHON_FILES
        for function in find_functions(parse(path))
        if function.end_lineno is not None
        and function.end_lineno - function.lineno + 1 > MAX_FUNCTION_LINES
    }
    assert long == {}


def test_a_function_takes_at_most_six_parameters() -> None:
    wide = {
        f"{get_name(path)}: {function.name}": count_parameters(function)
        for path in PYTHON_FILES
        for function in find_functions(parse(path))
        if count_parameters(function) > MAX_PARAMETERS
    }
    assert wide == {}


def test_every_module_opens_with_a_docstring() -> None:
    assert [get_name(path) for path in PYTHON_FILES if not ast.get_docstring(parse(path))] == []


def test_every_public_function_and_class_has_a_docstring() -> None:
    bare = [
        f"{get_name(path)}:{node.lineno} {node.name}"
        for path in PYTHON_FILES
        if path.is_relative_to(SOURCE)
        for node in find_public(parse(path))
        if not ast.get_docstring(node)
    ]
    assert bare == []


def test_every_package_is_a_package() -> None:
    folders = {path.parent for path in SOURCE.rglob("*.py")}
    assert [
        get_name(path) for path in sorted(folders) if not (path / "__init__.py").is_file()
    ] == []


def test_only_outermost_loops_catch_everything() -> None:
    counts = {get_name(path): count_catch_alls(path) for path in PYTHON_FILES}
    assert {name: count for name, count in counts.items() if count} == dict.fromkeys(
        OUTERMOST_LOOPS, 1
    )


def test_no_file_is_unfinished_or_tied_to_one_machine() -> None:
    found = [
        f"{get_name(path)}:{number}: {line.strip()}"
        for path in TEXT_FILES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if UNFINISHED.search(line) or MACHINE_PATHS.search(line)
    ]
    assert found == []


def test_environment_variables_are_few_and_documented() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py"))
    variables = set(re.findall(r"\"(TWOSTROKE_[A-Z_]+)\"", text))
    guide = (REPO / "docs" / "guide.md").read_text(encoding="utf-8")
    assert len(variables) <= MAX_ENVIRONMENT_VARIABLES
    assert [name for name in sorted(variables) if f"`{name}`" not in guide] == []
