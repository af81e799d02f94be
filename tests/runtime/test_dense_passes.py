"""How dense passes are cut on the CPU: stairs of short causal groups, strips of scattered masks, gradients in pieces,
rows that are copied where a pass reaches them first, and layouts in memory that kernels do not take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import patterndsl
from patterndsl.lower import plan as lower_plan
from patterndsl.lower import shapes
from patterndsl.lower.devices import CPU, CUDA
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.shapes import Band, Masked, Sparse
from patterndsl.lower.stored import Arrays, read_option, written_option
from patterndsl.runtime import sdpa
from patterndsl.runtime.sdpa import DensePass


def compared(text: str, n: int, heads: int = 2, batch: int = 2, **how: Any) -> patterndsl.Program:
    """The program, after its outputs and gradients were compared with the oracle's."""
    torch.manual_seed(n)
    tensors = [torch.randn(batch, heads, n, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weight = torch.randn(batch, heads, n, 8, dtype=torch.float64)
    program = patterndsl.parse(text).compile(n, heads=heads, backend="planned", **how)
    truth = patterndsl.parse(text).compile(n, heads=heads, backend="oracle")
    results = []
    for one in (program, truth):
        out, lse = one(*tensors, return_lse=True)
        kept = lse.masked_fill(lse == -torch.inf, 0.0)
        results.append([out, lse, *torch.autograd.grad((out * weight).sum() + kept.sum(), tensors)])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    return program


@pytest.mark.parametrize(
    ("text", "n", "stairs"),
    [("causal & block(100)", 1100, 4), ("causal & strided(11)", 1100, 4), ("causal", 512, 1), ("causal", 1100, 1)],
)
def test_stairs(text: str, n: int, stairs: int) -> None:
    """Not for few rows nor for long groups: there the kernel's own causal form is quicker."""
    (item,) = compared(text, n, batch=1).plan.passes
    assert len(DensePass(item.piece, torch.device("cpu")).launches) == stairs


@pytest.mark.parametrize(
    ("text", "forward"),
    [
        ("recent(100)", 32),
        ("window(80)", 32),
        ("recent(100) & (q % 2 == 0 | q - k < 50)", 32),
        ("recent(30)", 32),  # whose tiles are as small
        ("causal & q - k < 20 & (q + k) % 64 == 0", 32),  # with rows that attend nothing
        ("causal & q // 128 == k // 128 & k % 128 < 40", 128),  # narrower than half a tile
        ("causal & q // 64 - k // 64 <= 1", 64),
        ("recent(100) & (q % 64 < 32 | q - k < 50)", 64),
    ],
)
def test_bands_go_forward_in_tiles_of_half_as_many_queries(text: str, forward: int) -> None:
    """Where both halves of a tile have one mask; their gradients are made by whole tiles."""
    program = compared(text, 1024 if forward == 128 else 700)
    pieces = (item.piece for item in program.plan.passes)
    ((piece, band),) = ((piece, piece.shape) for piece in pieces if isinstance(piece.shape, Band))
    made = DensePass(piece, torch.device("cpu"))
    assert {launch.queries.side.length for launch in made.launches} == {forward}
    assert {launch.queries.side.length for launch in made.gradient_launches(8)} == {band.tile}


def test_stairs_are_made_on_the_device_of_their_tensors() -> None:
    program = patterndsl.parse("causal & block(64)").compile(1200, heads=2)
    query, key, value = (torch.randn(1, 2, 1200, 8) for _ in range(3))
    torch.set_default_device("meta")
    try:
        found = program(query, key, value)
    finally:
        torch.set_default_device("cpu")
    torch.testing.assert_close(found, patterndsl.attention(query, key, value, "causal & block(64)", backend="oracle"))


@pytest.mark.parametrize("text", ["causal & (recent(9) | strided(12))", "k > q + 3", "window(3) | global(2)"])
def test_shapes_are_told_of_tensors_without_elements(text: str) -> None:
    tensors = [torch.zeros(1, 2, 65, 8, device="meta", requires_grad=True) for _ in range(3)]
    found = patterndsl.attention(tensors[0], tensors[1], tensors[2], text)
    assert (found.shape, found.device.type) == ((1, 2, 65, 8), "meta")
    assert [gradient.shape for gradient in torch.autograd.grad(found.sum(), tensors)] == [(1, 2, 65, 8)] * 3


@pytest.mark.parametrize("block", [64, 96, 512])
def test_scattered_masks_in_strips(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "MAX_MASK", 1 << 12)
    monkeypatch.setattr(shapes, "STRIP", 128)
    machine = replace(CPU, name="other blocks", blocks=((block, 64),))
    program = compared("causal & random(9, seed = 1) | causal & first(2)", 700, machine=machine)
    assert sum(isinstance(item.piece.shape, Masked) for item in program.plan.passes) > 1, "nothing was cut"


def test_masks_of_many_heads_stay_within_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = 1 << 23
    monkeypatch.setattr(lower_plan, "MAX_MASK_PAIRS", budget)
    for heads in (4, 12):
        plan = patterndsl.parse("causal & random(32, seed = head)").compile(1536, heads=heads).plan
        masks = [item.piece.shape.mask for item in plan.passes if isinstance(item.piece.shape, Masked)]
        assert sum(mask.size for mask in masks) <= budget
        assert bool(masks) == (heads == 4)


@pytest.mark.parametrize("text", ["k < 3", "q < 3", "window(9) | global(2)", "causal & (recent(30) | strided(30))"])
def test_gradients_in_pieces(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "GRADIENT_BYTES", 1 << 13)
    program = compared(text, 600)
    cut = [DensePass(item.piece, program.device) for item in program.plan.passes]
    assert any(len(item.gradient_launches(128)) > len(item.launches) for item in cut), "nothing was cut"


@pytest.mark.parametrize(
    "text", ["q < 40 & recent(9) | q >= 60", "window(9) | global(2)", "q % 3 == 0 & strided(3)", "none"]
)
def test_rows_that_no_pass_reaches_yield_nothing(text: str) -> None:
    compared(text, 100)


@pytest.mark.parametrize("text", ["causal", "causal & (recent(16) | strided(16))", "window(9) | global(2)"])
def test_channels_that_are_not_next_to_each_other(text: str) -> None:
    """Keys that are kept as [B, H, D, T], and every other channel of something wider."""
    n = 100
    query = torch.randn(2, 2, n, 16)[..., ::2].requires_grad_()
    key = torch.randn(2, 2, 8, n).transpose(-1, -2).requires_grad_()
    value = torch.randn(2, 2, n, 8).requires_grad_()
    tensors = (query, key, value)

    def results(backend: str) -> list[Tensor]:
        out = patterndsl.attention(query, key, value, text, backend=backend)
        return [out, *torch.autograd.grad(out.square().sum(), tensors)]

    for found, wanted in zip(results("planned"), results("oracle"), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_finer_tiles_are_kept_in_plan_files() -> None:
    """FlexAttention, which older calibrations name, takes them in inference alone."""
    machine = replace(CUDA, sparse_kernel="flex", blocks=((128, 128),), finer=((64, 64),))
    plan = lower_plan.plan(patterndsl.parse("blocks(64, random(2, seed = 3))").bind(4096), Lookup(), machine)
    (item,) = plan.passes
    assert isinstance(item.piece.shape, Sparse) and item.piece.shape.finer is not None
    arrays = Arrays()
    written = written_option(plan.options[0][0], arrays)
    read = read_option(written, arrays.named).passes[0].piece.shape
    assert isinstance(read, Sparse) and read.finer is not None
    assert (read.finer.q_blks == item.piece.shape.finer.q_blks).all() and read.in_inference is read.finer


def test_what_is_not_finite_is_refused_where_it_is_masked() -> None:
    """A plan that was asked for has no other backend to leave it to."""
    query, key, value = (torch.randn(1, 1, 100, 8) for _ in range(3))
    value[0, 0, 3] = torch.nan
    masked, full = (patterndsl.parse(text).compile(100, backend="planned") for text in ("recent(9)", "all"))
    with pytest.raises(patterndsl.InputError, match="does not take tensors with NaN"):
        masked(query, key, value)
    assert full(query, key, value).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_finite_numbers_whose_sum_is_not_are_finite(dtype: torch.dtype) -> None:
    """That of float16 soon overflows."""
    large = torch.finfo(dtype).max / 100
    query, key, value = (torch.full((1, 1, 200, 8), number, dtype=dtype) for number in (0.0, 1.0, large))
    program = patterndsl.parse("recent(9)").compile(200)
    assert not value.sum().isfinite() and program.who(query, key, value) == "planned"
    torch.testing.assert_close(program(query, key, value), value)
    value[0, 0, 7, 7] = torch.nan
    assert program.who(query, key, value) == "gathered"
