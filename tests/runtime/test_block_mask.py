"""`program.block_mask` is create_block_mask's, on every example."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

import patterndsl
from patterndsl.runtime import flex
from patterndsl.runtime.program import Program

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
HEADS = 4
LISTS = (
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "q_num_blocks",
    "q_indices",
    "full_q_num_blocks",
    "full_q_indices",
)


def some_inputs(program: Program) -> dict[str, Tensor]:
    """Values for whatever the pattern reads: runs of uneven length, ascending."""
    made = {}
    for shape in program.bound.inputs:
        length = shape.length or 8
        values = (torch.arange(length).double().sqrt() / 3).long()
        made[shape.name] = values % 2 == 0 if shape.dtype == "bool" else values
    return made


def assert_same_lists(ours: BlockMask, theirs: BlockMask) -> None:
    for name in LISTS:
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert ours.seq_lengths == theirs.seq_lengths
    assert ours.BLOCK_SIZE == theirs.BLOCK_SIZE


@pytest.mark.parametrize("n", [1000, 4096])
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_equals_create_block_mask(path: Path, n: int) -> None:
    program = patterndsl.load(path).compile(n, heads=HEADS)
    inputs = some_inputs(program)
    keep = program.mask(inputs=inputs)
    heads = keep.shape[0]
    theirs = create_block_mask(lambda b, h, q, k: keep[h, q, k], None, heads, n, n, device="cpu")
    assert_same_lists(program.block_mask(128, inputs=inputs), theirs)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_mask_mod_is_the_mask(path: Path) -> None:
    program = patterndsl.load(path).compile(1000, heads=HEADS)
    inputs = some_inputs(program)
    keep = program.mask(inputs=inputs)
    mask = program.block_mask(128, inputs=inputs)
    heads = keep.shape[0]
    theirs = create_block_mask(mask.mask_mod, None, heads, 1000, 1000, device="cpu")
    assert_same_lists(mask, theirs)


def test_lengths_and_query_offset() -> None:
    program = patterndsl.parse("causal & recent(100)").compile(700, q_len=300, q_start=400, kv_len=650)
    keep = program.mask()
    theirs = create_block_mask(lambda b, h, q, k: keep[h, q, k], None, None, 300, 650, device="cpu")
    ours = program.block_mask(128)
    assert_same_lists(ours, theirs)
    assert_same_lists(ours, create_block_mask(ours.mask_mod, None, None, 300, 650, device="cpu"))


def test_batched_inputs_give_a_mask_per_row() -> None:
    program = patterndsl.parse("causal & same(doc)", inputs={"doc": "int[N]"}).compile(500)
    doc = torch.stack([torch.arange(500) // 90, torch.arange(500) // 200])
    keep = program.mask(inputs={"doc": doc})
    assert keep.shape == (2, 1, 500, 500)
    ours = program.block_mask(128, inputs={"doc": doc})
    theirs = create_block_mask(lambda b, h, q, k: keep[b, h, q, k], 2, None, 500, 500, device="cpu")
    assert_same_lists(ours, theirs)


def test_compact_lists_hold_the_same_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = patterndsl.parse("causal & (recent(300) | first(4)) | random(2, seed = head)")
    dense = pattern.compile(2000, heads=2).block_mask(64)
    monkeypatch.setattr(flex, "MAX_DENSE_BLOCKS", 0)
    compact = pattern.compile(2000, heads=2).block_mask(64)
    assert compact.full_kv_indices is not None
    assert compact.kv_indices.shape == compact.full_kv_indices.shape  # one stride for both
    for counts, columns in (LISTS[at : at + 2] for at in range(0, 8, 2)):
        assert torch.equal(getattr(compact, counts), getattr(dense, counts))
        width = getattr(compact, columns).shape[-1]
        used = torch.arange(width) < getattr(dense, counts)[..., None]
        assert torch.equal(getattr(compact, columns)[used], getattr(dense, columns)[..., :width][used])
