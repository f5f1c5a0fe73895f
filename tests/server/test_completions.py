"""/v1/completions through the official client."""

from __future__ import annotations

import openai
import pytest

from loopback import Running
from scripted_llm import REPLY

NUM_REPLY_TOKENS = len(REPLY.encode())


def test_a_prompt_is_completed_and_counted(client: openai.OpenAI, model: str) -> None:
    reply = client.completions.create(model=model, prompt="Say", max_tokens=40)
    assert reply.id.startswith("cmpl-")
    assert (reply.object, reply.model) == ("text_completion", model)
    assert [(one.index, one.text, one.finish_reason) for one in reply.choices] == [
        (0, REPLY, "stop")
    ]
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len("Say") + 1
    assert reply.usage.completion_tokens == NUM_REPLY_TOKENS
    assert reply.usage.total_tokens == len("Say") + 1 + NUM_REPLY_TOKENS


def test_max_tokens_is_16_unless_given(client: openai.OpenAI, model: str) -> None:
    reply = client.completions.create(model=model, prompt="Say")
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 16
    assert reply.choices[0].finish_reason == "length"


def test_cached_tokens_are_reported(server: Running, client: openai.OpenAI, model: str) -> None:
    server.engine.cached_tokens = 3
    usage = client.completions.create(model=model, prompt="Say").usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 3


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("AB", ["AB"]),
        (["A", "B"], ["A", "B"]),
        ([65, 66], [[65, 66]]),
        ([[65], [66, 67]], [[65], [66, 67]]),
    ],
)
def test_a_prompt_comes_in_four_shapes(
    server: Running, client: openai.OpenAI, model: str, prompt: list[str], expected: list[object]
) -> None:
    client.completions.create(model=model, prompt=prompt)
    assert [seen[0] for seen in server.engine.seen] == expected


def test_choices_are_numbered_prompt_by_prompt(client: openai.OpenAI, model: str) -> None:
    reply = client.completions.create(model=model, prompt=["A", "BC"], n=3, echo=True)
    assert [one.index for one in reply.choices] == list(range(6))
    assert [one.text[:2] for one in reply.choices] == ["AG"] * 3 + ["BC"] * 3
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == 2 + 3
    assert reply.usage.completion_tokens == 6 * 16


def test_the_stream_holds_the_same_text_as_the_reply(client: openai.OpenAI, model: str) -> None:
    whole = client.completions.create(model=model, prompt=["A", "B"], n=2, echo=True)
    texts, reasons, ids = [""] * 4, [""] * 4, set()
    with client.completions.create(
        model=model, prompt=["A", "B"], n=2, echo=True, stream=True
    ) as stream:
        for chunk in stream:
            ids.add(chunk.id)
            for one in chunk.choices:
                texts[one.index] += one.text
                reasons[one.index] = one.finish_reason or reasons[one.index]
    assert texts == [one.text for one in whole.choices]
    assert reasons == [one.finish_reason for one in whole.choices]
    assert len(ids) == 1
    assert ids != {whole.id}


def test_usage_comes_last_in_a_stream_that_asks(client: openai.OpenAI, model: str) -> None:
    with client.completions.create(
        model=model, prompt="A", stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 16


def test_logprobs_have_the_four_lists(client: openai.OpenAI, model: str) -> None:
    reply = client.completions.create(model=model, prompt="A", logprobs=2, max_tokens=4)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["G", "r", "bytes:\\xc3", "bytes:\\xbc"]
    assert logprobs.token_logprobs == [-0.5] * 4
    assert logprobs.text_offset == [0, 1, 2, 2]
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] == {"G": -0.5, "H": -1.5}


def test_streamed_logprobs_joined_are_those_of_the_reply(client: openai.OpenAI, model: str) -> None:
    asked = {"model": model, "prompt": "A", "logprobs": 1, "echo": True, "n": 2}
    whole = client.completions.create(**asked)  # type: ignore[call-overload]
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    joined: list[dict[str, list[object]]] = [{name: [] for name in names} for _ in range(2)]
    with client.completions.create(**asked, stream=True) as stream:  # type: ignore[call-overload]
        for chunk in stream:
            for one in chunk.choices:
                for name in names:
                    joined[one.index][name] += getattr(one.logprobs, name)
    for choice, lists in zip(whole.choices, joined, strict=True):
        assert lists == {name: getattr(choice.logprobs, name) for name in names}


def test_echo_puts_the_prompt_and_its_scores_first(client: openai.OpenAI, model: str) -> None:
    reply = client.completions.create(
        model=model, prompt="Hey", echo=True, logprobs=0, max_tokens=1
    )
    assert reply.choices[0].text == "HeyG"
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    # The begin token is a token of the prompt and no character of its text.
    assert logprobs.tokens == ["<s>", "H", "e", "y", "G"]
    assert logprobs.token_logprobs == [None, -0.5, -0.5, -0.5, -0.5]
    assert logprobs.text_offset == [0, 0, 1, 2, 3]


def test_token_ids_are_echoed_as_text(client: openai.OpenAI, model: str) -> None:
    reply = client.completions.create(model=model, prompt=[72, 105], echo=True, max_tokens=1)
    assert reply.choices[0].text == "HiG"


@pytest.mark.parametrize("stream", [False, True])
def test_no_tokens_with_echo_scores_the_prompt_alone(
    client: openai.OpenAI, model: str, stream: bool
) -> None:
    answer = client.completions.create(
        model=model, prompt="Hey", echo=True, logprobs=1, max_tokens=0, stream=stream
    )
    choice = (
        next(iter(answer)).choices[0] if isinstance(answer, openai.Stream) else answer.choices[0]
    )
    assert (choice.text, choice.finish_reason) == ("Hey", "length")
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["<s>", "H", "e", "y"]
    if not isinstance(answer, openai.Stream):
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 0


def test_a_stop_string_ends_the_text(client: openai.OpenAI, model: str) -> None:
    reply = client.completions.create(model=model, prompt="A", stop=[","], max_tokens=40)
    assert reply.choices[0].text == "Grüße"
    assert reply.choices[0].finish_reason == "stop"


def test_every_parameter_reaches_the_engine(
    server: Running, client: openai.OpenAI, model: str
) -> None:
    client.completions.create(
        model=model,
        prompt="A",
        temperature=0.5,
        top_p=0.9,
        n=2,
        best_of=2,
        seed=-7,
        max_tokens=3,
        stop="x",
        presence_penalty=0.25,
        frequency_penalty=-0.25,
        logit_bias={"65": 5},
        user="somebody",
        extra_body={
            "top_k": 4,
            "min_p": 0.125,
            "repetition_penalty": 1.5,
            "min_tokens": 2,
            "ignore_eos": True,
            "stop_token_ids": [9],
            "skip_special_tokens": False,
            "priority": -3,
        },
    )
    _, params, priority = server.engine.seen[0]
    assert (params.temperature, params.top_p, params.n, params.seed) == (0.5, 0.9, 2, -7)
    assert (params.max_tokens, params.stop_strings, params.min_tokens) == (3, ("x",), 2)
    assert (params.presence_penalty, params.frequency_penalty) == (0.25, -0.25)
    assert (params.top_k, params.min_p, params.repetition_penalty) == (4, 0.125, 1.5)
    assert (params.ignore_eos, params.skip_special_tokens) == (True, False)
    assert params.logit_bias == {65: 5.0}
    assert tuple(params.stop_token_ids) == (9,)
    assert priority == -3


def test_null_means_left_out(server: Running, client: openai.OpenAI, model: str) -> None:
    fields = ("temperature", "top_p", "n", "seed", "max_tokens", "stop", "logprobs", "echo")
    client.completions.create(
        model=model,
        prompt="A",
        extra_body=dict.fromkeys((*fields, "stream", "logit_bias", "tools")),
    )
    _, params, _ = server.engine.seen[0]
    assert (params.temperature, params.n, params.max_tokens) == (1.0, 1, 16)


def test_an_alias_is_served_under_its_own_name(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="also-scripted", prompt="A")
    assert reply.model == "also-scripted"


def test_the_models_are_listed_and_found(client: openai.OpenAI, model: str) -> None:
    assert [one.id for one in client.models.list()] == [model, "also-scripted"]
    assert client.models.retrieve(model).id == model
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nobody/nothing")
    assert caught.value.code == "model_not_found"
