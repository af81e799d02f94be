"""Does a cache of exactly the planned slots decode the same outputs, and is every key in it needed?

Decoding is simulated token by token with a cache of num_slots slots, beside a cache that keeps everything.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

import patterndsl
from patterndsl import PatternError, Program
from patterndsl.analysis.cache import CachePlan, NotDecodable, Ring, cache_plan, cache_plans, merged
from patterndsl.ir.index import K, Q
from patterndsl.ir.relation import compare, conjunction
from patterndsl.lower.lookup import Lookup
from tests.strategies import Case, cases, many

EXAMPLES = Path(__file__).parents[2] / "examples"
DOCUMENTS = "inputs:\n  doc: int[N]\nattend: "


@dataclass(frozen=True)
class Decoded:
    """A pattern that can be decoded, and what it is asked at."""

    name: str
    text: str = ""  # the example of that name where empty
    sizes: dict[str, int] = field(default_factory=lambda: {"n": 130})
    heads: int = 1
    layer: int = 0
    inputs: dict[str, list[int]] = field(default_factory=dict)

    def program(self) -> Program:
        pattern = patterndsl.parse(self.text) if self.text else patterndsl.load(EXAMPLES / f"{self.name}.yaml")
        sizes: dict[str, Any] = {**self.sizes}
        return pattern.compile(**sizes, heads=self.heads, layer=self.layer)

    def tensors(self) -> dict[str, Tensor]:
        return {name: torch.tensor(values) for name, values in self.inputs.items()}


PACKED = {"doc": [0] * 50 + [1] * 3 + [2] * 77}

DECODED = [
    Decoded("blockwise"),
    Decoded("four-kinds-of-heads", heads=8),
    Decoded("sparse-transformer-strided-by-head", heads=2),
    Decoded("sparse-transformer-strided-by-layer", layer=1),
    Decoded("sparse-transformer-fixed-by-head", heads=2),
    Decoded("sparse-transformer-fixed-by-layer", layer=1),
    Decoded("gemma"),
    Decoded("gemma", layer=5),
    Decoded("image-transformer-1d", sizes={"n": 127}),
    Decoded("image-transformer-2d", sizes={"n": 160}),
    Decoded("longformer-dilated", heads=5),
    Decoded("longnet", sizes={"n": 200}, heads=4),
    Decoded("mistral"),
    Decoded("packed-documents", inputs=PACKED),
    Decoded("packed-sinks-strided", inputs=PACKED),
    Decoded("prefix-lm", sizes={"n": 131, "q_start": 32}),
    Decoded("sparse-transformer-fixed"),
    Decoded("sparse-transformer-strided"),
    Decoded("streaming-sinks"),
    Decoded("causal", "causal"),
    Decoded("none", "none"),
    Decoded("no query", "recent(4)", {"q_len": 0, "q_start": 9, "kv_len": 9}),
    Decoded("one token", "recent(4)", {"n": 1}),
    Decoded("itself", "q == k"),
    Decoded("recent", "recent(7)"),
    Decoded("recent, prefilled", "recent(7)", {"n": 130, "q_start": 50}),
    Decoded("not itself", "recent(7) - recent(1)"),
    Decoded("window cut off", "1 < q - k < 9"),
    Decoded("sinks", "causal & first(5)"),
    Decoded("sinks and recent", "causal & (first(4) | recent(9))"),
    Decoded("sinks and recent, prefilled", "causal & (first(4) | recent(9))", {"n": 130, "q_start": 63}),
    Decoded("even sinks and recent", "causal & (first(9) & k % 2 == 0 | recent(9))"),
    Decoded("sinks and block", "causal & (first(3) | block(16))"),
    Decoded("strided", "causal & strided(8)"),
    Decoded("wide stride", "causal & strided(90)"),
    Decoded("fixed columns", "causal & (block(16) | columns(16, 2))"),
    Decoded("columns alone", "causal & columns(16, 2)"),
    Decoded("block-causal", "block(13) & causal"),
    Decoded("blocks before", "blocks(8, 1 <= q - k <= 2)"),
    Decoded("dilated", "causal & dilated(3, 5)"),
    Decoded("powers of two", "causal & (q - k) in {0, 1, 2, 4, 8, 16, 32}"),
    Decoded("halves", "q == 2 * k | q == k"),
    Decoded("random", "causal & random(3, seed = head)", heads=2),
    Decoded("random, near", "recent(20) & random(40)"),
    Decoded("more keys than queries", "recent(5)", {"q_len": 30, "q_start": 20, "kv_len": 77}),
    Decoded("fewer keys than queries", "causal & (recent(30) | strided(7))", {"q_len": 60, "q_start": 0, "kv_len": 40}),
    Decoded("a head each", "causal & (head == 0 | recent(5 * head))", heads=3),
    Decoded("by layer", "causal & (layer % 2 == 0 | recent(5))", layer=3),
    Decoded("packed windows", DOCUMENTS + "within(doc, causal & (recent(6) | first(2)))", inputs=PACKED),
]

CAUSAL_EXAMPLES = {case.name for case in DECODED if not case.text}


def ids(case: Decoded) -> str:
    sizes = "-".join(f"{name}{size}" for name, size in case.sizes.items())
    return f"{case.name}-{sizes}-layer{case.layer}"


def masks(program: Program, inputs: dict[str, Tensor]) -> Tensor:
    """bool [heads, q_len, kv_len]"""
    sizes = program.bound.sizes
    return program.mask(inputs).expand(program.bound.num_heads, sizes.q_len, sizes.kv_len)


def attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One query over the given keys; 0 where there are none. query: [D], key, value: [num_keys, D], returns: [D]"""
    return torch.softmax(key @ query * query.shape[0] ** -0.5, 0) @ value if len(key) else torch.zeros_like(query)


@dataclass
class SlotCache:
    """A cache of so many slots, that knows whose each one is."""

    plan: CachePlan
    key: Tensor
    value: Tensor
    owner: np.ndarray

    def write(self, k: int, key: Tensor, value: Tensor, t: int) -> None:
        slot = int(self.plan.slot[k])
        before = int(self.owner[slot])
        assert before < 0 or self.plan.last_use[before] < t, f"key {before} is overwritten too early, at {t}"
        self.key[slot], self.value[slot], self.owner[slot] = key[k], value[k], k


def decode(plan: CachePlan, row: Any, width: int = 4) -> None:
    """Decodes token by token; every output must be that of a full cache. row: the keys of a query."""
    random = torch.Generator().manual_seed(1)
    query, key, value = torch.randn(3, max(plan.kv_len, plan.q_stop), width, generator=random, dtype=torch.float64)
    slots = torch.full((2, plan.num_slots, width), torch.nan, dtype=torch.float64)
    cache = SlotCache(plan, slots[0], slots[1], np.full(plan.num_slots, -1))
    alive = {k for k in range(min(plan.q_start, plan.kv_len)) if plan.last_use[k] >= plan.q_start}
    for k in sorted(alive):
        cache.write(k, key, value, plan.q_start)
    for t in range(plan.q_start, plan.q_stop):
        assert plan.alive(t - 1).tolist() == sorted(alive)
        if t < plan.kv_len and plan.slot[t] >= 0:
            cache.write(t, key, value, t)
            alive.add(t)
        assert plan.held(t).tolist() == sorted(alive)
        keys = row(t)
        at = plan.slot[keys.numpy()]
        assert cache.owner[at].tolist() == keys.tolist(), f"query {t} does not find its keys"
        found = attended(query[t], cache.key[at], cache.value[at])
        expected = attended(query[t], key[keys], value[keys])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        dead = plan.evictions(t).tolist()
        assert dead == sorted(dead) and alive.issuperset(dead)
        alive.difference_update(dead)
        assert len(alive) <= plan.num_slots
    assert not alive, "nothing is kept after the last step"
    for k in np.flatnonzero(plan.last_use >= 0).tolist():  # a key that lives is missed by the query that ends its life
        q = int(plan.last_use[k])
        keys = row(q)
        without = keys[keys != k]
        changed = attended(query[q], key[keys], value[keys]) - attended(query[q], key[without], value[without])
        assert changed.abs().max() > 1e-9, f"key {k} is kept until {q} for nothing"


def assert_policy(plan: CachePlan, keep: Any) -> None:
    """The plan's figures, from bool [q_len, kv_len] and nothing else."""
    num_held = [0]
    for t in range(plan.q_start, plan.q_stop):
        needed = np.flatnonzero(keep[t - plan.q_start :].any(axis=0)[: t + 1])
        assert plan.held(t).tolist() == needed.tolist()
        later = np.flatnonzero(keep[t + 1 - plan.q_start :].any(axis=0)[: t + 1])
        assert plan.alive(t).tolist() == later.tolist()
        assert plan.evictions(t).tolist() == sorted(set(needed.tolist()) - set(later.tolist()))
        num_held.append(len(needed))
    quarter = (plan.q_stop - plan.q_start) // 4
    assert plan.num_slots == max(num_held) == max(plan.most_held)
    assert plan.most_held[1] == max(num_held[1 + quarter :], default=0)
    stored = keep.any(axis=0)
    assert (plan.slot[stored] >= 0).all() and (plan.slot[~stored] == -1).all()
    assert plan.slot.max(initial=-1) + 1 <= plan.num_slots


@pytest.mark.parametrize("case", DECODED, ids=ids)
def test_planned_slots_decode_what_a_full_cache_decodes(case: Decoded) -> None:
    program, inputs = case.program(), case.tensors()
    plans = program.cache_plan(inputs)
    assert [plan.heads for plan in plans] == [group.heads for group in program.bound.groups]
    keep = masks(program, inputs).numpy()
    for plan in plans:
        assert_policy(plan, keep[plan.heads[0]])
        decode(plan, lambda t, head=plan.heads[0]: program.row(t, head, inputs))


@many(2)
@given(case=cases(max_length=130))
def test_the_plan_of_any_pattern_follows_its_mask(case: Case) -> None:
    pattern = case.pattern()
    bound, keep, sizes = case.bound(pattern), case.keep(pattern), case.lengths
    lookup = Lookup({shape.name: np.array(case.inputs[shape.name], dtype=np.int64) for shape in bound.inputs})
    queries, keys = np.arange(sizes.q_start, sizes.q_start + sizes.q_len)[:, None], np.arange(sizes.kv_len)
    for group, found in zip(bound.groups, cache_plans(bound, lookup), strict=True):
        head = keep[group.heads[0]]
        ahead = np.argwhere(head & (keys > queries))
        if len(ahead):
            q, k = ahead[0]
            last = ahead[-1][0] + sizes.q_start + 1
            assert found == NotDecodable(group.heads, q + sizes.q_start, k, last)
        causal = dataclasses.replace(group, relation=conjunction((group.relation, compare("<=", K, Q))))
        plan = cache_plan(causal, bound.sizes, lookup)
        assert isinstance(plan, CachePlan)
        head = head & (keys <= queries)
        assert_policy(plan, head)
        rows = [torch.from_numpy(np.flatnonzero(row)) for row in head]
        decode(plan, lambda t, rows=rows: rows[t - sizes.q_start], width=2)


# ---- layouts and rules --------------------------------------------------------------------------------------


def plan_of(text: str, n: int = 130, **sizes: int) -> CachePlan:
    keywords: dict[str, Any] = {"n": n, **sizes}
    (plan,) = patterndsl.parse(text).compile(**keywords).cache_plan()
    return plan


@pytest.mark.parametrize("q_start", [0, 40])
@pytest.mark.parametrize("w", [1, 2, 7, 63])
def test_a_window_is_a_ring(w: int, q_start: int) -> None:
    plan = plan_of(f"recent({w})", q_start=q_start)
    ks = np.arange(130)
    assert plan.num_slots == w and plan.ring == Ring(0, 0, w)
    assert plan.slot.tolist() == np.where(ks + w > q_start, ks % w, -1).tolist()


def test_sinks_are_fixed_and_the_window_is_a_ring_behind_them() -> None:
    plan = plan_of("causal & (first(4) | recent(9))")
    assert plan.num_slots == 13 and plan.ring == Ring(4, 4, 9)
    assert plan.slot.tolist() == [0, 1, 2, 3, *(4 + (k - 4) % 9 for k in range(4, 130))]


def test_fixed_keys_that_nobody_needs_take_no_slot() -> None:
    plan = plan_of("causal & (first(9) & k % 2 == 0 | q - k in 2..5 & k >= 9)")
    assert plan.ring == Ring(9, 5, 5) or plan.ring is None
    assert plan.slot[:9].tolist() == [0, -1, 1, -1, 2, -1, 3, -1, 4]


@pytest.mark.parametrize(
    ("text", "num_slots", "kind", "rule"),
    [
        ("recent(9)", 9, "bounded", "keep k > t - 9"),
        ("causal & (first(4) | recent(9))", 13, "bounded", "keep k < 4 or k > t - 9"),
        ("causal & first(4)", 4, "bounded", "keep k < 4"),
        ("causal & block(16)", 16, "bounded", "keep k // 16 == t // 16"),
        ("causal & (first(3) | block(16))", 19, "bounded", "keep k < 3 or k // 16 == t // 16"),
        ("causal & dilated(3, 5)", 16, "bounded", "keep k > t - 16"),
        ("blocks(8, 1 <= q - k <= 2)", 24, "bounded", None),
        ("causal & (q - k) in {0, 1, 2, 4, 8, 16, 32}", 33, "bounded", "keep k > t - 33"),
        ("none", 0, "bounded", "keep nothing"),
        ("causal", 130, "growing", "keep every key"),
        ("recent(129)", 129, "bounded", "keep k > t - 129"),
        ("causal & strided(8)", 123, "growing", None),
        ("causal & columns(16, 2)", 16, "growing", None),
        ("causal & (block(16) | columns(16, 2))", 30, "growing", None),
        ("q == 2 * k | q == k", 33, "growing", None),
    ],
)
def test_size_kind_and_rule(text: str, num_slots: int, kind: str, rule: str | None) -> None:
    plan = plan_of(text)
    assert (plan.num_slots, plan.kind, plan.rule) == (num_slots, kind, rule)


@pytest.mark.parametrize("n", [1000, 1003])
def test_a_rule_says_what_each_step_holds(n: int) -> None:
    plan = plan_of("causal & (first(4) | recent(30))", n)
    for t in (0, 3, 29, 30, 34, 500, n - 1):
        assert plan.held(t).tolist() == [k for k in range(t + 1) if k < 4 or k > t - 30]


def test_sizes_do_not_grow_with_the_length() -> None:
    for text, num_slots in (("recent(64)", 64), ("causal & (first(4) | recent(64))", 68), ("causal & block(100)", 100)):
        assert [plan_of(text, n).num_slots for n in (1000, 10_000, 100_000)] == [num_slots] * 3


def test_heads_that_share_a_key_head_keep_what_any_of_them_needs() -> None:
    pattern = patterndsl.parse("causal & (recent(4 + 5 * head) | first(3) & head == 0)")
    program = pattern.compile(n=130, heads=2)
    both = merged(program.cache_plan())
    assert both.heads == (0, 1) and both.num_slots == 3 + 9
    assert both.rule == "keep k < 3 or k > t - 9"
    keep = program.mask().numpy()
    assert_policy(both, keep.any(axis=0))
    for head in range(2):
        for t in range(130):
            assert set(program.row(t, head).tolist()) <= set(both.held(t).tolist())
    assert merged([both]).slot.tolist() == both.slot.tolist()


# ---- what cannot be decoded ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_is_decoded_or_looks_ahead(path: Path) -> None:
    pattern = patterndsl.load(path)
    inputs = {"doc": torch.zeros(160, dtype=torch.int64)} if path.stem.startswith("packed") else {}
    program = pattern.compile(n=160, heads=4)
    keep = masks(program, inputs)
    if keep.triu(1).any():
        with pytest.raises(PatternError) as caught:
            program.cache_plan(inputs)
        assert [found.code for found in caught.value.diagnostics] == ["E505"]
        assert path.stem == "prefix-lm" or path.stem not in CAUSAL_EXAMPLES
    else:
        assert len(program.cache_plan(inputs)) == len(program.bound.groups)
        assert path.stem in CAUSAL_EXAMPLES


def test_a_pattern_that_looks_ahead_says_where_and_from_when_it_no_longer_does() -> None:
    program = patterndsl.parse("causal | first(12)").compile(n=130)
    with pytest.raises(PatternError) as caught:
        program.cache_plan()
    assert "query 0 attends key 1, a later one" in str(caught.value)
    assert "q_start=11" in str(caught.value)
    patterndsl.parse("causal | first(12)").compile(n=130, q_start=11).cache_plan()


def test_one_head_that_looks_ahead_is_named() -> None:
    with pytest.raises(PatternError, match="query 2 attends key 3, a later one in head 1"):
        patterndsl.parse("causal | q == 2 & k == 3 & head == 1").compile(n=130, heads=2).cache_plan()


def test_the_plan_of_a_batch_is_refused() -> None:
    program = patterndsl.parse(DOCUMENTS + "same(doc) & causal").compile(n=8)
    with pytest.raises(PatternError, match="2 batch rows"):
        program.cache_plan({"doc": torch.zeros(2, 8, dtype=torch.int64)})


@pytest.mark.parametrize("t", [8, 130])
def test_steps_that_are_not_there(t: int) -> None:
    plan = plan_of("recent(7)", q_start=9)
    with pytest.raises(PatternError, match="the steps are 9 to 129"):
        plan.evictions(t)
