"""Tokenizer: text to token ids and back, for every kind of vocabulary a model file brings.

Owns the rules around the merger: special tokens are found
first, then each piece between them is encoded by itself; a begin token is added where the
vocabulary says so and never twice. Ids equal llama.cpp's for the same file, with exceptions on
purpose: with parse_special=False no control token ever comes out of plain text, a begin token the
text brings itself is not doubled, and see `pretokenize`.

decode(encode(text)) is the text again, with these exceptions: a SentencePiece vocabulary reads
U+2581 as a space, and where it adds a space after a special token inside the text that space stays;
a vocabulary that has no token for some byte (SmolLM2 lacks 21, six of them ASCII control
characters) drops that byte.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from twostroke.errors import CorruptModel, InvalidParameter, UnsupportedModel
from twostroke.spec.vocabulary import Texts, TokenType, Vocabulary, VocabularyKind
from twostroke.text.merger import Merger, MergeRules
from twostroke.text.merges import get_cuts
from twostroke.text.pretokenize import build_pretokenizer, find_family
from twostroke.text.special import SpecialMatcher
from twostroke.text.tokens import SPACE_MARK, Spelling, TokenTable, get_byte_letters

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

_GAP = "a byte without a token"  # no token of byte-level BPE has a space in its spelling


class Encoder(Protocol):
    """Text to ids, without begin and end tokens.

    parse_special: whether control tokens spelled out in the text become those tokens. `prepare`
    does now what the first long text would wait for.
    """

    def encode(self, text: str, parse_special: bool) -> list[int]: ...

    def prepare(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Ends:
    """The ids at the ends of a text, and whether they are added."""

    bos: int | None
    eos: int | None
    stops: frozenset[int]
    add_bos: bool
    add_eos: bool


class Tokenizer:
    """A model's tokenizer. Immutable, and safe to use from several threads."""

    def __init__(
        self, table: TokenTable, encoder: Encoder, ends: Ends, strips_space: bool = False
    ) -> None:
        """strips_space: the encoder puts a space before the text, which decoding takes away."""
        self._table = table
        self._encoder = encoder
        self._ends = ends
        self.strips_space = strips_space
        # What streams ask for each token, kept once it was worked out; the values never differ.
        self._bytes: dict[int, bytes] = {}
        self._control: dict[int, bool] = {}
        self._most_chars: int | None = None

    @classmethod
    def from_vocabulary(cls, vocabulary: Vocabulary) -> Tokenizer:
        """See `build_tokenizer`."""
        return build_tokenizer(vocabulary)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return len(self._table)

    @property
    def most_token_chars(self) -> int:
        """Characters of the longest token. So many to each token are all that a text can have,
        where the vocabulary drops nothing of it. Takes a tenth of a second, once."""
        if self._most_chars is None:
            self._most_chars = max(map(len, self._table.texts), default=0)
        return self._most_chars

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text, or None where the vocabulary has none."""
        return self._ends.bos

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text, or None where the vocabulary has none."""
        return self._ends.eos

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens after which a model has nothing more to say."""
        return self._ends.stops

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = True
    ) -> list[int]:
        """Token ids of `text`.

        add_special: add the begin and end tokens the vocabulary asks for, unless they are there.
        parse_special: read control tokens spelled out in the text as those tokens.
        Raises InvalidParameter when `text` is not a string or holds a lone surrogate.
        """
        check_text("prompt", text)
        ids = self._encoder.encode(text, parse_special)
        if add_special:
            bos, eos = self._ends.bos, self._ends.eos
            if self._ends.add_bos and bos is not None and ids[:1] != [bos]:
                ids.insert(0, bos)
            if self._ends.add_eos and eos is not None and ids[-1:] != [eos]:
                ids.append(eos)
        return ids

    def prepare(self) -> None:
        """Do now what is otherwise done for the first long text: up to half a second of work."""
        self._encoder.prepare()
        self._most_chars = self.most_token_chars

    def decode(
        self, ids: Iterable[int], *, skip_special: bool = False, after_prompt: bool = False
    ) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD.

        skip_special: leave control tokens out. after_prompt: the ids continue a text, so a leading
        space is the model's own and stays. Raises InvalidParameter for an id out of range.
        """
        strips = self.strips_space and not after_prompt
        data: list[bytes] = []
        for token in ids:
            if self._table.is_control(token):
                data.append(b"" if skip_special else self._table.get_bytes(token))
                continue
            piece = self._table.get_bytes(token)
            data.append(piece.removeprefix(b" ") if strips else piece)
            strips = False
        return b"".join(data).decode("utf-8", errors="replace")

    def get_token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; a control token's are those of its name.

        Raises InvalidParameter for an id out of range.
        """
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._table.get_bytes(token)
        return known

    def get_token_text(self, token: int) -> str:
        """The token as its vocabulary spells it. Raises InvalidParameter for an id out of range."""
        self._table.check(token)
        return self._table.texts[token]

    def is_control(self, token: int) -> bool:
        """True for tokens that steer the model and are no text. Raises InvalidParameter."""
        known = self._control.get(token)
        if known is None:
            known = self._control[token] = self._table.is_control(token)
        return known

    def has_token(self, text: str) -> bool:
        """Whether a token is spelled exactly `text`."""
        return text in self._table.texts


def check_text(parameter: str, text: object) -> None:
    """Raise InvalidParameter naming `parameter` unless `text` is a str that UTF-8 can hold."""
    if not isinstance(text, str):
        raise InvalidParameter(parameter, f"must be a string, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidParameter(
            parameter, f"holds a lone surrogate at character {error.start}, which is no text"
        ) from error


def build_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizer of a vocabulary.

    Raises UnsupportedModel for an unknown pre-tokeniser or decoder, CorruptModel for a vocabulary
    that contradicts itself.
    """
    if vocabulary.kind is VocabularyKind.TOKENIZER_JSON:
        return _open_json(vocabulary)
    _check_lists(vocabulary)
    ends = _get_ends(vocabulary, [], [])
    tokens = vocabulary.tokens
    texts = tokens if isinstance(tokens, Texts) else Texts.join(tokens)
    if vocabulary.kind is VocabularyKind.SENTENCEPIECE:
        table = TokenTable(tokens, vocabulary.types, Spelling.MARKED_SPACES)
        merger = Merger(texts, get_cuts(vocabulary), _get_sentencepiece_rules(vocabulary))
        prefix = SPACE_MARK if vocabulary.add_space_prefix else ""
        encoder = _PieceEncoder(vocabulary, merger, prefix, " ")
        return Tokenizer(table, encoder, ends, vocabulary.add_space_prefix)
    table = TokenTable(tokens, vocabulary.types, Spelling.BYTE_LETTERS)
    rules = _get_byte_bpe_rules(vocabulary)
    return Tokenizer(
        table, _PieceEncoder(vocabulary, Merger(texts, get_cuts(vocabulary), rules)), ends
    )


def _get_ends(vocabulary: Vocabulary, first: list[int], last: list[int]) -> Ends:
    """first, last: tokens the encoder's file adds, which count where the vocabulary is silent."""
    bos = vocabulary.bos if vocabulary.bos is not None or not first else first[0]
    eos = vocabulary.eos if vocabulary.eos is not None or not last else last[0]
    stops = vocabulary.stop_tokens if eos is None else vocabulary.stop_tokens | {eos}
    return Ends(
        bos=bos,
        eos=eos,
        stops=stops,
        add_bos=vocabulary.add_bos or (bool(first) and first[0] == bos),
        add_eos=vocabulary.add_eos or (bool(last) and last[0] == eos),
    )


def _open_json(vocabulary: Vocabulary) -> Tokenizer:
    from twostroke.text.tokenizer_json import open_tokenizer_json

    if vocabulary.json_path is None:
        raise CorruptModel("vocabulary: it names no tokenizer.json")
    opened = open_tokenizer_json(vocabulary.json_path)
    ends = _get_ends(vocabulary, opened.first, opened.last)
    return Tokenizer(opened.table, opened.encoder, ends, opened.strips_space)


class _PieceEncoder:
    """Finds special tokens, then merges what lies between them."""

    def __init__(
        self, vocabulary: Vocabulary, merger: Merger, prefix: str = "", marked: str = ""
    ) -> None:
        """prefix: put before a text and after each special token. marked: written as U+2581."""
        types = np.frombuffer(bytes(vocabulary.types), np.uint8)
        tokens = vocabulary.tokens
        user, control = (
            [(token, tokens[token]) for token in np.flatnonzero(np.isin(types, kinds)).tolist()]
            for kinds in ((TokenType.USER_DEFINED,), (TokenType.CONTROL, TokenType.UNKNOWN))
        )
        self._plain = SpecialMatcher(user)
        self._all = SpecialMatcher([*user, *control])
        self._merger = merger
        self._prefix = prefix
        self._marked = marked
        self._gap = len(tokens)

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """See Encoder."""
        parts = (self._all if parse_special else self._plain).split(text)
        pieces = [self._mark(part) for part in parts if isinstance(part, str)]
        merged = iter(self._merger.merge(pieces) if pieces else ())
        ids: list[int] = []
        for part in parts:
            ids += [part] if isinstance(part, int) else next(merged)
        return [token for token in ids if token != self._gap] if self._gap in ids else ids

    def prepare(self) -> None:
        """See Encoder."""
        self._merger.prepare()

    def _mark(self, piece: str) -> str:
        return self._prefix + piece.replace(self._marked, SPACE_MARK) if self._marked else piece


def _check_lists(vocabulary: Vocabulary) -> None:
    num_tokens = len(vocabulary.tokens)
    lists = {"token types": vocabulary.types}
    if vocabulary.kind is VocabularyKind.SENTENCEPIECE:
        lists["token scores"] = vocabulary.scores  # type: ignore[assignment]
    for name, values in lists.items():
        if len(values) != num_tokens:
            raise CorruptModel(f"vocabulary: {num_tokens} tokens but {len(values)} {name}")
    for token in (vocabulary.bos, vocabulary.eos, vocabulary.unknown, *vocabulary.stop_tokens):
        if token is not None and not 0 <= token < num_tokens:
            raise CorruptModel(
                f"vocabulary: special token {token} is beyond its {num_tokens} tokens"
            )


def _get_byte_bpe_rules(vocabulary: Vocabulary) -> MergeRules:
    family = find_family(vocabulary.pre)
    letters = get_byte_letters()
    spelling = {byte: letter for letter, byte in letters.items()}
    gap_id = len(vocabulary.tokens)

    def make(ids: dict[str, int], pairs: list[tuple[str, str]]) -> Library:
        from tokenizers import Tokenizer as Library
        from tokenizers.models import BPE

        # A byte without a token must stay between its neighbours until all merges are done, or
        # they would merge over it; so it becomes an id beyond the vocabulary, which encode() drops.
        gap = {} if all(letter in ids for letter in letters) else {_GAP: gap_id}
        unknown = _GAP if gap else None
        whole_words = family.whole_words
        library = Library(BPE(ids | gap, pairs, unk_token=unknown, ignore_merges=whole_words))
        library.pre_tokenizer = build_pretokenizer(family)
        return library

    def spell(piece: str) -> str:
        return piece.encode().decode("latin-1").translate(spelling)

    return MergeRules(make, spell, tuple(letters))


def _get_sentencepiece_rules(vocabulary: Vocabulary) -> MergeRules:
    names = tuple(f"<0x{byte:02X}>" for byte in range(256))
    unknown = None if vocabulary.unknown is None else vocabulary.tokens[vocabulary.unknown]
    if unknown is None and not set(names) <= set(vocabulary.tokens):
        raise UnsupportedModel(
            "vocabulary: it has neither the 256 byte tokens <0x00> … <0xFF> nor an unknown token"
        )

    def make(ids: dict[str, int], pairs: list[tuple[str, str]]) -> Library:
        from tokenizers import Tokenizer as Library
        from tokenizers.models import BPE

        has_bytes = all(name in ids for name in names)
        return Library(BPE(ids, pairs, byte_fallback=has_bytes, unk_token=unknown))

    return MergeRules(make, str, names if unknown is None else (*names, unknown))
