"""Merge rules of a vocabulary, as cuts: which token is made of which two.

Byte-level vocabularies list their merges. A SentencePiece-style vocabulary has scores instead: it
merges, again and again, the two neighbours whose joined text is the token of the highest score,
leftmost first. Listing, for every token in order of score, each way to cut it in two tokens gives
an ordinary BPE the same choices, as long as no two such tokens have one score. This module owns
the list of either kind and its cache. A cached list also says that the vocabulary was checked.

Most cuts by score can never happen. Whatever stands around them, neighbours a and b are only ever
reached the way the text a+b alone would reach them; that run has one last step, so at most one cut
of a token is live. `_Derivation` drops a cut when a better merge across the seam comes first, and
keeps it in every case it cannot decide: a cut too many changes nothing but the time to load.

Cache file: magic | u32 CRC-32 of the rest | u32 token ids … | u16 cut positions …
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import zlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from twostroke.errors import CorruptModel
from twostroke.spec.vocabulary import Texts, TokenType, Vocabulary, VocabularyKind

# A smaller vocabulary is read or derived as soon as a file is found.
LEAST_CACHED = 4096
_MAGIC = b"2STROKE-CUTS-1\n\0"
_HEADER_BYTES = len(_MAGIC) + 4
_ENTRY_BYTES = 6
# Never made out of plain text: they stand for themselves or for a byte.
_UNMERGED = frozenset({TokenType.UNKNOWN, TokenType.CONTROL, TokenType.BYTE})


@dataclass(frozen=True, slots=True)
class Cuts:
    """Parallel arrays in order of rank: token id, and after how many characters it is cut."""

    tokens: array[int]
    positions: array[int]

    def get_pairs(self, texts: Sequence[str]) -> list[tuple[str, str]]:
        """The two halves of each cut; `texts` is indexed by token id."""
        words = map(texts.__getitem__, self.tokens)
        return [(word[:at], word[at:]) for word, at in zip(words, self.positions, strict=True)]

    def get_pairs_of(self, texts: Mapping[int, str], num_tokens: int) -> list[tuple[str, str]]:
        """The two halves of each cut of the tokens in `texts`, by id, in order of rank."""
        wanted = np.zeros(num_tokens, np.bool_)
        wanted[list(texts)] = True
        chosen = np.flatnonzero(wanted[np.asarray(self.tokens)]).tolist()
        words = ((texts[self.tokens[index]], self.positions[index]) for index in chosen)
        return [(word[:at], word[at:]) for word, at in words]


def get_ids(vocabulary: Vocabulary) -> dict[str, int]:
    """Token ids by text. Raises CorruptModel where two tokens have one text."""
    tokens = list(vocabulary.tokens)
    ids = {text: token for token, text in enumerate(tokens)}
    if len(ids) != len(tokens):
        twice = next(text for token, text in enumerate(tokens) if ids[text] != token)
        raise CorruptModel(f"vocabulary: token {twice!r} occurs twice")
    return ids


def get_cuts(vocabulary: Vocabulary) -> Cuts:
    """The cuts of a vocabulary, from the cache where they are known.

    A cache file that is missing, damaged or of another vocabulary is made anew. Raises CorruptModel
    where two tokens have one text, or a merge is not of two tokens to one.
    """
    path = _get_cache_folder() / "tokenizers" / f"{_get_hash(vocabulary)}.cuts"
    num_tokens = len(vocabulary.tokens)
    cached = _read(path, num_tokens) if num_tokens >= LEAST_CACHED else []
    if cached:
        return cached[0]
    ids = get_ids(vocabulary)
    is_listed = vocabulary.kind is VocabularyKind.BYTE_BPE
    cuts = read_cuts(vocabulary, ids) if is_listed else derive_cuts(vocabulary)
    # A cache that cannot be written costs time at the next start and nothing else.
    with contextlib.suppress(OSError):
        if num_tokens >= LEAST_CACHED:
            _write(path, cuts)
    return cuts


def read_cuts(vocabulary: Vocabulary, ids: Mapping[str, int]) -> Cuts:
    """The cuts of a byte-level vocabulary, from its merges; ids: of its tokens, by text."""
    tokens, positions = array("I"), array("H")
    for rank, line in enumerate(vocabulary.merges):
        # Searched from the second character on, as a merge may begin with a space.
        at = line.find(" ", 1)
        left, right = line[:at], line[at + 1 :]
        if not 0 < at < 2**16 or left not in ids or right not in ids or left + right not in ids:
            raise CorruptModel(f"vocabulary: merge {rank}, {line!r}, is not of two tokens to one")
        tokens.append(ids[left + right])
        positions.append(at)
    return Cuts(tokens, positions)


def derive_cuts(vocabulary: Vocabulary) -> Cuts:
    """The cuts of a SentencePiece-style vocabulary, computed."""
    derivation = _Derivation(vocabulary)
    texts, scores = list(vocabulary.tokens), vocabulary.scores
    mergeable = [token for token, kind in enumerate(vocabulary.types) if kind not in _UNMERGED]
    mergeable.sort(key=lambda token: len(texts[token]))
    kept = {token: cuts for token in mergeable if (cuts := derivation.find_cuts(texts[token]))}
    tokens, positions = array("I"), array("H")
    for token in sorted(sorted(kept), key=scores.__getitem__, reverse=True):
        for at in kept[token]:
            tokens.append(token)
            positions.append(at)
    return Cuts(tokens, positions)


# The last merge that makes a token: its score and the two pieces it joins. A plain tuple, because
# a quarter of a million of them are made in the first second of a model's life.
_Made = tuple[float, str, str]


class _Derivation:
    """Finds the cuts of tokens, shorter tokens first.

    `_last` holds what makes a token: None for tokens no merge makes; for a token with exactly one
    cut whose every step joins pieces of at least its own score, that merge. Such a token's merges
    happen in falling order of score, so they can be undone in rising order. Any other token is
    absent: undecided.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.scores = {
            text: score
            for text, score, kind in zip(
                vocabulary.tokens, vocabulary.scores, vocabulary.types, strict=True
            )
            if kind not in _UNMERGED
        }
        self._last: dict[str, _Made | None] = {}

    def find_cuts(self, text: str) -> list[int]:
        """Positions at which `text` is cut in two tokens, without those that can never happen."""
        scores = self.scores
        places = [at for at in range(1, len(text)) if text[:at] in scores and text[at:] in scores]
        if len(places) > 1:
            places = [at for at in places if self._may_happen(text[:at], text[at:])]
        if not places:
            self._last[text] = None
        elif len(places) == 1:
            score, left, right = scores[text], text[: places[0]], text[places[0] :]
            if self._is_above(left, score) and self._is_above(right, score):
                self._last[text] = (score, left, right)
        return places

    def _is_above(self, part: str, score: float) -> bool:
        if part not in self._last:
            return False
        made = self._last[part]
        return made is None or made[0] >= score

    def _may_happen(self, left: str, right: str) -> bool:
        """False when a merge across the seam always comes before `left` and `right` stand.

        The halves are taken apart, latest merge first. Where a merge that made the left half's end
        is undone, the end's last piece and the right half's beginning stood side by side before;
        had their merge a higher score, it would have been taken instead. Likewise on the right,
        where the merge across the seam lies further left and so wins a tie too.
        """
        last, get_score = self._last, self.scores.get
        if left not in last or right not in last:
            return True
        made_left, made_right = last[left], last[right]
        while True:
            if made_left and (made_right is None or made_right[0] > made_left[0]):
                left = made_left[2]
                across = get_score(left + right)
                if across is not None and across > made_left[0]:
                    return False
                made_left = last[left]
            elif made_right:
                right = made_right[1]
                across = get_score(left + right)
                if across is not None and across >= made_right[0]:
                    return False
                made_right = last[right]
            else:
                return True


def _get_cache_folder() -> Path:
    return Path(os.environ.get("TWOSTROKE_CACHE") or Path.home() / ".cache" / "twostroke")


def _get_hash(vocabulary: Vocabulary) -> str:
    digest = hashlib.sha256(vocabulary.kind.value.encode())
    for each in (vocabulary.tokens, vocabulary.merges):
        texts = each if isinstance(each, Texts) else Texts.join(each)
        starts = np.asarray(texts.starts, np.int64)
        digest.update(struct.pack("<Q", starts.size))
        if starts.size:
            digest.update((starts - starts[0]).tobytes())
            digest.update(memoryview(texts.data)[texts.starts[0] : texts.ends[-1]])
    digest.update(np.asarray(vocabulary.scores, np.float64).tobytes())
    digest.update(bytes(vocabulary.types))
    return digest.hexdigest()


def _read(path: Path, num_tokens: int) -> list[Cuts]:
    """The cached cuts, or an empty list when there are none to trust."""
    try:
        data = path.read_bytes()
    except OSError:
        return []
    body = data[_HEADER_BYTES:]
    if data[:_HEADER_BYTES] != _MAGIC + struct.pack("<I", zlib.crc32(body)):
        return []
    count = len(body) // _ENTRY_BYTES
    tokens, positions = array("I"), array("H")
    tokens.frombytes(body[: 4 * count])
    positions.frombytes(body[4 * count :])
    is_sound = not count or int(np.asarray(tokens).max()) < num_tokens
    return [Cuts(tokens, positions)] if is_sound else []


def _write(path: Path, cuts: Cuts) -> None:
    import tempfile  # of use at a model's first start only

    body = cuts.tokens.tobytes() + cuts.positions.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(_MAGIC + struct.pack("<I", zlib.crc32(body)) + body)
    os.replace(file.name, path)
