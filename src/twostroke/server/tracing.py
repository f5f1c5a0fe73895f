"""OpenTelemetry spans of requests: the one module that knows of it, behind the extra `otel`.

Owns the names of spans and attributes. Nothing is traced while a request runs: when it is over its
spans are made from the times the engine has measured anyway, so tracing costs the steps nothing. A
request is one span, a child of the one its `traceparent` header names (W3C Trace Context), with
children `queued`, `prefill` and `decode` for each prompt that got so far. No text is in a span.
"""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING, Any

from starlette.types import Scope

from twostroke.server.generation import Generation
from twostroke.server.keys import Key

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import TracerProvider

    from twostroke.engine.outputs import RequestTimings

# The standard's own variables; without either there is nobody to send spans to.
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


class OtelTracer:
    """Makes the spans of requests that are over, for one provider."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("twostroke")
        self._propagator = TraceContextTextMapPropagator()

    def record(self, scope: Scope, status: int | None, seconds: float) -> None:
        """Make the spans of one request; one that never reached the engine has none."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        generation: Generation | None = scope.get("twostroke.generation")
        if generation is None:
            return
        ended_ns = time.time_ns()
        since_boot_ns = ended_ns - time.monotonic_ns()  # from the engine's clock to Unix time
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        span = self._tracer.start_span(
            f"{scope['method']} {scope['path']}",
            context=self._propagator.extract(headers),
            kind=SpanKind.SERVER,
            start_time=ended_ns - round(seconds * 1e9),
            attributes=_describe(scope, status, generation),
        )
        if status is None or status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        within = set_span_in_context(span)
        for timings in generation.get_timings():
            self._record_parts(timings, since_boot_ns, within)
        span.end(ended_ns)

    def _record_parts(self, timings: RequestTimings, offset_ns: int, within: Context) -> None:
        counts = {
            "queued": {},
            "prefill": {
                "twostroke.prefill_tokens": timings.prefill_tokens,
                "twostroke.cached_tokens": timings.cached_tokens,
            },
            "decode": {
                "twostroke.decode_tokens": timings.decode_tokens,
                "twostroke.preemptions": timings.preemptions,
            },
        }
        ends_ns = (timings.first_planned_ns, timings.first_token_ns, timings.ended_ns)
        start_ns = timings.submitted_ns
        for (name, attributes), end_ns in zip(counts.items(), ends_ns, strict=True):
            # A part that was never left lasted until the end of the request, if that has come.
            last_ns = end_ns or timings.ended_ns
            if not start_ns or not last_ns:
                return
            span = self._tracer.start_span(
                name, within, start_time=start_ns + offset_ns, attributes=attributes
            )
            span.end(last_ns + offset_ns)
            start_ns = end_ns


def _describe(scope: Scope, status: int | None, generation: Generation) -> dict[str, Any]:
    usage = generation.get_usage()
    attributes: dict[str, Any] = {
        "http.request.method": scope["method"],
        "url.path": scope["path"],
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": usage["completion_tokens"],
        "twostroke.request_id": scope.get("twostroke.request_id", ""),
    }
    if status is not None:
        attributes["http.response.status_code"] = status
    key: Key | None = scope.get("twostroke.key")
    if key is not None and key.tenant:
        attributes["twostroke.tenant"] = key.tenant
    return attributes


def build_tracer() -> OtelTracer | None:
    """A tracer that sends spans where the standard's variables say, or None where they are unset.

    It sends from a thread of its own; without the extra it is left out, and the log says so.
    """
    if not any(os.environ.get(name) for name in _ENDPOINTS):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        logging.getLogger("twostroke.server").warning(
            "%s is set, but nothing is traced: pip install 'twostroke[otel]'", _ENDPOINTS[0]
        )
        return None
    # OTEL_SERVICE_NAME, where it is set, goes before this name.
    named = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "twostroke")})
    provider = TracerProvider(resource=named)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return OtelTracer(provider)
