"""What a grammar may cost, and how one is handed to the `llguidance` library.

Owns the limits that the serving process and the helper that tries grammars out (grammar_check.py)
must agree on, so that what passed there passes here. The library's own limits are counts, which
bound its time only roughly; the allowance bounds the time itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# Time on the serving thread that the masks of one continuation may take: for its states that are
# met for the first time, and for each token. Masks of ordinary schemas take 0.05 to 0.3 ms.
FIRST_ALLOWANCE_NS = 60_000_000
TOKEN_ALLOWANCE_NS = 2_000_000

# Of the library: Earley items of a row and of a mask, derivatives taken for a mask, states of the
# lexer, symbols of the grammar. Measured: 1,000 items take about 4.4 ms.
MAX_ROW_ITEMS = 5_000
MAX_MASK_ITEMS = 10_000
MAX_LEXER_FUEL = 100_000
MAX_LEXER_STATES = 50_000
MAX_GRAMMAR_SYMBOLS = 250_000

MAX_MESSAGE_CHARS = 300

# One line with a space behind commas and colons: a small model that may write blanks between values
# can write nothing else until its tokens are spent.
_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# Bytes that a grammar forces stay the model's to cut into tokens; the library would ask for a
# tokenizer, milliseconds a time. It stands last, so that no grammar's own options undo it.
_OPTIONS = '\n%llguidance {"no_forcing": true}\n'


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """A vocabulary as the library's TokenizerWrapper reads it: bytes and no rules."""

    tokens: Sequence[bytes]
    special_token_ids: Sequence[int]
    stops: Sequence[int]

    @property
    def eos_token_id(self) -> int:
        """One of the tokens that end a text."""
        return self.stops[0]

    @property
    def bos_token_id(self) -> None:
        """Grammars have no begin."""
        return None

    def __call__(self, text: bytes) -> list[int]:
        """No text is ever cut into tokens here (see _OPTIONS)."""
        return []


def open_library(vocabulary: TokenBytes) -> LLTokenizer:
    """The library's tokenizer for a vocabulary: a tenth of a second for 50,000 tokens."""
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(vocabulary), eos_token=list(vocabulary.stops))


def get_mask_allowance_ns(num_tokens: int) -> int:
    """Nanoseconds that matching so many tokens, and the masks between them, may take."""
    return FIRST_ALLOWANCE_NS + num_tokens * TOKEN_ALLOWANCE_NS


def write_library_grammar(text: str) -> str:
    """A canonical text (see grammar.py) as a grammar of the library.

    Raises ValueError for a kind that is unknown and for GBNF that cannot be read.
    """
    from llguidance import LLMatcher
    from llguidance._lib import regex_to_lark
    from llguidance.gbnf_to_lark import any_to_lark

    kind, _, body = text.partition(":")
    if kind == "json_schema":
        schema = json.loads(body)
        if schema is False:
            raise ValueError("no value matches the schema false")
        styled = style_schema({} if schema is True else schema)
        lark = f"start: %json {json.dumps(styled, ensure_ascii=False)}"
    elif kind == "regex":
        lark = f"start: /{regex_to_lark(body, '')}/"
    elif kind == "ebnf":
        lark = any_to_lark(body)
    else:
        raise ValueError(f"there is no grammar of kind {shorten(kind)}")
    return LLMatcher.grammar_from_lark(lark + _OPTIONS)


def style_schema(schema: Mapping[str, Any], *, lenient: bool = False) -> dict[str, Any]:
    """A JSON schema whose values are written in our style.

    lenient: keywords that cannot be held to are passed over, not refused.
    """
    return {**schema, "x-guidance": {**_JSON_STYLE, "lenient": lenient}}


def build_matcher(library: LLTokenizer, grammar: str) -> LLMatcher:
    """The library's matcher for its grammar, within our limits; see its `is_error`."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(
        max_items_in_row=MAX_ROW_ITEMS,
        step_max_items=MAX_MASK_ITEMS,
        step_lexer_fuel=MAX_LEXER_FUEL,
        max_lexer_states=MAX_LEXER_STATES,
        max_grammar_size=MAX_GRAMMAR_SYMBOLS,
        verbose_errors=False,
    )
    return LLMatcher(library, grammar, log_level=0, limits=limits)


def shorten(value: object) -> str:
    """A value for a message: one line of printable characters, not too long."""
    line = " ".join(str(value).replace("<non-verbose/>", "").split())
    plain = "".join(char if char.isprintable() else "?" for char in line[: MAX_MESSAGE_CHARS + 1])
    return plain if len(plain) <= MAX_MESSAGE_CHARS else plain[:MAX_MESSAGE_CHARS] + " …"
