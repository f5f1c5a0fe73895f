"""Ranks that run a tiny model on the GPU's executor, in Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tiny_models import TINY_SPECS, make_tensors
from twostroke.exec.cuda_memory import CudaOptions
from twostroke.exec.cuda_open import open_device
from twostroke.exec.rank_cuda import RankExecutor, open_share
from twostroke.exec.rank_wire import RankContext
from twostroke.kernels.cuda.collectives import Collectives, connect
from twostroke.spec.kv import KvElement
from twostroke.spec.model import ModelSpec
from twostroke.spec.quant import Format

VOCAB = 61


@dataclass(frozen=True)
class TinyJob:
    """Which tiny model, and whether results may not depend on the batch."""

    family: str
    seed: int
    exact: bool = False
    layers: int = 2


def make_tiny_rank(context: RankContext, job: object) -> RankExecutor:
    """The factory of these ranks."""
    assert isinstance(job, TinyJob)
    torch.set_num_threads(1)
    ranks = connect(context.place, torch.device("cpu"), context.store, context.timeout_s, job.exact)
    return open_tiny(job, ranks)


def make_small_spec(job: TinyJob) -> ModelSpec:
    """A model small enough for the interpreter, which has no products of bfloat16, in float16."""
    whole = TINY_SPECS[job.family]
    spec = replace(
        whole,
        width=32,
        ffn_width=64,
        num_heads=4,
        num_kv_heads=2,
        vocab_size=VOCAB,
        layers=whole.layers[: job.layers],
    )
    formats = tuple((tensor.name, Format.F16) for tensor in spec.tensors())
    return replace(spec, formats=formats)


def open_tiny(job: TinyJob, ranks: Collectives) -> RankExecutor:
    """A rank's executor; of the whole model where `ranks` is alone."""
    spec = make_small_spec(job)
    options = CudaOptions(
        device="cpu",
        kv_element=KvElement.F16,
        step_tokens=24,
        max_rows=2,
        context_tokens=128,
        kv_bytes=8 * 64 * spec.get_kv_bytes_per_token(KvElement.F16),
        exact=job.exact,
        world=ranks.place.layout.tensor,
    )
    tensors = make_tensors(spec, Format.F32, job.seed)
    return open_share(spec, tensors, options, open_device("cpu"), ranks)
