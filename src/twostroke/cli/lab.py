"""`twostroke lab`: lists the units, runs the experiment of one, sets and grades its exercises.

Owns how they are asked for and shown; what they are is in lab/. A question belongs to its seed, so
an answer can be given later, or by a program, with the seed that was printed.
"""

from __future__ import annotations

import secrets
import sys
import time
from pathlib import Path

from twostroke.cli.machine import read_machine
from twostroke.cli.question_options import LabOptions
from twostroke.errors import InvalidParameter
from twostroke.lab.question import Question, format_value, grade
from twostroke.lab.unit import Setup, Unit, check_picture
from twostroke.lab.units import find_unit, list_units

_EXERCISE = "exercise"
_RUNS_ON = {
    "numbers": "in an instant",
    "simulator": "in seconds, simulated",
    "engine": "on the real engine, with a pulled model",
}


def run_lab(options: LabOptions) -> None:
    """List, run or ask. Raises TwostrokeError."""
    if options.what is None:
        _list()
    elif options.what == _EXERCISE:
        _run_exercise(find_unit(_read_number(options.unit)), options)
    else:
        if options.unit is not None:
            raise InvalidParameter("what", f"{options.what!r} takes no second number")
        _run_experiment(find_unit(_read_number(options.what)), options)


def _list() -> None:
    for unit in list_units():
        print(f"{unit.number:>3}  {unit.title:<38} {_RUNS_ON[unit.runs_on]}")
    print("\ntwostroke lab N runs a unit; twostroke lab exercise N asks a question about it.")


def _read_number(text: str | None) -> int:
    if text is None or not (text.isascii() and text.isdigit()) or len(text) > 3:
        raise InvalidParameter(
            "unit", f"must be a number from 1 to {len(list_units())}, not {text!r}"
        )
    return int(text)


def _run_experiment(unit: Unit, options: LabOptions) -> None:
    paths = [Path(each) for each in options.output or ()]
    for path in paths:
        check_picture(path)
    print(f"{unit.number}. {unit.title}\n\n{unit.idea}\n")
    begin = time.monotonic()
    findings = unit.run(Setup(options.model, options.threads or read_machine().cores))
    for line in findings.lines:
        print(f"  {line}")
    print(f"\n{time.monotonic() - begin:.1f} s")
    for path in paths:
        findings.draw(path)
        print(f"wrote {path}")


def _run_exercise(unit: Unit, options: LabOptions) -> None:
    seed = secrets.randbelow(1_000_000) if options.seed is None else options.seed
    if options.answer is not None and options.seed is None:
        raise InvalidParameter("seed", "must say which question is answered: it was printed there")
    question = unit.ask(seed)
    print(f"{unit.title}\n\n{question.text}\n")
    answer = options.answer
    if answer is None and sys.stdin.isatty():
        print("Your answer, with its unit: ", end="", flush=True)
        answer = sys.stdin.readline()
    if answer is None:
        print(f"Answer with: twostroke lab exercise {unit.number} --seed {seed} --answer …")
        return
    _show_grade(question, answer)


def _show_grade(question: Question, answer: str) -> None:
    found = grade(question, answer)
    print(found.told)
    word = f", {question.word}" if question.word else ""
    print(f"\nAnswer: {format_value(question.answer, question.unit)}{word}.")
    print(f"Derivation: {question.derivation}")
