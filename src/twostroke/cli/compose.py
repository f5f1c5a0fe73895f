"""Puts an engine together: the one place that chooses concrete classes.

It owns the order in which model, tokenizer, executor and scheduler are made and unmade: when one
cannot be made, those before it are closed again. It holds no behaviour of its own; `LLM` hands
everything on to the offline engine.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

from twostroke.cli.loading import LoadingLine
from twostroke.cli.machine import read_machine
from twostroke.cli.scheduling import build_scheduling, read_scheduling
from twostroke.cli.settings import (
    EngineSettings,
    LLMOptions,
    ResolvedSettings,
    resolve_settings,
    settle_pool,
)
from twostroke.core.ports import Executor
from twostroke.engine.clock import MonotonicClock
from twostroke.engine.llm import OfflineLLM, OnProgress, Params
from twostroke.engine.loop import LoopPolicy
from twostroke.engine.metrics import EngineStats
from twostroke.engine.outputs import OutputDelta, RequestOutput
from twostroke.engine.params import SamplingParams
from twostroke.engine.service import EngineParts, Message, Prompt
from twostroke.errors import TemplateError
from twostroke.exec.build import build_cuda_executor, build_executor
from twostroke.exec.cuda_memory import CudaOptions
from twostroke.exec.local import RunnerSizes
from twostroke.text.chat import ChatTemplate, build_chat_template
from twostroke.text.tokenizer import Tokenizer, build_tokenizer
from twostroke.weights.catalog import get_cache_dir, resolve
from twostroke.weights.load import OpenModel, open_model

# A GPU starts the next step before the host has heard of the last. A step takes less than a second,
# or a minute when a kernel is compiled for it: what is not answered for so long never will be.
GPU_POLICY = LoopPolicy(max_in_flight=2, step_deadline_ns=300 * 10**9)


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine's parts, the settings they were made with, and the model they read.

    Whoever runs the parts closes the executor with them, and then the model.
    """

    parts: EngineParts
    settings: ResolvedSettings
    model: OpenModel


def build_engine(wanted: EngineSettings, isolated: bool = False) -> BuiltEngine:
    """Find and open the model, settle the settings, and make every part.

    isolated: run the CPU's executor in a process of its own, which is replaced when it dies.
    Raises UnknownModel, UnsupportedModel, CorruptModel, InvalidParameter, DeviceError; nothing is
    left open then.
    """
    with contextlib.ExitStack() as undo:
        model = undo.enter_context(open_model(resolve(wanted.model)))
        spec = model.spec
        settings = resolve_settings(wanted, spec, read_machine())
        read_scheduling(wanted, settings)  # a mistake is told before anything is loaded
        # Mapping or packing the weights leaves Python to the tokenizer.
        beside = ThreadPoolExecutor(1, "twostroke-build")
        building = beside.submit(_build, model, settings, isolated)
        beside.shutdown(wait=False)
        undo.callback(_close_when_built, building)
        tokenizer = build_tokenizer(model.vocabulary)
        template = find_chat_template(model, tokenizer) if wanted.has_chat else None
        executor, settings, policy = building.result()
        scheduling = build_scheduling(wanted, settings, spec)
        settings = replace(settings, choices=(*settings.choices, *scheduling.choices))
        parts = EngineParts(
            spec=spec,
            tokenizer=tokenizer,
            chat_template=template,
            scheduler=scheduling.scheduler,
            executor=executor,
            clock=MonotonicClock(),
            model_name=get_model_name(wanted.model),
            policy=policy,
            ttft_ns=scheduling.ttft_ns,
        )
        undo.pop_all()
    return BuiltEngine(parts, settings, model)


def _build(
    model: OpenModel, settings: ResolvedSettings, isolated: bool
) -> tuple[Executor, ResolvedSettings, LoopPolicy]:
    """The executor, the settings with the KV pool that it has, and how a loop treats it."""
    if settings.is_on_gpu:
        return (*_build_on_gpu(model, settings), GPU_POLICY)
    sizes = RunnerSizes(
        threads=settings.threads,
        num_blocks=settings.num_blocks,
        block_tokens=settings.block_tokens,
        max_step_tokens=settings.step_tokens,
        kv_element=settings.kv_element,
        host_blocks=settings.host_blocks,
    )
    packed = get_cache_dir() / "packed"
    if isolated and settings.backend == "cpu":
        from twostroke.cli.isolation import isolate_executor

        built = isolate_executor(model, sizes, packed)
        return built.executor, settings, built.policy
    return build_executor(model, settings.backend, sizes, packed), settings, LoopPolicy()


def _build_on_gpu(
    model: OpenModel, settings: ResolvedSettings
) -> tuple[Executor, ResolvedSettings]:
    options = CudaOptions(
        device=settings.device,
        kv_element=settings.kv_element,
        step_tokens=settings.step_tokens,
        max_rows=settings.max_rows,
        context_tokens=model.spec.context_tokens,
        kv_bytes=settings.asked_kv_bytes,
        host_bytes=settings.host_bytes,
        quantise=settings.weights,
        exact=settings.exact,
    )
    opened = build_cuda_executor(model, options, LoadingLine(sys.stderr))
    plan = opened.plan
    return opened.executor, settle_pool(settings, model.spec, plan.num_blocks, plan.reason)


def _close_when_built(building: Future[tuple[Executor, ResolvedSettings, LoopPolicy]]) -> None:
    if building.exception() is None:
        executor, _, policy = building.result()
        executor.close()
        policy.on_closed()


def find_chat_template(model: OpenModel, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The model's chat template; None where it has none, or none that compiles.

    A broken template takes the chat away and leaves the model: the log says what is wrong with it.
    """
    try:
        return build_chat_template(model.vocabulary, tokenizer)
    except TemplateError as error:
        if model.vocabulary.chat_template is not None:
            logging.getLogger(__name__).warning("%s: %s", model.path, error)
        return None


def get_model_name(model: str) -> str:
    """The name an engine answers to: of a path the last part without `.gguf`, else as it is."""
    path = Path(model)
    return path.name.removesuffix(".gguf") if path.exists() else model


class LLM:
    """A model, ready to generate; also a context manager.

    with LLM("smollm2-135m") as llm:
        outputs = llm.generate(["The sea is", "A poem:"], SamplingParams(max_tokens=32))
    """

    def __init__(self, model: str | Path, **options: Unpack[LLMOptions]) -> None:
        """Open a model by name, by path, or as org/name once it was pulled.

        device: "auto", "cpu", "cuda" or "cuda:1"; auto takes a GPU where one can be used and
        neither threads nor backend is given. exact: on a GPU, tokens do not depend on other
        requests. threads: that compute on the CPU; default the physical cores. backend: on the
        CPU, "cpu" or "reference". kv: how keys and values are stored, "f16", "int8" or "f32", on a
        GPU also "bf16" or "fp8". weights: on a GPU, "int8" or "int4" makes weights of floats
        smaller. kv_memory: bytes of the KV pool, or text such as "512MiB". step_tokens: token
        budget of one step. max_rows: most sequences in one step. policy: who goes first, one of
        "first-come", "priority", "shortest", "fair", "deadline". pace: how much of the prompts a
        step takes, "fixed", "load", "target" or "static". ttft_target_ms, itl_target_ms: longest
        times to the first token and between tokens. drafts: guess tokens by prompt lookup.
        host_memory: beside the pool, for preempted sequences. Raises what `build_engine` does.
        """
        self._start(EngineSettings(model=str(model), **options))

    @classmethod
    def from_settings(cls, settings: EngineSettings) -> LLM:
        """The model that settings name, ready to generate."""
        llm = cls.__new__(cls)
        llm._start(settings)
        return llm

    def _start(self, settings: EngineSettings) -> None:
        self._built = build_engine(settings)
        self._engine = OfflineLLM(self._built.parts)

    @property
    def built(self) -> BuiltEngine:
        """What the engine is made of: its parts, settings and model."""
        return self._built

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        params: Params = None,
        *,
        progress: bool | OnProgress = False,
    ) -> list[RequestOutput]:
        """Complete each prompt, all of them together; outputs come in the order of the prompts.

        prompts: a text, a list of texts, or lists of token ids. params: for all, or one each.
        progress: True writes a line to stderr; a function is called with each change.
        Raises InvalidRequest before anything runs, and RequestFailed.
        """
        return self._engine.generate(prompts, params, progress=progress)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: Params = None,
        *,
        progress: bool | OnProgress = False,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of several; a message has a `role` and a `content`.

        Raises TemplateError, and what `generate` does.
        """
        return self._engine.chat(messages, params, progress=progress)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[OutputDelta]:
        """The output of one prompt as it is made; leaving the iteration early ends the request."""
        return self._engine.stream(prompt, params)

    def stream_chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None
    ) -> Iterator[OutputDelta]:
        """The answer to a conversation as it is made. Raises TemplateError too."""
        return self._engine.stream(self._engine.render_chat(messages), params, add_special=False)

    def stats(self) -> EngineStats:
        """Counters and histograms so far."""
        return self._engine.stats()

    def close(self) -> None:
        """End the engine and let go of the model; again does nothing."""
        self._engine.close()
        self._built.model.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
