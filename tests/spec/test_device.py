"""Devices by name: published numbers, and files that are refused by key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from twostroke.errors import DeviceError
from twostroke.spec.device import get_known_device, list_known_devices

KNOWN = (
    "a100-40gb",
    "a100-80gb",
    "a10g",
    "b200",
    "h100-pcie",
    "h100-sxm",
    "h200",
    "l4",
    "l40s",
    "mi300x",
    "rtx-4090",
    "t4",
)
WHOLE = """
name = "mine"
memory_bytes = 1_000
memory_bandwidth = 2e9
[rates]
fp32 = 3e9
"""


def test_the_devices_there_are() -> None:
    assert list_known_devices() == KNOWN


@pytest.mark.parametrize("name", KNOWN)
def test_every_device_is_complete(name: str) -> None:
    device = get_known_device(name)
    assert device.name == name
    numbers = ["memory_bytes", "memory_bandwidth", "link_bandwidth", "host_bandwidth", "rates"]
    priced = ["hourly_price"] if device.hourly_price else []
    assert [key for key, _ in device.sources] == numbers + priced
    assert all(re.search("https://|PCI Express", source) for _, source in device.sources)
    assert device.memory_bytes >= 16e9
    assert device.link_bandwidth >= device.host_bandwidth >= 16e9
    assert device.get_rate("fp32") < device.get_rate("f16") < device.get_rate("int8")


@pytest.mark.parametrize(
    ("name", "flops_per_byte"),
    [("a100-80gb", 153), ("h100-sxm", 295), ("h200", 206), ("t4", 203), ("mi300x", 247)],
)
def test_where_arithmetic_overtakes_memory(name: str, flops_per_byte: int) -> None:
    device = get_known_device(name)
    assert round(device.get_rate("f16") / device.memory_bandwidth) == flops_per_byte


def test_an_a100_has_two_ridges_because_it_has_two_memories() -> None:
    ridges = [get_known_device(name).get_ridge("f16") for name in ("a100-80gb", "a100-40gb")]
    assert [round(each) for each in ridges] == [153, 201]


def test_a_price_says_where_and_when_it_was_read() -> None:
    prices = [dict(get_known_device(name).sources).get("hourly_price") for name in KNOWN]
    assert all(re.search(r"20\d\d-\d\d-\d\d", price) for price in prices if price)
    assert prices.count(None) == 3


def test_a_name_is_known_in_any_case() -> None:
    assert get_known_device("A100-80GB") == get_known_device("a100-80gb")


def test_a_device_has_the_rates_it_names() -> None:
    assert not get_known_device("t4").has_rate("bf16")
    assert get_known_device("h100-sxm").has_rate("fp8")


def test_an_unknown_device_is_refused_with_those_there_are() -> None:
    with pytest.raises(DeviceError, match=r"'h900' is no known device; there are a100-40gb, .*t4"):
        get_known_device("h900")


def test_a_file_of_ones_own_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(WHOLE)
    device = get_known_device(str(path))
    assert (device.name, device.memory_bytes, device.link_bandwidth) == ("mine", 1000, 0.0)
    assert device.rates == (("fp32", 3e9),)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "mine"', "", "'name' must be a text, not None"),
        ("memory_bytes", "memory_byte", "'memory_byte' is unknown; there are name, memory_bytes"),
        ("2e9", "-1", "'memory_bandwidth' must be a positive number, not -1"),
        ("2e9", "inf", "'memory_bandwidth' must be a positive number, not inf"),
        ("2e9", "nan", "'memory_bandwidth' must be a positive number, not nan"),
        ("2e9", "true", "'memory_bandwidth' must be a positive number, not True"),
        ("3e9", '"fast"', "'fp32' must be a positive number, not 'fast'"),
        ("fp32", "fp31", "'fp31' in 'rates' is unknown; there are fp32, bf16"),
        ("[rates]\nfp32 = 3e9", "", "'rates' must be a table"),
        ("[rates]", "hourly_price = -2\n[rates]", "'hourly_price' must be a number, 0 or more"),
        ("[rates]", "[sources]\nrate = 'x'\n[rates]", "'rate' in 'sources' is no number"),
        ("[rates]", "[rates", "is no TOML file"),
    ],
)
def test_a_bad_file_is_refused_by_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(WHOLE.replace(old, new))
    with pytest.raises(DeviceError) as refused:
        get_known_device(str(path))
    assert message in str(refused.value)
    assert str(path) in str(refused.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"none\.toml: cannot be read: No such file"):
        get_known_device(str(tmp_path / "none.toml"))
