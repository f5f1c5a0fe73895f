"""Laws of an engine that speaks text while its executor is killed: grammars, stops, choices."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from child_text import SIZES, IsolatedModel, make_parts, make_runner
from twostroke.core.types import Ending, Finished, TokenLogprob
from twostroke.engine.outputs import OutputDelta
from twostroke.engine.params import SamplingParams
from twostroke.engine.service import EngineParts, EngineService
from twostroke.exec.local import LocalExecutor
from twostroke.text.grammar import StructuredOutputs

TOKENS = 48
STRIDE = 3
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 4, "maxLength": 6},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}
JSON = StructuredOutputs(json=SCHEMA)


@dataclass
class Output:
    """All that was said of one continuation."""

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    ending: Ending | None = None

    def take(self, delta: OutputDelta) -> None:
        assert self.ending is None, "more after the end"
        self.text += delta.text
        self.tokens += delta.tokens
        self.logprobs += delta.logprobs
        self.ending = delta.ending


@dataclass
class Reader:
    """Receives every output, on the engine's thread, and kills as it was told.

    kill_at: numbers of deliveries, each of one step, behind which the executor dies.
    """

    model: IsolatedModel | None = None
    kill_at: range = range(0)
    outputs: dict[tuple[str, int], Output] = field(default_factory=dict)
    num_open: int = 0
    num_deliveries: int = 0
    num_killed: int = 0
    is_over: threading.Event = field(default_factory=threading.Event)

    def read(self, name: str, deltas: Sequence[OutputDelta], is_last: bool) -> None:
        for delta in deltas:
            self.outputs.setdefault((name, delta.index), Output()).take(delta)
        self.num_open -= is_last

    def note_delivery(self) -> None:
        self.num_deliveries += 1
        if self.num_open == 0:
            self.is_over.set()
        elif self.model is not None and self.num_deliveries in self.kill_at:
            os.kill(self.model.executor.child.pid, signal.SIGKILL)
            self.num_killed += 1


def run(parts: EngineParts, asked: dict[str, SamplingParams], reader: Reader) -> Reader:
    """All requests together, to their ends."""
    service = EngineService(parts, reader.note_delivery)
    try:
        states = []
        for name, params in asked.items():
            request = service.make_request(params, name, service.encode("tell me of the sea"))

            def sink(deltas: Sequence[OutputDelta], is_last: bool, name: str = name) -> None:
                reader.read(name, deltas, is_last)

            states.append(service.make_state(request, params, sink))
        reader.num_open = len(states)
        service.submit(states).result()
        assert reader.is_over.wait(60)
    finally:
        service.close()
    return reader


def make_requests() -> dict[str, SamplingParams]:
    return {
        "json": SamplingParams(
            max_tokens=TOKENS, temperature=0.0, logprobs=2, structured_outputs=JSON
        ),
        "choices": SamplingParams(
            max_tokens=TOKENS, temperature=1.0, seed=4, n=3, structured_outputs=JSON
        ),
        "penalty": SamplingParams(
            max_tokens=TOKENS, seed=5, repetition_penalty=1.3, structured_outputs=JSON
        ),
        "free": SamplingParams(max_tokens=TOKENS, seed=6, ignore_eos=True),
    }


@pytest.fixture(scope="module")
def undisturbed() -> tuple[dict[str, SamplingParams], Reader]:
    """Requests, and what they give in this process; the last stops at text of the one before."""
    asked = make_requests()
    free = run_here(asked).outputs["free", 0]
    stop = free.text[12:24]
    asked["stop"] = SamplingParams(max_tokens=TOKENS, seed=6, ignore_eos=True, stop=[stop])
    return asked, run_here(asked)


def run_here(asked: dict[str, SamplingParams]) -> Reader:
    return run(make_parts(LocalExecutor(make_runner(), SIZES)), asked, Reader())


def test_the_undisturbed_run_has_what_kills_are_to_meet(undisturbed) -> None:
    _, reader = undisturbed
    ended = {}
    for (name, index), output in reader.outputs.items():
        print(name, index, len(output.tokens), repr(output.text), output.ending)
        if name in ("json", "choices", "penalty"):
            ended[name, index] = output.ending
            if output.ending == Finished("stop"):
                json.loads(output.text)
    assert Finished("stop") in ended.values()
    assert len({reader.outputs["choices", index].text for index in range(3)}) == 3
    assert reader.outputs["stop", 0].ending == Finished("stop")
    assert reader.outputs["free", 0].text.startswith(reader.outputs["stop", 0].text)
    assert len(reader.outputs["stop", 0].tokens) > 12 + STRIDE


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1, STRIDE + 1))
def test_killed_at_every_token_grammars_stops_and_choices_give_the_same(undisturbed, first) -> None:
    asked, expected = undisturbed
    model = IsolatedModel()
    found = run(model.make_parts(), asked, Reader(model, range(first, TOKENS, STRIDE)))
    assert found.outputs == expected.outputs
    assert model.num_replaced == found.num_killed >= (TOKENS - STRIDE) // STRIDE - 1
