"""The work of one rank of a sharded model, and what ranks send each other: beside work.py the only
such formulas.

Three ways to share a model, which multiply: tensor parallelism divides matrices and heads (Shoeybi
et al. 2019, §3), pipeline parallelism layers (Huang et al. 2019, §2), expert parallelism experts,
where each rank attends for its own share of the tokens and sends them to the ranks that hold their
experts (Lepikhin et al. 2021, §3.2). Bytes are those that one rank sends in one step; a latency for
each message and what several links of a rank could carry at once are left out. Traffic of
activations, which work.py leaves out because a CPU's cache holds them, is counted here for engines
that run one kernel an op.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from twostroke.errors import InvalidParameter
from twostroke.spec.kv import KvElement
from twostroke.spec.model import ModelSpec
from twostroke.spec.ranks import split_layers
from twostroke.spec.shard import shard_spec, take_layers
from twostroke.spec.work import ModelWork, get_model_work

_SUMS_PER_LAYER = 2  # behind attention's output and behind the FFN's
_LOGIT_BYTES = 4  # gathered as float32


@dataclass(frozen=True, slots=True)
class Sharding:
    """How many ranks share a model, in each way."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1

    @property
    def ranks(self) -> int:
        """Devices of one replica."""
        return self.tensor * self.pipeline * self.expert


@dataclass(frozen=True, slots=True)
class Communication:
    """Bytes that one rank sends in a step, by what they are for; summed over its layers.

    sums: all-reduces of tensor parallelism. logits: gathering the parts of the head. stages: from
    this pipeline stage to the next. experts: tokens to their experts and back.
    """

    sums: int = 0
    logits: int = 0
    stages: int = 0
    experts: int = 0

    @property
    def bytes(self) -> int:
        """All of them."""
        return self.sums + self.logits + self.stages + self.experts


def check_sharding(spec: ModelSpec, sharding: Sharding) -> None:
    """Raises InvalidParameter, with what is possible, or DeviceError for heads that cannot be
    shared."""
    if not 1 <= sharding.pipeline <= spec.num_layers:
        least = f"must be from 1 to the {spec.num_layers} layers of {spec.name}"
        raise InvalidParameter("pp", f"{least}, not {sharding.pipeline}")
    experts = max(1, spec.num_experts)
    if sharding.expert < 1 or experts % sharding.expert:
        fits = ", ".join(str(each) for each in range(1, experts + 1) if experts % each == 0)
        raise InvalidParameter("ep", f"{spec.name} can be shared by {fits}, not {sharding.expert}")
    shard_spec(spec, 0, sharding.tensor)


def get_rank_work(
    spec: ModelSpec,
    sharding: Sharding,
    stage: int = 0,
    kv_element: KvElement = KvElement.F16,
) -> ModelWork:
    """Costs of one rank of pipeline stage `stage`, for steps counted as this rank sees them.

    With expert parallelism a rank's rows are its own, and its experts' operations and bytes are
    those that the tokens of all its group bring it: on average its share of every token's. The
    embedding and head are counted in the first and last stage alone. Raises as `check_sharding`.
    """
    check_sharding(spec, sharding)
    assert 0 <= stage < sharding.pipeline
    own = shard_spec(spec, 0, sharding.tensor).spec
    if sharding.pipeline > 1:
        own = take_layers(own, split_layers(spec, sharding.pipeline)[stage])
    work = get_model_work(own, kv_element)
    is_first, is_last = stage == 0, stage == sharding.pipeline - 1
    # A sharded spec describes its head whole; a rank has its rows of it, the last stage's only.
    divide = sharding.tensor

    def cut(part: str, count: int) -> int:
        return count if part != "head" else -(-count // divide) * is_last

    return replace(
        work,
        matrix_ops=tuple((part, kind, cut(part, ops)) for part, kind, ops in work.matrix_ops),
        weight_bytes=tuple((part, cut(part, size)) for part, size in work.weight_bytes),
        embed_row_bytes=work.embed_row_bytes * is_first,
        expert_bytes=work.expert_bytes // sharding.expert,
        expert_ranks=sharding.expert,
    )


def get_rank_weight_bytes(spec: ModelSpec, sharding: Sharding) -> int:
    """Bytes of weights that the fullest rank holds, the whole embedding in the first stage's.

    Raises as `check_sharding`.
    """
    check_sharding(spec, sharding)
    last = sharding.pipeline - 1
    embed_bytes = next(each.bytes for each in spec.tensors() if each.name == "embed")
    held = []
    for stage in range(sharding.pipeline):
        work = get_rank_work(spec, sharding, stage)
        total = sum(size for _, size in work.weight_bytes) + work.expert_bytes
        # A head that is tied and not divided is the embedding itself.
        is_held = spec.tied_embeddings and sharding.tensor == 1 and stage == last
        held.append(total + (embed_bytes if stage == 0 and not is_held else 0))
    return max(held)


def get_communication(
    spec: ModelSpec,
    sharding: Sharding,
    tokens: int,
    sampled: int,
    value_bytes: float = 2,
) -> Communication:
    """What one rank of the fullest stage sends in a step.

    tokens, sampled: of this rank's rows; with expert parallelism 1 / expert of the step's.
    value_bytes: of one activation. A sum over n ranks sends 2 (n - 1) / n of its bytes (ring,
    Patarasu & Yuan 2009, §3). Each token goes to experts_per_token experts, of which (e - 1) / e
    are with other ranks, and its results come back.
    """
    n, stages, e = sharding.tensor, sharding.pipeline, sharding.expert
    layers = -(-spec.num_layers // stages)
    row = spec.width * value_bytes
    sums = layers * _SUMS_PER_LAYER * get_ring_bytes(tokens * row, n)
    logits = (n - 1) / n * sampled * spec.vocab_size * _LOGIT_BYTES
    sent = tokens * row if stages > 1 else 0.0
    routed = layers * 2 * tokens * spec.experts_per_token * row * (e - 1) / e
    return Communication(round(sums), round(logits), round(sent), round(routed))


def get_ring_bytes(size: float, ranks: int) -> float:
    """Bytes that each of `ranks` ranks sends to sum `size` bytes over them all (Patarasu & Yuan
    2009, §3)."""
    return 2 * (ranks - 1) / ranks * size


def get_activation_bytes(spec: ModelSpec, value_bytes: float = 2) -> float:
    """Bytes a token that an engine with one kernel an op reads and writes of activations.

    Each op reads its inputs and writes its output once: norms and residual additions, q, k and v
    with their rotation, attention's output, gate, up and their product; logits left out. Fused
    kernels move less; a chip whose cache holds a step's activations moves none of it.
    """
    query, keys = spec.num_heads * spec.head_dim, 2 * spec.num_kv_heads * spec.head_dim
    norms = 4 if spec.post_norms else 2
    width = norms * 2 + 2 * 3  # in and out of norms; two in and one out of additions
    width += 2 + 2 * max(1, spec.experts_per_token)  # into q, k and v, out of o; in and out of FFNs
    rotated = 2 * (query + keys // 2)
    attended = 2 * (query + keys) + 2 * query  # q, k, v written and read; result written and read
    ffn = 6 * spec.ffn_width * max(1, spec.experts_per_token)  # gate, up: out and in; product: both
    values = spec.num_layers * (width * spec.width + rotated + attended + ffn)
    return value_bytes * values
