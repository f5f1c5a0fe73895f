"""What is measured on a GPU: models, steps of each, and which of them a card cannot hold.

A step is prefill of one prompt from its first token, or a decode: `batch` rows of one new token
each that sees `context` keys, its own included. Nothing here touches a device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from twostroke.spec.catalog import get_known_model, set_weight_format
from twostroke.spec.model import LayerSpec, ModelSpec, RopeLayout, RopeSpec
from twostroke.spec.work import ModelWork, StepTotals, StepWork, add_totals, get_model_work

SEED = 20
BLOCK_TOKENS = 64  # of the engine's KV blocks on a GPU
MAX_STEP_TOKENS = 8192

# What is left free beside weights and KV: activations of a step of 8,192 tokens, cuBLAS
# workspaces, captured graphs, the context of the driver.
RESERVE_BYTES = 5_000_000_000

PREFILL_TOKENS = (128, 512, 2048, 8192)
DECODE_BATCHES = (1, 8, 32, 128)
DECODE_CONTEXTS = (128, 2048, 8192)

PREFILL, DECODE = "prefill", "decode"


@dataclass(frozen=True, slots=True)
class GpuModel:
    """A built-in model and how its matrices are stored.

    weights: "f16", "bf16" or "int4": 4-bit integers with one 16-bit scale in each group of 32,
    which takes the bytes of Q4_0, head included. dtype: of activations and KV, "float16" or
    "bfloat16".
    """

    name: str
    spec_name: str
    weights: str

    @property
    def is_int4(self) -> bool:
        """True when the matrices are 4-bit integers."""
        return self.weights == "int4"

    @property
    def dtype(self) -> str:
        """Torch's name for the activations' type."""
        return "bfloat16" if self.weights == "bf16" else "float16"

    def get_spec(self) -> ModelSpec:
        """Its description, with the formats of its weights."""
        return _make_spec(self)

    def get_work(self) -> ModelWork:
        """What its steps cost, KV in 16 bits."""
        return _make_work(self)


@dataclass(frozen=True, slots=True)
class Cell:
    """One step to time: `batch` rows of `tokens` new tokens that end at `context`."""

    kind: str
    batch: int
    tokens: int
    context: int

    @property
    def name(self) -> str:
        """In words that sort and search well."""
        if self.kind == PREFILL:
            return f"prefill-{self.tokens}"
        return f"decode-{self.batch}x{self.context}"

    @property
    def rows(self) -> tuple[tuple[int, int], ...]:
        """(new tokens, context before them) of each row."""
        return ((self.tokens, self.context - self.tokens),) * self.batch

    @property
    def blocks(self) -> int:
        """KV blocks that all rows take."""
        return self.batch * -(-self.context // BLOCK_TOKENS)


# Stands in for the models in tests and on the fake device, where a step takes seconds.
TINY = ModelSpec(
    family="llama",
    name="tiny",
    width=128,
    ffn_width=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=96,
    context_tokens=1024,
    norm_eps=1e-5,
    attention_scale=32**-0.5,
    rope_layout=RopeLayout.INTERLEAVED,
    layers=(LayerSpec(RopeSpec(10_000.0)),),
    tied_embeddings=False,
)

# No ModelSpec describes GPT-3 175B (Brown et al. 2020, table 2.1): it has learned positions, norms
# with a mean and a bias, and no gate. This is a gated decoder with its layers, width, heads and
# number of weights, so its products move the same bytes; it is not GPT-3 and is never called so.
GPT3_STAND_IN = ModelSpec(
    family="llama",
    name="gpt-3-stand-in",
    width=12_288,
    ffn_width=32_768,
    num_heads=96,
    num_kv_heads=96,
    head_dim=128,
    vocab_size=50_304,
    context_tokens=2048,
    norm_eps=1e-5,
    attention_scale=128**-0.5,
    rope_layout=RopeLayout.INTERLEAVED,
    layers=(LayerSpec(RopeSpec(10_000.0)),) * 96,
    tied_embeddings=False,
)

MODELS = (
    GpuModel("llama-2-7b", "llama-2-7b", "f16"),
    GpuModel("llama-2-13b", "llama-2-13b", "f16"),
    GpuModel("llama-3.1-8b", "llama-3.1-8b", "bf16"),
    GpuModel("llama-3.1-8b-int4", "llama-3.1-8b", "int4"),
    GpuModel("llama-2-70b-int4", "llama-2-70b", "int4"),
    GpuModel("gpt-3-stand-in-int4", GPT3_STAND_IN.name, "int4"),
)
FAKE_MODELS = (
    GpuModel("tiny", TINY.name, "f16"),
    GpuModel("tiny-int4", TINY.name, "int4"),
)
FAKE_CELLS = (
    Cell(PREFILL, 1, 5, 5),
    Cell(DECODE, 1, 1, 70),
    Cell(DECODE, 3, 1, 5),
)


@cache
def _make_spec(model: GpuModel) -> ModelSpec:
    stored = "q4_0" if model.is_int4 else model.weights
    for own in (TINY, GPT3_STAND_IN):
        if model.spec_name == own.name:
            return set_weight_format(own, stored)
    return get_known_model(model.spec_name, stored)


@cache
def _make_work(model: GpuModel) -> ModelWork:
    return get_model_work(model.get_spec())


def get_model(name: str) -> GpuModel:
    """A model of MODELS or FAKE_MODELS by name; KeyError when there is none."""
    return {model.name: model for model in (*MODELS, *FAKE_MODELS)}[name]


def list_cells() -> tuple[Cell, ...]:
    """All steps asked for, those of the bars first, so that a run cut short has them."""
    prefills = [Cell(PREFILL, 1, tokens, tokens) for tokens in PREFILL_TOKENS]
    decodes = [
        Cell(DECODE, batch, 1, context) for context in DECODE_CONTEXTS for batch in DECODE_BATCHES
    ]
    wanted = ("prefill-2048", "decode-1x2048", "decode-32x2048")
    return tuple(sorted([*prefills, *decodes], key=lambda cell: cell.name not in wanted))


def find_obstacle(spec: ModelSpec, cell: Cell, memory_bytes: int) -> str:
    """Why a card of `memory_bytes` cannot run this step of `spec`; empty when it can."""
    if cell.context > spec.context_tokens:
        return f"the model's context is {spec.context_tokens:,} tokens"
    kv_bytes = cell.blocks * BLOCK_TOKENS * spec.get_kv_bytes_per_token()
    needed = spec.weight_bytes + kv_bytes + RESERVE_BYTES
    if needed > memory_bytes:
        parts = f"weights {spec.weight_bytes / 1e9:.1f} GB, KV {kv_bytes / 1e9:.1f} GB"
        room = f"working space {RESERVE_BYTES / 1e9:.0f} GB"
        return f"needs {parts} and {room}; the card has {memory_bytes / 1e9:.1f} GB"
    return ""


def split_cells(
    spec: ModelSpec, cells: Iterable[Cell], memory_bytes: int
) -> tuple[list[Cell], dict[str, str]]:
    """The steps that fit, and by name why the others do not."""
    fitting, refused = [], {}
    for cell in cells:
        obstacle = find_obstacle(spec, cell, memory_bytes)
        if obstacle:
            refused[cell.name] = obstacle
        else:
            fitting.append(cell)
    return fitting, refused


def get_totals(work: ModelWork, rows: Sequence[tuple[int, int]]) -> StepTotals:
    """Sums over (new tokens, context before) rows of which each draws one token."""
    totals = StepTotals()
    for new_tokens, context_before in rows:
        totals = add_totals(totals, work.get_row_totals(new_tokens, context_before, 1))
    return totals


def get_cell_work(model: GpuModel, cell: Cell) -> StepWork:
    """Operations and bytes of a step, KV in 16 bits."""
    work = model.get_work()
    return work.get_totals_work(get_totals(work, cell.rows))
