"""Does every name of the prelude mean what one line of Python says? At small lengths, with and without an offset."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch

import patterndsl
from patterndsl.sema.resolve import prelude_names

SIZES = {
    "n=1": {"n": 1},
    "n=2": {"n": 2},
    "n=7": {"n": 7},
    "n=24": {"n": 24},
    "n=25": {"n": 25},
    "q=5,k=17,start=9": {"q_len": 5, "kv_len": 17, "q_start": 9},
    "q=3,k=14,start=11,n=20": {"n": 20, "q_len": 3, "kv_len": 14, "q_start": 11},
    "q=17,k=6": {"q_len": 17, "kv_len": 6},
    "q=6,k=17": {"q_len": 6, "kv_len": 17},
    "q=0,k=4": {"q_len": 0, "kv_len": 4},
    "q=4,k=0": {"q_len": 4, "kv_len": 0},
}
DOC = [2, 2, 2, 0, 0, 0, 0, 7, 7, 2, 2, 5, 0, 0, 0, 0, 0, 0, 0, 9, 1, 1, 1, 3, 3]
START = [next(i for i in range(at + 1) if len(set(DOC[i : at + 1])) == 1) for at in range(len(DOC))]
BUCKET = [3, 1, 2, 3, 3, 0, 1, 1, 2, 0, 0, 3, 2, 1, 1, 1, 0, 2, 3, 2, 2, 1, 0, 0, 3]


@dataclass(frozen=True)
class Lengths:
    """Queries [q_start, q_stop), keys [0, Nk); N is the length of the whole sequence."""

    N: int
    Nk: int
    q_start: int
    q_stop: int

    @property
    def inputs(self) -> int:
        return max(self.N, self.Nk)


def lengths_of(sizes: dict[str, int]) -> Lengths:
    q_start = sizes.get("q_start", 0)
    total = sizes.get("n", q_start + sizes.get("q_len", 0))
    return Lengths(total, sizes.get("kv_len", total), q_start, q_start + sizes.get("q_len", total - q_start))


def rank(values: list[int], at: int) -> int:
    """The place of a position in the stable order by value."""
    return sorted(range(len(values)), key=lambda position: (values[position], position)).index(at)


Keep = Callable[[int, int, Lengths], bool]

PRELUDE: list[tuple[str, str, Keep]] = [
    ("all", "all", lambda q, k, n: True),
    ("none", "none", lambda q, k, n: False),
    ("causal", "causal", lambda q, k, n: q >= k),
    ("window", "window(0)", lambda q, k, n: q == k),
    ("window", "window(3)", lambda q, k, n: k in range(q - 3, q + 4)),
    ("window", "window(4, 0)", lambda q, k, n: k in range(q - 4, q + 1)),
    ("window", "window(2, 5)", lambda q, k, n: k in range(q - 2, q + 6)),
    ("window", "window(left = 1, right = 2)", lambda q, k, n: k in range(q - 1, q + 3)),
    ("recent", "recent(1)", lambda q, k, n: q == k),
    ("recent", "recent(5)", lambda q, k, n: k in range(q - 4, q + 1)),
    ("block", "block(4)", lambda q, k, n: k in range(q - q % 4, q - q % 4 + 4)),
    ("strided", "strided(3)", lambda q, k, n: q % 3 == k % 3),
    ("strided", "strided(1)", lambda q, k, n: True),
    ("dilated", "dilated(2, 3)", lambda q, k, n: k in {q - 6, q - 3, q, q + 3, q + 6}),
    ("dilated", "dilated(3, 1)", lambda q, k, n: k in range(q - 3, q + 4)),
    ("columns", "columns(5, 2)", lambda q, k, n: k % 5 in {3, 4}),
    ("columns", "columns(5, 0)", lambda q, k, n: False),
    ("columns", "columns(5, 5)", lambda q, k, n: True),
    ("first", "first(3)", lambda q, k, n: k in range(3)),
    ("global", "global(2)", lambda q, k, n: min(q, k) in range(2)),
    ("same", "same(doc)", lambda q, k, n: DOC[q] == DOC[k]),
    ("within", "within(doc, causal)", lambda q, k, n: DOC[q] == DOC[k] and q - START[q] >= k - START[k]),
    ("within", "within(doc, first(1))", lambda q, k, n: DOC[q] == DOC[k] and k == START[k]),
    ("within", "within(doc, window(0))", lambda q, k, n: DOC[q] == DOC[k] and q - START[q] == k - START[k]),
    ("blocks", "blocks(4, window(1))", lambda q, k, n: k in range(q - q % 4 - 4, q - q % 4 + 8)),
    ("blocks", "blocks(4, k == N - 1)", lambda q, k, n: k // 4 == (n.N - 1) // 4),
    ("blocks", "blocks(4, k == Nk - 1)", lambda q, k, n: k // 4 == (n.Nk - 1) // 4),
    ("blocks", "blocks(2, blocks(3, q == k))", lambda q, k, n: q // 6 == k // 6),
    ("transpose", "transpose(causal)", lambda q, k, n: q <= k),
    ("transpose", "transpose(window(3, 1))", lambda q, k, n: q in range(k - 3, k + 2)),
    ("transpose", "transpose(k == Nk - 1)", lambda q, k, n: q == n.N - 1),
    ("transpose", "transpose(q == Nq - 1)", lambda q, k, n: k == n.Nk - 1),
    ("transpose", "transpose(transpose(recent(4) & k < Nk - 2))", lambda q, k, n: 0 <= q - k < 4 and k < n.Nk - 2),
    ("shifted", "shifted(causal, 2)", lambda q, k, n: q >= k + 2),
    ("shifted", "shifted(window(1), -3)", lambda q, k, n: k - 3 in range(q - 1, q + 2)),
    (
        "chunks",
        "chunks(bucket, 4, 1)",
        lambda q, k, n: rank(BUCKET[: n.inputs], q) // 4 - rank(BUCKET[: n.inputs], k) // 4 in {0, 1},
    ),
    (
        "chunks",
        "chunks(bucket, 5, 0)",
        lambda q, k, n: rank(BUCKET[: n.inputs], q) // 5 == rank(BUCKET[: n.inputs], k) // 5,
    ),
]


def test_every_prelude_name_is_here():
    assert {name for name, _, _ in PRELUDE} == set(prelude_names())


def enumerated(keep: Keep, n: Lengths) -> list[list[bool]]:
    return [[bool(keep(q, k, n)) for k in range(n.Nk)] for q in range(n.q_start, n.q_stop)]


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("text", "keep"), [row[1:] for row in PRELUDE], ids=[row[1] for row in PRELUDE])
def test_prelude(text, keep, sizes):
    n = lengths_of(sizes)
    declared = {name: "int[N]" for name in ("doc", "bucket") if name in text}
    values = {"doc": DOC, "bucket": BUCKET}
    program = patterndsl.parse(text, inputs=declared).compile(**sizes)
    mask = program.mask(inputs={name: torch.tensor(values[name][: n.inputs]) for name in declared})
    assert mask.shape == (1, n.q_stop - n.q_start, n.Nk)
    assert mask[0].tolist() == enumerated(keep, n)


GRID_SIZES = {name: SIZES[name] for name in ("n=2", "n=24", "q=6,k=17", "q=3,k=14,start=11,n=20")}


@pytest.mark.parametrize("sizes", GRID_SIZES.values(), ids=GRID_SIZES)
def test_same_of_a_grid_axis(sizes):
    """The outermost axis runs on beyond N, where there are more keys than that."""
    n = lengths_of(sizes)
    grid: dict[str, int | str | Sequence[str]] = {"row": "N // 2", "col": 2}
    rows = patterndsl.parse("same(row)", grid=grid).compile(**sizes).mask()[0]
    assert rows.tolist() == enumerated(lambda q, k, _: q // 2 == k // 2, n)
    cols = patterndsl.parse("same(col)", grid=grid).compile(**sizes).mask()[0]
    assert cols.tolist() == enumerated(lambda q, k, _: q % 2 == k % 2, n)


@pytest.mark.parametrize(("axis", "others"), [("z", (1, 2)), ("y", (0, 2)), ("x", (0, 1))])
def test_along(axis, others):
    """Equal in all other coordinates."""
    places = list(itertools.product(range(2), range(3), range(4)))
    program = patterndsl.parse(f"along({axis})", grid={"z": 2, "y": 3, "x": 4}).compile(n=24)
    expected = [[all(q[other] == k[other] for other in others) for k in places] for q in places]
    assert program.mask()[0].tolist() == expected


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("r", [0, 1, 3, 30])
def test_random_draws_r_distinct_keys_that_are_not_avoided(r, sizes):
    n = lengths_of(sizes)
    program = patterndsl.parse("random(r, seed = 5, avoid = window(1))", params={"r": r}).compile(**sizes)
    keep = program.mask()[0]
    for q, row in zip(range(n.q_start, n.q_stop), keep, strict=True):
        allowed = {k for k in range(n.Nk) if abs(q - k) > 1}
        drawn = set(row.nonzero().flatten().tolist())
        assert drawn <= allowed
        assert len(drawn) == min(r, len(allowed))


def test_random_of_a_slice_is_the_slice_of_random():
    pattern = patterndsl.parse("random(4, seed = 2)")
    whole = pattern.compile(n=25).mask()
    assert pattern.compile(n=25, q_len=7, q_start=11).mask().equal(whole[:, 11:18])
