"""The only FLOP and byte formulas: what one step of a model computes, reads and writes. What ranks
of a sharded model do of it, and send each other, is in `sharded_work.py`.

Loader, planner, engine, benchmarks and simulator all divide by these numbers, so nothing else may
count work. Counted is what any exact implementation must do; a multiply-add is two operations.

Bytes count main memory only, each once a step: weights as stored, keys and values of earlier steps
read, those of this step written. Activations and logits are left out, because they are written and
read again at once and fit in a cache: for SmolLM2-135M 2 kB a token for each tensor of the width,
and 0.2 MB of logits a sampled position beside the head's 28 million weights. So are keys and
values of this step read back within it, token ids and block tables (4 bytes a token). Also left
out: decoding quantised weights, softmax exponentials (one a score, 1 / (4 * head_dim) of
attention's operations; with experts one for each of them), sampling.

Of a mixture of experts a step reads only those that some token picked. Which these are is not known
beforehand: counted is their expected number under uniform, independent routing (see
`ModelWork.get_expert_bytes`). Real routing is uneven and reads somewhat fewer.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from operator import add
from typing import NamedTuple

from twostroke.spec.device import DeviceSpec
from twostroke.spec.kv import KvElement
from twostroke.spec.model import ModelSpec, TensorSpec

# Parts of a step, in forward order, and the tensors whose bytes and products belong to each.
PARTS = ("embed", "elementwise", "projections", "attention", "ffn", "head")
_PROJECTIONS = frozenset("qkvo")
_FFN = frozenset(("gate", "up", "down", "router", "experts"))

# Operations of the elementwise part, for each value that passes through it.
_NORM_OPS = 4  # square, sum, times 1/rms, times weight (Zhang & Sennrich 2019, eq. 4)
_ROPE_OPS = 3  # two products and one sum a value (Su et al. 2021, eq. 34)
_RESIDUAL_OPS = 1
_MIX_OPS = 2  # an expert's output times its weight, and added to the others'
_GATE_OPS = 5  # negate, exp, add, divide, times `up` (Shazeer 2020, eq. 5); an exp counts as one


@dataclass(frozen=True, slots=True)
class RowShape:
    """One sequence's share of a step.

    new_tokens: computed in this step, at positions context_before and on. sampled: how many of
    them need logits.
    """

    new_tokens: int
    context_before: int
    sampled: int = 0

    def __post_init__(self) -> None:
        assert self.new_tokens > 0
        assert self.context_before >= 0
        assert 0 <= self.sampled <= self.new_tokens


@dataclass(frozen=True, slots=True)
class StepShape:
    """All rows of a step."""

    rows: tuple[RowShape, ...]

    @property
    def new_tokens(self) -> int:
        """Tokens the step computes."""
        return sum(row.new_tokens for row in self.rows)

    @property
    def sampled(self) -> int:
        """Positions whose logits are wanted."""
        return sum(row.sampled for row in self.rows)


class StepTotals(NamedTuple):
    """A step as seven sums over its rows: all that its work and its time depend on.

    rows: sequences; tokens: computed; sampled: positions whose logits are wanted. pairs: (query,
    key) pairs of attention, keys: keys of earlier steps read, both summed over layers with their
    windows counted. decode_pairs, decode_keys: of those, what rows of one new token contribute.
    A tuple and not a dataclass because the scheduler adds up one for every row of every step.
    """

    rows: int = 0
    tokens: int = 0
    sampled: int = 0
    pairs: int = 0
    keys: int = 0
    decode_pairs: int = 0
    decode_keys: int = 0


def add_totals(first: StepTotals, second: StepTotals) -> StepTotals:
    """Totals of all rows of both."""
    return StepTotals._make(map(add, first, second))


def grow_totals(first: StepTotals, growth: StepTotals, steps: int) -> StepTotals:
    """Totals `steps` steps after `first` when each step adds `growth`: first + steps * growth."""
    return StepTotals._make(start + steps * more for start, more in zip(first, growth, strict=True))


@dataclass(frozen=True, slots=True)
class PartWork:
    """Work of one part of a step.

    ops: (arithmetic, operations) pairs, arithmetic being "int8" for products with quantised
    weights (activations are quantised to 8 bits) and "fp32" for all else.
    """

    name: str
    ops: tuple[tuple[str, int], ...] = ()
    bytes_read: int = 0
    bytes_written: int = 0

    @property
    def flops(self) -> int:
        """Operations in any arithmetic."""
        return sum(count for _, count in self.ops)

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return self.bytes_read + self.bytes_written


@dataclass(frozen=True, slots=True)
class StepWork:
    """Work of a step: its parts in the order of PARTS.

    kv_bytes_read and kv_bytes_written are included in the attention part.
    """

    parts: tuple[PartWork, ...]
    kv_bytes_read: int
    kv_bytes_written: int

    @property
    def flops(self) -> int:
        """Operations of all parts."""
        return sum(part.flops for part in self.parts)

    @property
    def bytes(self) -> int:
        """Bytes read and written by all parts."""
        return sum(part.bytes for part in self.parts)

    def get_part(self, name: str) -> PartWork:
        """The part called `name`, one of PARTS."""
        return self.parts[PARTS.index(name)]


@dataclass(frozen=True, slots=True)
class PartFloor:
    """The least time a part can take, and what sets it: "memory" or "compute"."""

    name: str
    seconds: float
    bound_by: str


@dataclass(frozen=True, slots=True)
class Floor:
    """The least time a step can take.

    seconds: sum over `parts`, which depend on each other and so run one after another. bound_by:
    the resource that sets most of it.
    """

    seconds: float
    bound_by: str
    parts: tuple[PartFloor, ...]


@dataclass(frozen=True, slots=True)
class ModelWork:
    """What a model costs, summed over its tensors once, so that counting a step is cheap.

    matrix_ops: (part, arithmetic, operations a token) of every product with weights, biases
    included. weight_bytes: (part, bytes) read whole in each step that runs the part.
    elementwise_ops: operations a token. embed_row_bytes: one row of the embedding as stored.
    windows: (window, layers that have it), num_layers: of all windows. pair_ops: of one query with
    one key in one layer, for all heads. kv_layer_bytes: K and V of one token in one layer.
    expert_bytes: of all experts of all layers, which weight_bytes leaves out. expert_ranks: so many
    ranks' tokens come to these experts, each as many as are counted.
    """

    matrix_ops: tuple[tuple[str, str, int], ...]
    weight_bytes: tuple[tuple[str, int], ...]
    elementwise_ops: int
    embed_row_bytes: int
    windows: tuple[tuple[int | None, int], ...]
    num_layers: int
    pair_ops: int
    kv_layer_bytes: int
    num_experts: int = 0
    experts_per_token: int = 0
    expert_bytes: int = 0
    expert_ranks: int = 1

    def get_expert_bytes(self, tokens: int) -> int:
        """Bytes of the experts that a step of `tokens` tokens is expected to read.

        A token misses an expert with probability 1 - k/E, so E * (1 - (1 - k/E)^tokens) of a
        layer's E experts are picked at least once when each token picks k of them at random.
        """
        if not self.expert_bytes:
            return 0
        missed = 1 - self.experts_per_token / self.num_experts
        return round(self.expert_bytes * (1 - missed ** (tokens * self.expert_ranks)))

    def get_step_work(self, shape: StepShape) -> StepWork:
        """Work of one step, all parts; a head that nobody needs costs nothing."""
        totals = StepTotals()
        for row in shape.rows:
            more = self.get_row_totals(row.new_tokens, row.context_before, row.sampled)
            totals = add_totals(totals, more)
        return self.get_totals_work(totals)

    def get_row_totals(self, new_tokens: int, context_before: int, sampled: int) -> StepTotals:
        """One row's totals, `new_tokens` > 0 at positions `context_before` and on; unchecked,
        because it is called for every row of every step."""
        if new_tokens == 1:
            # A query at position p sees p + 1 keys, all but its own from earlier steps.
            pairs, seen = 0, context_before + 1
            for window, layers in self.windows:
                pairs += layers * (seen if window is None or seen < window else window)
            keys = pairs - self.num_layers
            return StepTotals(1, 1, sampled, pairs, keys, pairs, keys)
        pairs = keys = 0
        for window, layers in self.windows:
            pairs += layers * count_pairs(new_tokens, context_before, window)
            keys += layers * count_earlier_keys(context_before, window)
        return StepTotals(1, new_tokens, sampled, pairs, keys)

    def get_totals_work(self, totals: StepTotals) -> StepWork:
        """Work of the step whose rows sum to `totals`."""
        tokens, sampled = totals.tokens, totals.sampled
        weight_bytes = dict(self.weight_bytes)
        ops: dict[str, Counter[str]] = {name: Counter() for name in PARTS}
        for part, arithmetic, per_token in self.matrix_ops:
            ops[part][arithmetic] += per_token * (sampled if part == "head" else tokens)
        ops["elementwise"]["fp32"] += self.elementwise_ops * tokens
        attention = self.get_attention_work(totals)
        read = {name: weight_bytes.get(name, 0) if tokens else 0 for name in PARTS}
        read["ffn"] += self.get_expert_bytes(tokens)
        read["embed"] = self.embed_row_bytes * tokens
        if not sampled:
            read["head"] = 0
        parts = tuple(
            attention
            if name == "attention"
            else PartWork(
                name,
                tuple((kind, count) for kind, count in sorted(ops[name].items()) if count),
                read[name],
            )
            for name in PARTS
        )
        return StepWork(parts, attention.bytes_read, attention.bytes_written)

    def get_attention_work(self, totals: StepTotals) -> PartWork:
        """Work of the attention part alone: the only one that depends on more than the numbers of
        tokens and of logits."""
        ops = self.pair_ops * totals.pairs
        return PartWork(
            "attention",
            (("fp32", ops),) if ops else (),
            self.kv_layer_bytes * totals.keys,
            self.kv_layer_bytes * self.num_layers * totals.tokens,
        )


def get_model_work(spec: ModelSpec, kv_element: KvElement = KvElement.F16) -> ModelWork:
    """Costs of `spec` with its keys and values stored as `kv_element`."""
    matrix_ops: Counter[tuple[str, str]] = Counter()
    weight_bytes: Counter[str] = Counter()
    embed_row_bytes = expert_bytes = 0
    for tensor in spec.tensors():
        part = _get_part(tensor)
        if part == "embed":
            embed_row_bytes = tensor.bytes // spec.vocab_size
            if not spec.tied_embeddings:
                continue
            part = "head"
        if _is_expert(tensor):
            expert_bytes += tensor.bytes
        else:
            weight_bytes[part] += tensor.bytes
        if part != "elementwise":
            arithmetic, count = _get_product(spec, tensor)
            matrix_ops[part, arithmetic] += count
    windows = Counter(layer.window for layer in spec.layers)
    return ModelWork(
        matrix_ops=tuple((part, kind, ops) for (part, kind), ops in matrix_ops.items()),
        weight_bytes=tuple(weight_bytes.items()),
        elementwise_ops=_count_elementwise_ops(spec),
        embed_row_bytes=embed_row_bytes,
        windows=tuple(windows.items()),
        num_layers=spec.num_layers,
        # q·k and p·v: a multiply-add a value of the head each (Vaswani et al. 2017, eq. 1).
        pair_ops=4 * spec.num_heads * spec.head_dim,
        kv_layer_bytes=2 * spec.num_kv_heads * kv_element.get_head_bytes(spec.head_dim),
        num_experts=spec.num_experts,
        experts_per_token=spec.experts_per_token,
        expert_bytes=expert_bytes,
    )


def get_op_work(
    spec: ModelSpec, shape: StepShape, kv_element: KvElement = KvElement.F16
) -> dict[str, PartWork]:
    """A step's work op by op: each product under its weight's name over all layers ("q", "down",
    "head"), then "attention", "rms_norm", "rope", "add" and "gated".

    The same counts as `get_step_work`, divided more finely; embedding a token is left out.
    """
    tokens, sampled = shape.new_tokens, shape.sampled
    ops: dict[str, Counter[str]] = {}
    read: Counter[str] = Counter()
    expert_bytes: Counter[str] = Counter()
    for tensor in spec.tensors():
        part = _get_part(tensor)
        if part == "elementwise" or (part == "embed" and not spec.tied_embeddings):
            continue
        is_head = part in ("embed", "head")
        name = "head" if is_head else tensor.name.removesuffix(".bias").split(".")[-1]
        arithmetic, count = _get_product(spec, tensor)
        ops.setdefault(name, Counter())[arithmetic] += count * (sampled if is_head else tokens)
        if _is_expert(tensor):
            expert_bytes[name] += tensor.bytes
        elif sampled or not is_head:
            read[name] += tensor.bytes
    model = get_model_work(spec, kv_element)
    stored = picked = 0  # of the ops so far, so that the ops' rounded bytes sum to the step's
    for name, more in expert_bytes.items():
        stored += more
        read[name] += replace(model, expert_bytes=stored).get_expert_bytes(tokens) - picked
        picked += read[name]
    found = {
        name: PartWork(name, tuple(sorted(counts.items())), read[name])
        for name, counts in ops.items()
    }
    found["attention"] = model.get_step_work(shape).get_part("attention")
    for name, per_token in _get_elementwise_ops(spec).items():
        found[name] = PartWork(name, (("fp32", per_token * tokens),))
    return found


def get_step_work(
    spec: ModelSpec, shape: StepShape, kv_element: KvElement = KvElement.F16
) -> StepWork:
    """Work of one step of `spec`. Who counts many steps keeps `get_model_work`'s value instead."""
    return get_model_work(spec, kv_element).get_step_work(shape)


def get_floor_seconds(work: StepWork, device: DeviceSpec) -> Floor:
    """Least time of a step on a device (the roofline of Williams et al. 2009, part by part).

    A part takes at least its bytes over the memory bandwidth and at least its operations over
    their rates; both go on at once, so the longer counts. Left out: caches that keep weights from
    one step to the next, and everything `StepWork` leaves out. Raises ValueError when the device
    has no rate for an arithmetic the step needs.
    """
    parts = tuple(get_part_floor(part, device) for part in work.parts)
    seconds = {"memory": 0.0, "compute": 0.0}
    for part in parts:
        seconds[part.bound_by] += part.seconds
    bound_by = "memory" if seconds["memory"] >= seconds["compute"] else "compute"
    return Floor(sum(seconds.values()), bound_by, parts)


def get_part_floor(part: PartWork, device: DeviceSpec) -> PartFloor:
    """Least time of one part, or one op, alone; see `get_floor_seconds`."""
    memory = part.bytes / device.memory_bandwidth
    compute = sum(count / device.get_rate(kind) for kind, count in part.ops)
    bound_by = "memory" if memory >= compute else "compute"
    return PartFloor(part.name, max(memory, compute), bound_by)


def count_pairs(new_tokens: int, context_before: int, window: int | None) -> int:
    """(query, key) pairs of causal attention over one row in one layer, exactly.

    The query at position p sees p + 1 keys, itself included, or the last `window` of them.
    """
    first, end = context_before + 1, context_before + new_tokens + 1  # keys seen: first … end-1
    if window is None:
        return _sum_range(first, end)
    growing_end = min(max(first, window), end)  # queries that see fewer than `window` keys
    return _sum_range(first, growing_end) + window * (end - growing_end)


def count_earlier_keys(context_before: int, window: int | None) -> int:
    """Keys of earlier steps that some query of a row sees, in one layer.

    The first new query sees the most of them: the last window - 1 when there is a window.
    """
    return context_before if window is None else min(context_before, window - 1)


def _sum_range(first: int, end: int) -> int:
    return (first + end - 1) * (end - first) // 2


def _get_part(tensor: TensorSpec) -> str:
    if tensor.name in ("embed", "head"):
        return tensor.name
    words = tensor.name.split(".")
    kind = words[2] if len(words) > 2 else words[0]
    if kind in _PROJECTIONS:
        return "projections"
    return "ffn" if kind in _FFN else "elementwise"


def _is_expert(tensor: TensorSpec) -> bool:
    return ".experts." in tensor.name


def _get_product(spec: ModelSpec, tensor: TensorSpec) -> tuple[str, int]:
    """Arithmetic and operations a token of one matrix or bias; of an expert, on average."""
    # A matrix costs a multiply-add a weight and token, a bias one addition.
    count = (2 if len(tensor.shape) == 2 else 1) * tensor.num_weights
    if _is_expert(tensor):
        count = count * spec.experts_per_token // spec.num_experts
    return "int8" if tensor.format.is_quantised else "fp32", count


def _count_elementwise_ops(spec: ModelSpec) -> int:
    """Operations a token in norms, rope, residuals and gates; the final norm counts every token."""
    return sum(_get_elementwise_ops(spec).values())


def _get_elementwise_ops(spec: ModelSpec) -> dict[str, int]:
    """Operations a token of all layers and the final norm, by op."""
    query, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    norms = spec.width * (4 if spec.post_norms else 2)
    if spec.qk_norm:
        norms += query + keys
    layers, experts = spec.num_layers, spec.experts_per_token
    return {
        "rms_norm": _NORM_OPS * (layers * norms + spec.width),
        "rope": _ROPE_OPS * layers * (query + keys),
        "add": layers * spec.width * (2 * _RESIDUAL_OPS + experts * _MIX_OPS),
        "gated": _GATE_OPS * layers * spec.ffn_width * max(1, experts),
    }
