"""Laws of the request book: what leaves it is whole, in order, and ends once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from fakes import EOS, make_vocabulary
from twostroke.core.types import (
    Cancelled,
    Ending,
    Failed,
    Finished,
    Preempted,
    Request,
    Row,
    SamplingSpec,
    SequenceEnded,
    SequenceId,
    StepOutcome,
    StepPlan,
    TokenLogprob,
    TokensEmitted,
)
from twostroke.engine.metrics import EngineMetrics
from twostroke.engine.outputs import OutputDelta
from twostroke.engine.request import RequestBook, RequestState, TextRules
from twostroke.text.tokenizer import Tokenizer


class Bench:
    """A book with one request and everything that left it."""

    def __init__(self, *, n: int = 1, stops: tuple[str, ...] = (), skip: bool = True) -> None:
        self.metrics = EngineMetrics()
        self.deliveries = 0
        self.deltas: list[OutputDelta] = []
        self.ended: list[bool] = []
        tokenizer = Tokenizer.from_vocabulary(make_vocabulary())
        self.book = RequestBook(tokenizer, self.metrics, self.count_delivery)
        self.request = Request("r", (1, 2, 3, 4), 100, n=n)
        self.rules = TextRules(tokenizer, stops, skip)
        self.resume(())

    def resume(self, resumed: tuple[tuple[int, ...] | None, ...]) -> None:
        """Open the request, of which an earlier run emitted this."""
        self.state = RequestState(replace(self.request, resumed=resumed), self.rules, self.take)
        self.book.open(self.state, 10)

    def count_delivery(self) -> None:
        self.deliveries += 1

    def take(self, deltas: Sequence[OutputDelta], ended: bool) -> None:
        self.deltas.extend(deltas)
        self.ended.append(ended)

    def emit(self, tokens: bytes | Sequence[int], index: int = 0, now_ns: int = 20) -> list[int]:
        """Emit tokens of one continuation; returns the indices that a stop string ended."""
        update = TokensEmitted(SequenceId("r", index), tuple(tokens))
        return [one.index for one in self.book.updated([update], now_ns)]

    def end(self, ending: Ending, index: int = 0, now_ns: int = 90) -> None:
        assert not self.book.updated([SequenceEnded(SequenceId("r", index), ending)], now_ns)

    def get_text(self, index: int = 0) -> str:
        return "".join(delta.text for delta in self.deltas if delta.index == index)

    def get_tokens(self, index: int = 0) -> list[int]:
        return [token for delta in self.deltas if delta.index == index for token in delta.tokens]

    def get_endings(self, index: int = 0) -> list[Ending]:
        return [one.ending for one in self.deltas if one.index == index and one.ending]


def test_a_character_split_over_tokens_is_shown_whole() -> None:
    bench = Bench()
    shown = []
    for token in "a€".encode():
        bench.emit([token])
        bench.book.deliver()
        shown.append(bench.deltas[-1].text)
    assert shown == ["a", "", "", "€"]
    assert b"".join(one for delta in bench.deltas for one in delta.token_bytes) == "a€".encode()


def test_one_delivery_carries_all_that_was_emitted_since_the_last() -> None:
    bench = Bench()
    bench.emit(b"ab")
    bench.emit(b"c")
    bench.book.deliver()
    bench.book.deliver()
    assert [delta.text for delta in bench.deltas] == ["abc"]
    assert bench.deliveries == 1


def test_tokens_behind_a_stop_string_are_dropped_even_of_the_same_update() -> None:
    bench = Bench(stops=("END",))
    assert bench.emit(b"xENDyz") == [0]
    assert bench.emit(b"more") == []
    bench.end(Finished("stop"))
    bench.book.deliver()
    assert bench.get_tokens() == list(b"xEND")
    assert bench.get_text() == "x"
    assert bench.state.timings.decode_tokens == 4


def test_a_stop_string_across_tokens_shows_nothing_of_itself() -> None:
    bench = Bench(n=2, stops=("END",))
    for letter in b"aENxEN":
        bench.emit([letter], index=0)
        bench.emit([letter], index=1)
        bench.book.deliver()
    assert bench.emit(b"D", index=1) == [1]
    bench.end(Finished("stop"), index=1)
    bench.end(Finished("length"), index=0)
    bench.book.deliver()
    assert bench.get_text(1) == "aENx"
    assert bench.get_text(0) == "aENxEN"
    assert bench.get_endings(0) == [Finished("length")]


def test_a_stop_string_goes_before_the_length_reached_with_the_same_token() -> None:
    bench = Bench(stops=("END",))
    sequence = SequenceId("r", 0)
    stops = bench.book.updated(
        [
            TokensEmitted(sequence, tuple(b"END")),
            SequenceEnded(sequence, Finished("length")),
        ],
        20,
    )
    assert list(stops) == []  # it has ended already: there is nothing left to cancel
    bench.book.deliver()
    assert bench.get_endings() == [Finished("stop")]


@pytest.mark.parametrize("ending", [Finished("length"), Cancelled(), Failed("x")])
def test_text_held_for_a_stop_string_is_shown_at_any_other_ending(ending: Ending) -> None:
    bench = Bench(stops=("END",))
    bench.emit(b"aEN")
    bench.book.deliver()
    assert bench.get_text() == "a"
    bench.end(ending)
    bench.book.deliver()
    assert bench.get_text() == "aEN"
    assert bench.get_endings() == [ending]


def test_the_ending_comes_once_with_the_last_delta() -> None:
    bench = Bench(n=2)
    bench.emit(b"a", index=0)
    bench.end(Finished("length"), index=0)
    bench.book.deliver()
    bench.emit(b"b", index=1)
    bench.book.deliver()
    bench.end(Cancelled(), index=1)
    bench.book.deliver()
    assert bench.ended == [False, False, True]
    assert [delta.ending for delta in bench.deltas] == [Finished("length"), None, Cancelled()]
    assert "r" not in bench.book


def test_special_tokens_are_tokens_but_no_text_unless_asked() -> None:
    hidden, shown = Bench(), Bench(skip=False)
    for bench in (hidden, shown):
        bench.emit([*b"a", EOS])
        bench.end(Finished("stop"))
        bench.book.deliver()
        assert bench.get_tokens() == [*b"a", EOS]
    assert hidden.get_text() == "a"
    assert shown.get_text() == "a<eos>"


def test_a_token_that_pads_the_vocabulary_has_no_text() -> None:
    bench = Bench(stops=("END",))
    bench.emit([*b"a", 263, *b"b"])
    bench.book.deliver()
    assert bench.get_text() == "ab"
    assert bench.deltas[0].token_bytes == (b"a", b"", b"b")


def test_logprobs_are_cut_with_their_tokens() -> None:
    bench = Bench(stops=("b",))
    logprobs = tuple(TokenLogprob(token, -1.0) for token in b"abc")
    prompt = (TokenLogprob(2, -2.0),)
    bench.book.updated([TokensEmitted(SequenceId("r", 0), tuple(b"abc"), logprobs, prompt)], 20)
    bench.book.deliver()
    assert bench.deltas[0].logprobs == logprobs[:2]
    assert bench.deltas[0].prompt_logprobs == prompt


def make_plan(start: int, tokens: int) -> StepPlan:
    row = Row(SequenceId("r", 0), (0,) * tokens, start, (0,), SamplingSpec())
    return StepPlan(0, (row,))


def test_timings_follow_the_request() -> None:
    bench = Bench()
    for now_ns, plan in ((12, make_plan(1, 2)), (14, make_plan(3, 1)), (20, make_plan(4, 1))):
        bench.book.step_started(plan, now_ns)
        bench.book.step_committed(plan, StepOutcome(0, (), 5))
        if now_ns >= 14:
            bench.emit(b"a", now_ns=now_ns + 1)
    bench.book.updated([Preempted(SequenceId("r", 0))], 30)
    bench.book.step_committed(make_plan(0, 5), StepOutcome(0, (), 5))
    bench.end(Finished("length"), now_ns=40)
    timings = bench.state.timings
    assert (timings.submitted_ns, timings.first_planned_ns) == (10, 12)
    assert (timings.first_token_ns, timings.ended_ns) == (15, 40)
    assert (timings.cached_tokens, timings.prefill_tokens, timings.decode_tokens) == (1, 3, 2)
    assert timings.preemptions == 1
    stats = bench.metrics.get_stats()
    assert stats.prompt_tokens == 7  # recomputed ones count as work done
    assert stats.generation_tokens == 2
    assert stats.inter_token_seconds.count == 1


def test_aborting_ends_every_open_request_and_decodes_nothing() -> None:
    bench = Bench(n=2)
    bench.emit(b"a", index=0)
    bench.end(Finished("length"), index=0)
    bench.book.abort_all("broken", 50)
    assert [delta.ending for delta in bench.deltas] == [Finished("length"), Failed("broken")]
    assert bench.ended == [True]
    bench.book.deliver()
    assert bench.ended == [True]
    assert bench.metrics.get_stats().ended["failed"] == 1


@pytest.mark.parametrize("at", range(9))
@pytest.mark.parametrize("skip", [True, False])
def test_text_goes_on_where_an_earlier_run_stopped(at: int, skip: bool) -> None:
    # A character of three bytes and a stop string, either of which the cut may go through.
    tokens = "a€bEND".encode()
    whole = Bench(stops=("END",), skip=skip)
    whole.emit(tokens)
    whole.book.deliver()
    before, after = Bench(stops=("END",), skip=skip), Bench(stops=("END",), skip=skip)
    before.emit(tokens[:at])
    before.book.deliver()
    if at == len(tokens):
        assert before.get_text() == whole.get_text()
        return
    after.resume((tuple(tokens[:at]),))
    assert after.emit(tokens[at:]) == [0]
    after.book.deliver()
    assert before.get_text() + after.get_text() == whole.get_text() == "a€b"
    assert after.get_tokens() == list(tokens[at:])


def test_what_had_ended_before_is_not_spoken_of() -> None:
    bench = Bench(n=2)
    bench.resume((None, tuple(b"a")))
    bench.emit(b"b", index=1)
    bench.end(Finished("length"), index=1)
    bench.book.deliver()
    assert [(delta.index, delta.text) for delta in bench.deltas] == [(1, "b")]
    assert bench.ended == [True]


def test_each_token_has_its_part_of_the_text() -> None:
    bench = Bench(stops=("bc",))
    bench.emit("a€b".encode())
    bench.book.deliver()
    bench.end(Finished("length"))
    bench.book.deliver()
    assert bench.deltas[0].token_texts == ("a", "", "", "€", "")
    assert (bench.deltas[1].text, bench.deltas[1].token_texts) == ("b", ())
