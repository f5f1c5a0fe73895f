"""DeviceSpec: what a device can do at most, as numbers the work formulas are divided by.

Owns the names of the limits, not how they were found: a CPU's are measured at start
(`native/limits.cpp`), another device's come from its data sheet, kept one TOML file a device in
`devices/`. Frozen. A file is read whole or refused by key: a number half understood would be a
wrong prediction.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twostroke.errors import DeviceError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

ARITHMETIC = ("fp32", "bf16", "f16", "int8", "fp8")


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """One device.

    memory_bandwidth: bytes per second read from main memory by all threads together.
    rates: (arithmetic, operations per second) pairs over all threads, a multiply-add being two
    operations; arithmetic is one of ARITHMETIC. threads: cores used on a CPU; 0 elsewhere.
    memory_bytes: for weights and KV together. features: instruction set extensions, for reports.
    link_bandwidth: bytes per second that one device sends to its peers, host_bandwidth: to or from
    host memory, each in one direction; 0 where there is none. hourly_price: US dollars for one
    device, an example of a list price; 0 where none is known. sources: for the numbers, by the name
    they have in the file, where each is published.
    """

    name: str
    memory_bandwidth: float
    rates: tuple[tuple[str, float], ...]
    threads: int
    memory_bytes: int
    features: tuple[str, ...] = ()
    link_bandwidth: float = 0.0
    host_bandwidth: float = 0.0
    hourly_price: float = 0.0
    sources: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        assert self.memory_bandwidth > 0
        assert all(rate > 0 for _, rate in self.rates)
        assert min(self.link_bandwidth, self.host_bandwidth, self.hourly_price) >= 0

    def get_rate(self, arithmetic: str) -> float:
        """Operations per second in `arithmetic`; ValueError names those known when it is not."""
        for name, rate in self.rates:
            if name == arithmetic:
                return rate
        known = ", ".join(name for name, _ in self.rates)
        raise ValueError(f"{self.name} has no rate for {arithmetic} arithmetic, only for: {known}")

    def get_ridge(self, arithmetic: str) -> float:
        """Operations a byte from which on arithmetic takes longer than memory (Williams et al.
        2009, §3); ValueError as `get_rate`."""
        return self.get_rate(arithmetic) / self.memory_bandwidth

    def has_rate(self, arithmetic: str) -> bool:
        """True when the device computes in `arithmetic`."""
        return any(name == arithmetic for name, _ in self.rates)


def list_known_devices() -> tuple[str, ...]:
    """Names that `get_known_device` takes, in alphabetical order."""
    names = (each.name for each in _get_folder().iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml")))


def get_known_device(name: str) -> DeviceSpec:
    """A device by name, or from a TOML file of one's own, such as an edited copy of ours.

    name: one of `list_known_devices`, in any case, or a path that ends in .toml.
    Raises: DeviceError listing the known devices, or naming the key that is wrong in a file.
    """
    if name.endswith(".toml"):
        return _read_device(Path(name))
    known = list_known_devices()
    if name.lower() not in known:
        hint = f"there are {', '.join(known)}; or give a .toml file"
        raise DeviceError(f"{name!r} is no known device; {hint}")
    return _read_device(_get_folder() / f"{name.lower()}.toml")


def _get_folder() -> Traversable:
    from importlib.resources import files  # not at import: it takes longer than all of this module

    return files("twostroke.spec") / "devices"


def _read_device(path: Path | Traversable) -> DeviceSpec:
    import tomllib

    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DeviceError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DeviceError(f"{path}: is no TOML file: {error}") from None
    numbers = ("memory_bytes", "memory_bandwidth")
    optional = ("link_bandwidth", "host_bandwidth", "hourly_price")
    known = ("name", *numbers, *optional, "rates", "sources")
    for key in values:
        if key not in known:
            raise DeviceError(f"{path}: key {key!r} is unknown; there are {', '.join(known)}")
    rates = values.get("rates")
    if not isinstance(rates, dict) or not rates:
        raise DeviceError(f"{path}: key 'rates' must be a table of operations per second")
    for key in rates:
        if key not in ARITHMETIC:
            hint = f"there are {', '.join(ARITHMETIC)}"
            raise DeviceError(f"{path}: arithmetic {key!r} in 'rates' is unknown; {hint}")
    sources = values.get("sources", {})
    if not isinstance(sources, dict):
        raise DeviceError(f"{path}: key 'sources' must be a table of texts")
    for key in sources:
        if key not in (*numbers, *optional, "rates"):
            raise DeviceError(f"{path}: {key!r} in 'sources' is no number of a device")
    link, host, price = (_get_number(path, {key: 0, **values}, key, least=0) for key in optional)
    return DeviceSpec(
        name=_get_text(path, values, "name"),
        memory_bandwidth=_get_number(path, values, "memory_bandwidth"),
        rates=tuple((key, _get_number(path, rates, key)) for key in rates),
        threads=0,
        memory_bytes=int(_get_number(path, values, "memory_bytes")),
        link_bandwidth=link,
        host_bandwidth=host,
        hourly_price=price,
        sources=tuple((key, _get_text(path, sources, key)) for key in sources),
    )


def _get_text(path: Path | Traversable, values: dict[str, Any], key: str) -> str:
    value = values.get(key)
    if not isinstance(value, str):
        raise DeviceError(f"{path}: key {key!r} must be a text, not {value!r}")
    return value


def _get_number(
    path: Path | Traversable, values: dict[str, Any], key: str, least: float = 1
) -> float:
    value = values.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
        if least <= number < float("inf"):
            return number
    kind = "a positive number" if least else "a number, 0 or more"
    raise DeviceError(f"{path}: key {key!r} must be {kind}, not {value!r}")


@dataclass(frozen=True, slots=True)
class ExecutorInfo:
    """What an executor offers: its device, backend and KV pool.

    kv_bytes is the whole pool's size; max_step_tokens the most tokens one step may hold.
    """

    device: str
    backend: str
    threads: int
    num_blocks: int
    block_tokens: int
    kv_bytes: int
    weight_bytes: int
    max_step_tokens: int
