"""The forward kernel of Hopper beside float64 and dense attention; which blocks kernels take, and how they are tuned.

Gluon has no interpreter: without such a GPU only lists and choices are looked at.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import patterndsl
from patterndsl import Pattern
from patterndsl.ir.meaning import Point, member
from patterndsl.ir.relation import Relation
from patterndsl.lower.blocks import CANDIDATES, Blocks, Length, Pipeline, Role, Use
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.rests import rests_of
from patterndsl.lower.tiles import Tiles, find_tiles
from patterndsl.runtime.kernels import launch_hopper, shapes, work
from patterndsl.runtime.kernels.asked import asked_of, draws_for
from patterndsl.runtime.kernels.dealing import CLASSES, deal
from patterndsl.runtime.kernels.lists import Found, WorkLists
from patterndsl.runtime.kernels.predicate import WHOLE
from patterndsl.runtime.kernels.shapes import ROLES, blocks_for, has_hopper_kernel, usual_shapes
from patterndsl.runtime.kernels.work import (
    BLOCK_BITS,
    FULL,
    STATE_BITS,
    Lists,
    Placed,
    shared_lists_of,
    shared_transposed,
    work_of,
)
from patterndsl.sema.parameters import Sizes
from tests.property.test_membership import lookup_of, spread
from tests.strategies import Case, cases, many

HAS_HOPPER = torch.cuda.is_available() and has_hopper_kernel(torch.device("cuda", 0))
PIPELINES = {
    f"{dim}, {blocks.consumers} x {blocks.kv_block}": (dim, blocks)
    for dim in (64, 128)
    for blocks in CANDIDATES["forward", dim]
    if isinstance(blocks, Pipeline)
}
"""What a calibration may take, and the width of heads that it is for."""
SIDE = 16
CPU = torch.device("cpu")


# ---- lists


def state_of(entry: Any, sharer: int) -> Any:
    """As kernels read it."""
    return entry >> STATE_BITS * sharer & 7


@many(1)
@given(
    case=cases(), consumers=st.sampled_from((2, 3, 4)), width=st.sampled_from((1, 2)), kv_group=st.sampled_from((1, 2))
)
def test_states_of_entries_say_what_is_kept(case: Case, consumers: int, width: int, kv_group: int) -> None:
    """Of each pair, through rows and columns, as a kernel reads them."""
    bound = case.bound(case.pattern())
    if kv_group > 1 and bound.num_heads % kv_group:
        kv_group = 1
    sizes, lookup = bound.sizes, lookup_of(case, bound)
    group_of = [
        next(at for at, each in enumerate(bound.groups) if head in each.heads) for head in range(bound.num_heads)
    ]
    relations = [group.relation for group in bound.groups]
    tiles = [find_tiles(relation, sizes, lookup, SIDE, SIDE) for relation in relations]
    rests = rests_of(list(zip(relations, tiles, strict=True)), sizes)
    placed = [Placed(*each) for each in zip(tiles, rests.places, strict=True)]
    q, k = sizes.q_start + np.arange(sizes.q_len)[:, None], np.arange(sizes.kv_len)
    num_q_blocks = -(-sizes.q_len // SIDE)

    def kept(relation: Relation) -> Any:
        return spread(member(relation, Point(q, k, 0, lookup)), (sizes.q_len, sizes.kv_len))

    whole = [kept(relation) for relation in relations]
    of_state = [np.ones_like(whole[0]), *(kept(rest) for rest in rests.relations)]

    def seen(lists: Lists, first: int, place: Callable[[int, int], tuple[int, Any]]) -> list[Any]:
        found = [np.zeros_like(whole[0]) for _ in range(bound.num_heads)]
        done = work_of([(lists, [(0, 0)])], is_shared=True)
        for _, _, block, begin, stop, _, step, _ in done.pieces.tolist():
            for sharer, entry in itertools.product(range(consumers), done.entries[begin:stop].tolist()):
                if state := state_of(entry, sharer):
                    turn, where = place(block + step * sharer, entry >> BLOCK_BITS)
                    head = first + turn
                    says = {FULL: of_state[0], WHOLE: whole[group_of[head]]}
                    truth = says[state] if state in says else of_state[state - WHOLE]
                    found[head][where] = truth[where]
        return found

    def block(at: int, size: int) -> slice:
        return slice(at * size, (at + 1) * size)

    def of_rows(own: int, other: int) -> tuple[int, Any]:
        return 0, (block(own, SIDE), block(other, width * SIDE))

    def of_columns(own: int, other: int) -> tuple[int, Any]:
        return other // num_q_blocks, (block(other % num_q_blocks, SIDE), block(own, SIDE))

    for head, group in enumerate(group_of):
        lists = shared_lists_of(placed[group], sizes.kv_len, CPU, consumers, width * SIDE)
        np.testing.assert_array_equal(seen(lists, head, of_rows)[head], whole[group])
    for first in range(0, bound.num_heads, kv_group):
        of_heads = [placed[group] for group in group_of[first : first + kv_group]]
        columns = seen(shared_transposed(of_heads, placed[0], CPU, consumers), first, of_columns)
        for head in range(first, first + kv_group):
            np.testing.assert_array_equal(columns[head], whole[group_of[head]])


@given(seed=st.integers(0, 1 << 32), sharers=st.sampled_from((2, 3, 4)))
@many(0.5)
def test_transposed_lists_have_all_tiles(seed: int, sharers: int) -> None:
    """Each block of keys has the blocks of queries of all heads that share it, counted on from head to head."""
    draw = random.Random(seed)
    num_q_blocks, num_kv_blocks, num_heads = draw.randint(1, 9), draw.randint(1, 9), draw.randint(1, 3)
    wanted, of_heads = dict[tuple[int, int], bool](), list[Tiles | None]()
    for head in range(num_heads):
        share = draw.choice((0.0, 0.3, 1.0))
        cells = itertools.product(range(num_q_blocks), range(num_kv_blocks))
        kept = {cell: draw.random() < 0.5 for cell in cells if draw.random() < share}
        wanted |= {(kv_blk, head * num_q_blocks + q_blk): full for (q_blk, kv_blk), full in kept.items()}
        q_blks, kv_blks = (torch.tensor([tile[side] for tile in kept], dtype=torch.int64) for side in (0, 1))
        is_full = torch.tensor(list(kept.values()), dtype=torch.bool)
        of_heads.append(Tiles(SIDE, SIDE, num_q_blocks, num_kv_blocks, q_blks, kv_blks, is_full, 0))
    one = next(tiles for tiles in of_heads if tiles is not None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "SHORTEST", draw.choice((1, 3, 100)))
        lists = shared_transposed(
            [None if tiles is None else Placed(tiles) for tiles in of_heads], Placed(one), CPU, sharers
        )
        done = work_of([(lists, [(0, 0)])], is_shared=True)
    found = dict[tuple[int, int], bool]()
    for _, _, block, begin, stop, _, step, _ in done.pieces.tolist():
        for sharer, entry in itertools.product(range(sharers), done.entries[begin:stop].tolist()):
            if state := state_of(entry, sharer):
                cell = block + step * sharer, entry >> BLOCK_BITS
                assert cell not in found
                found[cell] = state == FULL
    assert found == wanted


@given(seed=st.integers(0, 1 << 32), sharers=st.sampled_from((2, 3, 4)), width=st.sampled_from((1, 2)))
@many(0.5)
def test_pieces_have_all_tiles(seed: int, sharers: int, width: int) -> None:
    """As the kernel reads them: each block of queries and block of keys with a tile once, masked but where all of it is
    kept. Blocks whose parts are joined have all of these in slots of their own; no other leaves any."""
    draw = random.Random(seed)
    num_q_blocks, num_kv_blocks, ragged = draw.randint(1, 9), draw.randint(1, 30), draw.randrange(SIDE)
    shares = [draw.choice((0.0, 0.1, 1.0)) for _ in range(num_q_blocks)]
    kept = {
        (q_blk, kv_blk): draw.random() < 0.5
        for q_blk in range(num_q_blocks)
        for kv_blk in range(num_kv_blocks)
        if draw.random() < shares[q_blk]
    }
    q_blks, kv_blks = (torch.tensor([tile[side] for tile in kept], dtype=torch.int64) for side in (0, 1))
    is_full = torch.tensor(list(kept.values()), dtype=torch.bool)
    tiles = Tiles(SIDE, SIDE, num_q_blocks, num_kv_blocks, q_blks, kv_blks, is_full, 0)
    kv_len = num_kv_blocks * SIDE - ragged
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "SHORTEST", draw.choice((1, 3, 100)))
        lists = shared_lists_of(Placed(tiles), kv_len, CPU, sharers, width * SIDE)
        done = work_of([(lists, [(0, 0)])], is_shared=True)
    joints = {block: range(first, first + number) for _, _, block, first, number in done.joints.tolist()}
    found, left = dict[tuple[int, int], bool](), list[int]()
    for _, _, block, begin, stop, slot, step, slot_step in done.pieces.tolist():
        fullness = [sum(state_of(x, y) == FULL for y in range(sharers)) for x in done.entries[begin:stop].tolist()]
        assert not fullness or fullness[0] == max(fullness)
        for sharer in range(sharers):
            q_blk, mine = block + step * sharer, slot + slot_step * sharer
            entries = [entry for entry in done.entries[begin:stop].tolist() if state_of(entry, sharer)]
            assert not found.keys() & {(q_blk, entry >> BLOCK_BITS) for entry in entries}
            found |= {(q_blk, entry >> BLOCK_BITS): state_of(entry, sharer) != FULL for entry in entries}
            left += [mine] if slot >= 0 else []
            if entries:
                assert mine in joints[q_blk] if slot >= 0 else q_blk not in joints

    def is_kept(q_blk: int, kv_blk: int) -> bool:
        parts = range(kv_blk * width, (kv_blk + 1) * width)
        return all(kept.get((q_blk, part), False) and (part + 1) * SIDE <= kv_len for part in parts)

    assert found == {(q_blk, kv_blk // width): not is_kept(q_blk, kv_blk // width) for q_blk, kv_blk in kept}
    assert sorted(left) == list(range(done.num_slots))
    assert len({slot for mine in joints.values() for slot in mine}) == sum(map(len, joints.values()))


PROCESSORS = 132
OVERHEAD = 1.5
"""Of a piece, in entries: what its program does before the first and after the last one."""
HARD: dict[str, tuple[str, Role, int, Length]] = {
    "global rows": ("window(256) | global(64)", "forward", 64, "short"),
    "global rows, three share": ("window(256) | global(64)", "forward", 128, "short"),
    "global columns": ("window(256) | global(64)", "keys", 64, "short"),
    "some columns": ("causal & columns(256, 8)", "forward", 64, "short"),
    "dense": ("causal", "forward", 128, "long"),
    "dense columns": ("causal", "keys", 64, "long"),
    "scattered": ("blocks(64, random(3, seed = 1) | window(1)) | global(64)", "forward", 128, "short"),
    "all columns": ("causal & columns(256, 8)", "keys", 64, "short"),
    "short lists": ("recent(256)", "forward", 64, "short"),
}
"""A pattern, and the role, width of heads and length of lists whose blocks are built in."""


def taken_by(borders: Tensor, pieces: Tensor) -> list[Tensor]:
    """The pieces of each program, as the kernel reads them."""
    return [pieces[begin:stop] for begin, stop in itertools.pairwise(borders.tolist())]


@given(costs=st.lists(st.integers(1, 1000), min_size=1, max_size=60), programs=st.integers(1, 20))
@many(0.3)
def test_each_piece_is_dealt_once(costs: list[int], programs: int) -> None:
    """In the order in which they come, and some to every program; none is left with more than all others and a piece of
    its own."""
    programs = min(programs, len(costs))
    in_classes = sorted(costs, key=lambda cost: -math.ceil(CLASSES * math.log2(cost)))
    taken = [mine.tolist() for mine in taken_by(*deal(torch.tensor(in_classes).float(), programs))]
    assert sorted(itertools.chain.from_iterable(taken)) == list(range(len(costs)))
    assert all(mine and mine == sorted(mine) for mine in taken)
    shares = [sum(in_classes[at] for at in mine) for mine in taken]
    assert max(shares) <= sum(costs) / programs + max(costs) * 1.1


def costs_of(pieces: Tensor, entries: Tensor, sharers: int) -> Tensor:
    """Entries of each piece that the sharer with the most of them needs."""
    needed = torch.stack([state_of(entries, sharer) > 0 for sharer in range(sharers)], 1)
    before = torch.cat([torch.zeros(1, sharers), needed.cumsum(0)])
    begin, stop = pieces[:, 3:5].long().T
    return (before[stop] - before[begin]).amax(1)


@given(seed=st.integers(0, 1 << 32), rows=st.integers(1, 3))
@many(0.3)
def test_dealt_pieces_are_those_of_all_rows(seed: int, rows: int) -> None:
    """Each with its batch row, and slots that no other row has; who leaves nothing says so to each sharer."""
    draw = random.Random(seed)
    kept = [(q_blk, kv_blk) for q_blk in range(6) for kv_blk in range(draw.choice((1, 4, 40)))]
    q_blks, kv_blks = torch.tensor(kept).T
    tiles = Tiles(SIDE, SIDE, 6, 40, q_blks, kv_blks, q_blks >= 0, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "SHORTEST", 2)
        patch.setattr(work, "PARTS", draw.choice((1, 100)))
        lists = shared_lists_of(Placed(tiles), 40 * SIDE, CPU, 2, SIDE)
        done = work_of([(lists, [(0, 0), (0, 1)])], is_shared=True)
    wanted = list[list[int]]()
    for row, (_, *middle, slot, step, slot_step) in itertools.product(range(rows), done.pieces.tolist()):
        slots = [slot + row * done.num_slots, step, slot_step] if slot >= 0 else [-1, step, 0]
        wanted.append([row, *middle, *slots])
    pieces, borders = done.dealt(rows, min(7, len(wanted)))
    assert sorted(pieces.tolist()) == sorted(wanted)
    assert borders[0] == 0 and borders[-1] == len(wanted)


@pytest.mark.parametrize(("text", "role", "dim", "length"), HARD.values(), ids=HARD)
def test_no_program_has_much_more_than_others(text: str, role: Role, dim: int, length: Length) -> None:
    """Of as many as an H100 runs at once, over 65,536 positions of 16 heads."""
    blocks = next(item.blocks for item in shapes.BUILT_IN if item.use == Use(role, dim, length))
    assert isinstance(blocks, Pipeline)
    relation, sizes = patterndsl.parse(text).bind(65_536).relation, Sizes(65_536, 65_536, 0, 65_536)
    lists = WorkLists(lambda *block: ((find_tiles(relation, sizes, Lookup(), *block),),), [0] * 16, 1, 65_536, CPU)
    done = lists.columns(blocks) if role == "keys" else lists.rows(blocks)
    pieces, borders = done.dealt(1, PROCESSORS * blocks.programs)
    shares = torch.stack(
        [(costs_of(mine, done.entries, blocks.consumers) + OVERHEAD).sum() for mine in taken_by(borders, pieces)]
    )
    assert shares.max() <= 1.03 * shares.mean()


@given(seed=st.integers(0, 1 << 32), sharers=st.sampled_from((2, 3)))
@many(0.3)
def test_pieces_come_longest_first_and_else_in_order(seed: int, sharers: int) -> None:
    """Each is at most a little longer than the one before, and behind it in the lists unless it is shorter."""
    draw = random.Random(seed)
    num_q_blocks, num_kv_blocks = draw.randint(1, 40), draw.randint(1, 200)
    reach = [draw.choice((1, 5, draw.randint(1, num_kv_blocks), num_kv_blocks)) for _ in range(num_q_blocks)]
    kept = [(q_blk, kv_blk) for q_blk in range(num_q_blocks) for kv_blk in range(min(reach[q_blk], num_kv_blocks))]
    q_blks, kv_blks = torch.tensor(kept).T
    tiles = Tiles(SIDE, SIDE, num_q_blocks, num_kv_blocks, q_blks, kv_blks, q_blks >= 0, 0)
    lists = shared_lists_of(Placed(tiles), num_kv_blocks * SIDE, CPU, sharers, SIDE)
    done = work_of([(lists, [(0, 0), (0, 1), (0, 2)])], is_shared=True)
    leaves_a_part = (done.pieces[:, 5] >= 0).int()  # which takes longer, too
    lengths = (costs_of(done.pieces, done.entries, sharers) + leaves_a_part).tolist()
    places = done.pieces[:, (1, 3, 4)].tolist()
    for (length, following), (place, behind) in zip(
        itertools.pairwise(lengths), itertools.pairwise(places), strict=True
    ):
        assert following + 1 <= 1.1 * (length + 1)
        assert following < length or place <= behind


# ---- choices


def some_lists(*, is_kept: bool = True, num_tiles: int = 1) -> WorkLists:
    at = torch.arange(num_tiles)
    tiles = Tiles(64, 64, 1, num_tiles, 0 * at, at, at >= 0, 0)
    return WorkLists(lambda *_: ((tiles,),), [0], 1, 64 * num_tiles, CPU, is_kept=is_kept)


TUNED = {Use("forward", 64, "short"): Blocks(64, 64, 4, 3), Use("keys", 64, "long"): Blocks(64, 64, 4, 2)}


def test_what_was_tuned_is_taken_for_its_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "tuned_on", lambda _: TUNED)
    usual = usual_shapes(torch.bfloat16, 64)
    x = torch.ones(1, 1, 64, 64, dtype=torch.bfloat16)
    short, long = ([blocks_for(role, some_lists(num_tiles=num), x, x, x) for role in ROLES] for num in (8, 100))
    assert short == [TUNED[Use("forward", 64, "short")], usual.queries, usual.keys]
    assert long == [usual.forward, usual.queries, TUNED[Use("keys", 64, "long")]]


@pytest.mark.parametrize(
    ("is_kept", "dtype", "dim", "value_dim"),
    [
        (False, torch.bfloat16, 64, 64),
        (True, torch.float32, 64, 64),
        (True, torch.float16, 32, 32),
        (True, torch.float16, 64, 32),
    ],
)
def test_other_uses_are_as_usual(
    is_kept: bool, dtype: torch.dtype, dim: int, value_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes, "tuned_on", lambda _: TUNED)
    query, value = torch.ones(1, 1, 64, dim, dtype=dtype), torch.ones(1, 1, 64, value_dim, dtype=dtype)
    lists, usual = some_lists(is_kept=is_kept), usual_shapes(dtype, max(dim, value_dim))
    assert tuple(blocks_for(role, lists, query, query, value) for role in ROLES) == usual


def test_tensors_that_the_kernel_of_hopper_does_not_take_have_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere, and where copies by description are not possible."""
    (_, pipeline), *_ = PIPELINES.values()
    tuned: dict[Use, Any] = {Use(role, 64, "short"): pipeline for role in ROLES}
    monkeypatch.setattr(shapes, "tuned_on", lambda _: tuned)
    x, apart = torch.ones(2, 1, 1, 64, 72, dtype=torch.bfloat16)[..., :64], torch.ones(1, 1, 64, 65).bfloat16()[..., 1:]

    def taken(*tensors: Tensor) -> list[bool]:
        return [blocks_for(role, some_lists(), *tensors) == pipeline for role in ROLES]

    assert taken(x[0], x[0], x[0]) == [False] * 3
    monkeypatch.setattr(shapes, "has_hopper_kernel", lambda _: True)
    assert taken(x[0], x[0], x[0]) == [False] * 3, "too little work for it"
    monkeypatch.setattr(shapes, "FEWEST", 1)
    assert taken(x[0], x[0], x[0]) == [True] * 3
    assert taken(x[0], x[0], x[0], x[1]) == [True] * 3
    assert taken(x[0], apart, x[0]) == [False] * 3
    assert taken(x[0], x[0], x[0], apart) == [False] * 3
    monkeypatch.setattr(shapes, "MOST_BLOCKS", 0)
    assert taken(x[0], x[0], x[0]) == [False] * 3, "more blocks than an entry can name"


# ---- tuning


@pytest.mark.parametrize(
    ("seconds", "wrong", "taken"),
    [
        ([[1.0, 0.9, 0.5], [2.0, 1.8, 1.0]], (), 2),
        ([[1.0, 0.98, 0.99], [1.0, 0.99, 0.98]], (), 0),  # as fast as the usual one
        ([[1.0, 0.9, 0.5], [1.0, 0.9, 1.3]], (), 1),  # slower on some
        ([[1.0, 0.9, 0.5], [1.0, 0.9, 0.5]], (2,), 1),
        ([[1.0, 0.9, 0.5], [1.0, 0.9, 0.5]], (1, 2), 0),
    ],
)
def test_the_fastest_of_those_that_are_right(
    seconds: list[list[float]], wrong: tuple[int, ...], taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Candidates that raise, or give something else, are none."""
    tuning = pytest.importorskip("patterndsl.runtime.kernels.tuning")
    use = Use("queries", 64, "short")
    candidates, examples, seconds_of = CANDIDATES["queries", 64], tuning.EXAMPLES["short"], dict[Any, list[float]]()

    def call_of(_: Use, example: Any, device: torch.device) -> Any:
        def call(blocks: Any) -> tuple[Tensor, ...]:
            at = candidates.index(blocks)
            if at == 2 and at in wrong:
                raise RuntimeError("it cannot be compiled")
            return (torch.full((3,), 2.0 if at in wrong else 1.0),)

        seconds_of[call] = seconds[examples.index(example)]
        return call

    def step_seconds(steps: list[Any], *_: object) -> list[list[float]]:
        mine = [seconds_of[step.func][candidates.index(step.args[0])] for step in steps]
        return [[2 * each for each in mine], mine]

    monkeypatch.setattr(tuning, "call_of", call_of)
    monkeypatch.setattr(tuning, "step_seconds", step_seconds)
    assert tuning.fastest(use, CPU) == candidates[taken]


# ---- the kernel


@pytest.mark.skipif(torch.cuda.is_available(), reason="it runs")
@pytest.mark.parametrize(("dim", "pipeline"), [PIPELINES["64, 2 x 64"], PIPELINES["128, 3 x 64"]], ids=["64", "128"])
def test_compiles_without_a_gpu(dim: int, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """For Hopper, through the launch, and into the shared memory that is there."""
    pytest.importorskip("triton")
    from patterndsl.runtime.kernels import launch
    from tests.compiling import compiling

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    relation, sizes = patterndsl.parse("recent(100) | k < 3").bind(300).relation, Sizes(300, 300, 0, 300)
    lists = WorkLists(
        lambda *block: ((find_tiles(relation, sizes, Lookup(), *block),),),
        *([0, 0], 2, 300, CPU),
        relations=[relation],
        sizes=sizes,
    )
    query, key, out = (torch.ones(1, heads, 300, dim, dtype=torch.bfloat16) for heads in (2, 1, 2))
    asked, into = asked_of(relation, sizes, {}, {}), (out, torch.ones(1, 2, 300))
    with compiling() as compiler:
        launch.forward(query, key, key, lists.rows(pipeline), pipeline, asked, 0.1, into, goes_on=True)
        results = out, into[1], out
        for role, blocks in backward_of(dim).items():
            if role == "queries":
                launch.gradient_of_queries(
                    query, key, key, *results, into[1], lists.rows(blocks), blocks, asked, 0.1, adds=True
                )
            else:
                columns = lists.columns(blocks)
                launch.gradients_of_keys(query, key, key, into[1], out, into[1], columns, blocks, asked, 0.1)
    wanted = {"queries": "query_kernel", "keys": "key_kernel"}
    assert set(compiler.compiled) >= {"attend_kernel", *(wanted[role] for role in backward_of(dim))}


@pytest.mark.skipif(torch.cuda.is_available(), reason="it runs")
def test_heads_that_draw_for_themselves_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tiles of a head leave is asked with the tables of all heads."""
    pytest.importorskip("triton")
    from patterndsl.runtime.kernels import launch
    from patterndsl.runtime.kernels.attention import Kernels
    from tests.compiling import compiling

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    bound = patterndsl.parse("recent(100) | blocks(48, random(2, seed = head))").bind(300, heads=2)

    def find(q_block: int, kv_block: int, _: dict[str, Tensor]) -> Found:
        return [[find_tiles(group.relation, bound.sizes, Lookup(), q_block, kv_block) for group in bound.groups]]

    kernels, (dim, pipeline) = Kernels(bound, CPU, find), PIPELINES["64, 2 x 64"]
    query = torch.ones(1, 2, 300, dim, dtype=torch.bfloat16)
    work, into = kernels.lists(1, {}).rows(pipeline), (query.clone(), torch.ones(1, 2, 300))
    assert work.rests is not None
    asked = asked_of(bound.relation, bound.sizes, {}, draws_for(bound.relation, 2, CPU))
    with compiling() as compiler:
        launch.forward(query, query, query, work, pipeline, asked, 0.1, into)
    assert "attend_kernel" in compiler.compiled


def backward_of(dim: int) -> dict[Role, Pipeline]:
    """The kernels of Hopper that make gradients, of those that a calibration tries."""
    roles: tuple[Role, ...] = ("queries", "keys")
    found = {role: [x for x in CANDIDATES[role, dim] if isinstance(x, Pipeline)] for role in roles}
    return {role: each[0] for role, each in found.items() if each}


on_hopper = pytest.mark.skipif(not HAS_HOPPER, reason="needs a Hopper GPU")


TAKEN = {
    f"{item.use.head_dim}, {item.use.length}": (item.use.head_dim, item.blocks)
    for item in shapes.BUILT_IN
    if item.use.role == "forward"
}


@pytest.fixture(params=list(TAKEN.values()), ids=list(TAKEN))
def dim(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The width of heads for which the kernel of Hopper now runs, on each of the blocks that are built in."""
    width, pipeline = request.param
    tuned = {Use("forward", width, length): pipeline for length in ("short", "long")}
    monkeypatch.setattr(shapes, "FEWEST", 1)
    monkeypatch.setattr(shapes, "tuned_on", lambda _: tuned)
    torch.use_deterministic_algorithms(True, warn_only=True)  # new tensors are NaN: what is left out shows
    yield width
    torch.use_deterministic_algorithms(False)


def dense(pattern: Pattern, tensors: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Output and lse from all pairs, in some dtype."""
    query, key, value = tensors
    keep = pattern.compile(query.shape[2], heads=query.shape[1], device="cuda").mask()
    q, k, v = (x.to(dtype) for x in (query, key, value))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~keep, -torch.inf)
    lse = scores.logsumexp(-1)
    return (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp() @ v, lse


def assert_right(pattern: Pattern, tensors: list[Tensor], found: tuple[Tensor, Tensor]) -> None:
    """Within twice the error of dense attention in the same dtype, or a rounding of the largest number."""
    (out, lse), (truth, truth_lse) = found, dense(pattern, tensors, torch.float64)
    beside, _ = dense(pattern, tensors, tensors[0].dtype)
    step = torch.finfo(out.dtype).eps * truth.abs().max()
    assert (out - truth).abs().max() <= torch.maximum(2 * (beside - truth).abs().max(), step)
    live = truth_lse.isfinite()
    assert torch.equal(lse.isfinite(), live)
    torch.testing.assert_close(lse[live], truth_lse[live].float(), rtol=1e-4, atol=1e-4)


PATTERNS = {
    "band and sinks": ("causal & (recent(300) | first(3))", 1000, "triton"),
    "empty rows": ("q >= 600 & k < 20 | (q - k) % 24 == 5 & causal", 1001, "triton"),
    "passes that go on": ("causal & (recent(64) | strided(40))", 1000, "planned"),
    "rows and columns": ("grid: {row: 25, col: 40}\nattend: q.row == k.row | q.col == k.col\n", 1000, "planned"),
    "lists that are cut": ("window(60) | global(70)", 4100, "triton"),
    "heads of their own": ("blocks(32, random(2, seed = head) | window(1))", 777, "triton"),
    "all pairs": ("all", 700, "triton"),
    "no pairs": ("none", 65, "triton"),
    "few positions": ("causal", 1, "triton"),
}


@pytest.mark.cuda
@on_hopper
@pytest.mark.parametrize(("text", "length", "backend"), PATTERNS.values(), ids=PATTERNS)
def test_equals_dense_attention(text: str, length: int, backend: str, dim: int) -> None:
    """Two heads of queries for each of keys, and the same bits twice."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if length % 2 == 0 else torch.float16
    pattern = patterndsl.parse(text)
    tensors = [torch.randn(2, heads, length, dim, device="cuda", dtype=dtype) for heads in (4, 2, 2)]
    program = pattern.compile(length, heads=4, device="cuda", backend=backend)
    first, second = (program(*tensors, return_lse=True) for _ in range(2))
    assert_right(pattern, tensors, first)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def with_few_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs have many pieces each, of which some stand."""
    two = SimpleNamespace(multi_processor_count=2)
    monkeypatch.setattr(
        launch_hopper, "torch", SimpleNamespace(cuda=SimpleNamespace(get_device_properties=lambda _: two))
    )


@pytest.mark.cuda
@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [0.003, 0.1, 1.0])
@pytest.mark.parametrize(("text", "length", "backend"), PATTERNS.values(), ids=PATTERNS)
def test_pieces_with_wide_scores_are_done_again(
    text: str, length: int, backend: str, share: float, dtype: torch.dtype, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share of the queries has scores far above and below those of the first tile; all of them are far from 0."""
    torch.manual_seed(0)
    with_few_processors(monkeypatch)
    pattern = patterndsl.parse(text)
    query, key, value = (torch.randn(2, heads, length, dim, device="cuda") for heads in (4, 2, 2))
    query = torch.where(torch.rand(2, 4, length, 1, device="cuda") < share, 60 * query, query)
    key[..., 0], query[..., 0] = 30, torch.where(torch.rand(2, 4, length, device="cuda") < 0.5, -30.0, 30.0)
    tensors = [x.to(dtype) for x in (query, key, value)]
    program = pattern.compile(length, heads=4, device="cuda", backend=backend)
    first, second = (program(*tensors, return_lse=True) for _ in range(2))
    assert_right(pattern, tensors, first)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.cuda
@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", [-14.0, -13.6, -12.0, -9.0, -5.0, 5.0, 9.0, 12.0])
def test_weights_may_count_from_nothing(score: float, dtype: torch.dtype, dim: int) -> None:
    """No score is known to be the first of its tile: all are alike and many, and far from 0, where weights have few
    digits."""
    torch.manual_seed(0)
    pattern = patterndsl.parse("k % 64 >= 8")
    key = torch.zeros(1, 1, 16_000, dim, device="cuda", dtype=dtype)
    query, key[..., 0] = key.clone(), 4
    query[..., 0] = score * dim**0.5 / 4
    score = float(query[0, 0, 0, 0]) * 4 / dim**0.5  # as it is rounded
    tensors = [query, key, torch.rand_like(key) + 1]
    out, lse = pattern.compile(16_000, heads=1, device="cuda", backend="triton")(*tensors, return_lse=True)
    mean = tensors[2][0, 0].double()[torch.arange(16_000, device="cuda") % 64 >= 8].mean(0)
    torch.testing.assert_close(out.double(), mean.expand_as(out), rtol=2 * torch.finfo(dtype).eps, atol=0)
    torch.testing.assert_close(lse, torch.full_like(lse, score + math.log(14_000)), rtol=1e-3, atol=1e-3)


@pytest.mark.cuda
@on_hopper
@pytest.mark.parametrize("backend", ["triton", "planned"])
def test_what_is_not_finite_stays_in_its_rows(backend: str, dim: int) -> None:
    """Of queries; and values whose sum only care keeps finite."""
    torch.manual_seed(0)
    pattern = patterndsl.parse("causal & (recent(64) | strided(40))")
    tensors = [torch.randn(1, 2, 1000, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    program = pattern.compile(1000, heads=2, device="cuda", backend=backend)
    plain = program(*tensors)
    for wrong in (torch.nan, torch.inf):
        query = tensors[0].clone()
        query[0, 1, 300:310] = wrong
        out = program(query, *tensors[1:])
        assert out[0, 1, 300:310].isnan().all()
        out[0, 1, 300:310] = plain[0, 1, 300:310]
        torch.testing.assert_close(out, plain, rtol=1e-2, atol=1e-2)
    key = tensors[1]
    query, large = 4 * key, 2e37 * tensors[2].sign()  # each query has by far the highest score with its own key
    assert_right(pattern, [query, key, large], program(query, key, large, return_lse=True))


@pytest.mark.cuda
@on_hopper
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(("text", "length", "backend"), PATTERNS.values(), ids=PATTERNS)
def test_gradients_equal_those_of_other_kernels(
    text: str, length: int, backend: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64 too, where lse has a gradient as well; the same bits twice."""
    torch.manual_seed(0)
    monkeypatch.setattr(shapes, "FEWEST", 1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # new tensors are NaN: what is left out shows
    dtype = torch.bfloat16 if length % 2 == 0 else torch.float16
    shape = [(2, heads, length, width) for heads in (4, 2, 2)]
    tensors = [torch.randn(each, device="cuda", dtype=dtype, requires_grad=True) for each in shape]
    upstream = torch.randn(shape[0], device="cuda", dtype=dtype), torch.randn(shape[0][:3], device="cuda")
    pattern = patterndsl.parse(text)

    def gradients(tuned: dict[Use, Any], of: list[Tensor], backend: str) -> list[Tensor]:
        monkeypatch.setattr(shapes, "tuned_on", lambda _: tuned)
        out, lse = pattern.compile(length, heads=4, device="cuda", backend=backend)(*of, return_lse=True)
        live = lse.detach().isfinite()
        loss = (out.double() * upstream[0]).sum() + (lse.masked_fill(~live, 0).double() * upstream[1]).sum()
        return list(torch.autograd.grad(loss, of))

    lengths: tuple[Length, ...] = ("short", "long")
    tuned = {Use(role, width, each): blocks for role, blocks in backward_of(width).items() for each in lengths}
    first, second = (gradients(tuned, tensors, backend) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    beside = gradients({}, tensors, backend)
    truth = gradients({}, [x.detach().double().requires_grad_() for x in tensors], "oracle")
    torch.use_deterministic_algorithms(False)
    for ours, others, exact in zip(first, beside, truth, strict=True):
        step = torch.finfo(dtype).eps * exact.abs().max()
        assert (ours - exact).abs().max() <= torch.maximum(1.5 * (others - exact).abs().max(), step)


@pytest.mark.cuda
@on_hopper
def test_positions_outside_heads(dim: int) -> None:
    """[B, T, H, D] transposed, as layers have it."""
    torch.manual_seed(0)
    pattern = patterndsl.parse("recent(100)")
    tensors = [torch.randn(2, 500, 4, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)]
    program = pattern.compile(500, heads=4, device="cuda", backend="triton")
    assert_right(pattern, tensors, program(*tensors, return_lse=True))


@pytest.mark.cuda
@on_hopper
@given(case=cases(max_length=300, max_heads=2), candidate=st.sampled_from(list(PIPELINES.values())))
@many(0.1)
def test_random_patterns(case: Case, candidate: tuple[int, Pipeline]) -> None:
    """As Triton's kernel has them, which runs those with inputs in either case."""
    torch.manual_seed(0)
    pattern, sizes, (width, pipeline) = case.pattern(), case.lengths, candidate
    tensors = [
        torch.randn(1, case.heads, length, width, device="cuda", dtype=torch.bfloat16)
        for length in (sizes.q_len, sizes.kv_len, sizes.kv_len)
    ]
    results = []
    for blocks in (pipeline, CANDIDATES["forward", width][0]):
        with pytest.MonkeyPatch.context() as patch:
            tuned = {Use("forward", width, "short"): blocks, Use("forward", width, "long"): blocks}
            patch.setattr(shapes, "FEWEST", 1)
            patch.setattr(shapes, "tuned_on", lambda _, tuned=tuned: tuned)
            keywords = {**case.keywords, "heads": case.heads, "layer": case.layer, "device": "cuda"}
            program = pattern.compile(case.sizes.get("n"), **keywords, backend="triton")
            inputs = {
                shape.name: torch.tensor(case.inputs[shape.name], device="cuda") for shape in program.bound.inputs
            }
            results.append(program(*tensors, inputs=inputs, return_lse=True))
    (out, lse), (other, other_lse) = results
    torch.testing.assert_close(out, other, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(lse, other_lse, rtol=1e-4, atol=1e-4)
