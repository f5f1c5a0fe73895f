"""tokenizer.json files: opened with the `tokenizers` library and read into the house's tables.

The file decides how text is normalised, cut and merged, and which special tokens a template puts
around it; this module only switches off what a file may leave on by accident (padding,
truncation) and finds out how its tokens spell bytes. A file it cannot read back exactly is refused.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twostroke.errors import CorruptModel, UnsupportedModel
from twostroke.spec.vocabulary import TokenType
from twostroke.text.tokens import SPACE_MARK, Spelling, TokenTable

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library


class JsonEncoder:
    """Encodes with a tokenizer.json.

    Whether special tokens are parsed is a property of the library's object, not of a call; so
    that calls from several threads cannot disturb each other, each answer has its own object. The
    second one is made when first asked for.
    """

    def __init__(self, path: Path, parsing: Library) -> None:
        self._path = path
        self._parsing = parsing
        self._ignoring: list[Library] = []
        self._lock = threading.Lock()

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """See Encoder."""
        library = self._parsing if parse_special else self._get_ignoring()
        ids: list[int] = library.encode(text, add_special_tokens=False).ids
        return ids

    def prepare(self) -> None:
        """See Encoder: a tokenizer.json is opened whole."""

    def _get_ignoring(self) -> Library:
        with self._lock:
            if not self._ignoring:
                library = _load(self._path)
                library.encode_special_tokens = True
                self._ignoring.append(library)
            return self._ignoring[0]


@dataclass(frozen=True, slots=True)
class OpenedJson:
    """A tokenizer.json: its tokens, its encoder, and what it puts around a text.

    first, last: the token it adds before and after, or an empty list. strips_space: it also puts a
    space before the text, which decoding takes away.
    """

    table: TokenTable
    encoder: JsonEncoder
    first: list[int]
    last: list[int]
    strips_space: bool


def open_tokenizer_json(path: Path) -> OpenedJson:
    """Open a tokenizer.json.

    Raises CorruptModel when it cannot be read, UnsupportedModel when its tokens spell text in a
    way this engine does not know.
    """
    library = _load(path)
    spelling, strips_space = _find_spelling(library, path)
    bare: list[int] = library.encode("a", add_special_tokens=False).ids
    whole: list[int] = library.encode("a", add_special_tokens=True).ids
    before = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
    after = len(whole) - before - len(bare)
    if before > 1 or after > 1:
        raise UnsupportedModel(f"{path}: puts more than one token before or after a text")
    encoder = JsonEncoder(path, library)
    table = _build_table(library, spelling)
    return OpenedJson(table, encoder, whole[:before], whole[len(whole) - after :], strips_space)


class _LibraryErrors:
    """Turns the library's own errors into CorruptModel; it raises them as plain `Exception`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        if kind is Exception:
            raise CorruptModel(f"{self._path}: not a tokenizer.json: {error}") from error


def _load(path: Path) -> Library:
    from tokenizers import Tokenizer as Library

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CorruptModel(f"{path}: cannot be read: {error}") from error
    with _LibraryErrors(path):
        library = Library.from_str(text)
    library.no_padding()
    library.no_truncation()
    return library


def _find_spelling(library: Library, path: Path) -> tuple[Spelling, bool]:
    """How tokens spell bytes, read off the file's decoder."""
    decoder = library.decoder
    parts = [] if decoder is None else list(_flatten(json.loads(decoder.__getstate__())))
    kinds = {part["type"] for part in parts}
    if "ByteLevel" in kinds:
        return Spelling.BYTE_LETTERS, False
    replaces = any(
        part["type"] == "Replace" and part["pattern"] == {"String": SPACE_MARK} for part in parts
    )
    metaspaces = [part for part in parts if part["type"] == "Metaspace"]
    if replaces or metaspaces:
        strips = any(part["type"] == "Strip" and part["start"] > 0 for part in parts) or any(
            part.get("prepend_scheme", "always") != "never" for part in metaspaces
        )
        return Spelling.MARKED_SPACES, strips
    found = ", ".join(sorted(kinds)) or "none"
    raise UnsupportedModel(
        f"{path}: unknown kind of decoder ({found}); known are ByteLevel,"
        " Metaspace, and Replace of U+2581"
    )


def _flatten(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if decoder["type"] == "Sequence":
        for part in decoder["decoders"]:
            yield from _flatten(part)
    else:
        yield decoder


def _build_table(library: Library, spelling: Spelling) -> TokenTable:
    ids = library.get_vocab(with_added_tokens=True)
    size = max(ids.values(), default=-1) + 1
    texts, types = [""] * size, [int(TokenType.UNUSED)] * size
    for text, token in ids.items():
        texts[token] = text
        types[token] = TokenType.NORMAL
        is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        if is_byte and spelling is Spelling.MARKED_SPACES:
            types[token] = TokenType.BYTE
    for token, added in library.get_added_tokens_decoder().items():
        types[token] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    return TokenTable(texts, types, spelling)
