"""The work formulas against what others count: PyTorch's operations, and the pool's bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tiny_models import TINY_SPECS, make_tensors
from twostroke.exec.cpu import CpuRunner
from twostroke.exec.local import RunnerSizes
from twostroke.spec.kv import KvElement
from twostroke.spec.model import ModelSpec
from twostroke.spec.quant import Format
from twostroke.spec.work import RowShape, StepShape, get_model_work

torch = pytest.importorskip("torch")

SPECS = {
    **{name: replace(spec, qkv_bias=False) for name, spec in TINY_SPECS.items()},
    "mixture": replace(TINY_SPECS["llama"], num_experts=4, experts_per_token=2),
}


def run(spec: ModelSpec, tokens: int) -> None:
    """The matrix products of a prompt whose every token is sampled, and of whole attention."""
    heads, size, kv = spec.num_heads, spec.head_dim, spec.num_kv_heads
    x = torch.zeros(tokens, spec.width)
    for _ in spec.layers:
        q = (x @ torch.zeros(spec.width, heads * size)).view(tokens, heads, size)
        k, v = ((x @ torch.zeros(spec.width, kv * size)).view(tokens, kv, size) for _ in "kv")
        k, v = (each.repeat_interleave(heads // kv, dim=1).transpose(0, 1) for each in (k, v))
        scores = torch.bmm(q.transpose(0, 1), k.transpose(1, 2))
        mixed = torch.bmm(scores, v).transpose(0, 1).reshape(tokens, heads * size)
        x = mixed @ torch.zeros(heads * size, spec.width)
        if spec.num_experts:
            x @ torch.zeros(spec.width, spec.num_experts)
        for _ in range(max(1, spec.experts_per_token)):
            gate, up = (x @ torch.zeros(spec.width, spec.ffn_width) for _ in "gu")
            x = (gate * up) @ torch.zeros(spec.ffn_width, spec.width)
    x @ torch.zeros(spec.width, spec.vocab_size)


@pytest.mark.parametrize("name", SPECS)
def test_products_are_those_that_pytorch_counts(name: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    spec, tokens = SPECS[name], 24  # within every window
    with FlopCounterMode(display=False) as counter:
        run(spec, tokens)
    counted = counter.get_flop_counts()["Global"]
    work = get_model_work(spec).get_step_work(StepShape((RowShape(tokens, 0, tokens),)))
    products = sum(work.get_part(part).flops for part in ("projections", "ffn", "head"))
    assert products == counted[torch.ops.aten.mm]
    # Dense attention computes the whole square, of which a causal row needs the lower half.
    square = counted[torch.ops.aten.bmm]
    assert work.get_part("attention").flops * 2 * tokens == square * (tokens + 1)


def allocate(spec: ModelSpec, element: KvElement) -> tuple[int, int]:
    """Bytes of the pool that the CPU's runner allocates, and the tokens it is for."""
    sizes = RunnerSizes(1, 6, 16, 32, element)
    runner = CpuRunner(spec, make_tensors(spec, Format.F32), sizes)
    return runner.view_kv().nbytes, sizes.num_blocks * sizes.block_tokens


@pytest.mark.parametrize("element", [KvElement.F32, KvElement.F16, KvElement.INT8])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_keys_and_values_are_the_bytes_of_the_allocated_pool(name: str, element: KvElement) -> None:
    pool_bytes, pool_tokens = allocate(TINY_SPECS[name], element)
    per_token = TINY_SPECS[name].get_kv_bytes_per_token(element)
    assert pool_bytes == pool_tokens * per_token
    written = get_model_work(TINY_SPECS[name], element).get_step_work(
        StepShape((RowShape(pool_tokens, 0),))
    )
    assert written.kv_bytes_written == pool_bytes
