"""Which constants plans are made with: the stored ones where they fit, the built-in ones otherwise, and why."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from itertools import cycle
from pathlib import Path
from typing import Any, get_args

import pytest

from patterndsl.diagnostics import PatternError
from patterndsl.lower import machine as machines
from patterndsl.lower.blocks import CANDIDATES, Length, Tuned, Use
from patterndsl.lower.devices import CPU, CUDA
from patterndsl.lower.machine import (
    FORMAT,
    Calibration,
    calibration_from,
    constants_named,
    constants_of,
    cpu_name,
    store,
    stored_path,
    torch_version,
    write_calibration,
)

MEASURED = replace(CPU, name="mine", dense_rate=1e11, blocks=((64, 64), (64, 2)))
TUNED = tuple(
    Tuned(Use(role, dim, length), blocks)
    for ((role, dim), candidates), length in zip(CANDIDATES.items(), cycle(get_args(Length)), strict=False)
    for blocks in candidates
)
HERE = Calibration(MEASURED, "cpu", cpu_name(), torch_version(), 2, TUNED)


@pytest.fixture(autouse=True)
def _config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def test_nothing_stored_is_built_in() -> None:
    assert constants_of("cpu", cpu_name()).machine == CPU
    assert constants_of("cuda", None).machine == CUDA
    assert "patterndsl calibrate --device cuda" in constants_of("cuda", None).source


def test_what_is_stored_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = store(HERE)
    assert path == tmp_path / "config" / "patterndsl" / "machine-cpu.json" == stored_path("cpu")
    assert calibration_from(path) == HERE
    assert constants_of("cpu", cpu_name()).tuned == TUNED
    assert calibration_from(path).machine == constants_of("cpu", cpu_name()).machine == MEASURED
    assert str(path) in constants_of("cpu", cpu_name()).source


def test_the_same_measurement_is_the_same_file(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        write_calibration(HERE, tmp_path / name, overwrite=False)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    with pytest.raises(PatternError, match="E602"):
        write_calibration(HERE, tmp_path / "a.json", overwrite=False)


@pytest.mark.parametrize(
    ("stored", "why"),
    [
        (replace(HERE, torch="1.0"), "of torch 1.0, not"),
        (replace(HERE, device="another, 64 cores"), "of another, 64 cores, not"),
    ],
)
def test_what_does_not_fit_is_not_taken_and_that_is_said(stored: Calibration, why: str) -> None:
    store(stored)
    found = constants_of("cpu", cpu_name())
    assert found.machine == CPU and found.source.startswith("built-in constants: ") and why in found.source


def test_a_gpu_that_is_not_here_has_no_stored_constants() -> None:
    store(Calibration(replace(CUDA, name="gpu"), "cuda", "gpu", torch_version(), 1))
    assert constants_of("cuda", "gpu").machine.name == "gpu"
    assert constants_of("cuda", None).machine == CUDA


@pytest.mark.parametrize("base", ["", "relative"])
def test_a_config_folder_that_is_no_absolute_path_is_ignored(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", base)
    monkeypatch.setenv("HOME", "/home/someone")
    assert stored_path("cpu") == Path("/home/someone/.config/patterndsl/machine-cpu.json")


GOOD: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **asdict(HERE)}))


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in GOOD.items() if key != name}


def with_constant(name: str, value: object) -> dict[str, Any]:
    return GOOD | {"machine": GOOD["machine"] | {name: value}}


def with_tuned(name: str, value: object) -> dict[str, Any]:
    return GOOD | {"tuned": [GOOD["tuned"][0] | {name: value}]}


BROKEN: dict[str, object] = {
    "a list": [],
    "no format": without("format"),
    "another format": GOOD | {"format": 99},
    "no device": without("device"),
    "a number for a device": GOOD | {"device": 3},
    "an unknown kind of device": GOOD | {"device_type": "tpu"},
    "no threads": GOOD | {"threads": 0},
    "no machine": without("machine"),
    "a list for a machine": GOOD | {"machine": []},
    "a machine without a rate": GOOD | {"machine": {"name": "x"}},
    "a rate of nothing": with_constant("dense_rate", 0.0),
    "an endless rate": with_constant("dense_rate", float("inf")),
    "no number": with_constant("bandwidth", float("nan")),
    "a text for a rate": with_constant("dense_rate", "fast"),
    "a truth value for a rate": with_constant("dense_call", True),
    "a kernel of another device": with_constant("sparse_kernel", "flex"),
    "no blocks": with_constant("blocks", []),
    "a block of nothing": with_constant("blocks", [[64, 0]]),
    "a block of one side": with_constant("blocks", [[64]]),
    "units below one": with_constant("units", 0),
    "nothing tuned": without("tuned"),
    "blocks that nobody tries": with_tuned("blocks", {"q_block": 3}),
    "blocks of another kernel": with_tuned("blocks", asdict(CANDIDATES["keys", 64][0])),
    "a kernel that there is not": with_tuned("use", {"role": "sideways", "head_dim": 64, "length": "short"}),
    "lists of another length": with_tuned("use", {"role": "forward", "head_dim": 64, "length": "endless"}),
    "a width for no kernel": with_tuned("use", {"role": "forward", "head_dim": 65, "length": "short"}),
    "an endless block": with_constant("blocks", [[64, float("inf")]]),
    "a number for blocks": with_constant("blocks", 64),
    "a text in a block": with_constant("blocks", [["wide", 64]]),
    "a block in words": with_constant("blocks", [[" 64 ", "64"]]),
    "a rate beyond floats": with_constant("dense_rate", 10**400),
    "nothing for a name": with_constant("name", None),
    "nothing at all": None,
    "a mapping for a format": GOOD | {"format": {"a": 3}},
    "a machine of nothing": GOOD | {"machine": None},
    "a number for what was tuned": GOOD | {"tuned": 3},
    "words for what was tuned": GOOD | {"tuned": ["fast"]},
    "a use of nothing": with_tuned("use", None),
    "a use without a width": with_tuned("use", {"role": "forward"}),
    "a list for a width": with_tuned("use", {"role": "forward", "head_dim": [64], "length": "short"}),
}


PYTHONS_WORDS = re.compile(
    r"None|True|'|dict|NoneType|unpack|invalid literal|indices|iterable|hashable|recursion|limit"
)


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_file_is_refused_where_named_and_passed_over_where_found(name: str) -> None:
    path = stored_path("cpu")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(BROKEN[name]))
    with pytest.raises(PatternError, match="E604") as refused:
        calibration_from(path)
    assert not PYTHONS_WORDS.search(str(refused.value))
    found = constants_of("cpu", cpu_name())
    assert found.machine == CPU and "damaged" in found.source


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{", b"[" * 100_000, b"9" * 9_999], ids=lambda text: text[:3])
def test_no_json_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(PatternError, match=r"E604.*: it is no JSON"):
        calibration_from(tmp_path / "x.json")


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    content = json.dumps(GOOD | {"tuned": GOOD["tuned"][:1]})
    for length in range(len(content)):
        (tmp_path / "x.json").write_text(content[:length])
        with pytest.raises(PatternError, match=r"E604.*: it is no JSON"):
            calibration_from(tmp_path / "x.json")


def test_no_name_of_a_file_is_refused() -> None:
    with pytest.raises(PatternError, match="E601"):
        calibration_from("x\0.json")


def test_named_constants(tmp_path: Path) -> None:
    assert constants_named("h100").machine == CUDA and constants_named("cpu-2-core").machine == CPU
    write_calibration(HERE, tmp_path / "there.json", overwrite=False)
    assert constants_named(tmp_path / "there.json").machine == MEASURED
    with pytest.raises(PatternError, match="did you mean `h100`"):
        constants_named("h10")


def test_a_processor_without_a_name_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "open", lambda *_, **__: (_ for _ in ()).throw(OSError), raising=False)
    monkeypatch.setattr("platform.processor", lambda: "")
    assert machines._model_name()
