"""Plan files: the same bytes each time, the same program back, and nothing believed that is damaged."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import patterndsl
from patterndsl import PatternError
from patterndsl.lower.plan import Option
from patterndsl.lower.shapes import Band, Full, Masked, Sparse, Triangle

PATTERN = "causal & (recent(40) | head < 2 & strided(d[head]) | head == 2 & k in 8..9) | random(1, seed = head // 2)"
PARAMS = {"d": [7, 7, 16]}
SIZES: dict[str, Any] = {"n": 300, "q_len": 200, "q_start": 70, "heads": 3, "layer": 2}


@cache
def program() -> patterndsl.Program:
    return compiled("auto")


def compiled(backend: str) -> patterndsl.Program:
    return patterndsl.parse(PATTERN, params=PARAMS).compile(**SIZES, backend=backend)


@pytest.fixture
def planning_is_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """What finds passes and tiles is out of order."""

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("planned again")

    for place in ("ready.make_plan", "tilings.gather_tiles", "tilings.find_tiles"):
        monkeypatch.setattr(f"patterndsl.runtime.{place}", forbidden)


def results(of: patterndsl.Program) -> list[torch.Tensor]:
    """Output, without and with gradients, and these."""
    torch.manual_seed(0)
    sizes = of.bound.sizes
    query, key, value = (torch.randn(1, 3, length, 16) for length in (sizes.q_len, sizes.kv_len, sizes.kv_len))
    trained = [x.clone().requires_grad_() for x in (query, key, value)]
    out = of(trained[0], trained[1], trained[2])
    return [of(query, key, value), out, *torch.autograd.grad(out.square().sum(), trained)]


@pytest.mark.parametrize("backend", ["auto", "gathered"])
def test_loads_back_to_the_same_program(tmp_path: Path, backend: str, request: pytest.FixtureRequest) -> None:
    path, again = tmp_path / "plan.safetensors", tmp_path / "again.safetensors"
    stored = (
        program() if backend == "auto" else patterndsl.parse(PATTERN, params=PARAMS).compile(**SIZES, backend=backend)
    )
    stored.save(path)
    expected = results(stored)
    request.getfixturevalue("planning_is_forbidden")
    loaded = patterndsl.load_program(path)
    assert (loaded.text, loaded.bound, loaded.backend) == (stored.text, stored.bound, stored.backend)
    assert all(torch.equal(found, wanted) for found, wanted in zip(results(loaded), expected, strict=True))
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()


def test_the_passes_are_the_chosen_ones(tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    program().save(path)
    stored, loaded = program().plan, patterndsl.load_program(path).plan
    for mine, theirs in ((loaded.forward, stored.forward), (loaded.training, stored.training)):
        assert [option.cost for option in mine] == [option.cost for option in theirs]
        assert texts(mine) == texts(theirs)


def texts(options: Sequence[Option]) -> list[tuple[str, list[str]]]:
    return [(option.text, [item.text for item in option.passes]) for option in options]


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        ("causal & (recent(64) | strided(32))", {Band, Triangle}),
        ("window(40) | global(3)", {Full, Band, Masked}),
        ("blocks(16, random(2, seed = 3))", {Sparse}),
        ("none", set()),
    ],
)
def test_every_shape_is_kept(tmp_path: Path, text: str, shapes: set[type]) -> None:
    path = tmp_path / "plan.safetensors"
    stored = patterndsl.parse(text).compile(1024, heads=3)
    assert {type(item.piece.shape) for item in stored.plan.passes} == shapes
    stored.save(path)
    loaded = patterndsl.load_program(path)
    assert loaded.plan.num_choices <= 2
    assert all(torch.equal(found, wanted) for found, wanted in zip(results(loaded), results(stored), strict=True))


def test_a_plan_asked_for_is_the_one_that_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    stored = patterndsl.parse("causal & (recent(64) | strided(32))").compile(1024, heads=3, plan=1)
    stored.save(path)
    loaded = patterndsl.load_program(path)
    assert texts(loaded.plan.training) == texts(loaded.plan.forward) == texts(stored.plan.forward)


def test_a_file_grows_with_the_plan_and_not_with_the_sequence(tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    patterndsl.parse("causal & (recent(256) | strided(256))").compile(1 << 18).save(path)
    assert path.stat().st_size < 100_000


def test_another_backend_finds_what_it_needs(tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    program().save(path)
    loaded = patterndsl.load_program(path, backend="gathered")
    for found, wanted in zip(results(loaded), results(program()), strict=True):
        torch.testing.assert_close(found, wanted)
    loaded.save(path, overwrite=True)
    assert patterndsl.load_program(path).backend == "gathered"


def test_an_older_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.safetensors"
    monkeypatch.setattr("patterndsl.runtime.plan.FORMAT", 1)
    program().save(path)
    monkeypatch.undo()
    with pytest.raises(PatternError, match=r"E603.*format 1"):
        patterndsl.load_program(path)


def test_same_bytes_in_another_process(tmp_path: Path) -> None:
    here, there = tmp_path / "here.safetensors", tmp_path / "there.safetensors"
    program().save(here)
    script = (
        f"import patterndsl; patterndsl.parse({PATTERN!r}, params={PARAMS!r}).compile(**{SIZES!r}).save({str(there)!r})"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert here.read_bytes() == there.read_bytes()


def test_a_pattern_with_inputs_keeps_no_tiles(tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    pattern = patterndsl.parse("causal & same(doc)", inputs={"doc": "int[N]"})
    pattern.compile(300).save(path)
    doc = torch.arange(300) // 70
    x = torch.randn(1, 1, 300, 8)
    loaded = patterndsl.load_program(path)
    assert torch.equal(loaded(x, x, x, inputs={"doc": doc}), pattern.compile(300)(x, x, x, inputs={"doc": doc}))


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "plan.safetensors"
    program().save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(PatternError, match="E603"):
        patterndsl.load_program(path)


@pytest.mark.parametrize("place", [3, 9, 40, 200, -1, -1000])
def test_a_flipped_byte_is_refused(tmp_path: Path, place: int) -> None:
    path = tmp_path / "plan.safetensors"
    program().save(path)
    data = bytearray(path.read_bytes())
    data[place] ^= 0x15
    path.write_bytes(data)
    with pytest.raises(PatternError, match="E603"):
        patterndsl.load_program(path)


def test_another_safetensors_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(PatternError, match="E603"):
        patterndsl.load_program(path)


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(PatternError, match="E601"):
        patterndsl.load_program(tmp_path / "none.safetensors")


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    path.write_text("mine")
    with pytest.raises(PatternError, match="E602"):
        program().save(path)
    assert path.read_text() == "mine"
    program().save(path, overwrite=True)
    assert patterndsl.load_program(path).text == program().text


def test_an_unwritable_folder_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(PatternError, match="E602"):
        program().save(tmp_path / "none" / "plan.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["shape", "dtype"])
def test_a_tensor_of_another_shape_or_dtype_is_damage(change: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    patterndsl.parse("causal & recent(8)").compile(64).save(path)
    tensors = load_file(path)
    assert tensors
    changed = {name: array[None] if change == "shape" else array.view("int8") for name, array in tensors.items()}
    with safe_open(path, "np") as file:
        save_file(changed, path, file.metadata())
    with pytest.raises(PatternError, match="E603"):
        patterndsl.load_program(path)
