"""`twostroke plan`: which devices, how many, in which pools, for what is asked; then checked.

Composes options from names (devices, formats, tensor parallelism, step budgets), lets
plan/search.py choose in closed form, and has the best few run in the simulator under the same
requests. What cannot be is answered with the nearest thing that can. `--device this` plans for this
machine alone.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product
from typing import NoReturn

from twostroke.cli.plan_check import TRIES, Checked, check_candidate
from twostroke.cli.plan_table import describe_plan, explain, print_plan
from twostroke.cli.question_options import PlanOptions
from twostroke.cli.roofline import THIS, check_pictures
from twostroke.cli.scheduling import read_target
from twostroke.cli.settings import check_name, format_bytes
from twostroke.cli.simulated import (
    ENGINES,
    KV_ELEMENTS,
    MAX_REPLICAS,
    MAX_ROWS,
    find_device,
    find_model,
    get_pool_bytes,
)
from twostroke.errors import DeviceError, InvalidParameter
from twostroke.plan.capacity import TPOT, Demand, Engine, find_capacity
from twostroke.plan.roofline_cost import RooflineCost
from twostroke.plan.search import Candidate, Nearest, Option, find_nearest, get_rank, search
from twostroke.sim.sources import Fitted, Source, SourceChoice, Targets, build_source
from twostroke.spec.device import DeviceSpec, get_known_device, list_known_devices
from twostroke.spec.kv import KvElement
from twostroke.spec.model import ModelSpec
from twostroke.spec.work import get_model_work

_BUDGETS = (512, 1024, 2048, 4096, 8192)
_DEGREES, _STAGES = (1, 2, 4, 8), (1, 2, 4, 8)
_WEIGHTS, _ELEMENTS = ("bf16", "q8_0"), ("f16", "int8")
_SHOWN = 4
_CHECK_S = 30.0  # no further plan is simulated after so long
_MEASURED = 2000  # requests whose lengths make the means
_HOUR_MS = 3.6e6


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, settled: the requests, their means and targets, and what may be chosen.

    source: None where the demand is what one engine keeps. fitted: how many of the requests that
    make the means were cut to the model's context.
    """

    demand: Demand
    fitted: Fitted
    source: Source | None
    options: tuple[Option, ...]
    link_bandwidth: float
    most_replicas: int
    refused: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """The plans that keep what is asked, the best first; `checked` were simulated."""

    question: Question
    candidates: tuple[Candidate, ...]
    shown: tuple[Candidate, ...]
    checked: tuple[Checked, ...]
    seconds: float


def run_plan(options: PlanOptions) -> None:
    """Answer, check and show. Raises TwostrokeError."""
    paths = check_pictures(options.output or [])
    began = time.perf_counter()
    question = ask(options)
    answer = find(question)
    seconds = time.perf_counter() - began
    if options.check and question.source is not None:
        answer = check(answer)
    print_plan(answer, seconds)
    if options.explain:
        explain(answer, options.failures)
    sys.stdout.flush()
    for path in paths:
        from twostroke.plan.pareto_plot import draw_front

        try:
            draw_front(answer.candidates, question.demand, answer.shown, path)
        except OSError as error:
            message = f"{path} cannot be written: {error.strerror}"
            raise InvalidParameter("output", message) from error
        print(f"wrote {path}")
    if options.json:
        print(json.dumps(describe_plan(answer, seconds)))


def ask(options: PlanOptions) -> Question:
    """Settle what is asked. Raises TwostrokeError."""
    targets = [_get_seconds(*each) for each in (
        ("ttft_target_ms", options.ttft_target_ms), ("itl_target_ms", options.itl_target_ms)
    )]  # fmt: skip
    names = [name.strip() for text in options.device or [] for name in text.split(",")]
    if THIS in names:
        return _ask_this(options, names, targets)
    if not names:
        find_device(None)
    source = _build_source(options)
    made = list(_build_options(options, names))
    refused = [each for each in made if isinstance(each, str)]
    found = [each for each in made if isinstance(each, Option)]
    if not found:
        raise InvalidParameter("device", "; ".join(dict.fromkeys(refused)))
    if options.kv_link_gbits <= 0:
        raise InvalidParameter("kv_link_gbits", "must be above 0, such as 200")
    link = options.kv_link_gbits * 1e9 / 8
    demand, fitted = _measure(source, targets, found[0].spec)
    return Question(demand, fitted, source, tuple(found), link, MAX_REPLICAS, tuple(refused))


def find(question: Question) -> Answer:
    """The plans, in closed form. Raises InvalidParameter with what is possible where none keeps
    what is asked."""
    began = time.perf_counter()
    demand = question.demand
    candidates = search(question.options, demand, question.link_bandwidth, question.most_replicas)
    if not candidates:
        _refuse(question, find_nearest(question.options, demand))
    seconds = time.perf_counter() - began
    return Answer(question, tuple(candidates), tuple(_choose(candidates)), (), seconds)


def check(answer: Answer) -> Answer:
    """Simulate the best few while there is time; what fails gets more replicas, within bounds."""
    question = answer.question
    assert question.source is not None
    began = time.perf_counter()
    tries = min(TRIES, question.most_replicas)
    checked: list[Checked] = []
    for candidate in answer.shown:
        if time.perf_counter() - began > _CHECK_S:
            break
        checked.append(check_candidate(candidate, question.demand, question.source, tries))
    order = sorted(checked, key=lambda each: (not each.is_kept, *get_rank(each.candidate)))
    rest = answer.shown[len(checked) :]
    shown = (*(each.candidate for each in order), *rest)
    seconds = time.perf_counter() - began
    return replace(answer, shown=shown, checked=tuple(order), seconds=answer.seconds + seconds)


def _choose(candidates: Sequence[Candidate]) -> Iterator[Candidate]:
    """The best of each device, format and number of pools; one at least in plain formats."""
    kinds: dict[tuple[object, ...], Candidate] = {}
    for candidate in candidates:
        option = candidate.pools[0].option
        kinds.setdefault(
            (option.device, option.weights, option.kv, len(candidate.pools)), candidate
        )
    best = list(kinds.values())
    plain = [each for each in best if each.pools[0].option.is_plain]
    if plain and plain[0] not in best[:_SHOWN]:
        best[_SHOWN - 1] = plain[0]
    yield from best[:_SHOWN]


def _refuse(question: Question, nearest: Nearest) -> NoReturn:
    """Raises InvalidParameter for the first limit that no engine keeps, with what one does keep."""
    demand = question.demand
    if demand.tpot_s and nearest.tpot_s > demand.tpot_s:
        least = _round_up(nearest.tpot_s)
        _refuse_target("itl_target_ms", f"{least} ms is the least, with {nearest.tpot_of}")
    if demand.ttft_s and nearest.ttft_s > demand.ttft_s:
        least = _round_up(nearest.ttft_s)
        _refuse_target("ttft_target_ms", f"{least} ms is the least, with {nearest.ttft_of}")
    found = [find_capacity(each.engine, demand) for each in question.options]
    kept = [each for each in found if not each.load.breaks]
    if kept:
        best = max(kept, key=lambda each: each.load.rate)
        rate = best.load.rate * question.most_replicas
        most = f"at most {rate:.3g} requests/s are kept here: beyond, {best.breaks}"
        raise InvalidParameter("rate", most)
    loose = replace(demand, ttft_s=0.0)
    loads = [find_capacity(each.engine, loose).load for each in question.options]
    without = [load.ttft_s for load in loads if not load.breaks]
    if without:
        least = _round_up(min(without))
        _refuse_target(
            "ttft_target_ms", f"without it TTFT is {least} ms at the most that one engine takes"
        )
    slow = [load.tpot_s for load in loads if load.breaks == TPOT]
    if slow:
        _refuse_target("itl_target_ms", f"beside prompts {_round_up(min(slow))} ms is the least")
    tokens = f"{demand.prompt_tokens:,} + {demand.new_tokens:,} tokens"
    one = f"no engine here keeps even one request of {tokens} at a time: {loads[0].breaks}"
    raise InvalidParameter("prompt_tokens", one)


def _refuse_target(name: str, problem: str) -> NoReturn:
    raise InvalidParameter(name, f"cannot be kept on these devices: {problem}")


def _round_up(seconds: float) -> str:
    """Milliseconds, rounded up so that what is named passes."""
    return f"{-(-round(seconds * 1e9) // 10_000) / 100:.2f}"


def _get_seconds(parameter: str, target_ms: float | None) -> float:
    return read_target(parameter, target_ms) / 1e9


def _build_source(options: PlanOptions) -> Source:
    return build_source(
        SourceChoice(
            trace=options.trace,
            workload=None if options.trace else "poisson",
            rate=options.rate,
            prompt_tokens=options.prompt_tokens,
            new_tokens=options.new_tokens,
            requests=None if options.trace else str(_MEASURED),
            seed=options.seed,
        )
    )


def _measure(source: Source, targets: Sequence[float], spec: ModelSpec) -> tuple[Demand, Fitted]:
    """The means of the first requests, cut to the model's context as a simulation cuts them."""
    fitted = Fitted()
    arrivals = source.arrive(Targets(context_tokens=spec.context_tokens), fitted)
    lengths = [(each.prompt_tokens, each.new_tokens) for each in islice(arrivals, _MEASURED)]
    prompt, new = (max(1, round(sum(each) / len(lengths))) for each in zip(*lengths, strict=True))
    ttft_s, tpot_s = targets
    return Demand(source.expected / source.seconds, prompt, new, ttft_s, tpot_s), fitted


def _build_options(options: PlanOptions, names: Sequence[str]) -> Iterator[Option | str]:
    """Every engine that fits, and for what does not a sentence that says what would."""
    name, _, stored = (options.model or "").partition(":")
    formats = (stored,) if stored else _WEIGHTS
    elements = (options.kv,) if options.kv else _ELEMENTS
    kinds = [check_name("kv", each, KV_ELEMENTS) for each in elements]
    specs = [(each, find_model(f"{name}:{each}" if options.model else None)) for each in formats]
    for wanted in names:
        device, engine = find_device(wanted)
        if options.price is not None:
            if options.price < 0:
                raise InvalidParameter("price", "must be 0 or more dollars an hour")
            device = replace(device, hourly_price=options.price)
        fits = False
        # Stages only where tensor parallelism alone does not do: they add latency and no speed.
        for stages in _STAGES:
            for (stored, spec), kind in product(specs, kinds):
                sharing = (device, engine, stages)
                for option in _fit(spec, (wanted, stored, kind), sharing):
                    fits = True
                    yield option if options.max_rows is None else _limit(option, options.max_rows)
            if fits:
                break
        if not fits:
            yield _say_unfit(specs[-1][1], specs[-1][0], device)


def _limit(option: Option, max_rows: int) -> Option:
    return replace(option, engine=replace(option.engine, max_rows=max_rows))


def _fit(
    spec: ModelSpec, names: tuple[str, str, str], sharing: tuple[DeviceSpec, str, int]
) -> Iterator[Option]:
    """Engines that hold the model with so many pipeline stages."""
    (wanted, stored, kind), (device, engine, stages) = names, sharing
    element = KvElement(kind)
    work = get_model_work(spec, element)
    token_bytes = spec.get_kv_bytes_per_token(element)
    for tp in _DEGREES:
        if spec.num_heads % tp or (tp * stages > 1 and not device.link_bandwidth):
            continue
        pool_tokens = get_pool_bytes(spec, device, tp, stages) // token_bytes
        if pool_tokens < 2 * _BUDGETS[0]:
            continue
        cost = RooflineCost(spec, device, tp, ENGINES[engine][0], work, stages)
        for budget in _BUDGETS:
            made = Engine(cost, pool_tokens, min(MAX_ROWS, budget), budget)
            is_plain = (stored, kind) == (_WEIGHTS[0], _ELEMENTS[0])
            yield Option(
                spec, wanted, stored, kind, tp, made,
                device.hourly_price, token_bytes, is_plain, stages,
            )  # fmt: skip


def _say_unfit(spec: ModelSpec, stored: str, device: DeviceSpec) -> str:
    """Why a model fits no number of these devices, and what would hold it."""
    needed = format_bytes(spec.weight_bytes)
    tp = max(tp for tp in _DEGREES if spec.num_heads % tp == 0)
    most = tp * _STAGES[-1] if device.link_bandwidth else 1
    memory = format_bytes(most * device.memory_bytes)
    others = [
        (tp * stages, name)
        for name in list_known_devices()
        for stages in _STAGES
        if get_pool_bytes(spec, get_known_device(name), tp, stages) > 0
    ]
    fewest = [f"{count} × {name}" for count, name in sorted(others)[:3]]
    hint = f"{', '.join(fewest)} hold it so" if fewest else f"take {spec.name}:q4_0"
    return f"{spec.name} takes {needed} in {stored}, {most} × {device.name} has {memory}; {hint}"


def _ask_this(options: PlanOptions, names: Sequence[str], targets: Sequence[float]) -> Question:
    """This machine as the only device: one replica, as `serve` would set it up."""
    from twostroke.cli.this_machine import open_this

    if len(names) > 1:
        raise InvalidParameter("device", f"{THIS!r} is planned for alone: there is one of it")
    spec, settings, cost, source_name = open_this(options.model, options.kv, options.max_rows)
    pool_tokens = settings.num_blocks * settings.block_tokens
    engine = Engine(cost, pool_tokens, settings.max_rows, settings.step_tokens)
    kind = settings.kv_element.value
    option = Option(
        spec, f"this machine, {settings.threads} threads, {source_name}", "its file's", kind,
        1, engine, options.price or 0.0, spec.get_kv_bytes_per_token(settings.kv_element),
    )  # fmt: skip
    if options.rate is None and options.trace is None:
        source = _build_source(replace(options, rate="1"))
        demand, fitted = _measure(source, targets, spec)
        rate = find_capacity(engine, demand).load.rate
        return Question(replace(demand, rate=0.999 * rate), fitted, None, (option,), 0.0, 1, ())
    source = _build_source(options)
    demand, fitted = _measure(source, targets, spec)
    if demand.held_tokens > pool_tokens:
        raise DeviceError(f"the KV pool here holds {pool_tokens:,} tokens, less than one request")
    return Question(demand, fitted, source, (option,), 0.0, 1, ())
