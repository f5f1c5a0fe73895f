"""Policies by name: what a user may ask for, and the objects that do it.

The only place where a name is turned into a class. Owns the names and the defaults; a name, or a
number, that cannot work is refused with what would.
"""

from __future__ import annotations

from dataclasses import dataclass

from twostroke.core.policy import Accounts, Order, Pace, Policies
from twostroke.errors import InvalidParameter
from twostroke.policies.accounts import VirtualTokenCounter
from twostroke.policies.draft import PromptLookup
from twostroke.policies.order import (
    AGE_NS,
    HORIZON_NS,
    AgeingPriority,
    EarliestDeadline,
    FirstCome,
    ShortestRemaining,
)
from twostroke.policies.pace import CHUNK_TOKENS, FixedPace, LoadHeuristicPace, StaticBatchPace
from twostroke.policies.preempt import build_swap_choice
from twostroke.policies.target import TargetPace
from twostroke.spec.cost import StepCost

ORDERS = ("first-come", "priority", "shortest", "fair", "deadline")
PACES = ("fixed", "load", "target", "static")

BATCH_SIZE = 16
BATCH_TIMEOUT_NS = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyChoice:
    """What a user asked for; every field has a default that is fit for serving.

    order: one of ORDERS. "fair" is first come with a counter for each tenant. age_ns: waiting that
    makes up for one level of priority. horizon_ns: when a request without a deadline is due.
    pace: one of PACES. fixed_tokens: budget of "fixed"; 0 for all that a step may hold.
    chunk_tokens: of "load". itl_ns: target of "target"; 0 for none but the requests' own.
    batch_size, batch_timeout_ns: of "static". drafts: guess tokens by prompt lookup.
    """

    order: str = "first-come"
    pace: str = "fixed"
    age_ns: int = AGE_NS
    horizon_ns: int = HORIZON_NS
    fixed_tokens: int = 0
    chunk_tokens: int = CHUNK_TOKENS
    itl_ns: int = 0
    batch_size: int = BATCH_SIZE
    batch_timeout_ns: int = BATCH_TIMEOUT_NS
    drafts: bool = False


def build_policies(
    choice: PolicyChoice, *, step_tokens: int, block_bytes: int = 0, cost: StepCost | None = None
) -> Policies:
    """Make what `choice` names, new: policies have memory and serve one scheduler.

    step_tokens: most tokens of a step. block_bytes: KV of one block; 0 where nothing is swapped.
    cost: predicts times; without one, swapping is always preferred, drafts are counted by a rule of
    thumb, and the order "deadline" and the pace "target" are not to be had. Raises InvalidParameter
    for what is unknown, impossible, or would be ignored.
    """
    if choice.itl_ns and choice.pace != "target":
        raise InvalidParameter(
            "itl_ns", f"the pace {choice.pace!r} keeps no target; choose the pace 'target'"
        )
    if choice.fixed_tokens < 0:
        raise InvalidParameter("fixed_tokens", f"must be at least 0, not {choice.fixed_tokens}")
    order, accounts = _build_order(choice, cost)
    pace = _build_pace(choice, step_tokens, cost)
    drafter = PromptLookup(cost) if choice.drafts else None
    if cost is None or not block_bytes:
        return Policies(order, accounts, pace, drafter)
    return Policies(
        order, accounts, pace, drafter, build_swap_choice(cost, block_bytes, step_tokens)
    )


def _build_order(choice: PolicyChoice, cost: StepCost | None) -> tuple[Order, Accounts | None]:
    match choice.order:
        case "first-come":
            return FirstCome(), None
        case "priority":
            return AgeingPriority(choice.age_ns), None
        case "shortest":
            return ShortestRemaining(), None
        case "fair":
            return FirstCome(), VirtualTokenCounter()
        case "deadline":
            return EarliestDeadline(_need("order", "deadline", cost), choice.horizon_ns), None
    raise _refuse("order", choice.order, ORDERS)


def _build_pace(choice: PolicyChoice, step_tokens: int, cost: StepCost | None) -> Pace | None:
    match choice.pace:
        case "fixed":
            # What fills every step needs no pace at all.
            return FixedPace(choice.fixed_tokens) if choice.fixed_tokens else None
        case "load":
            return LoadHeuristicPace(choice.chunk_tokens)
        case "target":
            return TargetPace(_need("pace", "target", cost), step_tokens, choice.itl_ns)
        case "static":
            return StaticBatchPace(choice.batch_size, choice.batch_timeout_ns)
    raise _refuse("pace", choice.pace, PACES)


def _need(parameter: str, name: str, cost: StepCost | None) -> StepCost:
    if cost is None:
        raise InvalidParameter(parameter, f"{name!r} needs predicted step times: calibrate first")
    return cost


def _refuse(parameter: str, name: str, known: tuple[str, ...]) -> InvalidParameter:
    return InvalidParameter(parameter, f"there is no {name!r}; choose from {', '.join(known)}")
