"""Laws of choosing the device."""

from __future__ import annotations

import pytest

from twostroke.cli.device import Gpus, find_gpus, resolve_device
from twostroke.errors import DeviceError, InvalidParameter

NONE = Gpus(0, "there is no driver")
TWO = Gpus(2)
BARE = Gpus(2, "", "torch is not installed")


def refuse() -> Gpus:
    """Nobody may ask."""
    raise AssertionError


@pytest.mark.parametrize(
    ("wanted", "gpus", "device"),
    [
        ("cpu", TWO, "cpu"),
        ("auto", TWO, "cuda:0"),
        ("auto", NONE, "cpu"),
        ("auto", BARE, "cpu"),
        ("cuda", TWO, "cuda:0"),
        ("cuda:1", TWO, "cuda:1"),
    ],
)
def test_the_device_is_as_asked_or_what_is_there(wanted: str, gpus: Gpus, device: str) -> None:
    chosen, reason = resolve_device(wanted, "", lambda: gpus)
    assert chosen == device
    assert reason


def test_a_setting_of_the_cpu_keeps_the_engine_there() -> None:
    assert resolve_device("auto", "threads", refuse) == (
        "cpu",
        "threads was asked for, which is of the CPU",
    )


@pytest.mark.parametrize(
    ("wanted", "gpus", "says"),
    [
        ("cuda", NONE, "no driver.*--device cpu"),
        ("cuda", BARE, r"torch is not installed.*pip install 'twostroke\[cuda\]'"),
        ("cuda:2", TWO, "no cuda:2 here, only cuda:0, cuda:1"),
    ],
)
def test_a_device_that_cannot_be_had_is_refused_with_the_way_out(
    wanted: str, gpus: Gpus, says: str
) -> None:
    with pytest.raises(DeviceError, match=says):
        resolve_device(wanted, "", lambda: gpus)


@pytest.mark.parametrize("wanted", ["gpu", "cuda:", "cuda:x", "cuda:-1", "CUDA", ""])
def test_an_unknown_device_is_refused_by_name(wanted: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        resolve_device(wanted, "", refuse)
    assert caught.value.parameter == "device"


def test_a_gpu_and_a_setting_of_the_cpu_do_not_go_together() -> None:
    with pytest.raises(InvalidParameter) as caught:
        resolve_device("cuda", "backend", refuse)
    assert caught.value.parameter == "backend"


def test_what_is_found_says_why_there_is_nothing() -> None:
    found = find_gpus()
    assert (found.count == 0) == bool(found.why)
