"""What a group and its ranks say to each other comes out as it went in."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace

import pytest

from rank_fakes import make_plan
from twostroke.core.types import (
    PENDING,
    BlockCopy,
    BlockSwap,
    Row,
    RowResult,
    SamplingSpec,
    SequenceId,
    StepOutcome,
    StepPlan,
    TokenLogprob,
)
from twostroke.exec.rank_wire import (
    Close,
    Message,
    RankEnd,
    WriteKv,
    decode,
    encode,
    open_group_end,
)
from twostroke.exec.step_wire import Decoder, PeerGone, StepLost

SAMPLING = SamplingSpec(0.5, 3, 0.9, 0.1, 1.5, 0.2, 0.3, 2**63 + 1, ((4, -1.5), (9, 2.0)), 4, "g")
PLAN = StepPlan(
    7,
    (
        Row(
            SequenceId("a", 1), (3, 4, 5), 17, (9, 2), SAMPLING, (1, 2, 3), 2, 2, (4, 5), 3, b"\x07"
        ),
        Row(SequenceId("b", 0), (PENDING,), 0, (1,), SamplingSpec()),
        Row(SequenceId("c", 0), (5, 6), 0, (3,), None),
    ),
    (BlockCopy(1, 2),),
    (BlockSwap(3, 4), BlockSwap(5, 6)),
    (BlockSwap(7, 8),),
    3,
)
LOGPROB = TokenLogprob(5, -0.25, ((5, -0.25), (6, -3.0)))
OUTCOME = StepOutcome(
    7,
    (RowResult(SequenceId("a", 1), (3, 4), 1, (LOGPROB,), (LOGPROB, LOGPROB)),),
    123,
    (60, 63),
    (1, 2, 3, 4, 5, 6, 7, 80, 15),
)
MESSAGES: list[Message] = [PLAN, OUTCOME, StepLost(3, "why"), WriteKv(b"\0\1" * 999, (1, 2)), PLAN]


def get_values(message: object) -> list[object]:
    return [getattr(message, field.name) for field in fields(message)]  # type: ignore[arg-type]


def test_the_samples_fill_every_field() -> None:
    for sample in (PLAN, PLAN.rows[0], SAMPLING, OUTCOME, OUTCOME.results[0], LOGPROB):
        defaults = {field.name: field.default for field in fields(sample)}
        assert all(getattr(sample, name) != value for name, value in defaults.items()), sample


@pytest.mark.parametrize("piece", [1, 7, 4096])
def test_messages_come_out_as_they_went_in_however_they_are_cut(piece: int) -> None:
    stream = b"".join(map(encode, MESSAGES))
    decoder = Decoder(decode)
    found = []
    for start in range(0, len(stream), piece):
        found += decoder.feed(stream[start : start + piece])
    assert found == MESSAGES
    assert [type(each) for each in get_values(found[0])] == [
        type(each) for each in get_values(PLAN)
    ]
    assert isinstance(found[0], StepPlan)
    for row, sent in zip(found[0].rows, PLAN.rows, strict=True):
        assert list(map(type, get_values(row))) == list(map(type, get_values(sent)))


def test_a_sequence_and_its_sampling_are_the_same_objects_in_every_plan() -> None:
    first, second = Decoder(decode).feed(encode(PLAN) + encode(replace(PLAN, step=8)))
    assert isinstance(first, StepPlan)
    assert isinstance(second, StepPlan)
    for row, next_row in zip(first.rows, second.rows, strict=True):
        assert row.sequence is next_row.sequence
        assert row.sampling is next_row.sampling


def test_what_a_rank_does_not_take_is_kept_for_it() -> None:
    own, theirs = socket.socketpair()
    with theirs, ThreadPoolExecutor(1) as pool:
        end, rank = open_group_end(own), RankEnd(theirs)
        big = WriteKv(bytes(3_000_000), (1,))
        end.send(encode(big))
        end.send(encode(make_plan(1, 5)))
        assert end.has_unsent
        received = pool.submit(lambda: [rank.receive(), rank.receive()])
        while end.has_unsent:
            end.flush()
        assert received.result(10) == [big, make_plan(1, 5)]
        end.close()


def test_each_end_hears_when_the_other_is_gone() -> None:
    own, theirs = socket.socketpair()
    end, rank = open_group_end(own), RankEnd(theirs)
    rank.send(Close())
    assert end.receive() == [Close()]
    assert end.receive() == []
    theirs.close()
    with pytest.raises(EOFError):
        end.receive()
    with pytest.raises(OSError, match="Broken pipe"):
        end.send(encode(Close()))
    end.close()
    own, theirs = socket.socketpair()
    own.close()
    with theirs, pytest.raises(PeerGone):
        RankEnd(theirs).receive()
