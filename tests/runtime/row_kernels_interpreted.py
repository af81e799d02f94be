"""Run by test_row_kernels.py with TRITON_INTERPRET=1: prints a line for each case that agrees."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from patterndsl.runtime.fused import share_of_gradient
from patterndsl.runtime.merge import merge_, unmerge_
from patterndsl.runtime.row_kernels import add_rows, merge_rows, share_rows
from tests.hastening import hasten

hasten()
torch.manual_seed(0)


def rows_of(x: Tensor, permuted: bool) -> Tensor:
    """[2, 3, 4, 5, ...] of [2, 3, 20, ...]: blocks, or residue classes."""
    if permuted:
        return x.unflatten(2, (5, 4)).transpose(2, 3)
    return x.unflatten(2, (4, 5))


for permuted, width, sign in itertools.product((False, True), (8, 5), (1, -1)):
    out, lse = torch.randn(2, 3, 20, width), torch.randn(2, 3, 20).clamp(-2, 2) + (5 if sign < 0 else 0)
    part, part_lse = torch.randn(2, 3, 4, 5, width), torch.randn(2, 3, 4, 5).clamp(-2, 2)
    part_lse[0, 0, 0], part_lse[1, 1, 1, 1] = -torch.inf, -torch.inf
    if sign > 0:
        lse[0, 0] = lse[1, 2, 7] = -torch.inf
        out[lse == -torch.inf] = 0.0
    expected, expected_lse = out.clone(), lse.clone()
    twin = merge_ if sign > 0 else unmerge_
    twin(rows_of(expected, permuted), rows_of(expected_lse, permuted), part, part_lse)
    merge_rows(rows_of(out, permuted), rows_of(lse, permuted), part, part_lse, sign)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    print("ok")

for permuted, more in itertools.product((False, True), (0, 8)):
    merged, grad = torch.randn(2, 3, 20, 5 + more), torch.randn(2, 3, 20, 5 + more)
    merged_lse = torch.randn(2, 3, 20)
    merged_lse[1, 0, 3] = torch.inf
    out, lse = torch.randn(2, 3, 4, 5, 5), torch.randn(2, 3, 4, 5)
    whole, whole_lse, upstream = (rows_of(x, permuted) for x in (merged, merged_lse, grad))
    wanted, wanted_lse = share_of_gradient(out, lse, whole, whole_lse, upstream)
    d_out, d_lse = torch.full_like(out, torch.nan), torch.full_like(lse, torch.nan)
    share_rows(out, lse, whole, whole_lse, upstream, d_out, d_lse)
    torch.testing.assert_close(d_out, wanted)
    torch.testing.assert_close(d_lse, wanted_lse)
    print("ok")

for permuted, sign in itertools.product((False, True), (1, -1)):
    total, part = torch.randn(2, 3, 20, 5), torch.randn(2, 3, 4, 5, 5)
    wanted = total.clone()
    rows_of(wanted, permuted).add_(part, alpha=sign)
    add_rows(rows_of(total, permuted), part, sign)
    torch.testing.assert_close(total, wanted)
    print("ok")
