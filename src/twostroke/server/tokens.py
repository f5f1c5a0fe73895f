"""/tokenize and /detokenize: a text as the model's tokens, and back.

Owns the two bodies, which have the fields that vLLM's have. A conversation is put through the
model's template, as a chat would be. Nothing here runs the model, or takes a place in its queue.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from twostroke.engine.service import check_tokens
from twostroke.errors import InvalidParameter
from twostroke.server.chat import to_template_message
from twostroke.server.schemas import STRICT, Message, validate
from twostroke.server.settings import Served


class TokenizeFields(BaseModel):
    """A body of /tokenize: either a prompt or messages."""

    model_config = STRICT
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeFields(BaseModel):
    """A body of /detokenize."""

    model_config = STRICT
    model: str | None = None
    tokens: list[int]


def tokenize(served: Served, body: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to a body of /tokenize; slow for a long text.

    Raises: InvalidParameter, UnknownModel, TemplateError.
    """
    fields = validate(TokenizeFields, _without_null(body))
    _check_model(served, fields.model)
    tokenizer = served.engine.tokenizer
    if (fields.prompt is None) == (fields.messages is None):
        raise InvalidParameter("prompt", "send either a prompt or messages")
    if fields.messages is not None:
        if not fields.messages:
            raise InvalidParameter("messages", "is empty; send at least one message")
        text = served.engine.render_chat(
            [to_template_message(each) for each in fields.messages],
            add_generation_prompt=fields.add_generation_prompt,
        )
        tokens = tokenizer.encode(text, add_special=False)
    else:
        tokens = tokenizer.encode(fields.prompt or "", add_special=fields.add_special_tokens)
    texts = [_show(tokenizer.get_token_bytes(token)) for token in tokens]
    return {
        "count": len(tokens),
        "max_model_len": served.engine.spec.context_tokens,
        "tokens": list(tokens),
        "token_strs": texts if fields.return_token_strs else None,
    }


def detokenize(served: Served, body: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to a body of /detokenize. Raises: InvalidParameter, UnknownModel."""
    fields = validate(DetokenizeFields, _without_null(body))
    _check_model(served, fields.model)
    tokenizer = served.engine.tokenizer
    tokens = check_tokens(fields.tokens, tokenizer.vocab_size) if fields.tokens else ()
    return {"prompt": tokenizer.decode(tokens)}


def _check_model(served: Served, model: str | None) -> None:
    if model is not None:
        served.check_model(model)


def _without_null(body: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if value is not None}


def _show(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")
