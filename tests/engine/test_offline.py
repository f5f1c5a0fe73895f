"""Laws of the offline face: whole outputs in order, bad prompts named, nothing left running."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest

from fakes import BOS, EOS, FakeExecutor, draw_from, make_parts
from twostroke.core.ports import OnDone
from twostroke.core.types import Failed, Finished, SamplingSpec, StepPlan
from twostroke.engine.collect import Progress
from twostroke.engine.llm import OfflineLLM
from twostroke.engine.params import SamplingParams
from twostroke.errors import (
    EngineClosed,
    InvalidParameter,
    InvalidRequest,
    PromptTooLong,
    RequestFailed,
    TemplateError,
)
from twostroke.text.chat import ChatTemplate
from twostroke.text.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=8)


TEMPLATE = ChatTemplate(
    "{% for message in messages %}<bos>{{ message.role }}:{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def make_llm(executor: FakeExecutor | None = None, **options: Any) -> OfflineLLM:
    return OfflineLLM(make_parts(executor or FakeExecutor(), **options))


def count_free(llm: OfflineLLM) -> int:
    """Free blocks once the engine's thread has done all that was asked of it so far."""
    llm._service._thread.call(lambda: None).result(10)
    llm._service._thread.call(lambda: None).result(10)
    return llm.parts.scheduler.num_free_blocks


def test_outputs_come_in_the_order_of_the_prompts() -> None:
    prompts = [f"prompt number {number}" * (number % 3 + 1) for number in range(12)]
    with make_llm() as llm:
        together = llm.generate(prompts, GREEDY)
        alone = [llm.generate(prompt, GREEDY)[0] for prompt in prompts]
    assert [one.prompt for one in together] == prompts
    assert [one.completions for one in together] == [one.completions for one in alone]


def test_a_prompt_may_be_text_or_token_ids() -> None:
    with make_llm() as llm:
        by_text = llm.generate("ab", GREEDY)[0]
        by_ids = llm.generate([BOS, 97, 98], GREEDY)[0]
        mixed = llm.generate([[BOS, 97, 98], "ab"], GREEDY)
        nothing = llm.generate([], GREEDY)
    assert by_text.prompt_tokens == by_ids.prompt_tokens == (BOS, 97, 98)
    assert by_ids.prompt is None
    assert by_text.completions == by_ids.completions
    assert [one.completions for one in mixed] == [by_text.completions] * 2
    assert nothing == []


def test_an_answer_ends_at_the_models_end_token() -> None:
    with make_llm(FakeExecutor(next_token=draw_from("héllo €".encode(), 2))) as llm:
        completion = llm.generate("a", SamplingParams(max_tokens=None))[0].completions[0]
    assert completion.text == "héllo €"
    assert completion.tokens == (*"héllo €".encode(), EOS)
    assert completion.finish_reason == "stop"


def test_a_stop_string_ends_each_continuation_where_it_meets_it() -> None:
    texts = (b"one STOP two", b"three", b"STOP")

    def draw(tokens: Any, sampling: SamplingSpec, index: int) -> int:
        return draw_from(texts[index], 3)(tokens, sampling, index)

    params = SamplingParams(n=3, max_tokens=30, stop=["STOP"])
    with make_llm(FakeExecutor(next_token=draw)) as llm:
        output = llm.generate("ab", params)[0]
        assert count_free(llm) == 64
    assert [one.text for one in output.completions] == ["one ", "three", ""]
    assert [bytes(one.tokens[:8]) for one in output.completions[::2]] == [b"one STOP", b"STOP"]
    assert [one.ending for one in output.completions] == [Finished("stop")] * 3


def test_continuations_differ_by_index_and_repeat_by_seed() -> None:
    params = SamplingParams(n=4, seed=3, max_tokens=10)
    with make_llm() as llm:
        first = llm.generate("ab", params)[0]
        again = llm.generate(["x", "ab"], params)[1]
        other = llm.generate("ab", SamplingParams(n=4, seed=4, max_tokens=10))[0]
    assert first.completions == again.completions
    assert len({one.text for one in (*first.completions, *other.completions)}) == 8
    assert [one.index for one in first.completions] == [0, 1, 2, 3]


def test_a_fresh_seed_is_recorded_and_draws_the_same_again() -> None:
    with make_llm() as llm:
        first = llm.generate("ab", SamplingParams())[0]
        other = llm.generate("ab", SamplingParams())[0]
        again = llm.generate("ab", SamplingParams(seed=first.seed))[0]
    assert first.seed != other.seed
    assert again.completions == first.completions


def test_streamed_deltas_join_to_the_offline_output() -> None:
    params = SamplingParams(n=3, seed=1, max_tokens=20, stop=["ab", "z"], logprobs=2)
    with make_llm() as llm:
        whole = llm.generate("hello", params)[0].completions
        deltas = list(llm.stream("hello", params))
    for completion in whole:
        own = [delta for delta in deltas if delta.index == completion.index]
        assert "".join(delta.text for delta in own) == completion.text
        assert tuple(token for delta in own for token in delta.tokens) == completion.tokens
        assert tuple(one for delta in own for one in delta.logprobs) == completion.logprobs
        assert [delta.ending for delta in own if delta.ending] == [completion.ending]
        assert own[-1].ending is not None


def test_logprobs_come_one_for_each_token_and_prompt_logprobs_once() -> None:
    params = SamplingParams(max_tokens=5, logprobs=2, prompt_logprobs=1, n=2)
    with make_llm() as llm:
        output = llm.generate("hello", params)[0]
    assert [one.token for one in output.prompt_logprobs] == list(output.prompt_tokens[1:])
    for completion in output.completions:
        assert tuple(one.token for one in completion.logprobs) == completion.tokens
        assert {len(one.top) for one in completion.logprobs} == {2}


def test_each_prompt_may_have_its_own_params() -> None:
    own = [SamplingParams(max_tokens=2), SamplingParams(max_tokens=7)]
    with make_llm() as llm:
        outputs = llm.generate(["a", "b"], own)
        with pytest.raises(InvalidParameter, match="params"):
            llm.generate(["a", "b", "c"], own)
    assert [len(one.completions[0].tokens) for one in outputs] == [2, 7]


BAD_PROMPTS: list[tuple[Any, type[Exception], str]] = [
    ("", InvalidRequest, "empty"),
    ([], InvalidRequest, "empty"),
    ([1, 264], InvalidParameter, r"position 1 must be from 0 to 263, not 264"),
    ([-1], InvalidParameter, r"position 0"),
    ([1, "a"], InvalidParameter, r"position 1 must be an integer"),
    ([1.0], InvalidParameter, r"position 0 must be an integer"),
    ([True, 2.0], InvalidParameter, r"position 0 must be an integer"),
    (5, InvalidParameter, "must be a text or a list of token ids"),
    (b"ab", InvalidParameter, "must be a text or a list of token ids"),
    ("x" * 200, PromptTooLong, "the context of 128 tokens"),
    ("\ud800", InvalidParameter, "surrogate"),
]


@pytest.mark.parametrize(("prompt", "error", "message"), BAD_PROMPTS)
def test_a_bad_prompt_is_named_by_its_index_before_anything_runs(
    prompt: Any, error: type[Exception], message: str
) -> None:
    executor = FakeExecutor()
    with make_llm(executor) as llm:
        with pytest.raises(error, match=f"prompt 1: .*{message}"):
            llm.generate(["fine", prompt, "fine"], GREEDY)
        assert count_free(llm) == 64
        assert llm.stats().live == 0
    assert executor.plans == []


def test_a_prompt_longer_than_the_pool_is_too_long() -> None:
    with make_llm(FakeExecutor(num_blocks=4)) as llm:
        with pytest.raises(PromptTooLong) as caught:
            llm.generate("x" * 20, GREEDY)
        assert caught.value.limit_tokens == 15


def test_a_text_that_no_tokens_could_hold_is_refused_before_it_is_tokenized(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    longest = "<bos>" + "<eos>" * 14  # of as many tokens as fit, each the longest
    with make_llm(FakeExecutor(num_blocks=4)) as llm:
        assert len(llm.generate(longest, GREEDY)[0].prompt_tokens) == 15
        monkeypatch.setattr(Tokenizer, "encode", None)
        with pytest.raises(PromptTooLong, match="76 characters are more than 15 tokens") as caught:
            llm.generate(longest + "x", GREEDY)
        assert caught.value.limit_tokens == 15


@pytest.mark.parametrize("params", [5, "x", {"n": 2}, [5]])
def test_params_of_a_wrong_type_are_refused(params: Any) -> None:
    with make_llm() as llm, pytest.raises(InvalidParameter, match="params"):
        llm.generate(["a"], params)


def test_chat_renders_each_conversation() -> None:
    first = [{"role": "user", "content": "hi"}]
    second = [*first, {"role": "assistant", "content": "ho"}]
    with make_llm(chat_template=TEMPLATE) as llm:
        one = llm.chat(first, GREEDY)
        two = llm.chat([first, second], GREEDY)
        with pytest.raises(InvalidRequest, match="conversation 1: "):
            llm.chat([first, []], GREEDY)
    assert len(one) == 1
    assert one[0].completions == two[0].completions
    assert one[0].prompt == "<bos>user:hiassistant:"
    assert one[0].prompt_tokens[0] == BOS
    assert list(one[0].prompt_tokens).count(BOS) == 1


def test_without_a_template_chat_is_refused() -> None:
    with make_llm() as llm, pytest.raises(TemplateError, match="no chat template"):
        llm.chat([{"role": "user", "content": "hi"}])


def test_progress_ends_complete_and_never_goes_back() -> None:
    seen: list[Progress] = []
    with make_llm() as llm:
        outputs = llm.generate(["a", "b", "c"], GREEDY, progress=seen.append)
    assert seen[-1] == Progress(3, 3, sum(len(one.completions[0].tokens) for one in outputs))
    assert [one.generated_tokens for one in seen] == sorted(one.generated_tokens for one in seen)


def test_progress_true_writes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with make_llm() as llm:
        llm.generate(["a", "b"], GREEDY, progress=True)
    assert "2/2 requests, 16 tokens\n" in capsys.readouterr().err


def test_an_exception_while_waiting_cancels_what_is_live() -> None:
    executor = FakeExecutor()
    started = threading.Event()

    def hold_third(plan: StepPlan, on_done: OnDone) -> None:
        if len(executor.plans) == 3:
            executor.answer_held(plan, on_done)
            started.set()
        else:
            executor.answer_now(plan, on_done)

    def interrupt(progress: Progress) -> None:
        assert started.wait(10)
        raise KeyboardInterrupt

    executor.behave = hold_third
    with make_llm(executor) as llm:
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a", "b"], SamplingParams(max_tokens=50, n=2), progress=interrupt)
        count_free(llm)  # the cancels have been run
        assert llm.stats().live == 0
        executor.release()
        assert count_free(llm) == 64
        assert llm.stats().ended["cancelled"] == 2


@pytest.mark.parametrize("how", ["close", "drop", "never read"])
def test_a_stream_that_is_left_cancels_its_request(how: str) -> None:
    executor = FakeExecutor()
    executor.behave = executor.answer_held
    with make_llm(executor) as llm:
        stream = llm.stream("ab", SamplingParams(max_tokens=50))
        count_free(llm)  # by now its first step has been started
        if how != "never read":
            executor.release()
            next(stream)
        if how == "close":
            stream.close()
            assert list(stream) == []
        del stream
        gc.collect()
        count_free(llm)
        assert llm.stats().ended["cancelled"] == 1
        executor.release()
        assert count_free(llm) == 64


def test_a_lost_executor_fails_the_call_with_the_reason() -> None:
    executor = FakeExecutor()
    with make_llm(executor) as llm:
        assert llm.generate("a", GREEDY)
        executor.behave = executor.answer_lost
        with pytest.raises(RequestFailed, match="prompt 0: the executor was lost: it died"):
            llm.generate(["a", "b"], GREEDY)
        health = llm.health()
        assert not health.alive
        assert "it died" in str(health.reason)
        with pytest.raises(EngineClosed, match="it died"):
            llm.generate("a", GREEDY)


def test_a_failed_stream_gives_its_ending_and_then_raises() -> None:
    executor = FakeExecutor()
    executor.behave = executor.answer_lost
    with make_llm(executor) as llm:
        stream = llm.stream("a", GREEDY)
        assert isinstance(next(stream).ending, Failed)
        with pytest.raises(RequestFailed, match="it died"):
            next(stream)
        assert list(stream) == []


def test_a_bug_in_the_engine_fails_what_is_live_and_says_so() -> None:
    executor = FakeExecutor()

    def break_down(plan: StepPlan, on_done: OnDone) -> None:
        raise ZeroDivisionError("a bug")

    executor.behave = break_down
    with make_llm(executor) as llm:
        with pytest.raises(RequestFailed, match="ZeroDivisionError: a bug"):
            llm.generate("a", GREEDY)
        with pytest.raises(EngineClosed, match="a bug"):
            llm.generate("a", GREEDY)
        assert "a bug" in str(llm.health().reason)
    assert executor.is_closed


def test_closing_fails_calls_of_other_threads() -> None:
    executor = FakeExecutor()
    started = threading.Event()

    def hold(plan: StepPlan, on_done: OnDone) -> None:
        executor.answer_held(plan, on_done)
        started.set()

    executor.behave = hold
    llm = make_llm(executor)
    errors: list[Exception] = []

    def call() -> None:
        try:
            llm.generate("a", GREEDY)
        except RequestFailed as error:
            errors.append(error)

    caller = threading.Thread(target=call)
    caller.start()
    assert started.wait(10)
    llm.close()
    caller.join(10)
    assert "the engine was closed" in str(errors)
    llm.close()
    with pytest.raises(EngineClosed):
        llm.generate("a", GREEDY)


def test_a_dropped_engine_closes_its_executor() -> None:
    executor = FakeExecutor()
    llm = make_llm(executor)
    llm.generate("a", GREEDY)
    del llm
    gc.collect()
    assert executor.is_closed


def test_calls_from_several_threads_share_the_engine() -> None:
    executor = FakeExecutor()
    executor.behave = executor.answer_threaded
    results: dict[int, str] = {}
    with make_llm(executor) as llm:
        expected = [
            llm.generate(f"prompt {number}", GREEDY)[0].completions[0].text for number in range(6)
        ]

        def call(number: int) -> None:
            output = llm.generate(f"prompt {number}", GREEDY)[0]
            results[number] = output.completions[0].text

        callers = [threading.Thread(target=call, args=(number,)) for number in range(6)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(10)
    assert [results[number] for number in range(6)] == expected
