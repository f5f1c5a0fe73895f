"""Laws of grammars: what may be asked for, what is refused, and that nothing holds the engine."""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from loopback import wait_until
from twostroke.errors import InvalidParameter, RequestFailed
from twostroke.text import grammar as module
from twostroke.text import grammar_check
from twostroke.text.grammar import GrammarCompiler, StructuredOutputs, read_structured_outputs
from twostroke.text.grammar_check import Checked, GrammarChecker
from twostroke.text.grammar_limits import TokenBytes
from twostroke.text.tokenizer import build_tokenizer
from vocabularies import make_byte_bpe

STOP = 1


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(build_tokenizer(make_byte_bpe(words=())))
    yield made
    made.close()


def matches(compiler: GrammarCompiler, asked: dict, text: str) -> bool:
    """Whether every byte of a text is let through, and then its end."""
    matcher = compiler.compile(StructuredOutputs(**asked).text).start()
    for token in [*(byte + 2 for byte in text.encode()), STOP]:
        mask = matcher.compute_mask()
        if not mask[token // 8] >> token % 8 & 1:
            return False
        if token != STOP:
            matcher.advance([token])
    return True


POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "y": {"$ref": "#/$defs/y"}},
    "required": ["x", "y"],
    "additionalProperties": False,
    "$defs": {"y": {"type": "boolean"}},
}


@pytest.mark.parametrize(
    ("asked", "good", "bad"),
    [
        ({"regex": "a{2,3}|b"}, "aaa", "a"),
        ({"regex": "[0-9]+/x"}, "12/x", "12/"),
        ({"choice": ["yes", 'n"o', "é"]}, 'n"o', "y"),
        ({"json": POINT}, '{"x": 12, "y": true}', '{"y": true}'),
        ({"json": json.dumps(POINT)}, '{"x": -1, "y": false}', '{"x": 1,  "y": true}'),
        ({"json": True}, '[{"a": null}]', "[1"),
        ({"grammar": 'start: "a" b\nb: "b"+'}, "abb", "a"),
        ({"grammar": 'root ::= "a" | item\nitem ::= [0-9]+'}, "42", "a4"),
    ],
)
def test_a_grammar_lets_through_what_it_describes(compiler, asked, good, bad) -> None:
    assert matches(compiler, asked, good)
    assert not matches(compiler, asked, bad)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"regex": "a", "choice": ["a"]},
        {"regex": ""},
        {"regex": "a" * (module.MAX_REGEX_CHARS + 1)},
        {"json": {"const": "a" * module.MAX_GRAMMAR_CHARS}},
        {"json": "{"},
        {"json": "[1]"},
        {"json": {"a": float("nan")}},
        {"choice": []},
        {"choice": [""]},
        {"choice": [7]},
        {"grammar": "a\ud800"},
        {"xml": "a"},
    ],
)
def test_what_is_no_structure_is_refused_before_it_is_compiled(asked) -> None:
    with pytest.raises(InvalidParameter) as caught:
        read_structured_outputs(asked)
    assert caught.value.parameter == "structured_outputs"


@pytest.mark.parametrize(
    "asked",
    [
        {"regex": "("},
        {"regex": "((a{0,100}){0,100}){0,100}"},
        {"json": {"$ref": "#"}},
        {"json": {"allOf": [{"$ref": "#"}, {"type": "object"}]}},
        {"json": {"type": "nothing"}},
        {"json": {"type": "integer", "multipleOf": 999999937}},
        {"json": False},
        {"grammar": "start: other"},
        {"grammar": "start: " + "(" * 3000 + '"a"' + ")" * 3000},
        {"grammar": 'start: x{1,100000}\nx: "a" | "b" | x x'},
    ],
)
def test_what_cannot_be_matched_is_refused_with_a_reason(compiler, asked) -> None:
    text = StructuredOutputs(**asked).text
    for _ in range(2):
        with pytest.raises(InvalidParameter) as caught:
            compiler.compile(text)
        assert len(str(caught.value)) < 500
        assert str(caught.value).isprintable()
    assert matches(compiler, {"regex": "a"}, "a")


def test_a_recursive_schema_is_served(compiler) -> None:
    node = {"type": "object", "properties": {"c": {"$ref": "#/$defs/n"}}}
    schema = {"$ref": "#/$defs/n", "$defs": {"n": node}}
    assert matches(compiler, {"json": schema}, '{"c": {"c": {}}}')


@pytest.mark.slow
def test_a_text_that_takes_too_long_is_refused_and_the_next_compiled() -> None:
    compiler = GrammarCompiler(build_tokenizer(make_byte_bpe(words=())))
    large = {f"p{at}": {"type": "string"} for at in range(9000)}
    text = StructuredOutputs(json={"properties": large}).text
    with pytest.raises(InvalidParameter, match="takes longer than"):
        compiler.compile(text)
    process = compiler._checker._process
    assert matches(compiler, {"regex": "a"}, "a")
    assert compiler._checker._process is process  # only its copy ended
    compiler.close()


@pytest.mark.slow
def test_a_text_that_takes_long_gives_way_and_ends_with_the_helper() -> None:
    checker = GrammarChecker(TokenBytes([b"", *(bytes([at]) for at in range(256))], [0], [0]))
    large = {f"p{at}": {"type": "string"} for at in range(9000)}
    text = StructuredOutputs(json={"properties": large}).text
    checking = threading.Thread(target=checker.check, args=(text,))
    checker.begin()
    checking.start()
    process = checker._process

    def find_copies() -> list[int]:
        words = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return [pid for pid in map(int, words) if os.sched_getscheduler(pid) == os.SCHED_IDLE]

    wait_until(lambda: len(find_copies()) == 1)
    [copy] = find_copies()
    checker.close()
    checking.join()
    wait_until(lambda: not Path(f"/proc/{copy}").exists())


def end_by(number: signal.Signals) -> None:
    """End this process as the system would."""
    signal.signal(number, signal.SIG_DFL)  # whoever runs tests has handlers of its own
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("end", "fault", "is_lasting"),
    [
        (partial(end_by, signal.SIGPROF), "takes longer than 4 s", True),
        (partial(end_by, signal.SIGALRM), "could not be compiled now", False),
        (partial(end_by, signal.SIGSEGV), "it ended the compiler", True),
        (partial(os._exit, 0), "it ended the compiler", True),
    ],
)
def test_however_a_copy_ends_the_helper_answers(monkeypatch, end, fault, is_lasting) -> None:
    def answer(library: object, text: str) -> bytes:
        end()
        raise AssertionError("it should have ended")

    monkeypatch.setattr(grammar_check, "_answer", answer)
    said = json.loads(grammar_check._check_apart(None, "regex:a"))
    assert said[0] == ""
    assert fault in said[1]
    assert said[2] is is_lasting


class FakeChecker:
    """Passes everything, and counts."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def check(self, text: str) -> Checked:
        self.seen.append(text)
        return Checked(grammar=grammar_check.write_library_grammar(text))

    def begin(self) -> None:
        """There is nothing to begin."""

    def close(self) -> None:
        """There is nothing to end."""


def test_a_text_is_compiled_once_while_it_is_kept() -> None:
    checker = FakeChecker()
    compiler = GrammarCompiler(build_tokenizer(make_byte_bpe(words=())), checker)
    for _ in range(3):
        compiler.compile("regex:a")
    assert checker.seen == ["regex:a"]
    for at in range(module.MAX_CACHED):
        compiler.compile(f"regex:b{at}")
    assert compiler.get("regex:a") is None


def test_a_grammar_whose_masks_cost_too_much_fails_its_request_and_is_refused_after(
    monkeypatch,
) -> None:
    checker = FakeChecker()
    compiler = GrammarCompiler(build_tokenizer(make_byte_bpe(words=())), checker)
    matcher = compiler.compile("regex:a+").start()
    monkeypatch.setattr(module, "get_mask_allowance_ns", lambda tokens: 0)
    with pytest.raises(RequestFailed, match="too costly"):
        matcher.compute_mask()
    with pytest.raises(InvalidParameter, match="too costly"):
        compiler.compile("regex:a+")


def test_closing_ends_the_process_that_compiles(compiler) -> None:
    own = GrammarCompiler(build_tokenizer(make_byte_bpe(words=())))
    own.compile("regex:a")
    process = own._checker._process
    own.close()
    assert process.poll() is not None


def test_the_first_grammar_finds_its_process_begun() -> None:
    own = GrammarCompiler(build_tokenizer(make_byte_bpe(words=())))
    own.prepare()
    process = own._checker._process
    assert os.getpriority(os.PRIO_PROCESS, process.pid) >= grammar_check.NICENESS
    own.compile("regex:a")
    assert own._checker._process is process
    own.close()
    assert process.poll() is not None


def test_without_a_token_that_ends_a_text_nothing_is_prepared() -> None:
    endless = SimpleNamespace(stop_ids=frozenset())
    compiler = GrammarCompiler(endless, FakeChecker())
    compiler.prepare()
    assert compiler._library is None


def ask_impostor(script: str) -> Checked:
    """What a process that is not ours, given a vocabulary and a text, is taken to have said."""
    command = (sys.executable, "-S", "-c", f"import sys, time; {script}")
    checker = GrammarChecker(TokenBytes([b"", b"a"], [0], [0]), command)
    try:
        return checker.check("regex:a")
    finally:
        checker.close()


@pytest.mark.parametrize(
    "line",
    [
        pickle.dumps(("start: A", "")).replace(b"\n", b"") + b"\n",
        b"start: A\n",
        b"[" * 50_000 + b"\n",
        b'{"grammar": "start: A", "fault": ""}\n',
        b'"aa"\n',
        b'["start: A"]\n',
        b'["start: A", null]\n',
        b'["", "", true]\n',
        b'["start: A", ""]\n',
        b'["start: A", "", 1]\n',
        b'["start: \\ud800", "", true]\n',
        b'["start: A", "", true]',  # and no end of the line within the limit
    ],
)
def test_an_answer_of_another_form_is_the_end_of_the_compiler(monkeypatch, line) -> None:
    monkeypatch.setattr(grammar_check, "MAX_ANSWER_BYTES", len(line))
    checked = ask_impostor(
        f"sys.stdout.buffer.write({line!r}); sys.stdout.flush(); time.sleep(1000)"
    )
    assert checked == Checked(fault="the grammar is too complex: it ended the compiler")


def test_a_fault_is_a_short_line_whatever_a_process_says() -> None:
    checked = ask_impostor("print('[\"\", \"' + '\\\\u001b' * 5000 + '\", true]')")
    assert checked.fault.isprintable()
    assert len(checked.fault) < 500


def test_a_process_that_neither_answers_nor_ends_is_ended(monkeypatch) -> None:
    monkeypatch.setattr(grammar_check, "ANSWER_SECONDS", 0.1)
    checked = ask_impostor("sys.stdout.close(); time.sleep(1000)")
    assert checked.fault
    assert not checked.is_lasting
