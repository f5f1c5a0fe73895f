"""Spans of requests, in the SDK's own memory."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from loopback import Running, run_server, wait_until
from scripted_llm import MODEL, ScriptedLLM
from twostroke.engine.outputs import RequestTimings
from twostroke.server.settings import ServerSettings
from twostroke.server.tracing import OtelTracer, build_tracer

BODY = {"model": MODEL, "prompt": "a secret"}
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
MS = 1_000_000


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    """Where the spans are."""
    return InMemorySpanExporter()


@pytest.fixture(scope="module")
def traced(exporter: InMemorySpanExporter) -> Iterator[Running]:
    """A server that traces into memory."""
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    engine = ScriptedLLM()
    engine.timings = RequestTimings(MS, 3 * MS, 7 * MS, 15 * MS, 5, 9, 0, 1)
    with run_server(engine, ServerSettings(tracer=OtelTracer(provider))) as url:
        yield Running(url, engine)
    provider.shutdown()


def take_spans(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    """The spans made since the last call, by name."""
    wait_until(lambda: any(span.name.startswith("POST") for span in exporter.get_finished_spans()))
    spans = {span.name: span for span in exporter.get_finished_spans()}
    exporter.clear()
    return spans


def get_ms(span: ReadableSpan) -> float:
    """How long an ended span lasted."""
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / MS


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_has_a_span_with_its_parts(
    traced: Running, exporter: InMemorySpanExporter, stream: bool
) -> None:
    headers = {"traceparent": PARENT, "x-request-id": "mine"}
    url = f"{traced.url}/v1/completions"
    httpx.post(url, json={**BODY, "stream": stream}, headers=headers)
    spans = take_spans(exporter)
    root = spans["POST /v1/completions"]
    assert root.parent is not None
    assert f"{root.parent.trace_id:032x}-{root.parent.span_id:016x}" == PARENT[3:-3]
    assert root.attributes is not None
    assert root.attributes["twostroke.request_id"] == "mine"
    assert root.attributes["http.response.status_code"] == 200
    lasted_ms = {name: get_ms(span) for name, span in spans.items() if span is not root}
    assert lasted_ms == {"queued": 2, "prefill": 4, "decode": 8}
    for name in lasted_ms:
        assert spans[name].parent == root.get_span_context()
    assert spans["decode"].attributes == {
        "twostroke.decode_tokens": 9,
        "twostroke.preemptions": 1,
    }


def test_no_text_is_in_a_span(traced: Running, exporter: InMemorySpanExporter) -> None:
    httpx.post(f"{traced.url}/v1/completions", json=BODY)
    assert "secret" not in "".join(span.to_json() for span in take_spans(exporter).values())


def test_what_never_reached_the_engine_has_no_span(
    traced: Running, exporter: InMemorySpanExporter
) -> None:
    httpx.get(f"{traced.url}/v1/models")
    httpx.post(f"{traced.url}/v1/completions", json={**BODY, "nonsense": 1})
    httpx.post(f"{traced.url}/v1/completions", json=BODY)
    assert len(take_spans(exporter)) == 4


def test_nothing_is_traced_unless_somebody_receives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", raising=False)
    assert build_tracer() is None
