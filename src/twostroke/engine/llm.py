"""OfflineLLM: the synchronous face of the engine, for scripts and batches.

It owns one running engine and turns prompts into finished outputs, or into a stream of deltas. It
must never leave a request running that nobody waits for: an exception while waiting, an interrupt
from the keyboard included, cancels what the call had started. Calls from several threads share the
engine and its batches.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from twostroke.core.types import Request
from twostroke.engine.attribution import Attribution
from twostroke.engine.collect import (
    Collector,
    DeltaStream,
    Progress,
    build_output,
    raise_failed,
)
from twostroke.engine.metrics import EngineStats
from twostroke.engine.outputs import RequestOutput
from twostroke.engine.params import SamplingParams
from twostroke.engine.request import RequestState
from twostroke.engine.service import (
    EngineHealth,
    EngineParts,
    EngineService,
    Message,
    Prompt,
    Submitted,
    Tool,
    cancel_submitted,
)
from twostroke.errors import (
    InvalidParameter,
    InvalidRequest,
    PromptTooLong,
)

__all__ = ["EngineParts", "OfflineLLM", "Progress"]


OnProgress = Callable[[Progress], None]
Params = SamplingParams | Sequence[SamplingParams] | None


class OfflineLLM:
    """Generates from one model; also a context manager."""

    def __init__(self, parts: EngineParts) -> None:
        self._service = EngineService(parts)
        self._ids = itertools.count()
        # Closes the engine also when this object is dropped or the interpreter ends.
        self._close = weakref.finalize(self, self._service.close)

    @property
    def parts(self) -> EngineParts:
        """What this engine was made of."""
        return self._service.parts

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        params: Params = None,
        *,
        progress: bool | OnProgress = False,
    ) -> list[RequestOutput]:
        """Complete each prompt; outputs come in the order of the prompts.

        prompts: a text, one list of token ids, or a list of such. params: for all, or one each.
        progress: True writes a line to stderr; a function is called on this thread as it goes on.
        Raises InvalidRequest before anything runs, naming the index of the bad prompt;
        RequestFailed when the engine could not finish one; EngineClosed.
        """
        return self._run(_list_prompts(prompts), params, progress, add_special=True)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: Params = None,
        *,
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = True,
        progress: bool | OnProgress = False,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of a list of them.

        Each message has a `role` and a `content`. Raises TemplateError, InvalidParameter for
        messages of the wrong shape, and what `generate` does.
        """
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
            raise InvalidRequest("messages: must be a list of messages that is not empty")
        one = isinstance(messages[0], Mapping)
        texts: list[Prompt] = []
        for index, conversation in enumerate([messages] if one else messages):
            try:
                texts.append(
                    self._service.render_chat(
                        conversation,  # type: ignore[arg-type]
                        tools,
                        add_generation_prompt=add_generation_prompt,
                    )
                )
            except InvalidRequest as error:
                if one:
                    raise
                raise _name_place(error, f"conversation {index}") from error
        return self._run(texts, params, progress, add_special=False)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, add_special: bool = True
    ) -> DeltaStream:
        """The output of one prompt as it is made; leaving the iteration early cancels the rest.

        add_special: False for a text from `render_chat`. The request is checked and submitted
        before the first delta is asked for. Raises what `generate` does.
        """
        own = params or SamplingParams()
        request = self._make_request(prompt, own, add_special)
        stream = DeltaStream()
        state = self._service.make_state(request, own, stream.get_sink())
        future = self._service.submit([state])
        with self._cancelling(future):
            future.result()
        stream.own(partial(self._service.cancel, [state]))
        return stream

    def render_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt text of a conversation; stream it with add_special=False.

        Raises TemplateError, and InvalidParameter for messages of the wrong shape.
        """
        return self._service.render_chat(
            messages, tools, add_generation_prompt=add_generation_prompt
        )

    @property
    def attribution(self) -> Attribution:
        """Where the time of its steps and requests went."""
        return self._service.attribution

    def stats(self) -> EngineStats:
        """Counters and histograms so far."""
        return self._service.get_stats()

    def health(self) -> EngineHealth:
        """Whether the engine works."""
        return self._service.get_health()

    def close(self) -> None:
        """End the engine; requests still running in other threads fail. Again does nothing."""
        self._close()

    def __enter__(self) -> OfflineLLM:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # ---- the way of one call --------------------------------------------------------------------

    def _run(
        self,
        prompts: list[Prompt],
        params: Params,
        progress: bool | OnProgress,
        *,
        add_special: bool,
    ) -> list[RequestOutput]:
        each = _spread_params(params, len(prompts))
        requests = []
        for index, (prompt, own) in enumerate(zip(prompts, each, strict=True)):
            try:
                requests.append(self._make_request(prompt, own, add_special))
            except InvalidRequest as error:
                if len(prompts) == 1:
                    raise
                raise _name_place(error, f"prompt {index}") from error
        if not requests:
            return []
        report = _get_reporter(progress)
        collector = Collector(requests)
        states = [
            self._service.make_state(
                request, own, partial(collector.take, index), in_one=report is None
            )
            for index, (request, own) in enumerate(zip(requests, each, strict=True))
        ]
        self._wait(states, collector, report)
        outputs = [
            build_output(prompt, state, collected)
            for prompt, state, collected in zip(prompts, states, collector.collected, strict=True)
        ]
        raise_failed(outputs)
        return outputs

    def _wait(
        self, states: list[RequestState], collector: Collector, report: OnProgress | None
    ) -> None:
        future = self._service.submit(states)
        with self._cancelling(future):
            future.result()
            is_done = False
            while not is_done:
                collector.changed.wait()
                collector.changed.clear()
                is_done = collector.is_done  # read first, so that the last report is complete
                if report is not None:
                    report(collector.get_progress())

    def _make_request(self, prompt: Prompt, params: SamplingParams, add_special: bool) -> Request:
        tokens = self._service.encode(prompt, add_special=add_special)
        return self._service.make_request(params, f"offline-{next(self._ids)}", tokens)

    @contextmanager
    def _cancelling(self, future: Submitted) -> Iterator[None]:
        """Cancel what a submission started, or is about to start, when the body is left early."""
        has_finished = False
        try:
            yield
            has_finished = True
        finally:
            if not has_finished:
                future.cancel()
                future.add_done_callback(partial(cancel_submitted, self._service))


def _list_prompts(prompts: Any) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise InvalidParameter("prompts", f"must be a text or a list of prompts, not {prompts!r}")
    if prompts and all(isinstance(one, int) for one in prompts):
        return [prompts]
    return list(prompts)


def _spread_params(params: Params, count: int) -> list[SamplingParams]:
    if params is None:
        return [SamplingParams()] * count
    if isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, Sequence) or len(params) != count:
        raise InvalidParameter("params", f"must be one SamplingParams, or a list of {count}")
    return list(params)


def _name_place(error: InvalidRequest, where: str) -> InvalidRequest:
    """The same error, saying which of several prompts or conversations it is about."""
    if isinstance(error, InvalidParameter):
        message = str(error).removeprefix(f"{error.parameter}: ")
        return InvalidParameter(error.parameter, f"{where}: {message}")
    if isinstance(error, PromptTooLong):
        return PromptTooLong(f"{where}: {error}", error.limit_tokens)
    return type(error)(f"{where}: {error}")


def _get_reporter(progress: bool | OnProgress) -> OnProgress | None:
    if callable(progress):
        return progress
    return _write_progress if progress else None


def _write_progress(progress: Progress) -> None:
    end = "\n" if progress.done == progress.total else ""
    sys.stderr.write(
        f"\r{progress.done}/{progress.total} requests, {progress.generated_tokens} tokens{end}"
    )
    sys.stderr.flush()
