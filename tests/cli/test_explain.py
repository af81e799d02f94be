"""`patterndsl explain` and `calibrate`: the plan in words, and the constants that it is made with."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from patterndsl.cli import main
from patterndsl.lower.devices import CPU
from patterndsl.lower.machine import stored_path, torch_version
from patterndsl.runtime import calibrate, measure
from patterndsl.runtime.calibrate import Setting

STRIDED = "causal & (recent(w) | strided(w))"
WORDS = ["explain", STRIDED, "--set", "w=64", "-n", "2048", "--heads", "4"]


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setitem(calibrate.SETTINGS, "cpu", Setting(1, torch.float32, 128, 1024, 16, 64, 16))
    monkeypatch.setattr(calibrate, "BUDGET", 0.0)
    others(monkeypatch, 0.0)


def others(monkeypatch: pytest.MonkeyPatch, cores: float) -> None:
    def known(*_: object) -> float:
        return cores

    monkeypatch.setattr(measure, "cores_of_others", known)


Said = Callable[..., str]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    def run(*words: str, code: int = 0) -> str:
        assert main(words) == code
        return capsys.readouterr().out

    return run


def test_the_plan_and_what_was_rejected(said: Said) -> None:
    out = said(*WORDS)
    assert out.startswith(f"{STRIDED}: N = 2,048, 4 heads of 64\n")
    assert "cpu-2-core, float32: built-in constants" in out
    assert "  plan 0, 2 terms apart: forward " in out and "rejected plan 1" in out and "(Expected)" in out


def test_another_device_is_explained_anywhere(said: Said) -> None:
    out = said(*WORDS, "--device", "h100", "--train", "--head-dim", "128")
    assert "h100, bfloat16" in out and "as usual on cuda" in out and "4 heads of 128" in out


def test_as_data(said: Said) -> None:
    data: dict[str, Any] = json.loads(said(*WORDS, "--json"))
    (group,) = data["groups"]
    assert data["heads"] == 4 and data["forward_s"] > 0 and data["backward_bytes"] > data["forward_bytes"]
    assert [way["plan"] for way in group["ways"]] == list(range(len(group["ways"])))


def test_terms_without_a_plan_say_how_they_run(said: Said) -> None:
    performer = said("explain", "examples/sources/performer.yaml", "-n", "512")
    assert "no plan: sums of the features of keys" in performer and "all of it: forward " in performer
    biased = said("explain", "examples/sources/alibi.yaml", "-n", "512")
    assert "no plan: block by block over the live tiles" in biased and "all of it: forward " in biased
    data = json.loads(said("explain", "examples/sources/window-and-sums.yaml", "-n", "512", "--json"))
    assert {name: item["plan"] is None for name, item in data["terms"].items()} == {
        "near.self": False,
        "far.self": True,
    }


def test_branches_of_other_layers_are_not_explained(said: Said) -> None:
    spec = str(Path(__file__).parents[2] / "examples" / "sources" / "lightning.yaml")
    for layer, name in (("0", "sums"), ("7", "softmax")):
        found = said("explain", spec, "-n", "300", "--layer", layer)
        assert [line.split(":")[0] for line in found.splitlines() if line.startswith("of ")] == [f"of {name}.self"]


def test_measured_constants_are_stored_shown_and_taken(said: Said) -> None:
    out = said("calibrate")
    assert "measured  cpu-2-core" in out and f"written to {stored_path('cpu')}" in out
    assert f"measured with torch {torch.__version__}, {stored_path('cpu')}" in said(*WORDS)
    assert "cpu-2-core" in said(*WORDS, "--device", "cpu-2-core")


def test_a_file_of_ones_own(said: Said, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.json"
    data = json.loads(said("calibrate", "-o", str(path), "--json"))
    assert data["path"] == str(path) and data["measured"]["dense_rate"] > 0
    assert not stored_path("cpu").exists()
    assert f"{path}" in said(*WORDS, "--device", str(path))
    assert main(["calibrate", "-o", str(path)]) == 1
    assert "E602" in capsys.readouterr().err
    assert main(["calibrate", "-o", str(tmp_path / "mine.txt")]) == 2


def test_what_others_disturbed_is_not_stored(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    others(monkeypatch, 1.5)
    out = said("calibrate", code=1)
    assert "others kept 1.5 cores busy" in out and "nothing is stored" in out
    assert not stored_path("cpu").exists()
    assert "written to" in said("calibrate", "--force") and stored_path("cpu").exists()


def test_a_folder_that_cannot_be_made_is_said_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(calibrate, "calibrate", lambda *_, **__: pytest.fail("it was measured"))
    assert main(["calibrate"]) == 1
    assert "E602" in capsys.readouterr().err
    assert main(["calibrate", "-o", str(tmp_path / "none" / "mine.json")]) == 1
    assert "mkdir -p" in capsys.readouterr().err


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_measured(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(calibrate.SETTINGS, "cuda", Setting(2, torch.bfloat16, 512, 4096, 0, 128, 256))
    data = json.loads(said("calibrate", "--device", "cuda", "--json"))
    assert data["device"] == torch.cuda.get_device_name() and data["measured"]["sparse_kernel"] == "triton"
    assert f"measured with torch {torch_version()}" in said(*WORDS, "--device", "cuda")


def test_nobody_has_to_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    for step in ("dense", "short", "few", "masked", "merging", "calls", "sparse"):
        monkeypatch.setattr(calibrate._Measurement, step, lambda _: None)
    found = calibrate.calibrate(torch.device("cpu"))
    assert found.tuned == () and found.machine == replace(CPU, name=found.device)


def test_each_step_of_a_measurement_is_said() -> None:
    seen: list[tuple[str, int, int]] = []
    found = calibrate.calibrate(torch.device("cpu"), on_event=lambda *event: seen.append(event))
    assert [done for _, done, _ in seen] == list(range(8)) and {total for *_, total in seen} == {7}
    assert found.machine.partial >= 1 and found.machine.short >= 1 and found.machine.sparse_kernel == "gathered"
