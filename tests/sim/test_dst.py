"""Deterministic simulation: no law breaks in 500 worlds, and broken engines are noticed.

Each breaker damages the scheduler, the loop or the memory as a plausible bug would; the laws must
see it within a few seeds, under the name of the law that it breaks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from dst import Tally, main, try_seed
from dst_scene import HARMS, draw_scene
from twostroke.core.builder import StepBuilder
from twostroke.core.roster import Roster, WaitingQueue
from twostroke.core.scheduler import Scheduler
from twostroke.core.sequence import State
from twostroke.engine.loop import EngineLoop
from twostroke.engine.metrics import EngineMetrics
from twostroke.engine.request import RequestBook
from twostroke.kv.blocks import BlockAllocator, BlockTable
from twostroke.kv.memory import KeptKV
from twostroke.policies.names import ORDERS, PACES
from twostroke.policies.order import AgeingPriority, ShortestRemaining

NUM_SEEDS = 500
MOST_SEEDS = 300  # within which every breaker must be noticed

Patch = pytest.MonkeyPatch
Breaker = Callable[[Patch], None]


@pytest.mark.slow
def test_no_law_breaks_in_500_worlds() -> None:
    total = Tally()
    for seed in range(NUM_SEEDS):
        total.add(try_seed(seed))
    assert total.failures == {}
    counts = total.counts
    # The worlds are worth something only if they go through what is hard.
    for name in ("preemptions", "lost_executors", "refused_answers", "results_after_the_end",
                 "swaps", "cached_tokens", "drafted_tokens"):  # fmt: skip
        assert counts[name] > NUM_SEEDS // 10, name
    for name in ("finished", "rejected", "cancelled", "failed", "engines_closed"):
        assert counts[name] > NUM_SEEDS // 20, name


def wrap(patch: Patch, owner: type, name: str, around: Callable[..., Any]) -> None:
    """Replace a method by `around`, which is given the method as it was."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda self, *args, **named: around(original, self, *args, **named))


def leak_a_block(patch: Patch) -> None:
    """Shrinking a table by several blocks forgets to free one."""

    def shrink(original: Any, table: BlockTable, count: int) -> None:
        if count > 1:
            del table._blocks[-1]
            count -= 1
        original(table, count)

    wrap(patch, BlockTable, "shrink", shrink)


def free_early(patch: Patch) -> None:
    """An ended sequence gives its blocks back although a step still writes to them."""
    patch.setattr(Roster, "free_if_settled", lambda self, sequence: sequence.forget_kv())


def share_without_copying(patch: Patch) -> None:
    """A continuation writes into the block that it shares."""
    patch.setattr(BlockTable, "is_shared", lambda self, index: False)


def name_too_early(patch: Patch) -> None:
    """A block is offered to others before its last token is computed."""

    def name_full(
        original: Any, kept: KeptKV, table: BlockTable, tokens: Any, computed: int
    ) -> Any:
        size = kept._memory.block_tokens
        original(kept, table, tokens, min(len(tokens), len(table) * size, computed + size - 1))

    wrap(patch, KeptKV, "name_full", name_full)


def lose_a_host_block(patch: Patch) -> None:
    """Host memory of an ended sequence is never used again."""

    def forget_host(original: Any, kept: KeptKV) -> None:
        if len(kept.host) > 1:
            kept.host = kept.host[1:]
        original(kept)

    wrap(patch, KeptKV, "forget_host", forget_host)


def emit_twice(patch: Patch) -> None:
    """The last of several tokens is reported two times."""

    def emit(original: Any, self: Scheduler, sequence: Any, result: Any, updates: Any) -> None:
        before = len(updates)
        original(self, sequence, result, updates)
        if sequence.num_new_tokens == 3:
            updates.insert(before, updates[before])

    wrap(patch, Scheduler, "_emit", emit)


def swallow_a_token(patch: Patch) -> None:
    """A token that is drawn right behind another is not delivered."""

    def emit(original: Any, book: RequestBook, state: Any, update: Any, *rest: Any) -> Any:
        return original(book, state, replace(update, tokens=update.tokens[:1]), *rest)

    wrap(patch, RequestBook, "_emit", emit)


def lose_a_request(patch: Patch) -> None:
    """A preempted sequence is not put back into the line."""

    def return_to_line(original: Any, roster: Roster, sequence: Any) -> None:
        original(roster, sequence)
        roster.waiting.remove(sequence)

    wrap(patch, Roster, "return_to_line", return_to_line)


def end_in_silence(patch: Patch) -> None:
    """A cancelled request's first continuation is ended without a word."""

    def cancel(original: Any, self: Scheduler, *args: Any, **named: Any) -> Any:
        return original(self, *args, **named)[1:]

    wrap(patch, Scheduler, "cancel", cancel)


def miscount_a_loss(patch: Patch) -> None:
    """The metrics do not hear of a lost executor."""
    patch.setattr(EngineMetrics, "record_loss", lambda self: None)


def miscount_a_rejection(patch: Patch) -> None:
    """A rejected request counts as one that was never sent."""

    def enter(original: Any, metrics: EngineMetrics) -> None:
        metrics._rejected += 1

    wrap(patch, EngineMetrics, "record_rejected", enter)


def admit_the_last(patch: Patch) -> None:
    """Whoever came last is admitted first."""

    def try_head(original: Any, queue: WaitingQueue) -> Any:
        lanes = [lane for lane in queue.lanes.values() if lane]
        return lanes[-1][-1] if lanes else None

    wrap(patch, WaitingQueue, "try_head", try_head)


def ignore_priorities(patch: Patch) -> None:
    """The order "priority" forgets what priorities are."""
    patch.setattr(AgeingPriority, "rank", lambda self, request, computed, new, now: ())


def prefer_the_longest(patch: Patch) -> None:
    """The order "shortest" has its sign wrong."""

    def rank(original: Any, order: ShortestRemaining, *args: Any) -> Any:
        return (-original(order, *args)[0],)

    wrap(patch, ShortestRemaining, "rank", rank)


def compute_again(patch: Patch) -> None:
    """Half of a prompt's chunk is thrown away when its step is committed."""

    def settle(original: Any, self: Scheduler, placement: Any, *rest: Any) -> None:
        row, sequence = placement.row, placement.sequence
        original(self, placement, *rest)
        if row.sampling is None and sequence.state is State.RUNNING and not sequence.rows_in_flight:
            kept = row.start + len(row.tokens) // 2
            if kept > sequence.kept.named * self.config.block_tokens and sequence.computed > kept:
                sequence.computed = sequence.planned = kept
                table = sequence.table
                table.shrink(len(table) - self.memory.get_num_blocks(kept))

    wrap(patch, Scheduler, "_settle", settle)


def overspend(patch: Patch) -> None:
    """A step's tokens are counted short by one a row."""

    def add(original: Any, builder: StepBuilder, placement: Any, planned: int) -> None:
        original(builder, placement, planned)
        builder._tokens_left += 1

    wrap(patch, StepBuilder, "_add", add)


def take_late_answers(patch: Patch) -> None:
    """An answer of an executor that was given up counts as if it had come in time."""

    def undo_steps(original: Any, loop: EngineLoop, reason: str) -> None:
        original(loop, reason)
        loop._generation -= 1

    wrap(patch, EngineLoop, "_undo_steps", undo_steps)


def blame_nobody(patch: Patch) -> None:
    """A request that kills every executor is never given up."""
    patch.setattr("twostroke.engine.loop.MAX_LOSSES", 1 << 30)


def undo_nothing(patch: Patch) -> None:
    """A lost step's rows count as planned."""

    def undo(original: Any, self: Scheduler, placement: Any) -> None:
        planned = placement.sequence.planned
        original(self, placement)
        placement.sequence.planned = planned

    wrap(patch, Scheduler, "_undo", undo)


def unpin_never(patch: Patch) -> None:
    """A block that is being copied from may be reused."""
    patch.setattr(BlockAllocator, "pin", lambda self, block: None)
    patch.setattr(BlockAllocator, "unpin", lambda self, block: None)


BREAKERS: list[tuple[Breaker, str]] = [
    (leak_a_block, "block .*: counts"),
    (free_early, "block .*: written while shared"),
    (share_without_copying, "block .*: written while shared"),
    (name_too_early, "named what is not computed"),
    (lose_a_host_block, "host: a block leaked"),
    (unpin_never, "block .*: counts"),
    (emit_twice, "scheduler_model"),
    (swallow_a_token, "tokens: .* was delivered others than alone"),
    (lose_a_request, "waiting: not those in the line"),
    (end_in_silence, "conservation: .* are live"),
    (miscount_a_loss, "conservation: executors"),
    (miscount_a_rejection, "conservation: .* are live"),
    (admit_the_last, "order: .* overtook"),
    (ignore_priorities, "order: .* overtook"),
    (prefer_the_longest, "order: .* overtook"),
    (compute_again, "endings: it does not come to an end"),
    (overspend, "scheduler_model"),
    (take_late_answers, "IndexError"),
    (blame_nobody, "endings: who kills executors goes on"),
    (undo_nothing, "planned in no step"),
]


@pytest.mark.parametrize(("breaker", "law"), BREAKERS)
def test_a_broken_engine_is_noticed(
    breaker: Breaker, law: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaker(monkeypatch)
    tallies = (try_seed(seed) for seed in range(MOST_SEEDS))
    found = next((tally.failures for tally in tallies if tally.failures), {})
    assert found, "nothing was noticed"
    (what,) = found.values()
    assert re.search(law, what)


def test_a_failing_seed_names_the_command_that_replays_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leak_a_block(monkeypatch)
    assert main(["--seeds", "3", "--jobs", "1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "  replay: make dst SEED=0" in lines
    result = json.loads(lines[-1])
    assert result["broken_seeds"][0] == 0
    with pytest.raises(AssertionError, match="block"):
        main(["--seed", "0"])


def test_a_replay_says_the_same_every_time(capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for _ in range(2):
        assert main(["--seed", "12"]) == 0
        said.append(capsys.readouterr().out.partition("\n")[2])
    assert said[0] == said[1]
    assert "StepPlan" in said[0]


def test_seeds_share_nothing() -> None:
    alone = try_seed(7).counts
    for seed in range(7):
        try_seed(seed)
    assert try_seed(7).counts == alone


def test_every_kind_of_harm_and_policy_is_drawn() -> None:
    scenes = [draw_scene(seed) for seed in range(300)]
    harms = {harm for scene in scenes for harm in scene.harms.values()}
    assert harms == set(HARMS)
    choices = [scene.choice for scene in scenes if scene.choice is not None]
    assert {choice.order for choice in choices} == set(ORDERS)
    assert {choice.pace for choice in choices} == set(PACES)
