"""From a row's weighed bins to the token it draws, one program a row.

Owns the search. Whatever top-k, top-p and min-p keep is a prefix of the row's order (falling value,
ties by rising id), and the drawn token is where the running weight of that order passes a target:
so a row is never sorted. The bin of such a place is found by the bins' weights, its candidates are
narrowed by halves of their range while they are many, and the few that are left are sorted.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from twostroke.kernels.cuda.sampling_values import (
    BINS,
    FACTS,
    FAR,
    HUGE,
    LARGEST_KEY,
    LARGEST_PACKED,
    LEAST_KEY,
    LEAST_PACKED,
    clean,
    find_bin,
    get_exponent,
    get_key,
    get_packed_value,
    get_power,
    get_token,
    get_units,
    get_value,
    is_live,
    load_facts,
    pack_candidate,
    widen,
)
from twostroke.kernels.cuda.sampling_weigh import CHOSEN, NEAR
from twostroke.kernels.cuda.types import Tensor

SCAN = tl.constexpr(1024)  # candidates looked at together
COMPARED = tl.constexpr(8)  # candidates that all chosen ones are compared with together


class Source(NamedTuple):
    """Where a row's candidates are read: its list when `listed`, else all its logits.

    row, near_values, near_ids: pointers to the logits and to the list. vocab, length: how many to
    read of the logits, and of what is read. chosen, chosen_units: pointers to room for CHOSEN
    packed candidates and their units.
    """

    row: Tensor
    near_values: Tensor
    near_ids: Tensor
    vocab: Tensor
    length: Tensor
    listed: Tensor
    chosen: Tensor
    chosen_units: Tensor


class Goal(NamedTuple):
    """The place sought: in bin `place`, where a running sum reaches `rest` (with `beyond`, passes).

    rest: float64, in the bin's units, or in candidates when `by_count`.
    """

    place: Tensor
    rest: Tensor
    by_count: Tensor
    beyond: Tensor


@triton.jit
def load_candidates(source, start):
    """Clean values and ids of SCAN candidates; -inf beyond the end."""
    at = start + tl.arange(0, SCAN)
    inside = at < source.length
    listed = inside & source.listed
    value = tl.load(source.near_values + at, mask=listed, other=float("-inf"))
    token = tl.load(source.near_ids + at, mask=listed, other=0)
    direct = tl.load(source.row + at, mask=inside & (source.listed == 0), other=float("-inf"))
    return (
        clean(tl.where(source.listed, value, direct)),
        tl.where(source.listed, token, at),
    )


@triton.jit
def gather(source, facts, place, low, high):
    """Writes the bin's candidates with keys low … high to `chosen`, as many as it has room for.

    Returns how many there are, and their least and largest key.
    """
    count = tl.full((), 0, tl.int32)
    least = tl.full((), LARGEST_KEY, tl.int32)
    largest = tl.full((), LEAST_KEY, tl.int32)
    tl.debug_barrier()  # what was gathered before has been read by now
    start, end = 0, source.length
    while start < end:
        value, token = load_candidates(source, start)
        key = get_key(value)
        shifted = widen(value) - facts.largest
        member = (find_bin(shifted, facts) == place) & is_live(shifted, facts)
        member = member & (key >= low) & (key <= high)
        at = count + tl.cumsum(member.to(tl.int32), 0) - 1
        fits = member & (at < CHOSEN)
        tl.store(source.chosen + at, pack_candidate(key, token), mask=fits)
        count += tl.sum(member.to(tl.int32))
        least = tl.minimum(least, tl.min(tl.where(member, key, LARGEST_KEY)))
        largest = tl.maximum(largest, tl.max(tl.where(member, key, LEAST_KEY)))
        start += SCAN
    tl.debug_barrier()  # all of it is written before any is read
    return count, least, largest


@triton.jit
def measure(source, facts, place, low, high):
    """Number and units of the bin's candidates with keys above `low` up to `high`."""
    count, units = tl.full((), 0, tl.int32), tl.full((), 0, tl.int64)
    start, end = 0, source.length
    while start < end:
        value, _ = load_candidates(source, start)
        key = get_key(value)
        if tl.max(((key > low) & (key <= high)).to(tl.int32)) > 0:
            shifted = widen(value) - facts.largest
            member = (find_bin(shifted, facts) == place) & is_live(shifted, facts)
            member = member & (key > low) & (key <= high)
            count += tl.sum(member.to(tl.int32))
            shifted = tl.where(member, shifted, -HUGE)  # weightless
            units += tl.sum(get_units(shifted, place, facts))
        start += SCAN
    return count, units


@triton.jit
def find_nth(source, value, index):
    """The id of the index-th logit (from 0) that equals `value`."""
    seen, token = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    start, end = 0, source.vocab
    while start < end:
        at = start + tl.arange(0, SCAN)
        x = tl.load(source.row + at, mask=at < source.vocab, other=float("-inf"))
        equal = (x == value).to(tl.int32)
        hit = (equal > 0) & (seen + tl.cumsum(equal, 0) - 1 == index)
        token += tl.sum(tl.where(hit, at, 0))
        seen += tl.sum(equal)
        start += SCAN
    return token


@triton.jit
def find_among_chosen(source, facts, goal, rest, count):
    """The place among `count` gathered candidates: its token, and the units up to it.

    Each candidate's rank and running sum come from comparing it with all others.
    """
    at = tl.arange(0, CHOSEN)
    inside = at < count
    packed = tl.load(source.chosen + at, mask=inside, other=LEAST_PACKED)
    value = clean(get_packed_value(packed))  # NaN beyond the end
    units = get_units(widen(value) - facts.largest, goal.place, facts)
    tl.store(source.chosen_units + at, units)
    tl.debug_barrier()  # all of them are written before any is read
    ranks, through = tl.zeros((CHOSEN,), tl.int32), tl.zeros((CHOSEN,), tl.int64)
    start = 0
    while start < count:
        other = start + tl.arange(0, COMPARED)
        other_packed = tl.load(source.chosen + other, mask=other < count, other=LEAST_PACKED)
        other_units = tl.load(source.chosen_units + other)
        ahead = (other_packed[:, None] >= packed[None, :]) & (other < count)[:, None]
        ranks += tl.sum(ahead.to(tl.int32), 0)
        through += tl.sum(tl.where(ahead, other_units[:, None], 0), 0)
        start += COMPARED
    sums = tl.where(goal.by_count, ranks.to(tl.float64), through.to(tl.float64))
    met = inside & tl.where(goal.beyond, sums > rest, sums >= rest)
    best = tl.max(tl.where(met, packed, LEAST_PACKED))
    last = tl.min(tl.where(inside, packed, LARGEST_PACKED))
    found = tl.where(best > LEAST_PACKED, best, last)
    return get_token(found), tl.sum(tl.where((packed == found) & inside, through, 0))


@triton.jit
def find_among_equal(source, facts, goal, rest, state):
    """The place among state[0] candidates of the key state[1]: its token, and units up to it."""
    count, key = state
    value = get_value(key)
    units = get_units(widen(value) - facts.largest, goal.place, facts)
    each = tl.where(goal.by_count, 1.0, tl.maximum(units.to(tl.float64), 1.0))
    steps = rest / each
    index = tl.where(goal.beyond, tl.floor(steps), tl.ceil(steps) - 1.0)
    index = tl.minimum(tl.maximum(index, 0.0), (count - 1).to(tl.float64)).to(tl.int32)
    return find_nth(source, value, index), (index + 1).to(tl.int64) * units


@triton.jit
def find_place(source, facts, goal):
    """The token at the place sought, -1 in an empty bin, and the bin's units up to it, itself
    included. Where rounding leaves the bin's sum short it is the bin's last candidate."""
    count, low, high = gather(source, facts, goal.place, LEAST_KEY, LARGEST_KEY)
    rest, passed = goal.rest, tl.full((), 0, tl.int64)
    was_many = count > CHOSEN
    while (count > CHOSEN) & (low < high):
        middle = (low & high) + ((low ^ high) >> 1)
        above, units = measure(source, facts, goal.place, middle, high)
        size = tl.where(goal.by_count, above.to(tl.float64), units.to(tl.float64))
        met = (above > 0) & tl.where(goal.beyond, size > rest, size >= rest)
        count = tl.where(met, above, count - above)
        rest = tl.where(met, rest, rest - size)
        passed = tl.where(met, passed, passed + units)
        low = tl.where(met, middle + 1, low)
        high = tl.where(met, high, middle)
    token, units = tl.full((), -1, tl.int32), tl.full((), 0, tl.int64)
    if count > CHOSEN:
        token, units = find_among_equal(source, facts, goal, rest, (count, low))
    elif count > 0:
        if was_many:
            gather(source, facts, goal.place, low, high)
        token, units = find_among_chosen(source, facts, goal, rest, count)
    return token, passed + units


@triton.jit(do_not_specialize_on_alignment=["tokens"])
def search_kernel(tokens, logits, sampling, scratch, stride, vocab):
    """Cuts each row by its top-k, top-p and min-p, in this order, and draws. Grid (rows,)."""
    row = tl.program_id(0)
    facts = load_facts(scratch.facts + row * FACTS)
    if facts.inverse > 0:
        bins = tl.arange(0, BINS)
        exponents = get_exponent(bins, facts)
        masses = tl.load(scratch.masses + row * BINS + bins).to(tl.float64)
        through = tl.cumsum(masses * get_power(-exponents), 0)
        counted = tl.cumsum(tl.load(scratch.counts + row * BINS + bins), 0)
        top_k = tl.load(sampling.top_k + row)
        top_p = tl.load(sampling.top_p + row).to(tl.float64)
        has_min_p = tl.load(sampling.min_p + row) > 0
        uniform = tl.load(scratch.facts + row * FACTS + 5)
        near_count = tl.load(scratch.near_count + row)
        near_mass = tl.max(tl.where(bins < FAR, through, 0.0))
        kept = tl.max(through)
        token = tl.load(tokens + row)
        for step in range(3):  # top-k, top-p, the draw
            cuts = ((step == 0) & (top_k > 0) & (top_k < vocab)) | ((step == 1) & (top_p < 1))
            if cuts | (step == 2):
                by_count, beyond = step == 0, step == 2
                if beyond & has_min_p:
                    kept = tl.minimum(kept, near_mass)
                target = tl.where(beyond, uniform, top_p) * kept
                behind = tl.where(beyond, through <= target, through < target)
                behind = tl.where(by_count, counted < top_k, behind)
                place = tl.minimum(tl.sum(behind.to(tl.int32)), FAR)
                passed = tl.max(tl.where(bins < place, through, 0.0))
                passed_count = tl.max(tl.where(bins < place, counted, 0))
                exponent = get_exponent(place, facts)
                rest = (target - passed) * get_power(exponent)
                rest = tl.where(by_count, (top_k - passed_count).to(tl.float64), rest)
                listed = (place < FAR) & (near_count <= NEAR)
                source = Source(
                    logits + row.to(tl.int64) * stride,
                    scratch.near_values + row * NEAR,
                    scratch.near_ids + row * NEAR,
                    vocab,
                    tl.where(listed, near_count, vocab),
                    listed,
                    scratch.chosen + row * CHOSEN,
                    scratch.chosen_units + row * CHOSEN,
                )
                found, units = find_place(source, facts, Goal(place, rest, by_count, beyond))
                kept = passed + units.to(tl.float64) * get_power(-exponent)
                token = tl.where(found >= 0, found, token)
        tl.store(tokens + row, token)
