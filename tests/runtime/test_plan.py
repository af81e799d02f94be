"""Plan files: the same bytes each time, the same program back, and nothing believed that is damaged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import patterndsl
from patterndsl import PatternError

PATTERN = "causal & (recent(100) | strided(d[head])) | random(2, seed = head)"
PARAMS = {"d": [7, 7, 16]}


def program() -> patterndsl.Program:
    return patterndsl.parse(PATTERN, params=PARAMS).compile(700, q_len=500, q_start=100, heads=3, layer=2)


def test_loads_back_to_the_same_program(tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    stored = program()
    stored.save(path)
    loaded = patterndsl.load_program(path)
    assert (loaded.text, loaded.bound) == (stored.text, stored.bound)
    query, key = torch.randn(1, 3, 500, 16), torch.randn(1, 3, 700, 16)
    assert torch.equal(loaded(query, key, key), stored(query, key, key))
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_same_bytes_in_another_process(tmp_path: Path) -> None:
    here, there = tmp_path / "here.safetensors", tmp_path / "there.safetensors"
    program().save(here)
    script = (
        f"import patterndsl; patterndsl.parse({PATTERN!r}, params={PARAMS!r})"
        f".compile(700, q_len=500, q_start=100, heads=3, layer=2).save({str(there)!r})"
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
