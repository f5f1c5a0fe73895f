"""/v1/completions: from prompts to submissions, and from output to replies and chunks.

Choices are numbered prompt by prompt. With `echo` the text and the log-probabilities of the prompt
come first, in the same choice; `max_tokens` 0 is then allowed and scores the prompt alone.
`text_offset` counts from the start of the choice's text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twostroke.engine.outputs import OutputDelta
from twostroke.errors import InvalidParameter
from twostroke.server.events import ChunkFrame, dump
from twostroke.server.generation import (
    Generation,
    PromptSource,
    Submission,
    build_params,
    get_finish_reason,
)
from twostroke.server.logprobs import CompletionLogprobs, ScoredToken
from twostroke.server.schemas import CompletionRequest, Prompt
from twostroke.server.settings import Served
from twostroke.server.structured import read_output_form


def build_completion_submission(request: CompletionRequest, request_id: str) -> Submission:
    """What a completion request asks of the engine. Raises: InvalidParameter."""
    own, common = request.own, request.common
    prompt_only = own.echo and common.max_tokens == 0
    extra: dict[str, Any] = {"logprobs": own.logprobs}
    if own.echo:
        extra["prompt_logprobs"] = own.logprobs
    if prompt_only:
        extra["max_tokens"] = 1
    form = read_output_form(common)
    extra["structured_outputs"] = form.structured
    params = build_params(common, extra, form.public_names)
    prompts = _split_prompts(own.prompt)
    return Submission(
        request_id,
        prompts,
        params,
        priority=common.priority,
        prompt_only=prompt_only,
        public_names=form.public_names,
    )


def _split_prompts(prompt: Prompt) -> Sequence[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidParameter("prompt", "is an empty array")
    texts = [each for each in prompt if isinstance(each, str | list)]
    # Validation has seen to it that the elements are of one kind; ids alone are one prompt.
    return texts or [[each for each in prompt if isinstance(each, int)]]


class CompletionChoices:
    """Turns deltas into a choice's fields, with the prompt before the first when it is echoed.

    Used alike for chunks and for whole replies, which are one delta a choice.
    """

    def __init__(
        self, served: Served, prompts: PromptSource, submission: Submission, echo: bool
    ) -> None:
        self._tokenizer = served.engine.tokenizer
        self._prompts = prompts
        self._submission = submission
        self._echo = echo
        self._opened: set[int] = set()
        self._logprobs: dict[int, CompletionLogprobs] = {}

    def build_choice(self, choice: int, delta: OutputDelta) -> dict[str, Any]:
        """The next fields of `choice`; mutates what is remembered of it."""
        text, tokens = delta.text, self._pair_output(delta)
        if choice not in self._opened:
            self._opened.add(choice)
            if self._echo:
                prompt_text = self._get_prompt_text(choice)
                tokens = self._open_prompt(choice, prompt_text) + tokens
                text = prompt_text + text
        return {
            "index": choice,
            "text": text,
            "logprobs": self._build_logprobs(choice, tokens),
            "finish_reason": get_finish_reason(delta),
        }

    def _build_logprobs(self, choice: int, tokens: list[ScoredToken]) -> dict[str, Any] | None:
        if self._submission.params.logprobs is None:
            return None
        get_bytes = self._tokenizer.get_token_bytes
        return self._logprobs.setdefault(choice, CompletionLogprobs(get_bytes)).build(tokens)

    def _pair_output(self, delta: OutputDelta) -> list[ScoredToken]:
        if not delta.logprobs:
            return []
        skips = self._submission.params.skip_special_tokens
        return [
            ScoredToken(data, entry, not (skips and self._tokenizer.is_control(token)))
            for token, data, entry in zip(
                delta.tokens, delta.token_bytes, delta.logprobs, strict=True
            )
        ]

    def _open_prompt(self, choice: int, text: str) -> list[ScoredToken]:
        """The prompt's tokens; remembers how far their characters overhang the text."""
        if self._submission.params.logprobs is None:
            return []
        get_bytes = self._tokenizer.get_token_bytes
        parts = [get_bytes(token) for token in self._prompts.get_prompt_tokens(choice)]
        overhang = len(b"".join(parts).decode("utf-8", errors="replace")) - len(text)
        self._logprobs[choice] = CompletionLogprobs(get_bytes, max(0, overhang))
        scores = self._prompts.get_prompt_logprobs(choice)
        return [
            ScoredToken(data, entry) for data, entry in zip(parts, (None, *scores), strict=True)
        ]

    def _get_prompt_text(self, choice: int) -> str:
        prompt = self._submission.prompts[choice // self._submission.params.n]
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)


class CompletionWriter:
    """Chunks of a streamed completion."""

    def __init__(
        self, head: dict[str, Any], choices: CompletionChoices, include_usage: bool
    ) -> None:
        self._frame = ChunkFrame({**head, "object": "text_completion"}, include_usage)
        self._choices = choices

    def write_delta(self, choice: int, delta: OutputDelta) -> str:
        """The event for one delta, or nothing where it has nothing to say."""
        fields = self._choices.build_choice(choice, delta)
        if not (fields["text"] or fields["finish_reason"] or delta.logprobs):
            return ""
        text, reason = dump(fields["text"]), dump(fields["finish_reason"])
        scores = dump(fields["logprobs"])
        return self._frame.frame_choice(
            f'{{"index":{choice},"text":{text},"logprobs":{scores},"finish_reason":{reason}}}'
        )

    def write_last(self, fields: dict[str, Any]) -> str:
        """The event that has no choice, with these fields."""
        return self._frame.frame_last(fields)


def build_completion_reply(
    head: dict[str, Any],
    generation: Generation,
    outputs: Sequence[OutputDelta],
    choices: CompletionChoices,
) -> dict[str, Any]:
    """The reply that is not streamed, from each choice's whole output."""
    built = [choices.build_choice(choice, output) for choice, output in enumerate(outputs)]
    usage = generation.get_usage()
    return {**head, "object": "text_completion", "choices": built, "usage": usage}
