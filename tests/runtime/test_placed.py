"""What a GPU is told to run, run here: FlexAttention as its tile lists and its mask_mod say, by plain arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

import patterndsl
from patterndsl.lower.devices import CUDA
from patterndsl.lower.hulls import hulls
from patterndsl.runtime import flex, oracle
from patterndsl.runtime.data import checked_inputs
from patterndsl.runtime.placed import Placed


def kept(mask: BlockMask, batch: int, q_len: int, kv_len: int) -> Tensor:
    """bool [B, 1, q_len, kv_len]: all of full tiles, of partial ones what the mask_mod says; the transposed lists must
    name the same tiles."""
    tall, wide = mask.BLOCK_SIZE
    found = torch.zeros(batch, -(-q_len // tall), -(-kv_len // wide), 2, dtype=torch.bool)
    turned = torch.zeros_like(found)
    lists = (
        (mask.kv_num_blocks, mask.kv_indices, mask.q_num_blocks, mask.q_indices),
        (mask.full_kv_num_blocks, mask.full_kv_indices, mask.full_q_num_blocks, mask.full_q_indices),
    )
    for kind, (number, columns, q_number, q_columns) in enumerate(lists):
        if number is None or columns is None or q_number is None or q_columns is None:
            continue
        for b in range(batch):
            at = b if number.shape[0] > 1 else 0
            for row in range(found.shape[1]):
                found[b, row, columns[at, 0, row, : number[at, 0, row]].long(), kind] = True
            for column in range(found.shape[2]):
                turned[b, q_columns[at, 0, column, : q_number[at, 0, column]].long(), column, kind] = True
    assert torch.equal(found, turned)
    assert not (found[..., 0] & found[..., 1]).any()
    q, k = torch.arange(q_len)[:, None], torch.arange(kv_len)[None]
    tiles = found[:, q // tall, k // wide]
    says = torch.stack(
        [mask.mask_mod(torch.tensor(b), torch.tensor(0), q, k).expand(q_len, kv_len) for b in range(batch)]
    )
    return (tiles[..., 1] | tiles[..., 0] & says)[:, None]


def plain_flex(
    attend: object, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, *, scale: float, want_lse: bool
) -> tuple[Tensor, Tensor]:
    return oracle.attend(query, key, value, kept(mask, query.shape[0], query.shape[2], key.shape[2]), scale)


@pytest.fixture
def by_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "flex", plain_flex)
    # compiled functions as they are written: what compiling them does is another test's
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


PATTERNS = [
    "causal & same(doc)",
    "recent(70) & same(doc) | first(3)",
    "causal & chunks(b, 32, 1)",
    "causal & (chunks(b, 32, 1) | recent(9)) & same(doc)",
    "causal & top",
    "causal & (top | recent(20) | first(2))",
    "causal & (top | recent(20)) & same(doc)",
    "causal & (top - recent(5)) | same(doc) & recent(9)",
    "top & same(doc)",
    "head % 2 == 0 & causal & top | head % 2 == 1 & recent(30) & same(doc)",
    "causal & (top | random(2, seed = 3))",
    "causal & (top | other)",
    "top | same(doc)",
    "top | window(5)",
]


@pytest.mark.usefixtures("by_arithmetic")
@settings(max_examples=80, deadline=None)
@given(
    attend=st.sampled_from(PATTERNS),
    n=st.integers(1, 300),
    start=st.integers(0, 140),
    sizes=st.sampled_from([(64, 64), (64, 1), (16, 128), (128, 128), (48, 96), (1, 1), (1, 40)]),
    rows=st.integers(0, 2),
    train=st.booleans(),
    seed=st.integers(0, 99),
)
def test_tiles_and_masks_say_the_pattern(
    attend: str, n: int, start: int, sizes: tuple[int, int], rows: int, train: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    (of, per), start = sizes, min(start, n - 1) if "chunks" not in attend else 0
    text = f"""
inputs: {{doc: "int[N]"}}
labels: {{b: given}}
select:
  top: "given(3, of = blocks({of}), per = blocks({per}))"
  other: "given(2, of = blocks(32))"
attend: {attend}
"""
    pattern = patterndsl.parse(text)
    program = pattern.compile(n, heads=4, q_len=n - start, kv_len=n, q_start=start, backend="oracle")
    inputs: dict[str, Any] = {}
    for shape in program.bound.inputs:
        outer = (rows,) if rows else ()
        if shape.selection is not None:
            size = (*outer, *(item or 0 for item in shape.inner))
            inputs[shape.name] = torch.randint(-1, -(-n // shape.selection.of), size, generator=generator)
        else:
            inputs[shape.name] = torch.randint(0, 3, (*outer, n), generator=generator).sort(-1).values
    if "doc" in inputs:  # of each row, whatever the others are
        inputs["doc"] = torch.randint(0, 3, (2, n), generator=generator).sort(-1).values
    shapes = [(2, heads, length, 4) for heads, length in ((4, n - start), (2, n), (2, n))]
    tensors = [torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=train) for shape in shapes]
    truth, truth_lse = program(*tensors, inputs=inputs, return_lse=True)
    found = hulls(program.bound, CUDA)
    if found is None:
        return
    placed = Placed(found, program.bound, torch.device("cpu"))
    given = checked_inputs(program.bound, inputs, torch.device("cpu"), 2)
    out, lse = placed(tensors[0], tensors[1], tensors[2], given, 0.5)
    torch.testing.assert_close(out, truth, rtol=0, atol=1e-9)
    torch.testing.assert_close(lse, truth_lse, rtol=0, atol=1e-9)
