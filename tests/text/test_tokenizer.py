"""Encoding and decoding with small vocabularies of every kind."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twostroke.errors import CorruptModel, InvalidParameter, UnsupportedModel
from twostroke.spec.vocabulary import Vocabulary, VocabularyKind
from twostroke.text.tokenizer import Tokenizer, build_tokenizer
from vocabularies import END, START, make_byte_bpe, make_sentencepiece


@functools.cache
def get_byte_bpe() -> Tokenizer:
    """Byte-level BPE with two user-defined tokens."""
    return build_tokenizer(make_byte_bpe(user_defined=["\n\n", "<b>"]))


@functools.cache
def get_plain() -> Tokenizer:
    """SentencePiece-style without a space before the text, with two user-defined tokens."""
    return build_tokenizer(make_sentencepiece(user_defined=["\n\n", "<b>"]))


@functools.cache
def get_prefixed() -> Tokenizer:
    """SentencePiece-style with a space before the text."""
    return build_tokenizer(make_sentencepiece(add_space_prefix=True))


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
FRAGMENTS = st.lists(
    st.sampled_from([START, END, "<s>", "</s>", "<unk>", "<b>", "the", " ", "\n\n", "<", "é", "▁"])
).map("".join)


@given(TEXT | FRAGMENTS)
def test_byte_level_text_survives_encoding(text: str) -> None:
    assert get_byte_bpe().decode(get_byte_bpe().encode(text)) == text


@given(TEXT | FRAGMENTS)
def test_sentencepiece_text_survives_but_for_the_space_mark(text: str) -> None:
    ids = get_plain().encode(text, add_special=False)
    assert get_plain().decode(ids) == text.replace("▁", " ")


@given(TEXT)
def test_a_space_put_before_the_text_is_taken_away_again(text: str) -> None:
    ids = get_prefixed().encode(text, parse_special=False)
    assert get_prefixed().decode(ids, skip_special=True) == text.replace("▁", " ")


def test_a_continuation_keeps_its_leading_space() -> None:
    ids = get_prefixed().encode("the", add_special=False)
    assert get_prefixed().decode(ids) == "the"
    assert get_prefixed().decode(ids, after_prompt=True) == " the"


@pytest.mark.parametrize("get", [get_byte_bpe, get_plain, get_prefixed])
@given(text=FRAGMENTS)
def test_unparsed_text_never_gives_a_control_token(get: Callable[[], Tokenizer], text: str) -> None:
    tokenizer = get()
    ids = tokenizer.encode(text, add_special=False, parse_special=False)
    assert not any(map(tokenizer.is_control, ids))


def test_control_tokens_in_text_are_parsed_when_asked() -> None:
    assert get_byte_bpe().encode(f"{START}the{END}") == [0, *get_byte_bpe().encode("the"), 1]


def test_user_defined_tokens_are_always_found() -> None:
    for tokenizer in (get_byte_bpe(), get_plain()):
        for parse in (True, False):
            ids = tokenizer.encode("a<b>\n\n", add_special=False, parse_special=parse)
            assert [tokenizer.get_token_text(token) for token in ids[-2:]] == ["<b>", "\n\n"]


def test_the_begin_token_is_added_once() -> None:
    assert get_plain().encode("the")[:1] == [1]
    assert get_plain().encode("<s>the") == get_plain().encode("the")
    assert get_plain().encode("<s><s>the") == [1, *get_plain().encode("the")]
    assert get_plain().encode("the", add_special=False) == get_plain().encode("the")[1:]
    assert get_plain().encode("") == [1]


def test_the_end_token_is_added_once() -> None:
    tokenizer = build_tokenizer(replace(make_byte_bpe(), add_eos=True))
    assert tokenizer.encode("the")[-1:] == [1]
    assert tokenizer.encode(f"the{END}") == tokenizer.encode("the")


def test_stop_ids_hold_the_end_token() -> None:
    tokenizer = build_tokenizer(replace(make_byte_bpe(), stop_tokens=frozenset({5})))
    assert tokenizer.stop_ids == {1, 5}
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)


def test_control_tokens_are_left_out_of_decoded_text_when_asked() -> None:
    ids = get_byte_bpe().encode(f"{START}the{END}")
    assert get_byte_bpe().decode(ids) == f"{START}the{END}"
    assert get_byte_bpe().decode(ids, skip_special=True) == "the"
    assert get_byte_bpe().get_token_bytes(0) == START.encode()


def test_bytes_that_are_no_text_become_replacement_characters() -> None:
    ids = [get_plain().encode("é", add_special=False), [3 + 0xC3], [3 + 0x28]]
    assert get_plain().decode([token for each in ids for token in each]) == "é\ufffd("


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", 5, None, b"bytes", ["a"]])
def test_what_is_no_text_is_refused(text: object) -> None:
    for tokenizer in (get_byte_bpe(), get_plain()):
        with pytest.raises(InvalidParameter, match="prompt"):
            tokenizer.encode(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("token", [-1, 100_000])
def test_ids_out_of_range_are_refused(token: int) -> None:
    tokenizer = get_byte_bpe()
    for ask in (tokenizer.get_token_bytes, tokenizer.get_token_text, tokenizer.is_control):
        with pytest.raises(InvalidParameter, match="token"):
            ask(token)
    with pytest.raises(InvalidParameter, match="token"):
        tokenizer.decode([token])


def test_a_byte_without_a_token_is_dropped_and_still_keeps_its_neighbours_apart() -> None:
    vocabulary = make_byte_bpe(["the"])
    missing = vocabulary.tokens.index("Ā")  # the letter for byte 0
    tokens = [text for token, text in enumerate(vocabulary.tokens) if token != missing]
    tokenizer = build_tokenizer(replace(vocabulary, tokens=tokens, types=vocabulary.types[1:]))
    assert tokenizer.decode(tokenizer.encode("the\0the")) == "thethe"
    assert len(tokenizer.encode("th\0e")) == 2
    assert max(tokenizer.encode("\0\0the")) < tokenizer.vocab_size


def test_one_word_of_200_kilobytes_is_encoded() -> None:
    text = "the" * 66_667
    for tokenizer in (get_byte_bpe(), get_plain()):
        ids = tokenizer.encode(text, add_special=False)
        assert len(ids) == 66_667
        assert tokenizer.decode(ids) == text


def test_text_is_cut_into_words_before_merging() -> None:
    vocabulary = make_byte_bpe(["a b"])
    assert vocabulary.tokens[-1] == "aĠb"
    assert len(build_tokenizer(vocabulary).encode("a b")) == 3


def test_a_word_that_is_a_token_is_taken_whole_by_llama3() -> None:
    vocabulary = make_byte_bpe(["abc"])
    for pre, count in (("gpt-2", 2), ("llama-bpe", 1)):
        merges = [line for line in vocabulary.merges if line != "ab c"]
        tokenizer = build_tokenizer(replace(vocabulary, merges=merges, pre=pre))
        assert len(tokenizer.encode("abc")) == count


def break_vocabulary(**changes: object) -> Vocabulary:
    """A byte-level vocabulary with fields replaced."""
    return replace(make_byte_bpe(), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("vocabulary", "error", "message"),
    [
        (break_vocabulary(pre="no-such"), UnsupportedModel, "'no-such'.*known ones.*smollm"),
        (break_vocabulary(merges=["t h", "nospace"]), CorruptModel, "merge 1, 'nospace'"),
        (break_vocabulary(merges=["t zzz"]), CorruptModel, "merge 0"),
        (break_vocabulary(types=[1]), CorruptModel, "1 token types"),
        (break_vocabulary(bos=100_000), CorruptModel, "100000"),
        (break_vocabulary(tokens=["a", "a"], types=[1, 1]), CorruptModel, "'a' occurs twice"),
        (break_vocabulary(kind=VocabularyKind.SENTENCEPIECE), CorruptModel, "0 token scores"),
        (break_vocabulary(kind=VocabularyKind.TOKENIZER_JSON), CorruptModel, "tokenizer.json"),
        (
            Vocabulary(VocabularyKind.SENTENCEPIECE, tokens=["a"], types=[1], scores=[0.0]),
            UnsupportedModel,
            "byte tokens",
        ),
    ],
)
def test_a_vocabulary_that_contradicts_itself_is_refused(
    vocabulary: Vocabulary, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build_tokenizer(vocabulary)


def save_json(path: Path, *, decoder: str = "ByteLevel") -> Vocabulary:
    """A tokenizer.json with the byte-level test vocabulary; it adds the begin token itself."""
    from tokenizers import AddedToken, decoders, processors
    from tokenizers import Tokenizer as Library
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary = make_byte_bpe()
    ids = {text: token for token, text in enumerate(vocabulary.tokens)}
    pairs = [(line.split(" ")[0], line.split(" ")[1]) for line in vocabulary.merges]
    library = Library(BPE(ids, pairs))
    library.pre_tokenizer = ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel() if decoder == "ByteLevel" else decoders.WordPiece()
    library.add_special_tokens([AddedToken(START, special=True), AddedToken(END, special=True)])
    library.add_tokens([AddedToken("<b>", special=False)])
    library.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, 0)]
    )
    library.enable_truncation(4)
    library.save(str(path))
    return Vocabulary(
        VocabularyKind.TOKENIZER_JSON, eos=1, stop_tokens=frozenset({1}), json_path=path
    )


@given(text=TEXT | FRAGMENTS)
def test_a_tokenizer_json_gives_the_same_ids(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "same.json"
    if not path.exists():
        save_json(path)
    tokenizer = build_tokenizer(Vocabulary(VocabularyKind.TOKENIZER_JSON, json_path=path))
    plain = build_tokenizer(make_byte_bpe(user_defined=["<b>"]))
    for parse in (True, False):
        expected = plain.encode(text, add_special=False, parse_special=parse)
        assert tokenizer.encode(text, add_special=False, parse_special=parse) == expected
        assert tokenizer.decode(expected) == text


def test_a_tokenizer_json_says_itself_which_tokens_it_adds(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(save_json(tmp_path / "tokenizer.json"))
    assert tokenizer.bos_id == 0
    assert tokenizer.encode("the") == [0, *tokenizer.encode("the", add_special=False)]
    assert tokenizer.encode(f"{START}the") == tokenizer.encode("the")
    assert tokenizer.is_control(0)
    assert tokenizer.get_token_bytes(0) == START.encode()


def test_a_broken_tokenizer_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for content in (b"", b"{}", b"\xff\xfe", b'{"version": "1.0"}'):
        path.write_bytes(content)
        with pytest.raises(CorruptModel, match=r"not a tokenizer|cannot be read"):
            build_tokenizer(Vocabulary(VocabularyKind.TOKENIZER_JSON, json_path=path))
    with pytest.raises(CorruptModel, match="missing"):
        build_tokenizer(
            Vocabulary(VocabularyKind.TOKENIZER_JSON, json_path=tmp_path / "missing.json")
        )


def test_a_tokenizer_json_that_spells_bytes_in_an_unknown_way_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    vocabulary = save_json(path, decoder="WordPiece")
    with pytest.raises(UnsupportedModel, match="WordPiece"):
        build_tokenizer(vocabulary)
