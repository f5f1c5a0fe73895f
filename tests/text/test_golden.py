"""The tokenizers of real models against independent answers, beside the laws they must keep."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from places import get_model_path, get_reference
from twostroke.spec.vocabulary import Vocabulary
from twostroke.text.chat import build_chat_template
from twostroke.text.stream import StreamDecoder
from twostroke.text.tokenizer import Tokenizer, build_tokenizer
from twostroke.weights.load import open_model

pytestmark = pytest.mark.real_model

MODELS = ["smollm2-135m", "gemma3-270m"]
GOLDEN = json.loads((Path(__file__).parent / "golden_tokens.json").read_text(encoding="utf-8"))
# Bytes SmolLM2's vocabulary has no token for; the first six are ASCII control characters.
MISSING = bytes([0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2])


@functools.cache
def get_vocabulary(name: str) -> Vocabulary:
    """The vocabulary of a pulled model."""
    with open_model(get_model_path(name)) as model:
        return model.vocabulary


@functools.cache
def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a pulled model."""
    return build_tokenizer(get_vocabulary(name))


@pytest.mark.parametrize("name", MODELS)
def test_ids_are_those_of_the_reference_answers(name: str) -> None:
    tokenizer = get_tokenizer(name)
    for prompt in get_reference(name).values():
        ids = tokenizer.encode(prompt["prompt"])
        assert ids == prompt["token_ids"]
        assert tokenizer.decode(ids).removeprefix("<bos>") == prompt["prompt"]
        assert tokenizer.decode(prompt["greedy_token_ids"]) == prompt["greedy_text"]


@pytest.mark.parametrize("name", MODELS)
def test_hard_strings_give_the_golden_ids(name: str) -> None:
    tokenizer = get_tokenizer(name)
    rows: list[dict[str, Any]] = GOLDEN["models"][name]
    assert len(rows) > 60
    for row in rows:
        ids = tokenizer.encode(row["text"], parse_special=row["parse_special"])
        assert ids == row["ids"], row["text"]


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_but_for_bytes_without_a_token(text: str) -> None:
    smollm2, gemma3 = map(get_tokenizer, MODELS)
    kept = text.encode().translate(None, delete=MISSING).decode(errors="replace")
    assert smollm2.decode(smollm2.encode(text)) == kept
    assert gemma3.decode(gemma3.encode(text, add_special=False)) == text.replace("▁", " ")


@pytest.mark.parametrize("name", MODELS)
def test_streamed_continuations_are_the_decoded_ones(name: str) -> None:
    tokenizer = get_tokenizer(name)
    for prompt in get_reference(name).values():
        decoder = StreamDecoder(tokenizer, skip_special=False)
        shown = "".join([*map(decoder.feed, prompt["greedy_token_ids"]), decoder.finish()])
        assert shown == prompt["greedy_text"]


def test_stop_ids_hold_the_ends_of_turns() -> None:
    smollm2, gemma3 = map(get_tokenizer, MODELS)
    assert {smollm2.get_token_text(token) for token in smollm2.stop_ids} >= {"<|im_end|>"}
    assert {gemma3.get_token_text(token) for token in gemma3.stop_ids} >= {
        "<eos>",
        "<end_of_turn>",
    }


@pytest.mark.parametrize("name", MODELS)
def test_a_conversation_becomes_the_reference_prompt(name: str) -> None:
    template = build_chat_template(get_vocabulary(name), get_tokenizer(name))
    question = "What is the capital of Italy? Answer in one sentence."
    text = template.render([{"role": "user", "content": question}])
    assert text == get_reference(name)["chat"]["prompt"]
