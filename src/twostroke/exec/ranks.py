"""RankGroup: an executor whose steps run on several processes, each with a part of the model.

Every plan is sent to all ranks, in one order; the rank that samples answers. The group owns the
processes and the promise that every plan is answered exactly once: a rank that dies, fails or is
stuck past a deadline loses the whole group, whose other ranks may sit in a collective operation
with it and are killed. One thread reads, watches and answers; `start` writes to sockets that never
make it wait.
"""

from __future__ import annotations

import selectors
import shutil
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from twostroke import errors
from twostroke.core.ports import Executor, ExecutorInfo, OnDone, StepAnswer
from twostroke.core.types import BlockId, StepOutcome, StepPlan
from twostroke.errors import DeviceError, ExecutorLost, ModelError, TwostrokeError
from twostroke.exec.rank_process import RankProcess, end_processes, explain, get_text
from twostroke.exec.rank_wire import (
    Begin,
    Close,
    KvBytes,
    Message,
    RankContext,
    ReadKv,
    Ready,
    WriteKv,
    encode,
)
from twostroke.exec.step_wire import Broken, StepLost
from twostroke.spec.ranks import RankLayout, RankPlace

_TICK_S = 0.1  # how late a deadline is noticed at most
_KV_HEADER = struct.Struct("<4sIII")  # mark, ranks a stage, stages, blocks
_KV_MARK = b"2SKV"


@dataclass(frozen=True, slots=True)
class RankSetup:
    """What a group is made of, and how long it waits.

    factory: a function of a module, called in each rank's process with its RankContext and `job`;
    returns the Executor of that rank, or raises. job: what it is to do, picklable. start_timeout_s:
    for all ranks to be ready, weights read and kernels compiled. step_timeout_s: for an answer,
    counted from the step's start or the answer before it. close_timeout_s: for the ranks to end by
    themselves.
    """

    factory: Callable[[RankContext, object], Executor]
    job: object
    layout: RankLayout
    start_timeout_s: float = 900.0
    step_timeout_s: float = 120.0
    close_timeout_s: float = 5.0


@dataclass(slots=True, eq=False)
class _Asked:
    """A question about KV to all ranks; `done` is set when all answered or the group is lost."""

    answers: dict[int, bytes] = field(default_factory=dict)
    done: threading.Event = field(default_factory=threading.Event)


class RankGroup:
    """Runs steps on a group of ranks (see core.ports.Executor).

    Any thread may call it. The constructor waits until all ranks are ready. It raises DeviceError,
    or the ModelError a rank met, naming the rank; no process is left then.
    """

    def __init__(self, setup: RankSetup) -> None:
        self._setup = setup
        self._folder = Path(tempfile.mkdtemp(prefix="twostroke-ranks-"))
        self._ranks: list[RankProcess] = []
        with ExitStack() as undo:
            undo.callback(self._end_processes, 0.0)
            self._start_processes()
            self._info = _combine(self._await_ready(), setup.layout)
            undo.pop_all()
        self._lock = threading.Lock()  # guards everything below, and writing to the ranks
        self._lost: ExecutorLost | None = None
        self._doom = ""  # why the thread should end the group; empty while it should not
        self._is_closing = False  # the ranks may end in good order then
        self._flights: dict[int, OnDone] = {}
        self._asked: _Asked | None = None
        self._due_s = 0.0  # when the oldest flight is late
        self._one_question = threading.Lock()
        self._wake_out, self._wake_in = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="ranks", daemon=True)
        self._thread.start()

    @property
    def pids(self) -> tuple[int, ...]:
        """The ranks' process ids."""
        return tuple(rank.pid for rank in self._ranks)

    def describe(self) -> ExecutorInfo:
        """What the ranks offer together."""
        return self._info

    def start(self, plan: StepPlan, on_done: OnDone) -> None:
        """Sends a plan to all ranks; `on_done` is called on the group's thread, or here if lost."""
        data = encode(plan)
        with self._lock:
            lost = self._lost
            if lost is None:
                assert plan.step not in self._flights
                if not self._flights:
                    self._due_s = time.monotonic() + self._setup.step_timeout_s
                self._flights[plan.step] = on_done
                self._send(data)
        if lost is not None:
            on_done(lost)

    def read_kv(self, blocks: Sequence[BlockId]) -> bytes:
        """The bytes of whole blocks of all ranks, behind a header that names the layout.

        Raises ExecutorLost.
        """
        layout = self._setup.layout
        parts = self._ask([ReadKv(tuple(blocks))] * layout.world)
        header = _KV_HEADER.pack(_KV_MARK, layout.tensor, layout.stages, len(blocks))
        sizes = struct.pack(f"<{layout.world}Q", *map(len, parts))
        return b"".join((header, sizes, *parts))

    def write_kv(self, handle: bytes, blocks: Sequence[BlockId]) -> None:
        """Puts bytes from `read_kv`, of a group of the same layout, into `blocks`.

        Raises DeviceError when they are not that, and ExecutorLost.
        """
        parts = _split_kv(handle, self._setup.layout, len(blocks))
        self._ask([WriteKv(part, tuple(blocks)) for part in parts])

    def close(self) -> None:
        """Ends the ranks; waits `close_timeout_s`, and a little for what it then kills."""
        with self._lock:
            self._is_closing = not self._doom
        self._end("the executor is closed")
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # ---- starting -------------------------------------------------------------------------------

    def _start_processes(self) -> None:
        setup = self._setup
        store = str(self._folder / "store")
        for index in range(setup.layout.world):
            place = RankPlace(index, setup.layout)
            # A rank that waits longer than the group does for an answer would wait in vain.
            context = RankContext(place, store, setup.step_timeout_s)
            data = encode(Begin(setup.factory, context, setup.job))
            rank = RankProcess(place)
            self._ranks.append(rank)
            with suppress(OSError):  # it died already, which waiting for it will show
                rank.end.send(data)

    def _await_ready(self) -> list[ExecutorInfo]:
        """What each rank offers, once all are ready."""
        infos: dict[int, ExecutorInfo] = {}
        deadline_s = time.monotonic() + self._setup.start_timeout_s
        with selectors.DefaultSelector() as selector:
            for rank in self._ranks:
                selector.register(rank.end, selectors.EVENT_READ, rank)
            while len(infos) < len(self._ranks):
                if time.monotonic() > deadline_s:
                    late = ", ".join(
                        rank.name for rank in self._ranks if rank.place.rank not in infos
                    )
                    raise DeviceError(f"not ready in {self._setup.start_timeout_s:g} s: {late}")
                for rank in self._ranks:
                    if rank.end.has_unsent:
                        with suppress(OSError):
                            rank.end.flush()
                for key, _ in selector.select(_TICK_S):
                    self._take_ready(key.data, infos)
        return [infos[index] for index in range(len(self._ranks))]

    def _take_ready(self, rank: RankProcess, infos: dict[int, ExecutorInfo]) -> None:
        try:
            messages = rank.end.receive()
        except (EOFError, OSError):
            raise DeviceError(f"{rank.describe_end()} while it started") from None
        for message in messages:
            if isinstance(message, Broken):
                text = explain(self._ranks, rank, get_text(message))
                raise _get_error_class(message.kind)(text)
            assert isinstance(message, Ready)
            infos[rank.place.rank] = message.info

    # ---- the group's thread ---------------------------------------------------------------------

    def _run(self) -> None:
        """Takes messages until the group is closed or lost; then nobody is left waiting."""
        reason = "the rank group failed"
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self._wake_in, selectors.EVENT_READ, None)
                for rank in self._ranks:
                    selector.register(rank.end, selectors.EVENT_READ, rank)
                while True:
                    self._check_time()
                    self._register_writes(selector)
                    for key, _ in selector.select(_TICK_S):
                        if key.data is None:
                            self._wake_in.recv(4096)
                        else:
                            self._take_messages(key.data)
        except ExecutorLost as lost:
            reason = str(lost)
        finally:
            self._finish(ExecutorLost(reason))

    def _check_time(self) -> None:
        """Raises ExecutorLost when the group is to end, or a step is late."""
        with self._lock:
            if self._doom:
                raise ExecutorLost(self._doom)
            if self._flights and time.monotonic() > self._due_s:
                step, timeout_s = next(iter(self._flights)), self._setup.step_timeout_s
                raise ExecutorLost(f"step {step} was not answered in {timeout_s:g} s: a rank hangs")

    def _register_writes(self, selector: selectors.BaseSelector) -> None:
        """Sends what is kept, and has the selector wake for ranks that do not take all of it."""
        with self._lock:
            for rank in self._ranks:
                events = selectors.EVENT_READ
                if rank.end.has_unsent:
                    with suppress(OSError):  # reading shows that it is gone
                        rank.end.flush()
                    events |= selectors.EVENT_WRITE if rank.end.has_unsent else 0
                if selector.get_key(rank.end).events != events:
                    selector.modify(rank.end, events, rank)

    def _take_messages(self, rank: RankProcess) -> None:
        """Takes what a rank says. Raises ExecutorLost when it is gone or broken."""
        try:
            messages = rank.end.receive()
        except (EOFError, OSError):
            raise ExecutorLost(rank.describe_end()) from None
        for message in messages:
            self._take_message(rank, message)

    def _take_message(self, rank: RankProcess, message: Message) -> None:
        match message:
            case StepOutcome() if rank.place.is_sampling:
                self._answer(rank, message)
            case KvBytes():
                self._note_kv(rank, message)
            case StepLost():
                raise ExecutorLost(explain(self._ranks, rank, message.reason))
            case Broken():
                raise ExecutorLost(explain(self._ranks, rank, get_text(message)))
            case _:
                raise ExecutorLost(f"{rank.name} sent {type(message).__name__} unasked")

    def _answer(self, rank: RankProcess, outcome: StepOutcome) -> None:
        with self._lock:
            on_done = self._flights.pop(outcome.step, None)
            self._due_s = time.monotonic() + self._setup.step_timeout_s
        if on_done is None:
            raise ExecutorLost(f"{rank.name} answered step {outcome.step}, which nobody started")
        on_done(outcome)

    def _note_kv(self, rank: RankProcess, message: KvBytes) -> None:
        with self._lock:
            asked = self._asked
            if asked is None or rank.place.rank in asked.answers:
                raise ExecutorLost(f"{rank.name} sent KV unasked")
            asked.answers[rank.place.rank] = message.data
            if len(asked.answers) == len(self._ranks):
                asked.done.set()

    def _finish(self, lost: ExecutorLost) -> None:
        """Answers whoever waits, and ends the processes."""
        with self._lock:
            self._lost = lost
            flights = list(self._flights.values())
            self._flights.clear()
            if self._asked is not None:
                self._asked.done.set()
            is_closed = self._is_closing
            for rank in self._ranks:
                if not is_closed:
                    rank.kill()
                else:
                    with suppress(OSError):
                        rank.end.send(encode(Close()))
        answer: StepAnswer = lost
        for on_done in flights:
            on_done(answer)
        self._end_processes(self._setup.close_timeout_s if is_closed else 0.0)
        self._wake_in.close()
        self._wake_out.close()

    # ---- asking ---------------------------------------------------------------------------------

    def _send(self, data: bytes) -> None:
        """Sends to all ranks; the lock is held."""
        for rank in self._ranks:
            with suppress(OSError):  # it is gone: the group's thread hears of that and answers
                rank.end.send(data)
        if any(rank.end.has_unsent for rank in self._ranks):
            self._wake()

    def _ask(self, messages: Sequence[ReadKv | WriteKv]) -> list[bytes]:
        """Asks every rank its message; the answers in the order of the ranks."""
        assert threading.current_thread() is not self._thread, "it would wait for itself"
        asked = _Asked()
        encoded = [encode(message) for message in messages]
        with self._one_question:
            with self._lock:
                if self._lost is not None:
                    raise self._lost
                self._asked = asked
                for rank, data in zip(self._ranks, encoded, strict=True):
                    with suppress(OSError):
                        rank.end.send(data)
                self._wake()
            if not asked.done.wait(self._setup.step_timeout_s):
                self._end(f"no KV came in {self._setup.step_timeout_s:g} s: a rank hangs")
            with self._lock:
                self._asked = None
                if len(asked.answers) < len(messages):
                    raise self._lost or ExecutorLost(self._doom)
        return [asked.answers[index] for index in range(len(messages))]

    def _end(self, reason: str) -> None:
        """Has the group's thread end the group."""
        with self._lock:
            self._doom = self._doom or reason
            self._wake()

    def _wake(self) -> None:
        with suppress(OSError):  # full: it will wake anyway; closed: the thread has ended
            self._wake_out.send(b"w")

    def _end_processes(self, grace_s: float) -> None:
        end_processes(self._ranks, grace_s)
        shutil.rmtree(self._folder, ignore_errors=True)


def _combine(infos: Sequence[ExecutorInfo], layout: RankLayout) -> ExecutorInfo:
    """What ranks offer together: each holds its part of every block. Raises DeviceError."""
    sizes = {(info.num_blocks, info.block_tokens) for info in infos}
    if len(sizes) > 1:
        raise DeviceError(f"the ranks' KV pools differ, in blocks and tokens a block: {sizes}")
    drawing = infos[layout.sampling_rank]
    return replace(
        drawing,
        device=f"{layout.world} x {drawing.device.partition(':')[0]}",
        kv_bytes=sum(info.kv_bytes for info in infos),
        weight_bytes=sum(info.weight_bytes for info in infos),
        max_step_tokens=min(info.max_step_tokens for info in infos),
    )


def _split_kv(handle: bytes, layout: RankLayout, num_blocks: int) -> list[bytes]:
    """Each rank's bytes of what `read_kv` made. Raises DeviceError."""
    sizes = struct.Struct(f"<{layout.world}Q")
    start = _KV_HEADER.size + sizes.size
    if len(handle) < _KV_HEADER.size or handle[: len(_KV_MARK)] != _KV_MARK:
        raise DeviceError("these are no KV bytes of a rank group")
    _, tensor, stages, blocks = _KV_HEADER.unpack_from(handle)
    if (tensor, stages) != (layout.tensor, layout.stages):
        theirs, ours = f"{tensor} x {stages}", f"{layout.tensor} x {layout.stages}"
        raise DeviceError(f"these KV bytes are of {theirs} ranks and not of {ours}")
    if blocks != num_blocks:
        raise DeviceError(f"these KV bytes are of {blocks} blocks and not of {num_blocks}")
    lengths = sizes.unpack_from(handle, _KV_HEADER.size) if len(handle) >= start else ()
    if len(handle) != start + sum(lengths) or not lengths:
        raise DeviceError("these KV bytes are cut off or have something behind them")
    parts = []
    for length in lengths:
        parts.append(handle[start : start + length])
        start += length
    return parts


def _get_error_class(kind: str) -> type[TwostrokeError]:
    """What a rank's error at its start is raised as: a model's fault stays one."""
    found = getattr(errors, kind, None)
    if isinstance(found, type) and issubclass(found, ModelError):
        return found
    return DeviceError
