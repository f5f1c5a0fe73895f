"""Laws of settling the engine's settings."""

from __future__ import annotations

import pytest

from twostroke.cli.device import Gpus
from twostroke.cli.machine import Machine
from twostroke.cli.options import MachineOptions
from twostroke.cli.settings import (
    BLOCK_TOKENS,
    CUDA_BLOCK_TOKENS,
    KV_ELEMENTS,
    KV_MEMORY_SHARE,
    EngineSettings,
    format_bytes,
    get_machine_settings,
    keep_on_cpu,
    parse_bytes,
    resolve_settings,
    settle_pool,
)
from twostroke.errors import InvalidParameter
from twostroke.spec.kv import KvElement
from twostroke.spec.model import LayerSpec, ModelSpec, RopeLayout, RopeSpec

MACHINE = Machine(6, "cores", 2**34, "memory", lambda: Gpus(0, "none"))
GPU_MACHINE = Machine(6, "cores", 2**34, "memory", lambda: Gpus(1))
CONTEXT = 1000


def make_spec(context_tokens: int = CONTEXT) -> ModelSpec:
    return ModelSpec(
        family="llama",
        name="tiny",
        width=64,
        ffn_width=128,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=100,
        context_tokens=context_tokens,
        norm_eps=1e-5,
        attention_scale=0.25,
        rope_layout=RopeLayout.HALF,
        layers=(LayerSpec(RopeSpec(10_000.0)),) * 2,
    )


def test_threads_default_to_the_machines_cores() -> None:
    assert resolve_settings(EngineSettings(model="m"), make_spec(), MACHINE).threads == 6


def test_the_pool_holds_every_row_at_full_context_where_memory_allows() -> None:
    resolved = resolve_settings(EngineSettings(model="m", max_rows=3), make_spec(), MACHINE)
    assert resolved.num_blocks == 3 * -(-CONTEXT // BLOCK_TOKENS)


def test_the_pool_takes_no_more_than_its_share_of_memory() -> None:
    small = Machine(6, "cores", 2**21, "memory")
    resolved = resolve_settings(EngineSettings(model="m"), make_spec(100_000), small)
    block_bytes = BLOCK_TOKENS * make_spec().get_kv_bytes_per_token()
    assert resolved.kv_bytes <= small.available_bytes // KV_MEMORY_SHARE
    assert resolved.kv_bytes > small.available_bytes // KV_MEMORY_SHARE - block_bytes


def test_the_pool_has_the_size_asked_for() -> None:
    block_bytes = BLOCK_TOKENS * make_spec().get_kv_bytes_per_token()
    for kv_memory in (10 * block_bytes, 11 * block_bytes - 1, f"{10 * block_bytes}"):
        wanted = EngineSettings(model="m", kv_memory=kv_memory)
        assert resolve_settings(wanted, make_spec(), MACHINE).num_blocks == 10


def test_the_reference_backend_keeps_kv_in_four_bytes() -> None:
    native = resolve_settings(EngineSettings(model="m"), make_spec(), MACHINE)
    reference = resolve_settings(
        EngineSettings(model="m", backend="reference"), make_spec(), MACHINE
    )
    assert reference.kv_bytes == 2 * native.kv_bytes


def test_int8_keys_and_values_take_little_more_than_half_the_memory() -> None:
    half = resolve_settings(EngineSettings(model="m"), make_spec(), MACHINE)
    small = resolve_settings(EngineSettings(model="m", kv="int8"), make_spec(), MACHINE)
    assert small.num_blocks == half.num_blocks
    assert small.kv_bytes * 2 * make_spec().head_dim == half.kv_bytes * (make_spec().head_dim + 4)


def test_int8_says_at_start_what_it_costs() -> None:
    resolved = resolve_settings(EngineSettings(model="m", kv="int8"), make_spec(), MACHINE)
    (choice,) = (each for each in resolved.choices if each.name == "KV element")
    assert "mean log-probability error" in choice.reason
    assert f"{(make_spec().head_dim + 4) / make_spec().head_dim / 2:.0%} of f16" in choice.reason


@pytest.mark.parametrize("element", KV_ELEMENTS["cpu"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_every_backend_keeps_every_kv_element(backend: str, element: KvElement) -> None:
    wanted = EngineSettings(model="m", backend=backend, kv=element.value)
    resolved = resolve_settings(wanted, make_spec(), MACHINE)
    assert resolved.kv_element is element
    tokens = resolved.num_blocks * resolved.block_tokens
    assert resolved.kv_bytes == tokens * make_spec().get_kv_bytes_per_token(element)


@pytest.mark.parametrize("element", list(KvElement))
def test_a_gpu_keeps_every_kv_element_in_a_pool_that_is_settled_later(element: KvElement) -> None:
    wanted = EngineSettings(model="m", kv=element.value)
    resolved = resolve_settings(wanted, make_spec(), GPU_MACHINE)
    assert (resolved.device, resolved.backend) == ("cuda:0", "cuda")
    assert resolved.num_blocks == resolved.kv_bytes == resolved.threads == 0
    settled = settle_pool(resolved, make_spec(), 7, "seven were left")
    tokens = 7 * CUDA_BLOCK_TOKENS
    assert settled.kv_bytes == tokens * make_spec().get_kv_bytes_per_token(element)
    (pool,) = (each for each in settled.choices if each.name == "KV pool")
    assert pool.reason == "seven were left"


def test_a_gpu_keeps_keys_and_values_as_its_activations_are_unasked() -> None:
    resolved = resolve_settings(EngineSettings(model="m"), make_spec(), GPU_MACHINE)
    assert resolved.kv_element is KvElement.BF16  # weights of no known format are BF16


def test_only_the_cpu_is_exact_unasked() -> None:
    for machine in (MACHINE, GPU_MACHINE):
        for exact in (False, True):
            wanted = EngineSettings(model="m", exact=exact)
            resolved = resolve_settings(wanted, make_spec(), machine)
            assert resolved.exact == (exact or machine is MACHINE)


def test_what_is_asked_of_the_cpu_keeps_the_engine_off_the_gpu() -> None:
    for wanted in (
        EngineSettings(model="m", threads=2),
        EngineSettings(model="m", backend="reference"),
        EngineSettings(model="m", device="cpu"),
    ):
        assert resolve_settings(wanted, make_spec(), GPU_MACHINE).device == "cpu"


@pytest.mark.parametrize(
    ("parameter", "wanted"),
    [
        ("threads", EngineSettings(model="m", device="cuda", threads=2)),
        ("backend", EngineSettings(model="m", device="cuda", backend="cpu")),
        ("weights", EngineSettings(model="m", weights="int3")),
        ("kv_memory", EngineSettings(model="m", kv_memory=100)),
    ],
)
def test_a_setting_that_a_gpu_has_not_is_refused_by_name(
    parameter: str, wanted: EngineSettings
) -> None:
    with pytest.raises(InvalidParameter) as caught:
        resolve_settings(wanted, make_spec(), GPU_MACHINE)
    assert caught.value.parameter == parameter


def test_what_only_the_cpu_can_do_stays_there_or_is_refused() -> None:
    assert keep_on_cpu(MachineOptions()).device == "cpu"
    with pytest.raises(InvalidParameter):
        keep_on_cpu(MachineOptions(device="cuda"))


def test_an_option_of_the_command_line_is_the_setting_of_its_name() -> None:
    on = MachineOptions(device="cuda:1", exact=True, kv="int8", weights="int4")
    wanted = EngineSettings(model="m", **get_machine_settings(on))
    for name in ("device", "exact", "threads", "backend", "kv", "weights"):
        assert getattr(wanted, name) == getattr(on, name)


def test_rows_never_outnumber_the_step_budget() -> None:
    resolved = resolve_settings(EngineSettings(model="m", step_tokens=16), make_spec(), MACHINE)
    assert resolved.max_rows == 16


def test_every_setting_gives_its_reason() -> None:
    for wanted in (EngineSettings(model="m"), EngineSettings(model="m", exact=True, kv="int8")):
        for machine in (MACHINE, GPU_MACHINE):
            choices = resolve_settings(wanted, make_spec(), machine).choices
            assert all(choice.name and choice.value and choice.reason for choice in choices)


@pytest.mark.parametrize(
    ("parameter", "wanted"),
    [
        ("backend", EngineSettings(model="m", backend="cuda")),
        ("kv", EngineSettings(model="m", kv="int4")),
        ("kv", EngineSettings(model="m", kv="fp8")),
        ("device", EngineSettings(model="m", device="gpu")),
        ("weights", EngineSettings(model="m", weights="int4")),
        ("threads", EngineSettings(model="m", threads=0)),
        ("threads", EngineSettings(model="m", threads=True)),
        ("threads", EngineSettings(model="m", threads=10**9)),
        ("max_rows", EngineSettings(model="m", max_rows=0)),
        ("max_rows", EngineSettings(model="m", max_rows=32, step_tokens=16)),
        ("step_tokens", EngineSettings(model="m", step_tokens=-1)),
        ("kv_memory", EngineSettings(model="m", kv_memory="lots")),
        ("kv_memory", EngineSettings(model="m", kv_memory="-1GiB")),
        ("kv_memory", EngineSettings(model="m", kv_memory=100)),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(parameter: str, wanted: EngineSettings) -> None:
    with pytest.raises(InvalidParameter) as caught:
        resolve_settings(wanted, make_spec(), MACHINE)
    assert caught.value.parameter == parameter


@pytest.mark.parametrize(
    ("text", "count"),
    [("17", 17), ("2K", 2048), ("512MiB", 2**29), ("1.5 GB", 3 * 2**29), ("1tib", 2**40)],
)
def test_sizes_are_read_in_units_of_1024(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    ("count", "text"),
    [(12, "12 B"), (1536, "1.5 KiB"), (2**20, "1 MiB"), (999 * 2**20, "999 MiB")],
)
def test_sizes_are_shown_in_units_of_1024(count: int, text: str) -> None:
    assert format_bytes(count) == text
