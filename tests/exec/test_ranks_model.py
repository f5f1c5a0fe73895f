"""A tiny model over several ranks draws what one rank draws, its layers or its matrices divided."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from rank_engine import Engine
from rank_reference import SIZES, ModelJob, make_reference
from tiny_models import TINY_SPECS, VOCAB, Answer, make_config, make_tensors, run_requests
from twostroke.core.types import Finished, Request, SamplingSpec, SequenceId
from twostroke.exec.ranks import RankGroup, RankSetup
from twostroke.exec.reference import ReferenceRunner
from twostroke.spec.quant import Format
from twostroke.spec.ranks import RankLayout

SEED = 5
PROMPTS = {"short": (3, 5), "long": tuple(range(40, 75)), "mid": (9, 9, 200, 7, 1, 0, 210)}


def make_requests(*, is_greedy: bool) -> list[Request]:
    """A prompt that is cut into chunks, and two that are not."""
    sampling = SamplingSpec(
        temperature=0.0 if is_greedy else 0.9, top_k=0 if is_greedy else 20, seed=7, logprobs=2
    )
    return [Request(name, prompt, 8, sampling) for name, prompt in PROMPTS.items()]


def run_alone(family: str, requests: list[Request]) -> dict[SequenceId, Answer]:
    spec = TINY_SPECS[family]
    runner = ReferenceRunner(spec, make_tensors(spec, Format.F32, SEED), SIZES)
    return run_requests(runner, SIZES, requests, make_config(spec, SIZES)).answers


def compare(found: dict[SequenceId, Answer], wanted: dict[SequenceId, Answer]) -> None:
    """The same tokens, and log-probabilities within what the order of float32 sums explains."""
    assert found.keys() == wanted.keys()
    for sequence, answer in wanted.items():
        assert found[sequence].ending == Finished("length")
        assert found[sequence].tokens == answer.tokens
        for one, other in zip(found[sequence].logprobs, answer.logprobs, strict=True):
            assert abs(one.logprob - other.logprob) < 1e-5
            assert [token for token, _ in one.top] == [token for token, _ in other.top]


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("gemma3", RankLayout(tensor=2)),
        ("qwen2", RankLayout(stages=2)),
        pytest.param("llama", RankLayout(tensor=2, stages=2), marks=pytest.mark.slow),
        pytest.param("qwen3", RankLayout(tensor=2), marks=pytest.mark.slow),
    ],
)
def test_several_ranks_draw_what_one_draws(family: str, layout: RankLayout) -> None:
    group = RankGroup(RankSetup(make_reference, ModelJob(family, SEED), layout))
    try:
        for is_greedy, ahead in ((True, False), (True, True), (False, True)):
            requests = make_requests(is_greedy=is_greedy)
            engine = Engine(group, VOCAB, ahead=ahead)
            engine.submit(*requests)
            engine.run()
            assert (engine.num_ahead > 0) == ahead
            compare(engine.answers, run_alone(family, requests))
        info = group.describe()
        assert info.kv_bytes == 2 * 24 * 16 * 2 * 16 * 2 * 4  # layers, pool, heads, k and v, bytes
    finally:
        group.close()
