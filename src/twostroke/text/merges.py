"""Merge rules for a SentencePiece-style vocabulary, derived from its scores.

Such a vocabulary merges, again and again, the two neighbours whose joined text is the token of the
highest score, leftmost first. Listing, for every token in order of score, each way to cut it in
two tokens gives an ordinary BPE the same choices. This module owns that list and its cache.

Most cuts can never happen. Whatever stands around them, neighbours a and b are only ever reached
the way the text a+b alone would reach them; that run has one last step, so at most one cut of a
token is live. `_Derivation` drops a cut when a better merge across the seam comes first, and keeps
it in every case it cannot decide: a cut too many changes nothing but the time to load.

Cache file: magic | u32 CRC-32 of the rest | u32 token ids … | u16 cut positions …
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import tempfile
import zlib
from array import array
from dataclasses import dataclass
from pathlib import Path

from twostroke.spec.vocabulary import TokenType, Vocabulary

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

    def get_pairs(self, texts: list[str]) -> list[tuple[str, str]]:
        """The two halves of each cut; `texts` is indexed by token id."""
        words = map(texts.__getitem__, self.tokens)
        return [(word[:at], word[at:]) for word, at in zip(words, self.positions, strict=True)]


def get_cuts(vocabulary: Vocabulary) -> Cuts:
    """The cuts of a SentencePiece-style vocabulary, from the cache where they are known.

    A cache file that is missing, damaged or of another vocabulary is made anew.
    """
    path = _get_cache_folder() / "tokenizers" / f"{_get_hash(vocabulary)}.cuts"
    cached = _read(path, len(vocabulary.tokens))
    if cached:
        return cached[0]
    cuts = derive_cuts(vocabulary)
    # A cache that cannot be written costs time at the next start and nothing else.
    with contextlib.suppress(OSError):
        _write(path, cuts)
    return cuts


def derive_cuts(vocabulary: Vocabulary) -> Cuts:
    """The cuts of a SentencePiece-style vocabulary, computed."""
    derivation = _Derivation(vocabulary)
    by_length = sorted(derivation.scores, key=len)
    kept = {text: places for text in by_length if (places := derivation.find_cuts(text))}
    ids = {text: index for index, text in enumerate(vocabulary.tokens)}
    ranked = sorted(kept, key=lambda text: (-derivation.scores[text], ids[text]))
    tokens, positions = array("I"), array("H")
    for text in ranked:
        for at in kept[text]:
            tokens.append(ids[text])
            positions.append(at)
    return Cuts(tokens, positions)


class _Derivation:
    """Finds the cuts of tokens, shorter tokens first.

    `formed` holds, for each token with exactly one cut whose every step merges tokens of at least
    its own score, that cut. Such a token's merges happen in falling order of score, so they can be
    undone in rising order. `bases` are tokens no merge makes. Any other token is left undecided.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.scores = {
            text: score
            for text, score, kind in zip(
                vocabulary.tokens, vocabulary.scores, vocabulary.types, strict=True
            )
            if kind not in _UNMERGED
        }
        self._formed: dict[str, tuple[str, str]] = {}
        self._bases: set[str] = set()

    def find_cuts(self, text: str) -> list[int]:
        """Positions at which `text` is cut in two tokens, without those that can never happen."""
        scores = self.scores
        places = [at for at in range(1, len(text)) if text[:at] in scores and text[at:] in scores]
        if len(places) > 1:
            places = [at for at in places if self._may_happen(text[:at], text[at:])]
        if not places:
            self._bases.add(text)
        elif len(places) == 1:
            left, right = text[: places[0]], text[places[0] :]
            if self._is_above(left, scores[text]) and self._is_above(right, scores[text]):
                self._formed[text] = (left, right)
        return places

    def _is_above(self, part: str, score: float) -> bool:
        return part in self._bases or (part in self._formed and self.scores[part] >= score)

    def _may_happen(self, left: str, right: str) -> bool:
        """False when a merge across the seam always comes before `left` and `right` stand.

        The halves are taken apart, latest merge first. Where a merge that made the left half's end
        is undone, the end's last piece and the right half's beginning stood side by side before;
        had their merge a higher score, it would have been taken instead. Likewise on the right,
        where the merge across the seam lies further left and so wins a tie too.
        """
        formed, scores, bases = self._formed, self.scores, self._bases
        for half in (left, right):
            if half not in formed and half not in bases:
                return True
        while True:
            left_cut, right_cut = formed.get(left), formed.get(right)
            if left_cut and not (right_cut and scores[right] <= scores[left]):
                made, left = scores[left], left_cut[1]
                across = scores.get(left + right)
                if across is not None and across > made:
                    return False
            elif right_cut:
                made, right = scores[right], right_cut[0]
                across = scores.get(left + right)
                if across is not None and across >= made:
                    return False
            else:
                return True


def _get_cache_folder() -> Path:
    return Path(os.environ.get("TWOSTROKE_CACHE") or Path.home() / ".cache" / "twostroke")


def _get_hash(vocabulary: Vocabulary) -> str:
    digest = hashlib.sha256("\0".join(vocabulary.tokens).encode("utf-8", "surrogatepass"))
    digest.update(array("d", vocabulary.scores).tobytes())
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
    return [Cuts(tokens, positions)] if max(tokens, default=0) < num_tokens else []


def _write(path: Path, cuts: Cuts) -> None:
    body = cuts.tokens.tobytes() + cuts.positions.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(_MAGIC + struct.pack("<I", zlib.crc32(body)) + body)
    os.replace(file.name, path)
