"""Grammars: what an output must match, and which tokens it may go on with.

Owns the canonical text of a grammar (what a SamplingSpec carries: replayed anywhere it means the
same), its limits, and the bridge from a model's tokens to the `llguidance` library. A grammar is
compiled in a helper process first, which is killed when that takes too long, so that no text a
client sends can hold or end this one; only what passed is compiled here. The masks of one text are
a function of its tokens alone.

What a Matcher may spend is bounded too: a grammar whose masks cost more than its share is a fault
of its request, and is remembered so that it is refused the next time.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from twostroke.errors import InvalidParameter, InvalidRequest, RequestFailed
from twostroke.text.grammar_check import Checked, GrammarChecker
from twostroke.text.grammar_limits import (
    TokenBytes,
    build_matcher,
    get_mask_allowance_ns,
    open_library,
    shorten,
)
from twostroke.text.tokenizer import Tokenizer, check_text

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_GRAMMAR_CHARS = 262_144
MAX_REGEX_CHARS = 16_384
MAX_CACHED = 64
PARAMETER = "structured_outputs"
_KINDS = ("json", "regex", "grammar", "choice")

# Between tokens' bytes are made, other threads are let in: a large vocabulary takes half a second.
_TOKENS_BETWEEN_PAUSES = 500

# What every reason begins with that a request fails for because of its own grammar.
GRAMMAR_FAULT = "the grammar"


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputs:
    """What an output must match; exactly one of these is given.

    json: a JSON schema, as a mapping, True, or its JSON text. regex: a regular expression for the
    whole text (Rust's syntax). grammar: Lark or GBNF. choice: texts of which the output is one.
    `text` is made of them: the grammar's kind, a colon, and what that kind says of it.
    Raises InvalidParameter.
    """

    json: Mapping[str, Any] | bool | str | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: Sequence[str] | None = None
    text: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", self._write())

    def _write(self) -> str:
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise InvalidParameter(
                PARAMETER, f"must have exactly one of {', '.join(_KINDS)}, not {found}"
            )
        if self.json is not None:
            return "json_schema:" + _write_schema(self.json)
        if self.regex is not None:
            return "regex:" + _check_length("regex", self.regex, MAX_REGEX_CHARS)
        if self.grammar is not None:
            return "ebnf:" + _check_length("grammar", self.grammar, MAX_GRAMMAR_CHARS)
        return "ebnf:" + _write_choice(self.choice)


def read_structured_outputs(value: Any) -> StructuredOutputs | None:
    """StructuredOutputs as they are, or made of a mapping of its fields; None for None.

    Raises InvalidParameter.
    """
    if value is None or isinstance(value, StructuredOutputs):
        return value
    if not isinstance(value, Mapping):
        raise InvalidParameter(
            PARAMETER, f"must be an object with one of {', '.join(_KINDS)}, not {shorten(value)}"
        )
    for name in value:
        if name not in _KINDS:
            raise InvalidParameter(
                PARAMETER, f"{shorten(name)} is unknown; there are {', '.join(_KINDS)}"
            )
    return StructuredOutputs(**value)


def _write_schema(schema: Any) -> str:
    if isinstance(schema, str):
        _check_length("json", schema, MAX_GRAMMAR_CHARS)
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise InvalidParameter(PARAMETER, f"json is no JSON text: {shorten(error)}") from None
    if not isinstance(schema, Mapping | bool):
        raise InvalidParameter(PARAMETER, f"json must be a schema, not {shorten(schema)}")
    try:
        # Not sorted: the order of properties is the order they are written in.
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidParameter(PARAMETER, f"json is no JSON schema: {shorten(error)}") from None
    return _check_length("json", text, MAX_GRAMMAR_CHARS)


def _write_choice(choice: Any) -> str:
    if not isinstance(choice, Sequence) or isinstance(choice, str | bytes) or not choice:
        raise InvalidParameter(PARAMETER, "choice must be a list of at least one string")
    for text in choice:
        if not isinstance(text, str) or not text:
            raise InvalidParameter(PARAMETER, "choice must be strings that are not empty")
    quoted = " | ".join(json.dumps(text, ensure_ascii=False) for text in choice)
    return _check_length("choice", f"start: {quoted}", MAX_GRAMMAR_CHARS)


def _check_length(name: str, text: Any, limit: int) -> str:
    check_text(PARAMETER, text)
    if not text or len(text) > limit:
        raise InvalidParameter(
            PARAMETER, f"{name} must have 1 to {limit:,} characters, not {len(text):,}"
        )
    return str(text)


class Matcher:
    """Follows the tokens of one continuation. Raises RequestFailed, and is of no use after that."""

    def __init__(self, inner: LLMatcher, on_costly: Callable[[], None]) -> None:
        self._inner = inner
        self._on_costly = on_costly
        self._spent_ns = 0
        self.num_tokens = 0

    def advance(self, tokens: Sequence[int]) -> None:
        """Take in the next tokens of the text."""
        start_ns = time.thread_time_ns()
        taken = self._inner.consume_tokens(list(tokens))
        self.num_tokens += len(tokens)
        self._charge(start_ns)
        if not taken:
            raise RequestFailed(
                f"{GRAMMAR_FAULT} refused a token: {shorten(self._inner.get_error())}"
            )

    def compute_mask(self) -> bytes:
        """Which tokens may follow, as spec.step.Row.mask; where nothing may, the end tokens."""
        start_ns = time.thread_time_ns()
        mask = self._inner.compute_bitmask()
        self._charge(start_ns)
        if self._inner.is_error():
            raise RequestFailed(
                f"{GRAMMAR_FAULT} is too complex: {shorten(self._inner.get_error())}"
            )
        return mask

    def _charge(self, start_ns: int) -> None:
        self._spent_ns += time.thread_time_ns() - start_ns
        if self._spent_ns > get_mask_allowance_ns(self.num_tokens):
            self._on_costly()
            raise RequestFailed(
                f"{GRAMMAR_FAULT} is too costly: its masks took {self._spent_ns / 1e6:.0f} ms for "
                f"{self.num_tokens} tokens"
            )


class Grammar:
    """A compiled grammar; any number of continuations may follow it."""

    def __init__(self, inner: LLMatcher, on_costly: Callable[[], None]) -> None:
        self._inner = inner
        self._on_costly = on_costly

    def start(self) -> Matcher:
        """A matcher at the beginning of a text."""
        return Matcher(self._inner.deep_copy(), self._on_costly)


class Checker(Protocol):
    """Says what becomes of a canonical text; see grammar_check.GrammarChecker."""

    def check(self, text: str) -> Checked:
        """The library's grammar, or its fault."""
        ...

    def begin(self) -> None:
        """Do now what the first text would have to wait for."""
        ...

    def close(self) -> None:
        """End what it has begun; any thread may call it."""
        ...


class GrammarCompiler:
    """Compiles canonical texts for one tokenizer, and keeps those used last.

    `get` may be called from any thread. `prepare` and `compile` take up to seconds and must not be
    called on a thread that serves; calls wait for each other.
    """

    def __init__(self, tokenizer: Tokenizer, checker: Checker | None = None) -> None:
        """checker: for tests; by default one with a process of its own, begun when first needed."""
        self._tokenizer = tokenizer
        self._checker = checker
        self._library: LLTokenizer | None = None
        self._lock = threading.Lock()
        self._compiling = threading.Lock()
        self._kept: OrderedDict[str, Grammar | str] = OrderedDict()  # or why it is refused

    def get(self, text: str) -> Grammar | None:
        """The compiled grammar where it is kept. Raises InvalidParameter for a refused one."""
        with self._lock:
            found = self._kept.get(text)
            if found is not None:
                self._kept.move_to_end(text)
        if isinstance(found, str):
            raise InvalidParameter(PARAMETER, found)
        return found

    def prepare(self) -> None:
        """Do what the first grammar would have to wait for, where the model can have grammars."""
        if self._tokenizer.stop_ids:
            with self._compiling:
                self._open_library()
                assert self._checker is not None
                self._checker.begin()

    def compile(self, text: str) -> Grammar:
        """The compiled grammar. Raises InvalidParameter, InvalidRequest."""
        with self._compiling:
            found = self.get(text)
            if found is None:
                found = self._compile(text)
                self._keep(text, found)
        return found

    def close(self) -> None:
        """End the helper process; compiling again would begin another."""
        checker = self._checker
        if checker is not None:
            checker.close()

    def _compile(self, text: str) -> Grammar:
        library = self._open_library()
        checker = self._checker
        assert checker is not None
        checked = checker.check(text)
        if checked.fault:
            if checked.is_lasting:
                self._keep(text, checked.fault)
            raise InvalidParameter(PARAMETER, checked.fault)
        inner = build_matcher(library, checked.grammar)
        if inner.is_error():
            raise InvalidParameter(PARAMETER, shorten(inner.get_error()))

        def refuse() -> None:
            self._keep(
                text, "the grammar is too costly: an earlier request with it had to be ended"
            )

        return Grammar(inner, refuse)

    def _open_library(self) -> LLTokenizer:
        """The library's tokenizer: no text of ours, only which bytes each token stands for."""
        if self._library is None:
            tokenizer, stops = self._tokenizer, sorted(self._tokenizer.stop_ids)
            if not stops:
                raise InvalidRequest("this model has no token that ends a text, so no grammar can")
            tokens = []
            for token in range(tokenizer.vocab_size):
                tokens.append(tokenizer.get_token_bytes(token))
                if token % _TOKENS_BETWEEN_PAUSES == 0:
                    time.sleep(0)
            control = [token for token in range(len(tokens)) if tokenizer.is_control(token)]
            vocabulary = TokenBytes(tokens, control, stops)
            self._library = open_library(vocabulary)
            self._checker = self._checker or GrammarChecker(vocabulary)
        return self._library

    def _keep(self, text: str, found: Grammar | str) -> None:
        with self._lock:
            self._kept[text] = found
            self._kept.move_to_end(text)
            while len(self._kept) > MAX_CACHED:
                self._kept.popitem(last=False)
