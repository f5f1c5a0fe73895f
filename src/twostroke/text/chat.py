"""ChatTemplate: a conversation becomes the prompt text its model was trained on.

Owns what a template sees (the messages, the special tokens, a few functions) and how its failures
are told: a template's own refusal, a broken template and one that runs away are all TemplateError,
while messages of the wrong shape are InvalidParameter before any template runs. Rendering the same
messages gives the same text, except where a template asks for today's date.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from twostroke.errors import TemplateError
from twostroke.spec.vocabulary import Vocabulary
from twostroke.text.guard import Guard
from twostroke.text.messages import read_messages
from twostroke.text.sandbox import add_guards, build_environment
from twostroke.text.templates import find_default_template
from twostroke.text.tokenizer import Tokenizer
from twostroke.text.tool_calls import find_tool_form, knows_tools

if TYPE_CHECKING:
    from jinja2 import Template

MAX_OUTPUT_CHARS = 8_000_000
MAX_SOURCE_CHARS = 1_000_000

# Marks what the assistant says, for training; its text is wanted like any other.
_GENERATION_TAG = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")

# What the expressions of a template can raise from Python, beside Jinja's own errors.
_PYTHON_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class ChatTemplate:
    """A compiled chat template. Safe to use from several threads, one rendering at a time."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """special_tokens: names such as "bos_token" to their texts. now: for `strftime_now`.

        knows_tools: the template shows tools to its model. tool_form: how that calls them.

        Raises TemplateError when the source does not compile.
        """
        if len(source) > MAX_SOURCE_CHARS:
            raise TemplateError(f"the chat template has more than {MAX_SOURCE_CHARS:,} characters")
        self._special_tokens = dict(special_tokens or {})
        self.knows_tools = knows_tools(source)
        self.tool_form = find_tool_form(source)
        self._now = now
        self._guard = Guard()
        self._lock = threading.Lock()
        self._template = self._compile(source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        **extra: Any,
    ) -> str:
        """The prompt text of a conversation.

        messages: each with a role and a content of text. tools: their descriptions, for templates
        that know tools. add_generation_prompt: end where the assistant is to speak. extra: further
        variables for the template. Raises InvalidParameter for messages of the wrong shape,
        TemplateError when the template fails, refuses the messages or exceeds its bounds.
        """
        from jinja2.exceptions import TemplateError as JinjaError

        variables: dict[str, Any] = {
            **self._special_tokens,
            **extra,
            "messages": read_messages(messages),
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        with self._lock:
            self._guard.begin()
            try:
                return self._collect(variables)
            except TemplateError:
                raise
            except JinjaError as error:
                message = error.message or type(error).__name__
                raise TemplateError(f"the chat template refuses the messages: {message}") from error
            except _PYTHON_ERRORS as error:
                raise TemplateError(
                    f"the chat template failed on these messages: {type(error).__name__}: {error}"
                ) from error

    def _collect(self, variables: Mapping[str, Any]) -> str:
        """The rendered text, given up as soon as it is too long."""
        chunks: list[str] = []
        length = 0
        for chunk in self._template.generate(variables):
            chunks.append(chunk)
            length += len(chunk)
            if length > MAX_OUTPUT_CHARS:
                raise TemplateError(
                    f"the chat template wrote more than {MAX_OUTPUT_CHARS:,} characters"
                )
        return "".join(chunks)

    def _compile(self, source: str) -> Template:
        from jinja2.exceptions import TemplateSyntaxError

        environment = build_environment(self._guard)
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = self._format_now
        source = _GENERATION_TAG.sub(
            lambda tag: f"{tag[1]}{'endif' if tag[2] else 'if true'}{tag[3]}", source
        )
        try:
            tree = environment.parse(source)
            add_guards(tree, environment)
            return environment.from_string(tree)
        except TemplateSyntaxError as error:
            raise TemplateError(
                f"the chat template does not compile: line {error.lineno}: {error.message}"
            ) from error
        except TemplateError:
            raise
        except (*_PYTHON_ERRORS, SyntaxError) as error:
            raise TemplateError(f"the chat template does not compile: {error}") from error

    def _format_now(self, format: str) -> str:
        self._guard.spend(100 * len(format))  # the longest a directive becomes, and more
        return self._now().strftime(format)


def _raise_exception(message: object) -> NoReturn:
    """What templates call to refuse messages."""
    from jinja2.exceptions import TemplateError as JinjaError

    raise JinjaError(str(message)[:1000])


def build_chat_template(vocabulary: Vocabulary, tokenizer: Tokenizer) -> ChatTemplate:
    """The model's own chat template, or the default of its family.

    Raises TemplateError when there is neither or the template does not compile.
    """
    source = vocabulary.chat_template
    if source is None:
        source = find_default_template(tokenizer)
    named = {
        "bos_token": tokenizer.bos_id,
        "eos_token": tokenizer.eos_id,
        "unk_token": vocabulary.unknown,
        "pad_token": vocabulary.padding,
    }
    special_tokens = {
        name: tokenizer.get_token_text(token) for name, token in named.items() if token is not None
    }
    return ChatTemplate(source, special_tokens)
