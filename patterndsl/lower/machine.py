"""Which constants does a device have? Those measured on it, where they are stored and fit, else built-in ones.

A stored file is a calibration: the constants, and what they were measured with. Another device, PyTorch or format does
not fit, and then the built-in constants hold; the reason is said and nothing is changed. Measuring stands above.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import Any, get_args

from patterndsl.diagnostics import PatternError, error, nearest
from patterndsl.files import write_atomically
from patterndsl.lower.blocks import Tuned, tuned_from
from patterndsl.lower.devices import CPU, CUDA, Kernel, Machine, built_in

FORMAT = 4
"""Of the file; it changes where what it holds does."""
NAMED = {machine.name: machine for machine in (CPU, CUDA)}
MAX_BYTES = 1 << 20
MOST_SHOWN = 80
"""Characters of what is wrong in a file."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Constants as they were measured. device: its name; torch: PyTorch's version; threads: of the measurement;
    tuned: blocks of generated kernels that were fastest."""

    machine: Machine
    device_type: str
    device: str
    torch: str
    threads: int
    tuned: tuple[Tuned, ...] = ()


@dataclass(frozen=True, slots=True)
class Constants:
    """The machine that plans are made for, in words where its constants come from, and what was tuned with them."""

    machine: Machine
    source: str
    tuned: tuple[Tuned, ...] = ()


def device_type_of(machine: Machine) -> str:
    """The kind of device that it describes: only there are Triton's kernels, and only there FlexAttention trains."""
    return "cuda" if machine.sparse_kernel in ("triton", "flex") else "cpu"


# ---- which constants


def constants_of(device_type: str, device: str | None) -> Constants:
    """The stored constants of this kind of device where they fit, else the built-in ones.

    device: the name of the device, which a calibration must be of; None where there is none here. Never raises: a file
    that is damaged does not fit.
    """
    usual, path = built_in(device_type), stored_path(device_type)
    if not path.is_file():
        cure = f"patterndsl calibrate{_option(device_type)}"
        return Constants(usual, f"built-in constants; `{cure}` measures those of this machine")
    try:
        found = calibration_from(path)
    except PatternError:
        cure = f"patterndsl calibrate{_option(device_type)}"
        return Constants(usual, f"built-in constants: {path} is damaged, or of another version; measure again: {cure}")
    misfit = _misfit(found, device_type, device)
    if misfit:
        return Constants(usual, f"built-in constants: those of {path} are {misfit}")
    return Constants(found.machine, f"measured with torch {found.torch}, {path}", found.tuned)


def _option(device_type: str) -> str:
    return "" if device_type == "cpu" else f" --device {device_type}"


def _misfit(found: Calibration, device_type: str, device: str | None) -> str | None:
    """Why a calibration does not fit, if it does not."""
    if found.device_type != device_type:
        return f"of a {found.device_type} device"
    if found.device != device:
        return f"of {found.device}, not {device or 'a device that is here'}"
    if found.torch != torch_version():
        return f"of torch {found.torch}, not {torch_version()}"
    return None


def constants_named(name: str | PathLike[str]) -> Constants:
    """Built-in constants by their name, or those of a calibration's file. Raises PatternError (E505, E601, E604)."""
    if isinstance(name, str) and name in NAMED:
        return Constants(NAMED[name], "built-in constants")
    path = Path(name)
    if path.suffix == ".json" or path.is_file():
        found = calibration_from(path)
        return Constants(found.machine, f"measured with torch {found.torch}, {path}")
    known = ("cpu", "cuda", *NAMED)
    near = nearest(str(name), known)
    help = f"did you mean `{near}`?" if near else f"choose from {', '.join(known)}, or name a calibration's .json file"
    raise error("E505", f"no constants of a machine `{name}` are known", None, help)


def torch_version() -> str:
    """The installed PyTorch's version, without importing it."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return ""


@cache
def cpu_name() -> str:
    """The processor and the cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{_model_name()}, {cores} core{'s' * (cores != 1)}"


def _model_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            found = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        found = ""
    return found or platform.processor() or platform.machine() or "CPU"


# ---- the file


def stored_path(device_type: str) -> Path:
    """Where the constants of a kind of device are stored for this user."""
    # the specification of XDG ignores relative paths
    given = os.environ.get("XDG_CONFIG_HOME", "")
    base = Path(given) if os.path.isabs(given) else Path(os.path.expanduser("~")) / ".config"
    return base / "patterndsl" / f"machine-{device_type}.json"


def store(found: Calibration) -> Path:
    """Writes the file that `constants_of` reads, over an older one; its path. Raises PatternError (E602)."""
    path = storage(found.device_type)
    write_calibration(found, path, overwrite=True)
    return path


def storage(device_type: str) -> Path:
    """The path that `store` writes, in a folder that is made where it is missing. Raises PatternError (E602)."""
    path = stored_path(device_type)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as failed:
        help = "set XDG_CONFIG_HOME to a folder that you may write to, or give -o FILE"
        raise error("E602", f"cannot make {path.parent}: {failed.strerror or failed}", None, help) from None
    return path


def write_calibration(found: Calibration, path: str | PathLike[str], *, overwrite: bool) -> None:
    """Writes the file whole or not at all. Raises PatternError (E602)."""
    data = {"format": FORMAT, **asdict(found)}
    text = json.dumps(data, indent=2, sort_keys=True) + "\n"
    write_atomically(path, text.encode(), overwrite=overwrite, switch="--force")


def calibration_from(path: str | PathLike[str]) -> Calibration:
    """The calibration in a file. Raises PatternError: E601 unreadable, E604 damaged or another format."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES)
    except (OSError, ValueError) as failed:  # a ValueError: no name of a file has a NUL in it
        reason = getattr(failed, "strerror", None) or failed
        raise error("E601", f"cannot read {path}: {reason}", None, "check the path") from None
    try:
        return read_calibration(_json(content))
    except _NoConstants as failed:
        help = "measure again: patterndsl calibrate"
        raise error("E604", f"{path} holds no constants of a machine: {failed}", None, help) from None


class _NoConstants(Exception):
    """Why a file's content is no calibration, in words for who damaged it."""


def _json(content: bytes) -> object:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):  # numbers of thousands of digits are a ValueError, too
        raise _NoConstants("it is no JSON") from None


def read_calibration(data: object) -> Calibration:
    """The calibration of a file's JSON. Raises _NoConstants where it is none."""
    file = _mapping(data, "it")
    if (number := _entry(file, "format")) != FORMAT:
        raise _NoConstants(f"its format is {_shown(number)}, not {FORMAT}")
    device_type, device, torch, threads = (_entry(file, name) for name in ("device_type", "device", "torch", "threads"))
    texts = all(isinstance(text, str) and text for text in (device_type, device, torch))
    if not texts or device_type not in ("cpu", "cuda") or not _is_count(threads):
        raise _NoConstants("what it was measured with is not said")
    machine = _machine(_mapping(_entry(file, "machine"), "machine"), device_type)
    return Calibration(machine, device_type, device, torch, threads, tuple(_tuned(_list(file, "tuned"))))


def _tuned(items: Sequence[object]) -> Iterator[Tuned]:
    for item in items:
        found = tuned_from(item)
        if found is None:
            raise _NoConstants(f"no kernel is tried on {_shown(item)}")
        yield found


def _machine(data: Mapping[str, Any], device_type: str) -> Machine:
    """The constants: rates above 0, counts, and the block-sparse kernel of that kind of device."""
    values: dict[str, Any] = {field.name: _entry(data, field.name) for field in fields(Machine)}
    for name in ("blocks", "finer"):
        values[name] = tuple(_block(name, block) for block in _list(data, name))
    usual = built_in(device_type)
    for name, value in values.items():
        if name in ("itemsize", "short", "few", "grain", "units"):
            is_fine = _is_count(value, 0 if name == "short" else 1)
        elif isinstance(getattr(usual, name), float):
            is_fine = _is_rate(value)
        else:
            is_fine = isinstance(value, type(getattr(usual, name)))
        if not is_fine:
            raise _NoConstants(f"{name} is {_shown(value)}")
    if values["sparse_kernel"] not in get_args(Kernel) or values["sparse_kernel"] != usual.sparse_kernel:
        raise _NoConstants(f"sparse_kernel is {_shown(values['sparse_kernel'])}")
    if not values["blocks"]:
        raise _NoConstants("blocks is empty")
    return Machine(**values)


def _block(name: str, value: object) -> tuple[int, int]:
    """Queries and keys of a block."""
    if not isinstance(value, list) or len(value) != 2 or not all(map(_is_count, value)):
        raise _NoConstants(f"a block in {name} is {_shown(value)}, not two sizes")
    return value[0], value[1]


def _mapping(value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _NoConstants(f"{name} is {_shown(value)}, no mapping")
    return value


def _list(data: Mapping[str, Any], name: str) -> Sequence[object]:
    value = _entry(data, name)
    if not isinstance(value, list):
        raise _NoConstants(f"{name} is {_shown(value)}, no list")
    return value


def _entry(data: Mapping[str, Any], name: str) -> Any:
    if name not in data:
        raise _NoConstants(f"{name} is missing")
    return data[name]


def _shown(value: object) -> str:
    """The value as the file has it, as much as fits in a line."""
    text = json.dumps(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def _is_count(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 40


def _is_rate(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max
