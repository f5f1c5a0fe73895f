"""Tries grammars out in a process of its own, where they can do no harm.

The library compiles in native code that nothing can interrupt, and a text made for it may run for
minutes or overflow a stack. So a helper process knows the vocabulary, and for each text makes a
copy of itself, which compiles it, follows it for some tokens at random, and ends itself when its
time is over. A text that takes long is computed when nothing else wants to run: the threads of a
step wait for the one whose core was taken.

Run as a module this file is the helper: it reads a vocabulary and then texts from its standard
input, a line of JSON each, and answers each text with its grammar, its fault, and whether that
fault would come again. It ends with its input, and so do its copies.

Neither process is trusted, for a text may have taken it over: of what they say the parent makes
two strings of bounded length and a truth and nothing else, and it waits for them a bounded time.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from twostroke.text.grammar_limits import (
    TokenBytes,
    build_matcher,
    get_mask_allowance_ns,
    open_library,
    shorten,
    write_library_grammar,
)

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

CHECK_SECONDS = 4.0  # of a processor
WAIT_SECONDS = 20.0  # in all: what serves may leave it little of one
MAX_MEMORY_BYTES = 4 * 2**30
TRIED_TOKENS = 48
NICENESS = 10  # of the helper and its copies
PATIENCE_MS = 250  # most texts take a tenth of it; what takes longer gives way to everything

# What the parent grants: a process needs seconds to begin on a busy machine, and then ends itself;
# a grammar is a few times as long as its text, which grammar.py bounds.
ANSWER_SECONDS = 60.0
MAX_ANSWER_BYTES = 32 * 2**20

_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG

_ENDED = "the grammar is too complex: it ended the compiler"


@dataclass(frozen=True, slots=True)
class Checked:
    """What became of a text: the library's grammar, or its fault.

    is_lasting: the same text would have it again.
    """

    grammar: str = ""
    fault: str = ""
    is_lasting: bool = True


class GrammarChecker:
    """The parent's side; one thread uses it, and another may close it."""

    def __init__(
        self, vocabulary: TokenBytes, command: Sequence[str] = (sys.executable, "-m", __name__)
    ) -> None:
        """command: begins the process; another one is for tests."""
        self._vocabulary = vocabulary
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        """Begin the process, unless it runs, so that the first text need not wait for it."""
        self._get_process()

    def check(self, text: str) -> Checked:
        """Whether a canonical text (see grammar.py) can be used; takes up to WAIT_SECONDS.

        A process that neither answers nor ends is killed after ANSWER_SECONDS.
        """
        process = self._get_process()
        with _bounded(process):
            answer = _ask(process, text)
            if not answer:
                return _describe_end(process.wait())
        checked = _read_answer(answer)
        if checked is None:
            process.kill()
            process.wait()
            return Checked(fault=_ENDED)
        return checked

    def close(self) -> None:
        """End the process, if there is one; a check that waits for it hears that it failed."""
        process, self._process = self._process, None
        if process is not None:
            _end(process)

    def _get_process(self) -> subprocess.Popen[bytes]:
        """The process, which knows the vocabulary or will never answer; a new one if it ended."""
        process = self._process
        if process is not None and process.poll() is None:
            return process
        if process is not None:
            _end(process)
        process = self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        # At once: beginning takes it longer than most texts do.
        with contextlib.suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
        with _bounded(process), _ending_well():
            _send(process, _write_vocabulary(self._vocabulary))
        return process


@contextlib.contextmanager
def _bounded(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Kill the process where this takes longer than ANSWER_SECONDS."""
    overdue = threading.Timer(ANSWER_SECONDS, process.kill)
    overdue.daemon = True
    overdue.start()
    try:
        yield
    finally:
        overdue.cancel()


def _ending_well() -> contextlib.suppress:
    """Around what a process may end in the midst of; whoever waits for its answer gets none."""
    return contextlib.suppress(OSError, ValueError)  # ValueError: another thread closed the pipes


def _send(process: subprocess.Popen[bytes], message: str) -> None:
    assert process.stdin is not None
    process.stdin.write(message.encode() + b"\n")
    process.stdin.flush()


def _ask(process: subprocess.Popen[bytes], text: str) -> bytes:
    """The line that a process answers with; nothing where it, or its pipes, came to an end."""
    assert process.stdout is not None
    with _ending_well():
        _send(process, json.dumps(text))
        return process.stdout.readline(MAX_ANSWER_BYTES)
    return b""


def _read_answer(line: bytes) -> Checked | None:
    """What a line says; None for one that the process would not write."""
    if not line.endswith(b"\n"):
        return None
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        return None
    match answer:
        case [str(grammar), str(fault), bool(is_lasting)] if grammar or fault:
            is_text = not any("\ud800" <= char <= "\udfff" for char in grammar)
            return Checked(grammar, shorten(fault), is_lasting) if is_text else None
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what was still to be written has no reader
                pipe.close()


def _describe_end(status: int) -> Checked:
    """What became of a text whose process ended so: an exit status, or the signal less than 0."""
    if status == -signal.SIGPROF:
        return Checked(fault=f"the grammar takes longer than {CHECK_SECONDS:g} s to compile")
    if status in (-signal.SIGALRM, -signal.SIGKILL):
        return Checked(fault="the grammar could not be compiled now", is_lasting=False)
    return Checked(fault=_ENDED)


def _write_vocabulary(vocabulary: TokenBytes) -> str:
    tokens = [token.decode("latin-1") for token in vocabulary.tokens]
    return json.dumps([tokens, list(vocabulary.special_token_ids), list(vocabulary.stops)])


def _read_vocabulary(line: bytes) -> TokenBytes:
    tokens, control, stops = json.loads(line)
    return TokenBytes([token.encode("latin-1") for token in tokens], control, stops)


# ---- the helper ----------------------------------------------------------------------------------


def main() -> None:
    """Answer texts until the input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    lines = sys.stdin.buffer
    library = open_library(_read_vocabulary(lines.readline()))
    for line in lines:
        answers.write(_check_apart(library, json.loads(line)))
        answers.flush()


def _check_apart(library: LLTokenizer, text: str) -> bytes:
    """The answer to a text, from a copy of this process that ends with it."""
    reader, writer = os.pipe()
    helper, pid = os.getpid(), os.fork()
    if not pid:
        _check_here(library, text, writer, helper)
    os.close(writer)
    with os.fdopen(reader, "rb") as said:
        waiting = select.poll()
        waiting.register(said, select.POLLIN)
        if not waiting.poll(PATIENCE_MS):
            _give_way(pid)
        answer = said.readline(MAX_ANSWER_BYTES)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status == 0 and _read_answer(answer) is not None:
        return answer
    end = _describe_end(status)
    return _write_answer(end.grammar, end.fault, end.is_lasting)


def _give_way(pid: int) -> None:
    """Let a process run where nothing else wants to.

    Beside one of niceness 10 steps took twice as long, and one in a hundred eight times; beside one
    of the idle class, a third longer.
    """
    with contextlib.suppress(ProcessLookupError):
        if hasattr(os, "SCHED_IDLE"):
            os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
        else:
            os.setpriority(os.PRIO_PROCESS, pid, 2 * NICENESS)


def _check_here(library: LLTokenizer, text: str, writer: int, helper: int) -> NoReturn:
    """Compile a text, write the answer and end this process, in time."""
    status = 1
    try:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        signal.setitimer(signal.ITIMER_PROF, CHECK_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, WAIT_SECONDS)
        if os.getppid() == helper:  # else it ended before the system was told
            with os.fdopen(writer, "wb") as answer:
                answer.write(_answer(library, text))
            status = 0
    finally:
        os._exit(status)


def _answer(library: LLTokenizer, text: str) -> bytes:
    try:
        grammar = write_library_grammar(text)
        fault = _try_out(build_matcher(library, grammar))
    except (ValueError, RecursionError) as error:
        grammar, fault = "", shorten(error)
    return _write_answer(grammar, fault)


def _write_answer(grammar: str, fault: str, is_lasting: bool = True) -> bytes:
    return json.dumps([grammar, fault, is_lasting]).encode() + b"\n"


def _try_out(matcher: LLMatcher) -> str:
    """Follow a grammar for some random tokens; what is wrong with it, or nothing."""
    choices = random.Random(0)
    begin_ns = time.thread_time_ns()
    for done in range(TRIED_TOKENS + 1):
        mask = matcher.compute_bitmask()
        if matcher.is_error():
            error = shorten(matcher.get_error())
            return "the grammar matches no text" if error.startswith("NoExtension") else error
        spent_ns = time.thread_time_ns() - begin_ns
        if spent_ns > get_mask_allowance_ns(done):
            return f"the grammar is too costly: {done + 1} masks took {spent_ns / 1e6:.0f} ms"
        allowed = int.from_bytes(mask, "little")
        start = choices.randrange(allowed.bit_length())
        above = allowed >> start
        token = start + (above & -above).bit_length() - 1
        if not matcher.consume_token(token):
            return shorten(matcher.get_error())
        if matcher.is_stopped():
            return ""
    return ""


if __name__ == "__main__":
    main()
