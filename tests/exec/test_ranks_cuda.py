"""The GPU's executor over several ranks: gloo between processes, kernels in the interpreter."""

from __future__ import annotations

import os

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
    """Prompts whose step is one of many rows, and decodes of few; many logits are seen."""
    sampling = SamplingSpec(logprobs=20)
    return [
        Request("a", tuple(range(10, 20)), 3, sampling),
        Request("b", tuple(range(60, 50, -1)), 3, sampling),
    ]


def run_reference(family: str) -> Answers:
    """In float32 throughout."""
    spec = make_small_spec(family)
    sizes = RunnerSizes(1, 24, 16, 24, KvElement.F32)
    runner = ReferenceRunner(spec, make_tensors(spec, Format.F32, SEED), sizes)
    return run_requests(runner, sizes, make_requests(), make_config(spec, sizes)).answers


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
    ("family", "layout"),
    [
        ("llama", RankLayout(tensor=2)),
        pytest.param("qwen3", RankLayout(tensor=2), marks=pytest.mark.slow),
        pytest.param("qwen2", RankLayout(tensor=2, stages=2), marks=pytest.mark.slow),
    ],
)
def test_several_ranks_err_at_most_twice_as_much_as_one(family: str, layout: RankLayout) -> None:
    wanted, job = run_reference(family), TinyJob(family, SEED)
    alone, divided = run_alone(job), run_ranks(job, layout)
    assert get_error(divided, wanted) <= 2 * get_error(alone, wanted)


def test_stages_compute_what_one_rank_computes_bit_for_bit() -> None:
    job = TinyJob("qwen2", SEED)
    assert run_ranks(job, RankLayout(stages=2)) == run_alone(job)
