"""Writes docs/lab/*.ipynb from the units: `python -m twostroke.lab.notebooks docs/lab`.

A notebook calls the same functions as `twostroke lab` and holds no results, so that it says nothing
that was not computed where it is read. Notebook format 4.5, as few fields as it allows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from twostroke.lab.unit import Unit
from twostroke.lab.units import list_units


def get_file_name(unit: Unit) -> str:
    """A notebook's name: its number and title."""
    words = "".join(each if each.isalnum() else " " for each in unit.title.lower()).split()
    return f"{unit.number:02}-{'-'.join(words)}.ipynb"


def build_notebook(unit: Unit) -> str:
    """A unit as a notebook, in JSON."""
    cells = [
        ("markdown", f"# {unit.number}. {unit.title}\n\n{unit.idea}"),
        (
            "code",
            "from twostroke.lab.question import grade\n"
            "from twostroke.lab.unit import Setup\n"
            "from twostroke.lab.units import find_unit\n\n"
            f"unit = find_unit({unit.number})\n"
            "findings = unit.run(Setup())\n"
            'print("\\n".join(findings.lines))',
        ),
        ("code", "findings  # its picture"),
        ("markdown", "## Exercise\n\nAnother seed is another question."),
        ("code", "question = unit.ask(seed=1)\nprint(question.text)"),
        (
            "code",
            'answer = ""  # a number with its unit\n'
            "if answer:\n"
            "    print(grade(question, answer).told)\n"
            "    print(question.derivation)",
        ),
    ]
    notebook = {
        "cells": [_make_cell(at, kind, text) for at, (kind, text) in enumerate(cells)],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def _make_cell(at: int, kind: str, text: str) -> dict[str, Any]:
    cell: dict[str, Any] = {
        "cell_type": kind,
        "id": f"cell-{at}",
        "metadata": {},
        "source": text.splitlines(keepends=True),
    }
    return cell | {"execution_count": None, "outputs": []} if kind == "code" else cell


def write_notebooks(folder: Path) -> None:
    """Write one file a unit. Raises OSError."""
    for unit in list_units():
        (folder / get_file_name(unit)).write_text(build_notebook(unit), encoding="utf-8")


if __name__ == "__main__":
    write_notebooks(Path(sys.argv[1]))
