"""Does attention in patches of a grid compute the textbook's? On the CPU's tiles and our kernels, ragged grids too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import patterndsl
from patterndsl.ir.relation import Random, Relation, children
from patterndsl.lower.devices import CPU, CUDA, Machine
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.order import Order, Patches
from patterndsl.lower.plan import Option, pass_of, plan
from patterndsl.lower.shapes import Sparse, in_order
from patterndsl.lower.stored import Arrays, read_option, written_option
from patterndsl.runtime.planned import Planned
from tests.interpreting import IS_INTERPRETED, assert_passes_in_the_interpreter, compiles
from tests.lower.test_plan import times_held
from tests.property.test_program import attend
from tests.strategies import Case, cases, many

TILED = replace(CPU, bands=False)
"""A CPU that takes no masks, so that small grids are tiles too."""
NEAR = "abs(q.row - k.row) <= 3 & abs(q.col - k.col) <= 3"
SIZES = [
    ("whole", f"grid: {{row: 16, col: 32}}\nattend: {NEAR}\n", {"n": 512}),
    ("ragged", f"grid: {{row: 13, col: 19}}\nattend: {NEAR}\n", {"n": 247}),
    ("no whole grid", "abs(q // 19 - k // 19) <= 3 & abs(q % 19 - k % 19) <= 3", {"n": 233}),
    (
        "later queries, some without keys",
        "abs(q // 40 - k // 40) <= 2 & abs(q % 40 - k % 40) <= 2 & q % 40 != 4",
        {"q_len": 190, "kv_len": 357, "q_start": 137},
    ),
    (
        "three axes",
        "grid: {z: 5, y: 7, x: 17}\nattend: abs(q.z - k.z) <= 1 & abs(q.y - k.y) <= 1 & abs(q.x - k.x) <= 1\n",
        {"n": 595},
    ),
    (
        "moved windows",
        "(q // 20 - 2) // 4 == (k // 20 - 2) // 4 & (q % 20 - 2) // 4 == (k % 20 - 2) // 4",
        {"n": 280},
    ),
    ("by head", "abs(q // 19 - k // 19) <= 1 + head % 2 * 2 & abs(q % 19 - k % 19) <= 2", {"n": 233}),
    ("beside an axis", f"grid: {{row: 12, col: 32}}\nattend: q.row == k.row | {NEAR}\n", {"n": 384}),
]
GRIDS = pytest.mark.parametrize(("text", "sizes"), [item[1:] for item in SIZES], ids=[item[0] for item in SIZES])


def has_patches(option: Option) -> bool:
    return any(isinstance(item.piece.shape, Sparse) and item.piece.shape.orders for item in option.passes)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    limit = 1e-9 if found.dtype == torch.float64 else 2e-5
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=limit, atol=limit)


def check(
    text: str,
    sizes: dict[str, int],
    machine: Machine,
    kv_group: int,
    dtype: torch.dtype,
    *,
    heads: int = 4,
    batch: int = 2,
) -> None:
    """Every plan with patches: output, lse and gradients against the textbook's."""
    pattern = patterndsl.parse(text)
    n, q_len, kv_len, q_start = (sizes.get(name) for name in ("n", "q_len", "kv_len", "q_start"))
    program = pattern.compile(n, q_len=q_len, kv_len=kv_len, q_start=q_start or 0, heads=heads)
    bound, keep = program.bound, program.mask().expand(heads, -1, -1)
    made = plan(bound, Lookup(), machine)
    tried = 0
    for choice in range(made.num_choices):
        options = replace(made, choice=choice).forward
        if not any(map(has_patches, options)):
            continue
        tried += 1
        passes = [item for option in options for item in option.passes]
        torch.manual_seed(choice)
        lengths = bound.sizes.q_len, bound.sizes.kv_len
        query = torch.randn(batch, heads, lengths[0], 8, dtype=dtype, requires_grad=True)
        key, value = (
            torch.randn(batch, heads // kv_group, lengths[1], 8, dtype=dtype, requires_grad=True) for _ in range(2)
        )
        weight = torch.randn(query.shape, dtype=dtype)
        out, lse = Planned(passes, torch.device("cpu"), lengths)(query, key, value, 8**-0.5)
        shared_key, shared_value = (x.repeat_interleave(kv_group, dim=1) for x in (key, value))
        expected, expected_lse = attend(query, shared_key, shared_value, keep)
        close(out, expected)
        close(lse, expected_lse)
        tensors = (query, key, value)
        found = torch.autograd.grad((out * weight).sum(), tensors)
        for gradient, wanted in zip(found, torch.autograd.grad((expected * weight).sum(), tensors), strict=True):
            close(gradient, wanted)
    assert tried, "no plan has patches"


@pytest.mark.parametrize("kv_group", [1, 2])
@GRIDS
def test_every_plan_in_patches(text: str, sizes: dict[str, int], kv_group: int) -> None:
    check(text, sizes, TILED, kv_group, torch.float64)


FEW = (
    ("abs(q // 19 - k // 19) <= 3 & abs(q % 19 - k % 19) <= 3 & q % 19 != 4", {"n": 165}),
    ("abs(q // 19 - k // 19) <= 3 - head % 2 & abs(q % 19 - k % 19) <= 3", {"n": 190}),
)


@pytest.mark.skipif(not IS_INTERPRETED, reason="needs the interpreter")
@pytest.mark.parametrize(("text", "sizes"), FEW, ids=["ragged", "by head"])
def test_kernels_reach_positions_where_they_lie(text: str, sizes: dict[str, int]) -> None:
    check(text, sizes, CUDA, 2, torch.float32, heads=2, batch=1)


@many(2)
@given(
    case=cases(max_length=150),
    chain=st.sampled_from([(3,), (7,), (16,), (4, 12), (2, 14)]),
    sides=st.tuples(*[st.integers(1, 9)] * 3),
    offsets=st.tuples(*[st.integers(0, 8)] * 3),
)
def test_any_pattern_in_any_patches(
    case: Case, chain: tuple[int, ...], sides: tuple[int, ...], offsets: tuple[int, ...]
) -> None:
    """Of the places: each position once, and the pairs of the pattern in tiles."""
    assume(not case.inputs and case.lengths.q_len and case.lengths.kv_len)
    bound, keep = case.bound(case.pattern()), case.keep(case.pattern())
    sizes, axes = bound.sizes, len(chain) + 1
    patches = Patches(chain, sides[:axes], tuple(o % s for o, s in zip(offsets, sides, strict=True))[:axes])
    orders = Order(patches, sizes.q_start, sizes.q_len), Order(patches, 0, sizes.kv_len)
    for group in bound.groups:
        if any(isinstance(node, Random) for node in nodes_of(group.relation)):
            continue
        piece = in_order(group.relation, sizes, orders, TILED.wanted)
        assert (
            times_held([pass_of(piece, group.heads, TILED)], keep.shape[1:], Lookup()) == keep[group.heads[0]]
        ).all()


def nodes_of(relation: Relation) -> Iterator[Relation]:
    yield relation
    for child in children(relation):
        yield from nodes_of(child)


def test_a_stored_plan_has_its_orders() -> None:
    """Written and read again, it is the same, and no table of all positions is in it."""
    bound = patterndsl.load("examples/neighborhood-2d.yaml").with_params(kernel=13).bind(4096)
    (options,) = plan(bound, Lookup(), CUDA).options
    option, arrays = next(filter(has_patches, options)), Arrays()
    read = read_option(json.loads(json.dumps(written_option(option, arrays))), arrays.named)
    first, second = (item.passes[0].piece.shape for item in (option, read))
    assert isinstance(first, Sparse) and isinstance(second, Sparse)
    assert second.orders == first.orders
    assert all(len(array) < 4096 for array in arrays.named.values())


def test_what_is_not_attended_may_be_anything() -> None:
    """NaN in keys and values that no query attends reaches nothing."""
    bound = patterndsl.parse("abs(q // 19 - k // 19) <= 3 & abs(q % 19 - k % 19) <= 3 & k % 19 != 9").bind(233)
    option = next(filter(has_patches, plan(bound, Lookup(), TILED).options[0]))
    attend = Planned(option.passes, torch.device("cpu"), (233, 233))
    query, key, value = (torch.randn(1, 1, 233, 8) for _ in range(3))
    expected, _ = attend(query, key, value, 1.0)
    key[:, :, 9::19], value[:, :, 9::19] = torch.nan, torch.inf
    torch.testing.assert_close(attend(query, key, value, 1.0)[0], expected)


@compiles
def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    assert_passes_in_the_interpreter(__file__, "kernels_reach")
