"""The GPU's executor over several ranks: gloo between processes, kernels in the interpreter."""

from __future__ import annotations

import os
from functools import cache

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from rank_engine import Engine
from rank_tiny import VOCAB, TinyJob, make_small_spec, make_tiny_rank, open_tiny
from tiny_models import Answer, make_config, make_tensors, run_requests
from twostroke.core.types import Finished, Request, SamplingSpec, SequenceId
from twostroke.exec.local import RunnerSizes
from twostroke.exec.ranks import RankGroup, RankSetup
from twostroke.exec.reference import ReferenceRunner
from twostroke.kernels.cuda.collectives import Collectives
from twostroke.spec.kv import KvElement
from twostroke.spec.quant import Format
from twostroke.spec.ranks import RankLayout

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="one process each would need a GPU each"
)

SEED = 5
Answers = dict[SequenceId, Answer]


def make_requests() -> list[Request]:
    """Steps of several tokens, and decodes of two rows and of one; many logits are seen."""
    sampling = SamplingSpec(logprobs=20)
    return [
        Request("a", (7, 8, 9, 10), 3, sampling),
        Request("b", (60, 3), 2, sampling),
    ]


def run_reference(job: TinyJob) -> Answers:
    """In float32 throughout."""
    spec = make_small_spec(job)
    sizes = RunnerSizes(1, 24, 16, 24, KvElement.F32)
    runner = ReferenceRunner(spec, make_tensors(spec, Format.F32, SEED), sizes)
    return run_requests(runner, sizes, make_requests(), make_config(spec, sizes)).answers


@cache
def run_alone(job: TinyJob) -> Answers:
    executor = open_tiny(job, Collectives())
    try:
        engine = Engine(executor, VOCAB, ahead=True)
        engine.submit(*make_requests())
        engine.run()
    finally:
        executor.close()
    return engine.answers


def run_ranks(job: TinyJob, layout: RankLayout) -> Answers:
    group = RankGroup(RankSetup(make_tiny_rank, job, layout))
    try:
        engine = Engine(group, VOCAB, ahead=True)
        engine.submit(*make_requests())
        engine.run()
        assert engine.num_ahead > 0
    finally:
        group.close()
    return engine.answers


def get_error(answers: Answers, wanted: Answers) -> float:
    """The largest difference of a log-probability, as far as both drew the same tokens.

    They may part only where the best two of the wanted ones are closer than that.
    """
    largest, margins = 0.0, []
    for sequence, answer in wanted.items():
        own = answers[sequence]
        assert own.ending == Finished("length")
        for one, best in zip(own.logprobs, answer.logprobs, strict=True):
            found, known = dict(one.top), dict(best.top)
            differences = [abs(found[token] - known[token]) for token in found.keys() & known]
            assert len(differences) > 15
            largest = max(largest, *differences)
            if one.token != best.token:
                margins.append(best.logprob - known[one.token])
                break
    assert all(margin <= 2 * largest for margin in margins)
    return largest


@pytest.mark.parametrize(
    ("family", "tensor"), [("llama", 2), pytest.param("qwen3", 2, marks=pytest.mark.slow)]
)
def test_two_ranks_err_at_most_twice_as_much_as_one(family: str, tensor: int) -> None:
    job = TinyJob(family, SEED, layers=1)
    wanted = run_reference(job)
    divided = run_ranks(job, RankLayout(tensor))
    assert get_error(divided, wanted) <= 2 * get_error(run_alone(job), wanted)


@pytest.mark.slow
def test_stages_compute_what_one_rank_computes_bit_for_bit() -> None:
    job = TinyJob("llama", SEED)
    assert run_ranks(job, RankLayout(stages=2)) == run_alone(job)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_stages_of_shards_compute_what_shards_compute_bit_for_bit(family: str) -> None:
    job = TinyJob(family, SEED)
    assert run_ranks(job, RankLayout(2, 2)) == run_ranks(job, RankLayout(2))
