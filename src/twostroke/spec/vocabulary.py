"""Vocabulary: everything a model file says about turning text into token ids.

Filled in by `weights/` from GGUF metadata or a Hugging Face folder, consumed by `text/`. It holds
data only; the algorithms (byte-level BPE, SentencePiece-style BPE) live in `text/`.
"""

from __future__ import annotations

import enum
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from mmap import mmap
from pathlib import Path
from typing import Any, Protocol, overload


class VocabularyKind(enum.Enum):
    """Which tokenizer algorithm the data is for."""

    BYTE_BPE = "gpt2"  # byte-level BPE with a named pre-tokeniser
    SENTENCEPIECE = "llama"  # SentencePiece-style BPE: scores, byte fallback, U+2581 for a space
    TOKENIZER_JSON = "tokenizer.json"  # a `tokenizers` file; `json_path` names it


class TokenType(enum.IntEnum):
    """The GGUF token types."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Offsets(Protocol):
    """Whole numbers in a row: a list, or an array."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...

    def __iter__(self) -> Iterator[Any]: ...


class Texts(Sequence[str]):
    """Texts that lie in one buffer and are decoded when asked for.

    Not a list: a quarter of a million strings take a tenth of a second to make, and few are used.
    data: the buffer. starts, ends: byte offsets of each text in it, ascending; each is UTF-8.
    """

    __slots__ = ("data", "ends", "starts")

    def __init__(self, data: bytes | mmap, starts: Offsets, ends: Offsets) -> None:
        assert len(starts) == len(ends), (len(starts), len(ends))
        self.data = data
        self.starts = starts
        self.ends = ends

    @classmethod
    def join(cls, texts: Sequence[str]) -> Texts:
        """The same texts in a buffer of their own; lone surrogates stay what they are."""
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        ends = list(accumulate(map(len, encoded)))
        return cls(b"".join(encoded), [0, *ends[:-1]] if ends else [], ends)

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        return self.get_bytes(index).decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return (self[at] for at in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __contains__(self, text: object) -> bool:
        """Searches the buffer and decodes nothing."""
        if not isinstance(text, str) or not len(self):
            return False
        sought = text.encode("utf-8", "surrogatepass")
        if not sought:
            return any(start == end for start, end in zip(self.starts, self.ends, strict=True))
        at, end = self.data.find(sought, self.starts[0]), self.ends[-1]
        while 0 <= at < end:
            index = bisect_left(self.starts, at)
            # Of several texts at one place, all but the last are empty.
            while index < len(self) and self.starts[index] == at:
                if self.ends[index] == at + len(sought):
                    return True
                index += 1
            at = self.data.find(sought, at + 1)
        return False

    def get_bytes(self, index: int) -> bytes:
        """One text, as it lies there."""
        return self.data[self.starts[index] : self.ends[index]]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer's data.

    tokens, types and scores are parallel, indexed by token id; scores may be empty (BYTE_BPE).
    merges: "left right" pairs in order of rank (BYTE_BPE). pre: the pre-tokeniser's GGUF name.
    stop_tokens: ids that end a turn or text (eos, eot, eom). add_space_prefix: SentencePiece's
    dummy prefix. chat_template: Jinja source, or None.
    """

    kind: VocabularyKind
    tokens: Sequence[str] = field(default=(), repr=False)
    types: Sequence[int] = field(default=(), repr=False)
    scores: Sequence[float] = field(default=(), repr=False)
    merges: Sequence[str] = field(default=(), repr=False)
    pre: str = "default"
    bos: int | None = None
    eos: int | None = None
    unknown: int | None = None
    padding: int | None = None
    stop_tokens: frozenset[int] = frozenset()
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool = False
    chat_template: str | None = None
    json_path: Path | None = None
