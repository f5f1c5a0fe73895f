"""Agents of pydantic-ai over a real model: text as it comes, tools that run, typed answers.

The library is used as its users use it with a local server: an OpenAI provider with another
address. What a small model says does not matter here; that the library reads all of it does.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, RunContext, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

from loopback import run_server
from twostroke.cli.compose import build_engine
from twostroke.cli.settings import EngineSettings
from twostroke.engine.async_llm import AsyncLLM
from twostroke.server.settings import ServerSettings

pytestmark = pytest.mark.real_model

MODEL = "smollm2-135m"
GREEDY = ModelSettings(temperature=0, max_tokens=48)

Month = Annotated[int, Field(ge=1, le=12)]
OpenModel = Callable[[], contextlib.AbstractAsyncContextManager[Any]]


class Bird(BaseModel):
    """What an agent is to answer with."""

    kind: Literal["parrot", "crow", "owl"]
    wings: int = Field(ge=0, le=4)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    built = build_engine(EngineSettings(model=MODEL))
    with (
        contextlib.closing(built.model),
        run_server(AsyncLLM(built.parts), ServerSettings()) as url,
    ):
        yield f"{url}/v1"


@pytest.fixture(params=[OpenAIChatModel, OpenAIResponsesModel], ids=["chat", "responses"])
def open_model(url: str, request: pytest.FixtureRequest) -> OpenModel:
    """Opens the model of either API; a client belongs to the event loop that made it."""

    @contextlib.asynccontextmanager
    async def open_it() -> AsyncIterator[Any]:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            yield request.param(MODEL, provider=OpenAIProvider(openai_client=client))

    return open_it


def test_text_is_streamed_and_is_that_of_the_whole_answer(open_model: OpenModel) -> None:
    async def main() -> None:
        async with open_model() as model:
            agent = Agent(model, instructions="Be brief.", model_settings=GREEDY)
            async with agent.run_stream("Name a colour.") as stream:
                parts = [part async for part in stream.stream_text(delta=True, debounce_by=None)]
                usage = stream.usage
            whole = await agent.run("Name a colour.")
            assert len(parts) > 1
            assert "".join(parts) == whole.output
            assert usage.output_tokens == whole.usage.output_tokens > 0

    asyncio.run(main())


def test_a_conversation_goes_on(open_model: OpenModel) -> None:
    async def main() -> None:
        async with open_model() as model:
            agent = Agent(model, model_settings=GREEDY)
            first = await agent.run("My name is Ada.")
            second = await agent.run("What is my name?", message_history=first.all_messages())
            assert second.output
            assert second.usage.input_tokens > first.usage.input_tokens

    asyncio.run(main())


def ask_for_the_tool_first(context: RunContext[None]) -> ModelSettings:
    """Names the tool and then the answer: a small model that chooses goes on looking up."""
    name = "look_up" if context.run_step <= 1 else "final_result"
    return ModelSettings(
        temperature=0, max_tokens=64, parallel_tool_calls=False, tool_choice=[name]
    )


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_a_tool_is_run_and_its_answer_told_to_the_model(
    open_model: OpenModel, streamed: bool
) -> None:
    async def main() -> None:
        seen: list[tuple[str, int]] = []
        async with open_model() as model:
            agent = Agent(
                model, output_type=ToolOutput(Bird), model_settings=ask_for_the_tool_first
            )

            @agent.tool_plain
            def look_up(kind: Literal["parrot", "owl"], month: Month) -> str:
                """Count the birds of a kind in a month."""
                seen.append((kind, month))
                return "12 birds"

            if streamed:
                async with agent.run_stream("How many owls are there in May?") as stream:
                    output: Any = await stream.get_output()
            else:
                output = (await agent.run("How many owls are there in May?")).output
        assert isinstance(output, Bird)
        assert seen
        assert all(kind in ("parrot", "owl") and 1 <= month <= 12 for kind, month in seen)

    asyncio.run(main())


def test_an_answer_has_the_type_that_was_asked_for(open_model: OpenModel) -> None:
    async def main() -> None:
        async with open_model() as model:
            agent = Agent(
                model,
                output_type=NativeOutput(Bird),
                model_settings={"temperature": 0, "max_tokens": 64},
            )
            output = (await agent.run("Describe a bird.")).output
            assert isinstance(output, Bird)
            async with agent.run_stream("Describe a bird.") as stream:
                assert await stream.get_output() == output

    asyncio.run(main())
