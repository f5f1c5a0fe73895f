"""TokenTable: what each token id stands for, as bytes.

Owns the one answer to "which bytes is this token", for every kind of vocabulary; decoding in one
go and decoding while streaming both read it, so they cannot disagree. Control tokens stand for
their own text. Never cuts or joins characters: bytes become text only at the reader's.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from twostroke.errors import InvalidParameter
from twostroke.spec.vocabulary import TokenType

SPACE_MARK = "\u2581"
_CONTROLS = frozenset({TokenType.CONTROL, TokenType.UNKNOWN})


class Spelling(enum.Enum):
    """How a normal token's text is spelled in its vocabulary."""

    BYTE_LETTERS = "each character is a letter for one byte, as in GPT-2"
    MARKED_SPACES = "plain text, with U+2581 for a space"


def get_byte_letters() -> dict[str, int]:
    """GPT-2's letters for the 256 bytes.

    Bytes with a printable Latin-1 character are that character; the others, in order, are the
    characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + index): byte for index, byte in enumerate(others)}


@dataclass(frozen=True, slots=True)
class TokenTable:
    """Texts and types of all tokens, indexed by id, and how to read them.

    An id the vocabulary leaves out has an empty text.
    """

    texts: Sequence[str] = field(repr=False)
    types: Sequence[int] = field(repr=False)
    spelling: Spelling
    letters: Mapping[str, int] = field(default_factory=get_byte_letters, repr=False)

    def __len__(self) -> int:
        return len(self.texts)

    def get_bytes(self, token: int) -> bytes:
        """The bytes `token` stands for. Raises InvalidParameter for an id out of range."""
        self.check(token)
        text, kind = self.texts[token], self.types[token]
        if kind == TokenType.BYTE:
            return bytes([int(text[3:5], 16)])
        if kind in _CONTROLS or kind == TokenType.USER_DEFINED:
            return text.encode("utf-8")
        if self.spelling is Spelling.MARKED_SPACES:
            return text.replace(SPACE_MARK, " ").encode("utf-8")
        letters = self.letters
        if all(letter in letters for letter in text):
            return bytes([letters[letter] for letter in text])
        # A few vocabularies hold added tokens as plain text without marking them as such.
        return text.encode("utf-8")

    def is_control(self, token: int) -> bool:
        """True for tokens that steer the model and are no text. Raises InvalidParameter."""
        self.check(token)
        return self.types[token] in _CONTROLS

    def check(self, token: int) -> None:
        """Raise InvalidParameter unless `token` is an id of this vocabulary."""
        if not 0 <= token < len(self.texts):
            raise InvalidParameter(
                "token", f"{token} is no token id; ids run from 0 to {len(self.texts) - 1}"
            )
