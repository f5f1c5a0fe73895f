"""Constraints: what grammars allow, put into plans between the scheduler and the executor.

Owns the matchers of live continuations. A matcher follows committed tokens only, and its mask is a
function of those: a step that was lost and is planned again asks for the same masks, and a
continuation that was preempted, resumed or replayed is matched anew from its first token. `compile`
and `get` may be called from any thread; the rest belongs to the thread that pumps the loop. It
never touches the scheduler: who can no longer be matched is reported, for the loop to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from twostroke.core.types import Request, Row, SequenceEnded, SequenceId, StepPlan, Update
from twostroke.errors import Overloaded, RequestFailed
from twostroke.text.grammar import Grammar, GrammarCompiler, Matcher

MAX_WAITING = 64  # grammars to compile
RETRY_AFTER_S = 5.0


class Constraints:
    """The grammars of one engine."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._thread = ThreadPoolExecutor(1, "twostroke-grammar")
        self._waiting: set[Future[Grammar]] = set()
        self._grammars: dict[str, Grammar] = {}  # by request
        self._live: dict[str, int] = {}  # of these requests, continuations that have not ended
        self._matchers: dict[SequenceId, Matcher] = {}

    # ---- any thread -----------------------------------------------------------------------------

    def compile(self, text: str) -> Future[Grammar]:
        """The grammar of a canonical text (see text/grammar.py), once it is compiled.

        The future raises InvalidParameter for what is no grammar or costs too much. Raises
        Overloaded when too many are being compiled already.
        """
        known = self._compiler.get(text)
        if known is not None:
            done: Future[Grammar] = Future()
            done.set_result(known)
            return done
        if len(self._waiting) >= MAX_WAITING:
            raise Overloaded(
                "grammars", f"{MAX_WAITING} grammars are being compiled already", RETRY_AFTER_S
            )
        future = self._thread.submit(self._compiler.compile, text)
        self._waiting.add(future)
        future.add_done_callback(self._waiting.discard)
        return future

    def prepare(self) -> Future[None]:
        """Begin what the first grammar would have to wait for; nobody needs to wait for it."""
        return self._thread.submit(self._compiler.prepare)

    def close(self) -> None:
        """End the compiler; what still waits for it is cancelled."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._compiler.close()
        self._thread.shutdown(wait=True)
        self._compiler.close()  # the last to be compiled may have begun a process meanwhile

    # ---- the loop's thread ----------------------------------------------------------------------

    def open(self, request: Request, grammar: Grammar) -> None:
        """Match what this request draws from now on, until all its continuations have ended."""
        self._grammars[request.id] = grammar
        self._live[request.id] = request.num_open

    def apply(self, plan: StepPlan) -> tuple[StepPlan, Sequence[tuple[SequenceId, str]]]:
        """The plan with masks, and the continuations that cannot be matched, with the reason.

        Their rows are left without a mask, so what these draw must not be used.
        """
        if not self._grammars or not any(map(_is_constrained, plan.rows)):
            return plan, ()
        rows, broken = list(plan.rows), []
        for place, row in enumerate(rows):
            if not _is_constrained(row):
                continue
            try:
                mask = self._compute_mask(row)
            except RequestFailed as error:
                broken.append((row.sequence, str(error)))
                mask = b""
            rows[place] = _fill(row, mask)
        return replace(plan, rows=tuple(rows)), broken

    def note(self, updates: Sequence[Update]) -> None:
        """Forget continuations that ended."""
        for update in updates if self._grammars else ():
            request_id = update.sequence.request
            if isinstance(update, SequenceEnded) and request_id in self._live:
                self._matchers.pop(update.sequence, None)
                self._live[request_id] -= 1
                if not self._live[request_id]:
                    del self._live[request_id], self._grammars[request_id]

    def _compute_mask(self, row: Row) -> bytes:
        drawn = row.history[row.history_prompt :]
        matcher = self._matchers.get(row.sequence)
        if matcher is None or matcher.num_tokens > len(drawn):
            matcher = self._grammars[row.sequence.request].start()
        self._matchers[row.sequence] = matcher
        if matcher.num_tokens < len(drawn):
            matcher.advance(drawn[matcher.num_tokens :])
        return matcher.compute_mask()


def _is_constrained(row: Row) -> bool:
    return row.sampling is not None and row.sampling.grammar != ""


def _fill(row: Row, mask: bytes) -> Row:
    """The row with its mask, and without a history that only the mask was made from."""
    if row.sampling is not None and row.sampling.has_penalties:
        return replace(row, mask=mask)
    return replace(row, mask=mask, history=(), history_prompt=0)
