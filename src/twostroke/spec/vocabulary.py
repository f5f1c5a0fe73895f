"""Vocabulary: everything a model file says about turning text into token ids.

Filled in by `weights/` from GGUF metadata or a Hugging Face folder, consumed by `text/`. It holds
data only; the algorithms (byte-level BPE, SentencePiece-style BPE) live in `text/`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path


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


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer's data.

    tokens, types and scores are parallel, indexed by token id; scores may be empty (BYTE_BPE).
    merges: "left right" pairs in order of rank (BYTE_BPE). pre: the pre-tokeniser's GGUF name.
    stop_tokens: ids that end a turn or text (eos, eot, eom). add_space_prefix: SentencePiece's
    dummy prefix. chat_template: Jinja source, or None.
    """

    kind: VocabularyKind
    tokens: list[str] = field(default_factory=list, repr=False)
    types: list[int] = field(default_factory=list, repr=False)
    scores: list[float] = field(default_factory=list, repr=False)
    merges: list[str] = field(default_factory=list, repr=False)
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
