"""Capacity in closed form: how many requests an engine keeps within its targets, and what breaks.

Owns the steady state of continuous batching: by Little's law b = λ N T(b) rows decode at once,
where N tokens are drawn for each of λ requests a second and a step takes T(b) in the mean (Little
1961). Prompts take their share of steps, those with a chunk being longer; a prompt waits for those
before it as in M/D/1 (Kleinrock 1975, §5.8), with an exponential tail for the 90th percentile. Left
out: the spread of lengths, bursts beyond Poisson's, preemption, prefix caches; the simulator has
them. Step times come from a StepCost; nothing here counts work or knows a device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from twostroke.spec.cost import StepCost
from twostroke.spec.work import StepTotals, add_totals

# Beyond this share of its time a queue's waits grow without use.
MOST_BUSY = 0.9
_TAIL = 10.0  # the 90th percentile: one in ten waits longer
_HALVINGS = 18  # of an interval: to a part in 250,000

KV, ROWS, TPOT, TTFT, PROMPTS = (
    "the KV pool is full",
    "a step has all the rows it may",
    "time between tokens",
    "time to first token",
    "prompts take all steps",
)


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked: requests a second, mean lengths, and targets in seconds; 0 is no target."""

    rate: float
    prompt_tokens: int
    new_tokens: int
    ttft_s: float = 0.0
    tpot_s: float = 0.0

    @property
    def held_tokens(self) -> int:
        """Tokens that a request holds at its end."""
        return self.prompt_tokens + self.new_tokens


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine: its cost, its KV pool in tokens, and what a step may hold."""

    cost: StepCost
    pool_tokens: int
    max_rows: int
    step_tokens: int


@dataclass(frozen=True, slots=True)
class Load:
    """An engine in its steady state. breaks: the first limit that is not kept; "" when all are.

    rate: requests a second; rows: decoding at once; busy: share of the room for prompts that they
    take; mixed: of steps, those with a chunk of a prompt. tpot_s: mean; ttft_s: 90th percentile.
    """

    rate: float
    rows: float
    busy: float
    mixed: float
    tpot_s: float
    ttft_s: float
    breaks: str


@dataclass(frozen=True, slots=True)
class Capacity:
    """The most that an engine keeps: its load there, and what breaks beyond it."""

    load: Load
    breaks: str


def get_largest_batch(engine: Engine, demand: Demand) -> int:
    """Requests whose keys and values fit at their full length, and a step's rows allow."""
    return min(engine.max_rows, engine.pool_tokens // demand.held_tokens)


def get_prefill_s(engine: Engine, demand: Demand, rows: float = 0.0) -> float:
    """Time of a prompt's steps, `rows` others decoding along."""
    chunk = get_chunk_tokens(engine, demand, rows)
    steps = math.ceil(demand.prompt_tokens / chunk)
    return steps * get_step_s(engine, demand, rows, chunk)


def get_chunk_tokens(engine: Engine, demand: Demand, rows: float) -> int:
    """Tokens of a prompt in each of the steps it takes beside `rows` decodes, in equal parts."""
    room = max(1, min(demand.prompt_tokens, engine.step_tokens - round(rows)))
    return math.ceil(demand.prompt_tokens / math.ceil(demand.prompt_tokens / room))


@dataclass(frozen=True, slots=True)
class Mixing:
    """How prompts share steps with decodes. chunk: tokens of each prompt in a step; steps: that a
    prompt takes; coming: prompts in a step's time; room: prompts that a step has room for."""

    chunk: int
    steps: int
    coming: float
    room: int

    @property
    def together(self) -> int:
        """Prompts in a step that has some, in the mean."""
        return min(self.room, max(1, round(self.coming)))


def get_mixing(engine: Engine, demand: Demand, rows: float) -> Mixing:
    """How prompts share steps with `rows` decodes: in a step's time rows / N of them come."""
    chunk = get_chunk_tokens(engine, demand, rows)
    steps = math.ceil(demand.prompt_tokens / chunk)
    # Whole prompts share a step where there is room.
    room = max(1, (engine.step_tokens - round(rows)) // chunk) if steps == 1 else 1
    return Mixing(chunk, steps, rows / demand.new_tokens, room)


def get_step_s(engine: Engine, demand: Demand, rows: float, chunk: int, prompts: int = 1) -> float:
    """Time of a step: `rows` decodes half-way through their answers, a chunk of each of some
    prompts."""
    cost, count = engine.cost, max(1, round(rows)) if rows else 0
    context = demand.prompt_tokens + demand.new_tokens // 2
    totals = StepTotals()
    if count:
        row = cost.get_row_totals(1, context, 1)
        totals = StepTotals(*(count * each for each in row))
    if chunk:
        before = (demand.prompt_tokens - chunk) // 2
        row = cost.get_row_totals(chunk, before, 1)
        totals = add_totals(totals, StepTotals(*(prompts * each for each in row)))
    return cost.predict_ns(totals) / 1e9


def get_load(engine: Engine, demand: Demand, rows: float) -> Load:
    """The steady state of one pool, prompts and decodes together, in which `rows` decode."""
    mixing = get_mixing(engine, demand, rows)
    chunks = mixing.coming * mixing.steps
    busy, mixed = chunks / mixing.room, min(1.0, chunks)
    plain_s = get_step_s(engine, demand, rows, 0)
    mixed_s = get_step_s(engine, demand, rows, mixing.chunk, mixing.together)
    tpot_s = plain_s + mixed * (mixed_s - plain_s)
    prefill_s = mixing.steps * mixed_s
    ttft_s = prefill_s + tpot_s / 2 + get_wait_s(busy, prefill_s)
    rate = rows / (demand.new_tokens * tpot_s)
    load = Load(rate, rows, busy, mixed, tpot_s, ttft_s, "")
    return replace(load, breaks=_find_broken(engine, demand, load))


def get_decode_load(engine: Engine, demand: Demand, rows: float) -> Load:
    """The steady state of a decode pool's engine, which computes no prompts."""
    step_s = get_step_s(engine, demand, rows, 0)
    rate = rows / (demand.new_tokens * step_s)
    load = Load(rate, rows, 0.0, 0.0, step_s, 0.0, "")
    return replace(load, breaks=_find_broken(engine, demand, load))


def get_prefill_load(engine: Engine, demand: Demand, rate: float) -> Load:
    """The steady state of a prefill pool's engine at `rate` requests a second."""
    prefill_s = get_prefill_s(engine, demand)
    busy = rate * prefill_s
    ttft_s = prefill_s + get_wait_s(busy, prefill_s)
    load = Load(rate, 0.0, busy, 1.0, 0.0, ttft_s, "")
    return replace(load, breaks=_find_broken(engine, demand, load))


def get_wait_s(busy: float, service_s: float) -> float:
    """90th percentile of the wait of an M/D/1 queue that is busy so much of its time.

    Mean ρ S / (2 (1 - ρ)) (Kleinrock 1975, §5.8); those who wait at all, a share ρ, are taken to
    wait exponentially.
    """
    if busy >= 1:
        return math.inf
    if busy * _TAIL <= 1:
        return 0.0
    return service_s / (2 * (1 - busy)) * math.log(busy * _TAIL)


def _find_broken(engine: Engine, demand: Demand, load: Load) -> str:
    if load.rows * demand.held_tokens > engine.pool_tokens:
        return KV
    if load.rows > engine.max_rows:
        return ROWS
    if demand.tpot_s and load.tpot_s > demand.tpot_s:
        return TPOT
    if load.busy > MOST_BUSY:
        return TTFT if demand.ttft_s and load.ttft_s > demand.ttft_s else PROMPTS
    if demand.ttft_s and load.ttft_s > demand.ttft_s:
        return TTFT
    return ""


def find_capacity(engine: Engine, demand: Demand, is_decode_only: bool = False) -> Capacity:
    """The most requests a second that one engine keeps, and what breaks beyond that.

    Where not even one row keeps the targets, its load is that of one row and says what breaks.
    """
    get = get_decode_load if is_decode_only else get_load
    most = engine.max_rows + 1
    low, high = 1, most
    first = get(engine, demand, 1.0)
    if first.breaks:
        return Capacity(first, first.breaks)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if get(engine, demand, middle).breaks else (middle, high)
    return Capacity(get(engine, demand, low), get(engine, demand, high).breaks)


def find_prefill_capacity(engine: Engine, demand: Demand) -> Capacity:
    """The same for an engine of a prefill pool."""
    most = MOST_BUSY / get_prefill_s(engine, demand)
    rate = find_highest(lambda rate: not get_prefill_load(engine, demand, rate).breaks, most)
    load = get_prefill_load(engine, demand, rate)
    return Capacity(load, get_prefill_load(engine, demand, 1.01 * rate + 1e-9).breaks or PROMPTS)


def find_load(
    engine: Engine, demand: Demand, rate: float, most: Load, is_decode_only: bool = False
) -> Load:
    """The steady state at `rate` requests a second, at most that of `most`."""
    get = get_decode_load if is_decode_only else get_load
    low, high = 0.0, most.rows
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if get(engine, demand, middle).rate < rate else (low, middle)
    return get(engine, demand, high)


def find_highest(is_kept: Callable[[float], bool], most: float) -> float:
    """The highest of 0 … most at which a condition still holds that once broken stays so."""
    if is_kept(most):
        return most
    low, high = 0.0, most
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if is_kept(middle) else (low, middle)
    return low
