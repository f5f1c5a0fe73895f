"""RooflineCost and MeasuredCost: the time of a step, from data sheets or from measured steps.

Both fill `spec.cost.StepCost` from a step's seven sums. They never count work (spec/work.py does)
and never measure. One step and a run of steps go through the same expression, written once for
integers and for arrays, with nothing but additions, products and maxima of float64 in one order: so
a run's times are those of its steps one by one, to the bit, on every machine.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twostroke.errors import InvalidParameter
from twostroke.spec.device import DeviceSpec
from twostroke.spec.model import ModelSpec
from twostroke.spec.work import ModelWork, StepTotals, get_model_work, grow_totals

# Shorter runs are quicker step by step than as arrays.
_LEAST_ARRAY = 12
_PRODUCTS_PER_LAYER = 5  # q with k and v, attention, o, gate with up, down

# A number of one step, or one for each step of a run.
Values = Any


@dataclass(frozen=True, slots=True)
class Overheads:
    """What a real engine loses against its device's limits; all times in nanoseconds.

    memory_efficiency, matrix_efficiency, attention_efficiency, link_efficiency: shares of the
    bandwidth, of the rate in products with weights, of the rate in attention, and of the link.
    kernel_ns: beginning and end of a kernel, for each of five a layer. link_ns: latency of one
    all-reduce. layer_host_ns: the host takes this to launch a layer's kernels, so that no step is
    shorter than its layers take. step_ns: Python around a step. sampled_ns: for each drawn token;
    prompt_ns: for each row of more than one token.
    """

    memory_efficiency: float
    matrix_efficiency: float
    attention_efficiency: float
    link_efficiency: float
    kernel_ns: float
    link_ns: float
    layer_host_ns: float
    step_ns: float
    sampled_ns: float
    prompt_ns: float


# Fitted with `python -m twostroke.bench.fit_roofline` to half of two published measurements:
# memory_efficiency, matrix_efficiency and kernel_ns to products of Llama-2-7B on an A100 (Vidur,
# Agrawal et al. 2024), the rest to whole steps of Llama-2-70B on two, four and eight A100-80GB
# (Splitwise, Patel et al. 2024), which an engine of 2023 made that launched every kernel from
# Python. Assumed, because those measurements do not tell them: attention_efficiency and link_ns.
# Error on the other halves, median and 90th percentile: products 5 % and 15 %, decode steps 2 % and
# 6 %, prefills 11 % and 23 % (those of 16 prompts and more took longer than their work explains).
EAGER = Overheads(
    memory_efficiency=0.90,
    matrix_efficiency=0.717,
    attention_efficiency=0.5,
    link_efficiency=0.228,
    kernel_ns=10_600.0,
    link_ns=10_000.0,
    layer_host_ns=408_000.0,
    step_ns=10_990_000.0,
    sampled_ns=458_000.0,
    prompt_ns=19_590_000.0,
)
# An engine that replays captured kernels and keeps Python out of the way, as engines since 2024 do.
# Efficiencies as above but for the link; the overheads are assumed, not fitted.
CAPTURED = Overheads(
    memory_efficiency=0.90,
    matrix_efficiency=0.717,
    attention_efficiency=0.5,
    link_efficiency=0.7,
    kernel_ns=3_000.0,
    link_ns=10_000.0,
    layer_host_ns=0.0,
    step_ns=1_000_000.0,
    sampled_ns=10_000.0,
    prompt_ns=0.0,
)

# This engine on an H100, fitted by bench/gpu/fit.py to half of the steps in docs/gpu/results.json,
# prefills and decodes of 16-bit models: 13 of 25. Error on the other half, median: prefills 8 %,
# decodes 8 %. Not measured, and so as above: link_efficiency and link_ns. With 4-bit weights steps
# of many rows take up to twice what this says.
OURS = Overheads(
    memory_efficiency=0.799,
    matrix_efficiency=0.616,
    attention_efficiency=0.645,
    link_efficiency=0.7,
    kernel_ns=1_392.0,
    link_ns=10_000.0,
    layer_host_ns=0.0,
    step_ns=369_000.0,
    sampled_ns=3_940.0,
    prompt_ns=8.0,
)


class RooflineCost:
    """The time of a step on `tensor_parallel` devices (Williams et al. 2009, part by part).

    Each part takes the longer of its bytes over the bandwidth and its operations over the rate,
    both divided by the devices; decoding rows and prompts attend one after the other. Every layer
    sums its partial results over the devices twice (ring: Patarasu & Yuan 2009, §3, 2(n-1)/n of the
    bytes pass each link, plus a latency). Left out: memory traffic of activations, the work that is
    not divided (norms, routers), and waiting of the devices for each other.

    A device with 16-bit matrix units multiplies and attends in 16 bits whatever the weights are
    stored in; one without does as work.py counts. See `StepCost` for the methods.
    """

    def __init__(
        self,
        spec: ModelSpec,
        device: DeviceSpec,
        tensor_parallel: int = 1,
        overheads: Overheads = EAGER,
        work: ModelWork | None = None,
    ) -> None:
        """work: counts of `spec`, where its KV is not 16-bit.

        Raises InvalidParameter when the devices cannot share the model's heads, or have no link.
        """
        _check_sharing(spec, device, tensor_parallel)
        self._work = work = get_model_work(spec) if work is None else work
        self.get_row_totals = work.get_row_totals
        n, over, layers = tensor_parallel, overheads, spec.num_layers
        self._experts = _get_expert_table(work)
        self._expert_array = np.array(self._experts)
        byte_ns = 1e9 / (device.memory_bandwidth * over.memory_efficiency)
        weights = {part: stored * byte_ns / n for part, stored in work.weight_bytes}
        self._projections_ns = weights.get("projections", 0.0)
        self._ffn_ns, self._head_ns = weights.get("ffn", 0.0), weights.get("head", 0.0)
        self._expert_byte_ns = byte_ns / n
        ops_ns = dict.fromkeys(("projections", "ffn", "head"), 0.0)
        for part, arithmetic, ops in work.matrix_ops:
            rate = _get_matrix_rate(device, arithmetic) * over.matrix_efficiency
            ops_ns[part] += ops * 1e9 / rate / n
        self._projections_token_ns = ops_ns["projections"]
        self._ffn_token_ns, self._head_token_ns = ops_ns["ffn"], ops_ns["head"]
        other_ns = work.elementwise_ops * 1e9 / device.get_rate("fp32") / n
        self._token_ns = other_ns + work.embed_row_bytes * byte_ns
        # A device holds whole heads: beyond one a device they are held several times.
        held = max(1, -(-spec.num_kv_heads // n)) / spec.num_kv_heads
        self._key_ns = work.kv_layer_bytes * held * byte_ns
        attention_rate = _get_matrix_rate(device, "fp32") * over.attention_efficiency
        self._pair_ns = work.pair_ops * 1e9 / attention_rate / n
        self._link_token_ns, self._fixed_ns = 0.0, layers * _PRODUCTS_PER_LAYER * over.kernel_ns
        if n > 1:
            link_byte_ns = 1e9 / (device.link_bandwidth * over.link_efficiency)
            passed = 2 * (n - 1) / n * 2 * spec.width  # bytes a token, in 16 bits
            self._link_token_ns = 2 * layers * passed * link_byte_ns
            self._fixed_ns += 2 * layers * over.link_ns
        self._host_ns, self._step_ns = layers * over.layer_host_ns, over.step_ns
        self._sampled_ns, self._prompt_ns = over.sampled_ns, over.prompt_ns
        self._copy_byte_ns = 1e9 / device.host_bandwidth / n if device.host_bandwidth else byte_ns

    def predict_ns(self, totals: StepTotals) -> int:
        """Time of one step."""
        experts = self._experts[min(totals.tokens, len(self._experts) - 1)]
        return _to_time(self._evaluate(totals, experts, max))

    def predict_run_ns(self, first: StepTotals, growth: StepTotals, count: int) -> list[int]:
        """Times of `count` steps, the first with `first`, each `growth` more than the last."""
        if count < _LEAST_ARRAY:
            return [self.predict_ns(grow_totals(first, growth, step)) for step in range(count)]
        totals = _spread(first, growth, count)
        most = len(self._experts) - 1
        if growth.tokens:
            experts: Values = self._expert_array[np.minimum(totals.tokens, most)]
        else:
            experts = self._experts[min(first.tokens, most)]
        return _to_times(self._evaluate(totals, experts, _get_longer), count)

    def predict_copy_ns(self, kv_bytes: int) -> int:
        """Time of moving KV to or from host memory: each device moves its part."""
        return round(kv_bytes * self._copy_byte_ns)

    def _evaluate(
        self, totals: StepTotals, experts: Values, longer: Callable[[Values, Values], Values]
    ) -> Values:
        """Nanoseconds of one step or many; `experts` are the bytes of the experts read."""
        rows, tokens, sampled, pairs, keys, decode_pairs, decode_keys = totals
        layers = self._work.num_layers
        prompt_rows = rows - (decode_pairs - decode_keys) // layers
        # A decoding row writes as many keys as it has pairs but no earlier keys.
        prompt_pairs = pairs - decode_pairs
        prompt_keys = keys - decode_keys + tokens * layers - (decode_pairs - decode_keys)
        ffn_ns = self._ffn_ns + experts * self._expert_byte_ns
        device = self._fixed_ns + tokens * (self._token_ns + self._link_token_ns)
        device = device + longer(tokens * self._projections_token_ns, self._projections_ns)
        device = device + longer(tokens * self._ffn_token_ns, ffn_ns)
        device = device + longer(sampled * self._head_token_ns, (sampled > 0) * self._head_ns)
        device = device + longer(decode_pairs * self._pair_ns, decode_pairs * self._key_ns)
        device = device + longer(prompt_pairs * self._pair_ns, prompt_keys * self._key_ns)
        python = self._step_ns + sampled * self._sampled_ns + prompt_rows * self._prompt_ns
        return longer(device, self._host_ns) + python


@dataclass(frozen=True, slots=True)
class StepFit:
    """A machine's step times as fitted to measured steps (see plan/fit.py); times in nanoseconds.

    token_knots, token_ns: time of a step's layers at so many tokens, linear between and beyond,
    never falling. sampled_knots, sampled_ns: the same for drawn tokens, from (0, 0). row_ns: for
    each row. decode_pair_ns: for each (query, key) pair of rows of one token; prompt_pair_ns,
    prompt_key_ns: for each pair and earlier key of other rows. copy_byte_ns: for each byte copied.
    """

    token_knots: tuple[int, ...]
    token_ns: tuple[float, ...]
    sampled_knots: tuple[int, ...]
    sampled_ns: tuple[float, ...]
    row_ns: float
    decode_pair_ns: float
    prompt_pair_ns: float
    prompt_key_ns: float
    copy_byte_ns: float

    def to_json(self) -> str:
        """As text that `from_json` reads back exactly."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> StepFit:
        """A fit that was stored. Raises InvalidParameter naming what is wrong with it."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise InvalidParameter("step_fit", f"is no JSON: {error}") from None
        names = [field.name for field in fields(StepFit)]
        if not isinstance(values, dict) or sorted(values) != sorted(names):
            raise InvalidParameter("step_fit", f"must be an object with {', '.join(names)}")
        for name in names:
            is_curve = name.endswith("_knots") or name in ("token_ns", "sampled_ns")
            kind = "numbers" if is_curve else "a number"
            numbers = values[name] if is_curve else [values[name]]
            if not isinstance(numbers, list) or not all(map(_is_number, numbers)):
                raise InvalidParameter("step_fit", f"{name} must be {kind}")
            if is_curve:
                values[name] = tuple(numbers)
        for curve in ("token", "sampled"):
            knots = values[f"{curve}_knots"]
            whole = all(isinstance(knot, int) for knot in knots)
            if len(knots) < 2 or not whole or list(knots) != sorted(set(knots)):
                raise InvalidParameter("step_fit", f"{curve}_knots must be whole and rising")
            if len(values[f"{curve}_ns"]) != len(knots):
                raise InvalidParameter("step_fit", f"{curve}_ns must match {curve}_knots")
        return StepFit(**values)


class MeasuredCost:
    """The time of a step on the machine it was measured on. See `StepCost` for the methods."""

    def __init__(self, work: ModelWork, fit: StepFit) -> None:
        """work: the model's counts, with the KV format that was measured."""
        self.fit = fit
        self.get_row_totals = work.get_row_totals
        self._num_layers = work.num_layers
        self._tokens = _Curve(fit.token_knots, fit.token_ns)
        self._sampled = _Curve(fit.sampled_knots, fit.sampled_ns)

    def predict_ns(self, totals: StepTotals) -> int:
        """Time of one step."""
        layers_ns, head_ns = self._tokens.get(totals.tokens), self._sampled.get(totals.sampled)
        return _to_time(self._evaluate(totals, layers_ns, head_ns))

    def predict_run_ns(self, first: StepTotals, growth: StepTotals, count: int) -> list[int]:
        """Times of `count` steps, the first with `first`, each `growth` more than the last."""
        if count < _LEAST_ARRAY:
            return [self.predict_ns(grow_totals(first, growth, step)) for step in range(count)]
        totals = _spread(first, growth, count)
        layers_ns = self._tokens.get_all(totals.tokens)
        head_ns = self._sampled.get_all(totals.sampled)
        return _to_times(self._evaluate(totals, layers_ns, head_ns), count)

    def predict_copy_ns(self, kv_bytes: int) -> int:
        """Time of a copy within this machine's memory."""
        return round(kv_bytes * self.fit.copy_byte_ns)

    def _evaluate(self, totals: StepTotals, layers_ns: Values, head_ns: Values) -> Values:
        fit = self.fit
        decode_ns = totals.decode_pairs * fit.decode_pair_ns
        pairs_ns = (totals.pairs - totals.decode_pairs) * fit.prompt_pair_ns
        keys_ns = (totals.keys - totals.decode_keys) * fit.prompt_key_ns
        return layers_ns + head_ns + totals.rows * fit.row_ns + decode_ns + pairs_ns + keys_ns


class _Curve:
    """Straight lines through (knot, value) points; the last goes on."""

    def __init__(self, knots: tuple[int, ...], values: tuple[float, ...]) -> None:
        self._knots, self._values = knots, values
        self._slopes = tuple(
            (values[at + 1] - values[at]) / (knots[at + 1] - knots[at])
            for at in range(len(knots) - 1)
        )
        self._arrays = tuple(np.array(each) for each in (knots, values, self._slopes))

    def get(self, where: int) -> float:
        """Value at one place."""
        at = min(max(bisect_right(self._knots, where) - 1, 0), len(self._slopes) - 1)
        return self._values[at] + self._slopes[at] * (where - self._knots[at])

    def get_all(self, where: Values) -> NDArray[np.float64]:
        """Values at many places (steps,), each as `get` has it."""
        knots, values, slopes = self._arrays
        at = np.clip(np.searchsorted(knots, where, side="right") - 1, 0, len(slopes) - 1)
        result: NDArray[np.float64] = values[at] + slopes[at] * (where - knots[at])
        return result


def _spread(first: StepTotals, growth: StepTotals, count: int) -> StepTotals:
    """Totals of a run: arrays (count,) in place of those numbers that grow."""
    steps = np.arange(count)
    pairs = zip(first, growth, strict=True)
    return StepTotals._make(start + more * steps if more else start for start, more in pairs)


def _get_longer(one: Values, other: Values) -> Values:
    """The longer of two times, each of one step or of many; arrays are slow for single numbers."""
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return np.maximum(one, other)
    return max(one, other)


def _to_time(ns: float) -> int:
    return max(1, round(ns))


def _to_times(ns: Values, count: int) -> list[int]:
    """Whole times of `count` steps; a single number where all take the same."""
    if not isinstance(ns, np.ndarray) or ns.ndim == 0:
        return [_to_time(float(ns))] * count
    times: list[int] = np.maximum(np.rint(ns), 1).astype(np.int64).tolist()
    return times


def _get_expert_table(work: ModelWork) -> list[int]:
    """Expected bytes of experts at 0, 1, 2 … tokens, up to where all are read."""
    table = [0]
    while table[-1] < work.expert_bytes:
        table.append(work.get_expert_bytes(len(table)))
    return table


def _get_matrix_rate(device: DeviceSpec, arithmetic: str) -> float:
    for half in ("bf16", "f16"):
        if device.has_rate(half):
            return device.get_rate(half)
    return device.get_rate(arithmetic)


def _check_sharing(spec: ModelSpec, device: DeviceSpec, devices: int) -> None:
    if devices < 1 or spec.num_heads % devices:
        fits = [str(n) for n in range(1, spec.num_heads + 1) if spec.num_heads % n == 0]
        problem = (
            f"{spec.name} has {spec.num_heads} heads: {', '.join(fits)} devices can share them"
        )
        raise InvalidParameter("tensor_parallel", f"{problem}, not {devices}")
    if devices > 1 and not device.link_bandwidth:
        raise InvalidParameter("tensor_parallel", f"{device.name} has no link to another")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e300
