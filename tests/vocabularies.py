"""Small vocabularies of each kind, made by hand, for tests that need no model file."""

from __future__ import annotations

from collections.abc import Sequence

from twostroke.spec.vocabulary import TokenType, Vocabulary, VocabularyKind
from twostroke.text.tokens import get_byte_letters

END = "<|im_end|>"
START = "<|im_start|>"


def make_byte_bpe(
    words: Sequence[str] = ("the", " the", "hello", " world", "ing", "été", "中文"),
    pre: str = "gpt-2",
    user_defined: Sequence[str] = (),
    control: tuple[str, str] = (START, END),
) -> Vocabulary:
    """Byte-level BPE: two control tokens, all 256 bytes, then each word's beginnings, merged."""
    letters = {byte: letter for letter, byte in get_byte_letters().items()}
    tokens, merges = [*control, *(letters[byte] for byte in range(256))], []
    for word in words:
        spelled = "".join(letters[byte] for byte in word.encode())
        for at in range(1, len(spelled)):
            if spelled[: at + 1] not in tokens:
                tokens.append(spelled[: at + 1])
                merges.append(f"{spelled[:at]} {spelled[at]}")
    types = [TokenType.CONTROL] * 2 + [TokenType.NORMAL] * (len(tokens) - 2)
    return Vocabulary(
        VocabularyKind.BYTE_BPE,
        tokens=[*tokens, *user_defined],
        types=[*map(int, types), *(int(TokenType.USER_DEFINED) for _ in user_defined)],
        merges=merges,
        pre=pre,
        bos=0,
        eos=1,
        stop_tokens=frozenset({1}),
    )


def make_sentencepiece(
    pieces: dict[str, float] | None = None,
    *,
    add_space_prefix: bool = False,
    add_bos: bool = True,
    user_defined: Sequence[str] = (),
) -> Vocabulary:
    """SentencePiece-style: <unk>, <s>, </s>, 256 bytes, then `pieces` with their scores."""
    if pieces is None:
        longer = ["th", "the", "▁the", "he", "ll", "hell", "o▁", "▁w", "or", "▁wor", "ld"]
        singles = "▁thelowrdabc.é"
        pieces = {piece: -float(rank) for rank, piece in enumerate([*longer, *singles])}
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    types += [TokenType.BYTE] * 256 + [TokenType.NORMAL] * len(pieces)
    types += [TokenType.USER_DEFINED] * len(user_defined)
    return Vocabulary(
        VocabularyKind.SENTENCEPIECE,
        tokens=["<unk>", "<s>", "</s>", *names, *pieces, *user_defined],
        types=list(map(int, types)),
        scores=[0.0] * 259 + list(pieces.values()) + [0.0] * len(user_defined),
        bos=1,
        eos=2,
        unknown=0,
        stop_tokens=frozenset({2}),
        add_bos=add_bos,
        add_space_prefix=add_space_prefix,
    )
