"""Is the cache policy for every length the one of each length, and is it enough to decode?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

import patterndsl
from patterndsl.analysis.pairs import NoFormula, symbolic
from patterndsl.analysis.policy import CachePolicy, LooksAhead, cache_policy
from patterndsl.sema.parameters import param_values, sizes_of
from tests.analysis.test_cache import DECODED, Decoded, attended, ids, masks
from tests.strategies import Case, cases, many

STEPS = 130
WITHOUT_A_FORMULA = {"image-transformer-2d", "longnet", "random", "random, near"}
SELF_ATTENTION = [case for case in DECODED if case.sizes.keys() == {"n"} and case.sizes["n"] > 1]


def policy_of(text: str, **params: int) -> Any:
    return patterndsl.parse(text, params=params).cache_policy()


def values_of(pattern: patterndsl.Pattern, n: int) -> dict[str, int]:
    values = param_values(pattern.resolved, {}, sizes_of(n, None, None, 0))
    return {name: value for name, value in values.items() if isinstance(value, int)}


@pytest.mark.parametrize("case", SELF_ATTENTION, ids=ids)
def test_decoding_with_what_the_policy_keeps(case: Decoded) -> None:
    """Every output is that of a full cache, and each kept key is attended by some query that may still come."""
    pattern = case.program().bound  # sizes of the plan; the policy knows none
    spec = patterndsl.parse(case.text) if case.text else patterndsl.load(f"examples/{case.name}.yaml")
    values = values_of(spec, 4 * STEPS)
    long = {name: list(found) + [found[-1]] * (4 * STEPS - len(found)) for name, found in case.inputs.items()}
    later = spec.with_params(**values).compile(n=4 * STEPS, heads=case.heads, layer=case.layer)
    keep = masks(later, {name: torch.tensor(found) for name, found in long.items()}).numpy()
    for group in pattern.groups:
        policy = spec.cache_policy(head=group.heads[0], layer=case.layer)
        if isinstance(policy, NoFormula):
            assert case.name in WITHOUT_A_FORMULA, policy.reason
            continue
        if isinstance(policy, LooksAhead):  # for some documents, or where prefixes are decoded together
            assert policy.certainty == "UpperBound" or case.name in ("prefix-lm",)
            continue
        head = keep[group.heads[0]]
        decode(policy, head, values)
        sizes = []
        for t in range(STEPS):
            held = np.flatnonzero(policy.keeps(t, np.arange(t + 1), values, 4 * STEPS))
            needed = np.flatnonzero(head[t:].any(axis=0)[: t + 1])
            if policy.certainty == "Exact":
                assert held.tolist() == needed.tolist(), f"step {t}"
            assert set(needed.tolist()) <= set(held.tolist())
            assert policy.size_at(t, values, 4 * STEPS) == len(held)
            sizes.append(len(held))
        most = policy.most_at(values)
        assert most is None or max(sizes) <= most
        if most is not None and most < STEPS // 2:
            assert max(sizes) == most
        assert policy.kind == "bounded" or policy.certainty == "UpperBound" or max(sizes[-32:]) > max(sizes[:32])


def decode(policy: CachePolicy, keep: Any, values: dict[str, int]) -> None:
    """Token by token, with a cache that drops what the policy drops and never gets it back."""
    query, key, value = torch.randn(3, STEPS, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cache: dict[int, tuple[Tensor, Tensor]] = {}
    for t in range(STEPS):
        cache[t] = (key[t], value[t])
        known = np.array(sorted(cache))
        dropped = known[~policy.keeps(t, known, values, 4 * STEPS)]
        for k in dropped.tolist():
            del cache[k]
        keys = np.flatnonzero(keep[t, : t + 1]).tolist()
        assert set(keys) <= cache.keys(), f"query {t} misses keys"
        held = [torch.stack([cache[k][side] for k in keys]) if keys else key[:0] for side in range(2)]
        found, expected = attended(query[t], held[0], held[1]), attended(query[t], key[keys], value[keys])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_most_of_the_patterns_have_a_policy() -> None:
    assert len(SELF_ATTENTION) - len(WITHOUT_A_FORMULA) >= 30


@many(2)
@given(case=cases(max_length=40))
def test_the_policy_of_any_pattern_keeps_what_is_needed(case: Case) -> None:
    pattern = case.pattern()
    if case.sizes.keys() != {"n"}:
        return
    bound, keep, n = case.bound(pattern), case.keep(pattern), case.sizes["n"]
    values = values_of(pattern, n)
    for group in bound.groups:
        head = keep[group.heads[0]]
        policy = cache_policy(symbolic(pattern.resolved, head=group.heads[0], layer=case.layer))
        if np.triu(head, 1).any():
            assert not isinstance(policy, CachePolicy)
        if not isinstance(policy, CachePolicy) or policy.size_at(0, values, n) is None:
            continue
        for t in range(n):
            needed = np.flatnonzero(head[t:].any(axis=0)[: t + 1])
            held = policy.keeps(t, np.arange(t + 1), values, n)
            assert held[needed].all(), f"step {t}"
            assert policy.size_at(t, values, n) == held.sum()


@pytest.mark.parametrize(
    ("text", "params", "shown"),
    [
        ("recent(w) | causal & first(g)", {"w": 8, "g": 2}, "bounded(g + w); keep k > t - w or k < g"),
        ("causal & window(w)", {"w": 8}, "bounded(w + 1); keep k ≥ t - w"),
        ("causal & block(b)", {"b": 8}, "bounded(b); keep k // b = t // b"),
        ("causal & block(64)", {}, "bounded(64); keep k // 64 = t // 64"),
        ("causal & blocks(b, recent(m))", {"b": 8, "m": 2}, "bounded(b·m); keep k // b > t // b - m"),
        ("causal & dilated(w, d)", {"w": 8, "d": 2}, None),
        ("causal", {}, "growing, t + 1 keys at step t; keep every key"),
        ("causal & strided(s)", {"s": 8}, "growing, t + 1 keys at step t; keep every key"),
        ("none", {}, "bounded(0); keep no key"),
        ("window(w)", {"w": 8}, "not decodable: a query attends a later key"),
        ("recent(t)", {"t": 4}, "bounded(t); keep k > t0 - t"),
    ],
)
def test_the_rule_as_a_text(text: str, params: dict[str, int], shown: str | None) -> None:
    policy = policy_of(text, **params)
    assert shown is None or str(policy) == shown
    if text == "causal & dilated(w, d)":
        assert policy.kind == "bounded" and policy.most_text() == "d·w + 1"


def test_a_size_says_where_it_holds() -> None:
    policy = policy_of("causal & dilated(w, d) | first(g) & causal", w=4, d=3, g=2)
    assert "keys at step t for g // d = 0 and t % d ≥ 1 and w ≥ 1 and t // d > w" in str(policy)
    assert f"({len(policy.size.cells) - 1} other cases); keep" in str(policy)
    assert "keys at step t for t // w ≥ 1 (1 other case); keep" in str(
        policy_of("causal & (recent(w) | k % w == 0)", w=8)
    )
    values = {"d": 3, "w": 4, "g": 7}
    assert policy.size_at(100, values) == int(np.sum(policy.keeps(100, np.arange(101), values)))


def test_what_is_not_affine_may_need_fewer_keys() -> None:
    policy = policy_of("recent(w) & q * k % 7 != 3", w=4)
    assert str(policy) == "bounded(w); keep k > t - w" and policy.certainty == "UpperBound"
    assert isinstance(policy_of("k * k <= q * q"), NoFormula)  # not known to look ahead


def test_a_policy_as_data_can_be_computed_with() -> None:
    policy = policy_of("causal & (block(l) | columns(l, c))", l=64, c=8)
    first = policy.to_dict()["size"][0]
    assert eval(first["expr"], {}, {"t": 1000, "l": 64, "c": 8}) == policy.size_at(1000, {"l": 64, "c": 8})
    assert policy_of("causal & block(b)", b=8).to_dict()["most_expr"] == "b"


def test_a_growing_cache_says_how_fast() -> None:
    policy = policy_of("causal & (block(l) | columns(l, c))", l=64, c=8)
    assert policy.kind == "growing" and policy.rule == "k % l ≥ l - c or k // l = t // l"
    assert policy.size_at(1000, {"l": 64, "c": 8}) == 8 * (1000 // 64) + 1000 % 64 + 1


def test_what_holds_for_special_parameters_only() -> None:
    policy = policy_of("causal & (recent(w) | layer % period == 0)", w=8, period=6)
    assert policy.kind == "growing"  # layer 0
    other = patterndsl.parse("causal & (recent(w) | layer % period == 1)", params={"w": 8, "period": 6})
    assert str(other.cache_policy(layer=3)).startswith("bounded(w) unless period = 2")


def test_documents_bound_the_policy_from_above() -> None:
    pattern = patterndsl.parse("recent(w) & same(doc)", params={"w": 8}, inputs={"doc": "int[N]"})
    policy = pattern.cache_policy()
    assert isinstance(policy, CachePolicy)
    assert (policy.certainty, policy.most_text()) == ("UpperBound", "w")
