"""Laws of putting an engine together, over a tiny model file that is written on the spot."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model_files import VOCAB, make_tiny_llama
from twostroke.cli import compose
from twostroke.cli.compose import LLM, build_engine, get_model_name
from twostroke.cli.device import Gpus
from twostroke.cli.limits import cut_prompt, get_stroke_floors, measure_device
from twostroke.cli.machine import Machine
from twostroke.cli.settings import BACKENDS, BLOCK_TOKENS, CUDA_BLOCK_TOKENS, EngineSettings
from twostroke.cli.strokes import get_strokes, measure
from twostroke.cli.summary import format_summary
from twostroke.engine.params import SamplingParams
from twostroke.errors import (
    DeviceError,
    EngineClosed,
    InvalidParameter,
    PromptTooLong,
    UnknownModel,
    UnsupportedModel,
)
from twostroke.exec import build
from twostroke.exec.cuda_memory import CudaOptions, MemoryPlan
from twostroke.exec.local import RunnerSizes
from twostroke.spec.kv import KvElement
from twostroke.weights.load import OpenModel, open_model

PROMPT = [5, 6, 7, 8, 9]
PARAMS = SamplingParams(max_tokens=7, temperature=1.0, seed=3, ignore_eos=True)


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    """The recipe, written."""
    return make_tiny_llama().write(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_file_becomes_an_engine_that_answers(model_file: Path, backend: str) -> None:
    with LLM(model_file, backend=backend, threads=1) as llm:
        [output] = llm.generate([PROMPT], PARAMS)
        streamed = [token for delta in llm.stream(PROMPT, PARAMS) for token in delta.tokens]
    assert len(output.completions[0].tokens) == 7
    assert streamed == list(output.completions[0].tokens)
    assert all(0 <= token < VOCAB for token in streamed)


def test_the_engine_has_the_sizes_that_were_settled(model_file: Path) -> None:
    with LLM(model_file, threads=1, kv_memory="64KiB", step_tokens=16, max_rows=3) as llm:
        info, settings = llm.built.parts.executor.describe(), llm.built.settings
        assert (info.num_blocks, info.block_tokens) == (settings.num_blocks, BLOCK_TOKENS)
        assert (info.kv_bytes, info.max_step_tokens) == (settings.kv_bytes, 16)
        assert settings.kv_bytes <= 64 * 1024


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_pool_has_the_bytes_of_the_elements_asked_for(model_file: Path, backend: str) -> None:
    sizes = {}
    for kv in ("f32", "f16", "int8"):
        with LLM(model_file, threads=1, backend=backend, kv=kv, max_rows=1) as llm:
            (output,) = llm.generate([PROMPT], PARAMS)
            assert len(output.completions[0].tokens) == 7
            sizes[kv] = llm.built.parts.executor.describe().kv_bytes
            assert llm.built.settings.kv_bytes == sizes[kv]
    assert sizes["int8"] < 0.7 * sizes["f16"] < 0.5 * sizes["f32"]


def test_a_pool_smaller_than_the_context_names_the_longest_prompt(model_file: Path) -> None:
    with LLM(model_file, threads=1, kv_memory=2 * 16 * 512) as llm:
        with pytest.raises(PromptTooLong) as caught:
            llm.generate([[5] * 100], PARAMS)
        assert len(llm.generate([[5] * caught.value.limit_tokens], PARAMS)) == 1


def test_closing_twice_does_nothing(model_file: Path) -> None:
    llm = LLM(model_file, threads=1)
    llm.close()
    llm.close()
    with pytest.raises(EngineClosed):
        llm.generate([[5]], PARAMS)


def test_a_broken_template_leaves_the_model_usable(tmp_path: Path) -> None:
    recipe = make_tiny_llama()
    recipe.keys["tokenizer.chat_template"] = (recipe.keys["general.name"][0], "{% if %}")
    broken = recipe.write(tmp_path / "broken.gguf")
    with LLM(broken, threads=1) as llm:
        assert llm.built.parts.chat_template is None
        assert llm.generate([PROMPT], PARAMS)


def test_without_chat_the_template_is_left_alone(tmp_path: Path) -> None:
    recipe = make_tiny_llama()
    recipe.keys["tokenizer.chat_template"] = (recipe.keys["general.name"][0], "{{ messages }}")
    path = recipe.write(tmp_path / "chat.gguf")
    for has_chat in (True, False):
        settings = EngineSettings(model=str(path), threads=1, has_chat=has_chat)
        with LLM.from_settings(settings) as llm:
            assert (llm.built.parts.chat_template is not None) == has_chat


def test_an_engine_that_cannot_be_built_leaves_no_thread(tmp_path: Path) -> None:
    recipe = make_tiny_llama()
    kind, _ = recipe.keys["tokenizer.ggml.pre"]
    recipe.keys["tokenizer.ggml.pre"] = (kind, "no-such")
    path = recipe.write(tmp_path / "no-such.gguf")
    with pytest.raises(UnsupportedModel, match="no-such"):
        build_engine(EngineSettings(model=str(path), threads=1))
    assert [each.name for each in threading.enumerate() if "twostroke" in each.name] == []


@pytest.mark.parametrize(
    ("wanted", "error"),
    [
        (EngineSettings(model="nowhere"), UnknownModel),
        (EngineSettings(model="FILE", threads=0), InvalidParameter),
        (EngineSettings(model="FILE", backend="abacus"), InvalidParameter),
    ],
)
def test_what_cannot_be_built_raises_its_reason(
    model_file: Path, wanted: EngineSettings, error: type[Exception]
) -> None:
    name = str(model_file) if wanted.model == "FILE" else wanted.model
    with pytest.raises(error):
        build_engine(EngineSettings(model=name, threads=wanted.threads, backend=wanted.backend))


def test_an_engine_on_the_cpu_brings_no_library_of_the_gpu(model_file: Path) -> None:
    code = (
        "import sys\n"
        "from twostroke import LLM, SamplingParams\n"
        f"with LLM({str(model_file)!r}, device='cpu') as llm:\n"
        "    llm.generate([[5, 6]], SamplingParams(max_tokens=2))\n"
        "print(*{'torch', 'triton'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


class OpenedFake:
    """What opening a GPU gives, over the reference backend: an executor and its pool's plan."""

    def __init__(self, model: OpenModel, options: CudaOptions) -> None:
        self.options = options
        self.plan = MemoryPlan(9, 0, "nine blocks were left")
        sizes = RunnerSizes(1, 9, CUDA_BLOCK_TOKENS, options.step_tokens, KvElement.F32)
        self.executor = build.build_executor(model, "reference", sizes)


def test_a_gpus_pool_is_settled_once_its_executor_knows_what_is_left(
    model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[OpenedFake] = []

    def open_fake(model: OpenModel, options: CudaOptions, progress: object) -> OpenedFake:
        opened.append(OpenedFake(model, options))
        return opened[-1]

    monkeypatch.setattr(compose, "build_cuda_executor", open_fake)
    monkeypatch.setattr(compose, "read_machine", lambda: Machine(2, "", 2**34, "", lambda: Gpus(2)))
    wanted = EngineSettings(
        model=str(model_file), device="cuda:1", exact=True, kv="int8", kv_memory="3MiB", max_rows=5
    )
    wanted = replace(wanted, host_memory="1MiB")
    built = build_engine(wanted)
    options = opened[0].options
    assert (options.device, options.exact, options.max_rows) == ("cuda:1", True, 5)
    assert (options.kv_element, options.kv_bytes) == (KvElement.INT8, 3 * 2**20)
    assert options.host_bytes == 2**20
    parts, settings = built.parts, built.settings
    assert settings.num_blocks == parts.scheduler.config.num_blocks == 9
    assert parts.scheduler.config.block_tokens == CUDA_BLOCK_TOKENS
    assert parts.scheduler.config.plans_ahead
    assert parts.policy.max_in_flight == 2
    assert "nine blocks were left" in format_summary(built)
    parts.executor.close()
    built.model.close()


@pytest.mark.parametrize(
    ("parameter", "wanted"),
    [
        ("policy", {"policy": "deadline"}),
        ("pace", {"pace": "target"}),
        ("itl_target_ms", {"itl_target_ms": 50.0}),
    ],
)
def test_what_needs_a_gpus_step_times_is_refused_by_name(
    parameter: str, wanted: dict[str, Any], model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        compose, "build_cuda_executor", lambda model, options, progress: OpenedFake(model, options)
    )
    monkeypatch.setattr(compose, "read_machine", lambda: Machine(2, "", 2**34, "", lambda: Gpus(1)))
    with pytest.raises(InvalidParameter, match="a GPU's steps are not predicted") as caught:
        build_engine(EngineSettings(model=str(model_file), device="cuda", **wanted))
    assert caught.value.parameter == parameter


def test_an_engine_on_a_gpu_answers(
    model_file: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_here(model: OpenModel, options: CudaOptions, progress: object) -> object:
        here = replace(options, device=device)
        return build.build_cuda_executor(model, here, lambda done, total: None)

    monkeypatch.setattr(compose, "build_cuda_executor", build_here)
    monkeypatch.setattr(compose, "read_machine", lambda: Machine(2, "", 2**34, "", lambda: Gpus(1)))
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    with LLM(model_file, device="cuda", step_tokens=64, max_rows=1) as llm:
        [output] = llm.generate([PROMPT], params)
        assert llm.built.parts.executor.describe().backend.startswith("cuda")
    assert len(output.completions[0].tokens) == 2


def test_a_gpu_without_what_drives_it_is_refused_with_the_way_out(
    model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # what importing it then raises is ImportError
    monkeypatch.delitem(sys.modules, "twostroke.exec.cuda_open", raising=False)
    options = CudaOptions("cuda:0", KvElement.F16, 64, 4, 128)
    with (
        open_model(model_file) as model,
        pytest.raises(DeviceError, match=r"pip install 'twostroke\[cuda\]'"),
    ):
        build.build_cuda_executor(model, options, lambda done, total: None)


def test_a_head_size_the_kernels_lack_is_refused_with_the_way_out(tmp_path: Path) -> None:
    odd = make_tiny_llama(head_dim=8).write(tmp_path / "odd.gguf")
    with pytest.raises(UnsupportedModel, match="--backend reference"):
        build_engine(EngineSettings(model=str(odd)))


def test_backends_are_those_that_can_be_built() -> None:
    assert BACKENDS == build.BACKENDS


def test_a_path_is_served_under_its_last_part(model_file: Path) -> None:
    assert get_model_name(str(model_file)) == "tiny"
    assert get_model_name(str(model_file.parent)) == model_file.parent.name
    assert get_model_name("org/name") == "org/name"


def test_the_summary_gives_every_setting_with_its_reason(model_file: Path) -> None:
    with LLM(model_file, threads=1) as llm:
        summary = format_summary(llm.built)
        for choice in llm.built.settings.choices:
            assert choice.value in summary
            assert choice.reason in summary


def test_both_strokes_have_their_floor(model_file: Path) -> None:
    with LLM(model_file, threads=1, max_rows=1, step_tokens=2) as llm:
        before = llm.stats()
        llm.generate([PROMPT], PARAMS)
        measured = measure(before, llm.stats())
        spec, settings = llm.built.parts.spec, llm.built.settings
        floors = get_stroke_floors(spec, settings, measured, measure_device(1))
    prefill, decode = get_strokes(measured, *floors)
    assert (prefill.tokens, decode.tokens) == (5, 6)
    assert prefill.share is not None
    assert decode.share is not None
    assert prefill.share > 0
    assert decode.share > 0


def test_a_prompt_is_cut_into_chunks_that_join_up_and_only_the_last_is_sampled() -> None:
    for prompt_tokens in range(1, 12):
        rows = cut_prompt(prompt_tokens, 4)
        assert sum(row.new_tokens for row in rows) == prompt_tokens
        assert [row.context_before for row in rows] == list(range(0, prompt_tokens, 4))
        assert [row.sampled for row in rows] == [0] * (len(rows) - 1) + [1]
