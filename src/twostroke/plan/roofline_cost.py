"""RooflineCost: the time of a step from a data sheet's limits and an engine's overheads.

Fills `spec.cost.StepCost` from a step's seven sums. It never counts work (spec/work.py does) and
never measures; the overheads were fitted elsewhere (`bench/fit_roofline.py`, `bench/gpu/fit.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from twostroke.errors import InvalidParameter
from twostroke.plan.runs import LEAST_ARRAY, Values, get_longer, spread_totals, to_time, to_times
from twostroke.spec.device import DeviceSpec
from twostroke.spec.model import ModelSpec
from twostroke.spec.sharded_work import get_ring_bytes
from twostroke.spec.work import ModelWork, StepTotals, get_model_work, grow_totals

_PRODUCTS_PER_LAYER = 5  # q with k and v, attention, o, gate with up, down


@dataclass(frozen=True, slots=True)
class Overheads:
    """What a real engine loses against its device's limits; all times in nanoseconds.

    memory_efficiency, matrix_efficiency, attention_efficiency, link_efficiency: shares of the
    bandwidth, of the rate in products with weights, of the rate in attention, and of the link.
    kernel_ns: beginning and end of a kernel, for each of five a layer. link_ns: latency of one
    all-reduce. layer_host_ns: the host takes this to launch a layer's kernels, so that no step is
    shorter than its layers take. step_ns: Python around a step. sampled_ns: for each drawn token;
    prompt_ns: for each row of more than one token. link_burst_bytes, link_late_efficiency: what an
    all-reduce moves beyond so many bytes, such as a cache holds, passes at this share of the link;
    0 bytes where all pass alike.
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
    link_burst_bytes: float = 0.0
    link_late_efficiency: float = 1.0


# Fitted with `python -m twostroke.bench.fit_roofline` to half of two published measurements:
# memory_efficiency, matrix_efficiency and kernel_ns to products of Llama-2-7B on an A100 (Vidur,
# Agrawal et al. 2024), the rest to whole steps of Llama-2-70B on two, four and eight A100-80GB
# (Splitwise, Patel et al. 2024), which an engine of 2023 made that launched every kernel from
# Python. Assumed, because those measurements do not tell them: attention_efficiency and link_ns.
# That sums of more than 48 MB go slower is what the measurements show: a token of a prompt of 4,096
# on eight devices takes a third longer than one of 1,024. Error on the other halves, median and
# 90th percentile: products 5 % and 15 %, decode steps 2 % and 6 %, prefills 5 % and 14 %.
EAGER = Overheads(
    memory_efficiency=0.90,
    matrix_efficiency=0.717,
    attention_efficiency=0.5,
    link_efficiency=0.592,
    kernel_ns=10_630.0,
    link_ns=10_000.0,
    layer_host_ns=406_200.0,
    step_ns=11_150_000.0,
    sampled_ns=457_900.0,
    prompt_ns=21_250_000.0,
    link_burst_bytes=48e6,
    link_late_efficiency=0.0887,
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
    bytes pass each link, those behind a burst more slowly, plus a latency). Left out: memory
    traffic of activations, the work that is not divided (norms, routers), and waiting of the
    devices for each other.

    With pipeline parallelism the devices are those of one stage, and a step's rows go through the
    stages in as many equal parts, one behind the other without end (Huang et al. 2019, §2.3), so
    that a step takes what one part takes through all stages; filling the pipeline is left out,
    which makes a step that is alone take up to twice as long.

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
        pipeline_parallel: int = 1,
    ) -> None:
        """work: counts of `spec`, where its KV is not 16-bit.

        Raises InvalidParameter when the devices cannot share the model's heads, or have no link.
        """
        _check_sharing(spec, device, tensor_parallel, pipeline_parallel)
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
        self._burst_tokens, self._late_token_ns = 0.0, 0.0
        if n > 1:
            token_bytes = 2 * spec.width  # in 16 bits
            passed = 2 * layers * get_ring_bytes(token_bytes, n)
            passed_ns = passed * 1e9 / device.link_bandwidth
            self._link_token_ns = passed_ns / over.link_efficiency
            self._fixed_ns += 2 * layers * over.link_ns
            if over.link_burst_bytes:
                late_ns = passed_ns / over.link_late_efficiency
                self._burst_tokens = over.link_burst_bytes / token_bytes
                self._late_token_ns = late_ns - self._link_token_ns
        self._stages, self._sent_token_ns, self._sent_ns = pipeline_parallel, 0.0, 0.0
        if pipeline_parallel > 1:
            sends, link = pipeline_parallel - 1, device.link_bandwidth * over.link_efficiency
            self._sent_token_ns = sends * 2 * spec.width * 1e9 / link  # in 16 bits
            self._sent_ns = sends * over.link_ns
        self._host_ns, self._step_ns = layers * over.layer_host_ns, over.step_ns
        self._sampled_ns, self._prompt_ns = over.sampled_ns, over.prompt_ns
        self._copy_byte_ns = 1e9 / device.host_bandwidth / n if device.host_bandwidth else byte_ns

    def predict_ns(self, totals: StepTotals) -> int:
        """Time of one step."""
        experts = self._experts[min(-(-totals.tokens // self._stages), len(self._experts) - 1)]
        return to_time(self._evaluate(self._share(totals), experts, max))

    def predict_run_ns(self, first: StepTotals, growth: StepTotals, count: int) -> list[int]:
        """Times of `count` steps, the first with `first`, each `growth` more than the last."""
        if count < LEAST_ARRAY:
            return [self.predict_ns(grow_totals(first, growth, step)) for step in range(count)]
        totals = spread_totals(first, growth, count)
        most = len(self._experts) - 1
        if growth.tokens:
            tokens = -(-totals.tokens // self._stages)
            experts: Values = self._expert_array[np.minimum(tokens, most)]
        else:
            experts = self._experts[min(-(-first.tokens // self._stages), most)]
        return to_times(self._evaluate(self._share(totals), experts, get_longer), count)

    def predict_copy_ns(self, kv_bytes: int) -> int:
        """Time of moving KV to or from host memory: each device moves its part."""
        return round(kv_bytes * self._copy_byte_ns)

    def _share(self, totals: StepTotals) -> StepTotals:
        """What goes through the stages at once: one of as many equal parts as there are stages."""
        if self._stages == 1:
            return totals
        return StepTotals._make(each / self._stages for each in totals)

    def _evaluate(
        self, totals: StepTotals, experts: Values, longer: Callable[[Values, Values], Values]
    ) -> Values:
        """Nanoseconds of one step or many; `experts` are the bytes of the experts read."""
        rows, tokens, sampled, pairs, keys, decode_pairs, decode_keys = totals
        layers = self._work.num_layers
        prompt_rows = rows - (decode_pairs - decode_keys) / layers
        # A decoding row writes as many keys as it has pairs but no earlier keys.
        prompt_pairs = pairs - decode_pairs
        prompt_keys = keys - decode_keys + tokens * layers - (decode_pairs - decode_keys)
        ffn_ns = self._ffn_ns + experts * self._expert_byte_ns
        token_ns = self._token_ns + self._link_token_ns + self._sent_token_ns
        device = self._fixed_ns + self._sent_ns + tokens * token_ns
        device = device + longer(tokens - self._burst_tokens, 0.0) * self._late_token_ns
        device = device + longer(tokens * self._projections_token_ns, self._projections_ns)
        device = device + longer(tokens * self._ffn_token_ns, ffn_ns)
        device = device + longer(sampled * self._head_token_ns, (sampled > 0) * self._head_ns)
        device = device + longer(decode_pairs * self._pair_ns, decode_pairs * self._key_ns)
        device = device + longer(prompt_pairs * self._pair_ns, prompt_keys * self._key_ns)
        python = self._step_ns + sampled * self._sampled_ns + prompt_rows * self._prompt_ns
        return longer(device, self._host_ns) + python


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


def _check_sharing(spec: ModelSpec, device: DeviceSpec, devices: int, stages: int) -> None:
    if not 1 <= stages <= spec.num_layers:
        least = f"must be from 1 to the {spec.num_layers} layers of {spec.name}"
        raise InvalidParameter("pipeline_parallel", f"{least}, not {stages}")
    if stages > 1 and not device.link_bandwidth:
        raise InvalidParameter("pipeline_parallel", f"{device.name} has no link to another")
    if devices < 1 or spec.num_heads % devices:
        fits = [str(n) for n in range(1, spec.num_heads + 1) if spec.num_heads % n == 0]
        problem = (
            f"{spec.name} has {spec.num_heads} heads: {', '.join(fits)} devices can share them"
        )
        raise InvalidParameter("tensor_parallel", f"{problem}, not {devices}")
    if devices > 1 and not device.link_bandwidth:
        raise InvalidParameter("tensor_parallel", f"{device.name} has no link to another")
