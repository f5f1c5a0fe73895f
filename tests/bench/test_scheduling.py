"""Laws of how scheduling is measured: what is compared is what is said."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from twostroke.bench import scheduling
from twostroke.bench.scheduling import BATCH, extend_batches, find_share
from twostroke.bench.variants import Arrival


@dataclass
class Prompts:
    """Makes prompts that say how long they were asked to be."""

    def make_prompt(self, seed: int, tokens: int) -> tuple[int, ...]:
        """All zeros."""
        return (0,) * tokens


LOAD = [Arrival(0.0, (7,) * (1 + index % 5), 1 + index % 7) for index in range(BATCH + 3)]


@pytest.mark.parametrize("pads", [False, True])
def test_a_static_batch_ends_with_its_longest_answer(pads: bool) -> None:
    longer = extend_batches(LOAD, Prompts().make_prompt, pads)
    assert {one.new_tokens for one in longer[:BATCH]} == {7}
    assert {one.new_tokens for one in longer[BATCH:]} == {
        max(one.new_tokens for one in LOAD[BATCH:])
    }


def test_padding_makes_all_prompts_of_a_batch_as_long_as_its_longest() -> None:
    longer = extend_batches(LOAD, Prompts().make_prompt, True)
    assert {len(one.prompt) for one in longer[:BATCH]} == {5}
    for one, padded in zip(LOAD, longer, strict=True):
        assert padded.prompt[len(padded.prompt) - len(one.prompt) :] == one.prompt


def test_without_padding_prompts_stay_as_they_are() -> None:
    longer = extend_batches(LOAD, Prompts().make_prompt, False)
    assert [one.prompt for one in longer] == [one.prompt for one in LOAD]


def test_a_share_of_values_is_one_that_occurred() -> None:
    assert find_share([3.0, 1.0, 2.0], 0.5) == 2.0
    assert find_share([3.0, 1.0, 2.0], 1.0) == 3.0


def test_every_section_has_words_for_people() -> None:
    assert all(section.__doc__ for section in scheduling.SECTIONS.values())
