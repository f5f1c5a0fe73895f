"""A Vocabulary from a GGUF file's `tokenizer.*` keys, with llama.cpp's defaults.

Checking that a vocabulary is there and of a known kind is cheap and done when the file is opened;
building it (a quarter of a million strings for gemma) waits until somebody needs it. Keys under
`tokenizer.ggml.` that are not understood are refused: they may change which tokens a text gives.
"""

from __future__ import annotations

from array import array

import numpy as np
from numpy.typing import NDArray

from twostroke.spec.vocabulary import Texts, TokenType, Vocabulary, VocabularyKind
from twostroke.weights.gguf import ValueType
from twostroke.weights.gguf_metadata import Metadata
from twostroke.weights.stop_tokens import is_turn_end
from twostroke.weights.string_array import may_repeat

_PREFIX = "tokenizer.ggml."
_UNDERSTOOD = frozenset(
    {
        "model",
        "pre",
        "tokens",
        "token_type",
        "scores",
        "merges",
        "bos_token_id",
        "eos_token_id",
        "eot_token_id",
        "eom_token_id",
        "unknown_token_id",
        "padding_token_id",
        "add_bos_token",
        "add_eos_token",
        "add_space_prefix",
    }
)
# Of use to encoders, infilling or training; generation never needs them.
_HARMLESS = frozenset(
    {
        "seperator_token_id",
        "separator_token_id",
        "cls_token_id",
        "mask_token_id",
        "add_sep_token",
        "prefix_token_id",
        "suffix_token_id",
        "middle_token_id",
        "fim_pre_token_id",
        "fim_suf_token_id",
        "fim_mid_token_id",
        "fim_pad_token_id",
        "fim_rep_token_id",
        "fim_sep_token_id",
        "token_type_count",
        "remove_extra_whitespaces",  # only read for Unigram vocabularies, which are refused
        "precompiled_charsmap",
        "added_tokens",
    }
)
# Byte-level pre-tokenisers whose models expect a beginning-of-text token unless told otherwise.
_PRE_ADDS_BOS = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken"})


def check_vocabulary(metadata: Metadata, vocab_size: int) -> None:
    """Check the kind of vocabulary and its size against the embedding table's rows.

    Raises: UnsupportedModel for another kind or an unknown key, CorruptModel for another size.
    """
    for key in metadata.file.entries:
        name = key.removeprefix(_PREFIX)
        if key.startswith(_PREFIX) and name not in _UNDERSTOOD and name not in _HARMLESS:
            metadata.refuse_unsupported(key, "is not understood; it may change the tokens")
    _get_kind(metadata)
    tokens = metadata.get_array(_PREFIX + "tokens", ValueType.STRING)
    if tokens.count != vocab_size:
        problem = f"has {tokens.count} items, but the embedding table has {vocab_size} rows"
        metadata.refuse(_PREFIX + "tokens", problem)


def read_vocabulary(metadata: Metadata) -> Vocabulary:
    """Build the vocabulary of a checked file.

    Raises: CorruptModel naming the key for text that is not UTF-8, lists of different lengths,
    token types or ids out of range, or a token that appears twice.
    """
    kind = _get_kind(metadata)
    tokens = _read_tokens(metadata)
    types = _read_types(metadata, len(tokens))
    plain = kind is VocabularyKind.SENTENCEPIECE
    bos = _read_id(metadata, "bos_token_id", 1 if plain else None, len(tokens))
    eos = _read_id(metadata, "eos_token_id", 2 if plain else None, len(tokens))
    pre = metadata.get_text(_PREFIX + "pre", "default")
    template = "tokenizer.chat_template"
    return Vocabulary(
        kind=kind,
        tokens=tokens,
        types=types.tobytes(),
        scores=_read_scores(metadata, len(tokens)) if plain else (),
        merges=() if plain else metadata.get_strings(_PREFIX + "merges"),
        pre=pre,
        bos=bos,
        eos=eos,
        unknown=_read_id(metadata, "unknown_token_id", 0 if plain else None, len(tokens)),
        padding=_read_id(metadata, "padding_token_id", None, len(tokens)),
        stop_tokens=_find_stop_tokens(metadata, tokens, types, eos),
        add_bos=_read_adds(metadata, "bos", bos, plain or pre in _PRE_ADDS_BOS),
        add_eos=_read_adds(metadata, "eos", eos, False),
        add_space_prefix=metadata.get_flag(_PREFIX + "add_space_prefix", plain),
        chat_template=metadata.get_text(template) if metadata.has(template) else None,
    )


def _get_kind(metadata: Metadata) -> VocabularyKind:
    key = _PREFIX + "model"
    model = metadata.get_text(key)
    kinds = (VocabularyKind.BYTE_BPE, VocabularyKind.SENTENCEPIECE)
    if model not in {kind.value for kind in kinds}:
        known = ", ".join(kind.value for kind in kinds)
        metadata.refuse_unsupported(key, f"is '{model}'; supported are {known}")
    return VocabularyKind(model)


def _read_tokens(metadata: Metadata) -> Texts:
    """The token texts; an empty one gets the name llama.cpp gives it, so that texts differ."""
    key = _PREFIX + "tokens"
    texts = metadata.get_strings(key)
    starts, ends = np.asarray(texts.starts, np.int64), np.asarray(texts.ends, np.int64)
    if (starts < ends).all() and not may_repeat(metadata.file.mapping, starts, ends):
        return texts
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(texts)]
    seen: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if seen.setdefault(token, index) != index:
            metadata.refuse(key, f"has {token!r} twice, as {seen[token]} and {index}")
    return Texts.join(tokens)


def _read_types(metadata: Metadata, count: int) -> NDArray[np.uint8]:
    key = _PREFIX + "token_type"
    if not metadata.has(key):
        return np.full(count, TokenType.NORMAL, np.uint8)
    types = metadata.get_numbers(key, count, ValueType.INT32, ValueType.UINT32)
    wrong = np.flatnonzero((types < min(TokenType)) | (types > max(TokenType)))  # type: ignore[operator]
    if wrong.size:
        metadata.refuse(key, f"gives token {wrong[0]} the unknown type {types[wrong[0]]}")
    return types.astype(np.uint8)


def _read_scores(metadata: Metadata, count: int) -> array[float]:
    key = _PREFIX + "scores"
    scores = metadata.get_numbers(key, count, ValueType.FLOAT32).astype(np.float64)
    if not np.isfinite(scores).all():
        metadata.refuse(key, "has a score that is not finite")
    return array("d", scores.tobytes())


def _read_id(metadata: Metadata, name: str, default: int | None, count: int) -> int | None:
    """A special token's id; a default beyond the vocabulary is none at all."""
    key = _PREFIX + name
    if not metadata.has(key):
        return default if default is not None and default < count else None
    token = metadata.get_size(key, least=0)
    if token >= count:
        metadata.refuse(key, f"is {token}, but there are {count} tokens")
    return token


def _read_adds(metadata: Metadata, name: str, token: int | None, default: bool) -> bool:
    """Whether the token is added to every text; impossible without the token."""
    key = f"{_PREFIX}add_{name}_token"
    adds = metadata.get_flag(key, default and token is not None)
    if adds and token is None:
        metadata.refuse(key, f"is true, but there is no {name}_token_id")
    return adds


def _find_stop_tokens(
    metadata: Metadata,
    tokens: Texts,
    types: NDArray[np.uint8],
    eos: int | None,
) -> frozenset[int]:
    """Ids that end a turn or text: those named by key, and control tokens known to mean it."""
    stops = {eos} if eos is not None else set()
    for name in ("eot_token_id", "eom_token_id"):
        token = _read_id(metadata, name, None, len(tokens))
        if token is not None:
            stops.add(token)
    for kind in (TokenType.CONTROL, TokenType.USER_DEFINED):
        is_control = kind is TokenType.CONTROL
        for index in np.flatnonzero(types == kind).tolist():
            if is_turn_end(tokens[index], is_control=is_control):
                stops.add(index)
    return frozenset(stops)
