"""Exercises: fixed ones have their known answers, and graders take rounding but no near miss."""

from __future__ import annotations

import random

import pytest

from twostroke.errors import InvalidParameter
from twostroke.lab.kv_arithmetic import ask_fit, ask_kv
from twostroke.lab.question import Question, format_value, grade
from twostroke.lab.roofline import ask_bound
from twostroke.lab.units import list_units

THIRTEEN = ask_kv("LLaMA-2 13B", 40, 40, 128, 4096)
SEVEN = ask_bound(7e9, 1024, 312e12, 1.5e12)
WHOLE = ask_fit(24, 14, 356, 1.0)
CAPPED = ask_fit(24, 14, 356, 0.9)


def is_right(question: Question, answer: str) -> bool:
    """Whether an answer passes."""
    return grade(question, answer).is_right


def test_thirteen_billion_parameters_at_4096_tokens_leave_3355443200_bytes() -> None:
    assert THIRTEEN.answer == 3_355_443_200
    for answer in ("3,355,443,200 bytes", "3355443200 B", "3.36 GB", "3.125 GiB", "3200 MiB"):
        assert is_right(THIRTEEN, answer)


def test_three_digits_are_enough_and_two_are_not() -> None:
    question = Question("", 100.49, "steps", "")
    assert is_right(question, "100")
    assert not is_right(question, "99")
    for answer in ("0.505 s", ".505 s", "505 ms", "5.05e-1 s"):
        assert is_right(Question("", 0.505, "s", ""), answer)


def test_near_misses_of_bytes_are_refused() -> None:
    for answer in ("4,194,304,000 bytes", "4 GB", "3.125 GB", "3.4 GB", "3.3 GB", "3.36 GiB"):
        assert not is_right(THIRTEEN, answer)


def test_seven_billion_parameters_at_1024_tokens_are_compute_bound_at_ridge_208() -> None:
    assert SEVEN.answer == pytest.approx(208)
    assert is_right(SEVEN, "208 FLOP/byte, compute")
    assert is_right(SEVEN, "208, compute-bound")


def test_near_misses_of_the_ridge_or_its_side_are_refused() -> None:
    for answer in ("208 FLOP/byte, memory", "200.6 compute", "206 compute", "210 compute"):
        assert not is_right(SEVEN, answer)


def test_24_gigabytes_hold_28_requests_and_with_a_cap_of_09_hold_21() -> None:
    assert is_right(WHOLE, "28 requests")
    assert is_right(CAPPED, "21")


def test_near_misses_of_a_count_are_refused() -> None:
    assert not any(is_right(WHOLE, answer) for answer in ("27", "29", "28.09", "24", "21"))
    assert not any(is_right(CAPPED, answer) for answer in ("20", "22", "25", "21.3", "28"))


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (THIRTEEN, "3355443200"),
        (THIRTEEN, "3.36 seconds"),
        (THIRTEEN, "many"),
        (THIRTEEN, ""),
        (SEVEN, "208"),
        (SEVEN, "208 compute or memory"),
        (WHOLE, "28 GB"),
        (WHOLE, "28 s"),
    ],
)
def test_an_answer_without_its_number_unit_or_word_is_no_answer(
    question: Question, answer: str
) -> None:
    with pytest.raises(InvalidParameter, match="answer"):
        grade(question, answer)


def test_every_drawn_question_takes_its_own_answer_and_refuses_one_that_is_off() -> None:
    for seed in range(200):
        for unit in list_units():
            question = unit.ask(seed)
            value = format_value(question.answer, question.unit)
            assert is_right(question, f"{value} {question.word}"), (unit.number, seed)
            off = question.answer * 1.02 if question.tolerance else question.answer + 1
            told = f"{off!r} {question.unit} {question.word}"
            assert not is_right(question, told), (unit.number, seed)


def test_a_question_belongs_to_its_seed() -> None:
    for unit in list_units():
        texts = {unit.ask(seed).text for seed in range(20)}
        assert unit.ask(7) == unit.ask(7)
        assert len(texts) > 5


def test_drawn_prefills_are_never_close_to_the_ridge() -> None:
    for seed in range(100):
        question = list_units()[1].questions[0](random.Random(seed))
        tokens = int(question.text.split(" tokens")[0].split()[-1].replace(",", ""))
        assert not 0.6 < tokens / question.answer < 1.7
