"""How a GPU's memory is divided: weights, buffers, graphs, a reserve, and the KV pool for the rest.

Owns the arithmetic and the words of it, so that it can be checked without a GPU. Everything is
allocated before the first step and at its largest, so nothing a request does can need more. What
does not fit is refused before weights are read, with numbers that add up and with what would help.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from twostroke.errors import DeviceError
from twostroke.exec.cuda_formats import get_device_bytes, list_matrices
from twostroke.spec.kv import KvElement
from twostroke.spec.model import ModelSpec

# Tokens of a block, as kernels/cuda/types.py has it; that module needs PyTorch.
BLOCK_TOKENS = 64

# What no one may take: libraries allocate on first use (cuBLAS 32 MiB a stream, kernels' code as it
# is loaded), and PyTorch's allocator rounds up.
RESERVE_SHARE = 50  # of all memory, one part in so many
LEAST_RESERVE = 256 * 2**20
# Of one captured launch: its parameters and what the driver keeps of it, rounded up.
_LAUNCH_BYTES = 8 * 2**10
_LAYER_LAUNCHES = 8
_RUNGS = 64
# Parts that decodes leave of a head's result, while several programs share a row's keys: so many a
# row, and at least so many in all (see kernels/cuda/attention_work.py).
_PARTS_A_ROW = 4
_LEAST_PARTS = 1024
# Of a token of a sequence whose repetitions are penalised: the hash table that counts them (see
# kernels/cuda/sampling_adjust.py), which grows twofold.
_HISTORY_BYTES = 64
# Of a drawn row, and of penalties and biases to begin with (see kernels/cuda/sampling.py); where
# parts of products with quantised matrices meet; what tables are widened to.
_DRAW_ROW_BYTES = 96 * 2**10
_DRAW_ROOM_BYTES = 7 * 2**20
_WORKSPACE_BYTES = 17 * 2**20
_TABLE_STEP = 16
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class CudaOptions:
    """What an executor on a GPU is made for.

    device: as PyTorch names it. step_tokens, max_rows: of the largest step. context_tokens: of the
    longest sequence. kv_bytes: of the pool; None takes what is left. host_bytes: of host memory for
    blocks that are moved out of it. quantise: "int4" or "int8" makes of matrices of floats what it
    says; "" leaves them. exact: a token's results do not depend on the other tokens of its step.
    world: devices that share the model.
    """

    device: str
    kv_element: KvElement
    step_tokens: int
    max_rows: int
    context_tokens: int
    kv_bytes: int | None = None
    host_bytes: int = 0
    quantise: str = ""
    exact: bool = False
    world: int = 1


@dataclass(frozen=True, slots=True)
class MemoryNeeds:
    """What is still to be allocated, in bytes, and what the pool should hold.

    weights are 0 once they are loaded. block_bytes: of the pool; beside_block: of what grows with
    the tokens in it. least_tokens: of the smallest pool worth starting with;
    most_tokens: no pool is of use beyond it. asked: bytes of the pool; None takes what is left.
    """

    weights: int
    buffers: int
    graphs: int
    block_bytes: int
    least_tokens: int
    most_tokens: int
    asked: int | None = None
    beside_block: int = 0

    @property
    def least_pool(self) -> int:
        """Bytes of the smallest pool that will do, and of what goes with it."""
        if self.asked is not None:
            return self.asked + self.asked // self.block_bytes * self.beside_block
        return -(-self.least_tokens // BLOCK_TOKENS) * (self.block_bytes + self.beside_block)

    @property
    def least(self) -> int:
        """Bytes of everything with the smallest pool."""
        return self.weights + self.buffers + self.graphs + self.least_pool


@dataclass(frozen=True, slots=True)
class Saving:
    """Something to change, and the bytes a device then needs less."""

    change: str
    bytes: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The KV pool, and why it has that size."""

    num_blocks: int
    kv_bytes: int
    reason: str


def get_reserve(total: int) -> int:
    """Bytes that stay free of a device's `total`."""
    return max(LEAST_RESERVE, total // RESERVE_SHARE)


def plan_memory(
    free: int, total: int, needs: MemoryNeeds, savings: Sequence[Saving] = ()
) -> MemoryPlan:
    """Divide a device of `total` bytes, `free` of them unused now.

    Raises: DeviceError where it does not fit: every number of it, and which of `savings` help.
    """
    reserve = get_reserve(total)
    left = free - reserve - needs.weights - needs.buffers - needs.graphs
    if left < needs.least_pool:
        raise DeviceError(_explain_shortage(free, total, needs, savings))
    if needs.asked is not None:
        blocks = needs.asked // needs.block_bytes
        return MemoryPlan(blocks, blocks * needs.block_bytes, "as asked")
    useful = -(-needs.most_tokens // BLOCK_TOKENS)
    blocks = min(left // (needs.block_bytes + needs.beside_block), useful)
    reason = "every row at its longest" if blocks == useful else _explain_rest(free, total, needs)
    return MemoryPlan(blocks, blocks * needs.block_bytes, reason)


def get_needs(spec: ModelSpec, options: CudaOptions) -> MemoryNeeds:
    """What a model, or a rank's share of it, needs before anything of it is loaded."""
    block_bytes = BLOCK_TOKENS * spec.get_kv_bytes_per_token(options.kv_element)
    # A step of prompt must find room for its own keys and values.
    least = min(options.step_tokens, options.context_tokens)
    return MemoryNeeds(
        weights=get_device_bytes(spec, options.quantise, options.world),
        buffers=_get_buffer_bytes(spec, options),
        graphs=_RUNGS * _LAYER_LAUNCHES * (spec.num_layers + 1) * _LAUNCH_BYTES,
        block_bytes=block_bytes,
        least_tokens=least,
        most_tokens=options.max_rows * options.context_tokens,
        asked=options.kv_bytes,
        beside_block=BLOCK_TOKENS * _HISTORY_BYTES,
    )


def get_savings(spec: ModelSpec, options: CudaOptions) -> list[Saving]:
    """What could be changed where a model does not fit, each on its own.

    The bytes of several devices are counted as if everything but the buffers were divided evenly.
    """
    now = get_needs(spec, options)

    def compare(change: str, other: CudaOptions) -> Saving:
        return Saving(change, now.least - get_needs(spec, other).least)

    found = [compare(change, other) for change, other in _list_changes(options)]
    if options.kv_bytes is not None:
        found.append(compare("no --kv-memory", replace(options, kv_bytes=None)))
    for more in (2, 4, 8):
        divided = now.weights + now.least_pool
        found.append(Saving(f"{more} devices", divided - divided // more))
    return [each for each in found if each.bytes > 0]


def _list_changes(options: CudaOptions) -> Iterator[tuple[str, CudaOptions]]:
    if options.quantise != "int4":
        yield "--weights int4", replace(options, quantise="int4")
    if options.quantise == "":
        yield "--weights int8", replace(options, quantise="int8")
    if options.kv_element not in (KvElement.INT8, KvElement.FP8):
        yield "--kv int8", replace(options, kv_element=KvElement.INT8)
    if options.step_tokens > 512:
        yield "--step-tokens 512", replace(options, step_tokens=512)
    if options.max_rows > 16:
        yield "--max-rows 16", replace(options, max_rows=16)


def _get_buffer_bytes(spec: ModelSpec, options: CudaOptions) -> int:
    """Activations, logits, the kernels' own memory and tables, at their largest.

    A token's activations: the residual stream and three like it, and either q, k, v and attention's
    output or gate, up and their product. One quantised matrix is unpacked for products of many
    rows.
    """
    width, query = spec.width, spec.num_heads * spec.head_dim
    qkv = query + 2 * spec.num_kv_heads * spec.head_dim
    values = 4 * width + max(qkv + query, 3 * spec.ffn_width)
    activations = 2 * values * options.step_tokens
    rows = min(options.max_rows, options.step_tokens)
    head = rows * (4 * width + 4 * spec.vocab_size)
    # Scores keep a number of every 64 tokens, of every 4,096 three more.
    draws = rows * (_DRAW_ROW_BYTES + spec.vocab_size // 16 + 1024) + _DRAW_ROOM_BYTES
    parts = max(_LEAST_PARTS, _PARTS_A_ROW * rows)
    scratch = 4 * spec.num_heads * (parts * (spec.head_dim + 2) + rows)
    ropes = 4 * len({layer.rope for layer in spec.layers}) * spec.head_dim * options.context_tokens
    unpacked = max(
        (
            2 * outputs * inputs
            for name, each, outputs, inputs in list_matrices(spec, options.quantise)
            if each.is_quantised and name not in ("embed", "head")
        ),
        default=0,
    )
    is_quantised = any(each.is_quantised for _, each, _, _ in list_matrices(spec, options.quantise))
    unpacked += _WORKSPACE_BYTES if is_quantised else 0
    blocks = -(-options.context_tokens // (BLOCK_TOKENS * _TABLE_STEP)) * _TABLE_STEP
    tables = 4 * ((rows + 1) * (blocks + 4) + 9 * options.step_tokens)
    return activations + head + draws + scratch + ropes + unpacked + tables


def _explain_rest(free: int, total: int, needs: MemoryNeeds) -> str:
    """Where a pool comes from that takes what is left."""
    parts = [
        ("for weights", needs.weights),
        ("for buffers", needs.buffers),
        ("for graphs", needs.graphs),
        ("kept free", get_reserve(total)),
    ]
    taken = " and ".join(f"{_show(count)} {name}" for name, count in parts if count)
    return f"{_show(free, is_room=True)} free, less {taken}"


def _explain_shortage(free: int, total: int, needs: MemoryNeeds, savings: Sequence[Saving]) -> str:
    """Every part in MiB, rounded so that what is printed adds up; then what helps."""
    pool = "the KV pool asked for" if needs.asked is not None else "the smallest KV pool"
    if needs.asked is None:
        pool += f" ({needs.least_tokens:,} tokens)"
    parts = [
        ("weights", needs.weights),
        ("buffers", needs.buffers),
        ("graphs", needs.graphs),
        ("a reserve", get_reserve(total)),
        (pool, needs.least_pool),
    ]
    shown = [(name, -(-count // _MIB)) for name, count in parts if count]
    needed, room = sum(count for _, count in shown), free // _MIB
    sums = " + ".join(f"{count:,} MiB for {name}" for name, count in shown)
    short = needed - room
    lines = [
        f"the model does not fit: {sums} = {needed:,} MiB, of {room:,} MiB free "
        f"({total // _MIB:,} MiB in all); {short:,} MiB are missing"
    ]
    # The least change that is enough comes first; of those that are not, what comes nearest.
    helping = sorted(
        savings,
        key=lambda each: (0, each.bytes) if each.bytes // _MIB >= short else (1, -each.bytes),
    )
    for each in helping:
        saved = each.bytes // _MIB
        if saved:
            enough = "enough" if saved >= short else "not enough alone"
            lines.append(f"  {each.change} saves {saved:,} MiB: {enough}")
    return "\n".join(lines)


def _show(count: int, is_room: bool = False) -> str:
    """Bytes in MiB: of what is taken rounded up, of room down."""
    return f"{count // _MIB if is_room else -(-count // _MIB):,} MiB"
