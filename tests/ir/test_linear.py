"""Relations in other coordinates hold where they held before."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import patterndsl
from patterndsl.ir.index import Const, Index, K, Param, Q, arithmetic
from patterndsl.ir.linear import Frame
from patterndsl.ir.meaning import Point, member
from patterndsl.ir.relation import Relation, substitute
from patterndsl.lower.lookup import Lookup
from tests.strategies import Case, cases, many


def holds(relation: Relation, q: Any, k: Any) -> Any:
    found = member(relation, Point(q, k, 0, Lookup()))
    return np.broadcast_to(found, np.broadcast_shapes(q.shape, k.shape))


@many(2)
@given(cases(), st.integers(1, 9))
def test_digits_keep_every_pair(case: Case, low: int) -> None:
    """q = low q.1 + q.0, and likewise k: the new relation is the old one, wherever the digits lie."""
    assume(not case.inputs)
    bound = case.bound(case.pattern())
    sizes = bound.sizes
    spans = {Q: (sizes.q_start, sizes.q_start + sizes.q_len), K: (0, sizes.kv_len)}
    assume(all(start < stop for start, stop in spans.values()))
    put: dict[Any, Index] = {}
    back: dict[Any, Index] = {}
    ranges: dict[Index, tuple[int, int]] = {}
    for position, (start, stop) in spans.items():
        high_digit, low_digit = Param(f"{position.name}.1"), Param(f"{position.name}.0")
        ranges |= {high_digit: (start // low, (stop - 1) // low), low_digit: (0, low - 1)}
        put[position] = arithmetic("+", arithmetic("*", high_digit, Const(low)), low_digit)
        back |= {high_digit: arithmetic("//", position, Const(low)), low_digit: arithmetic("%", position, Const(low))}
    q, k = np.arange(*spans[Q])[:, None], np.arange(*spans[K])
    for group in bound.groups:
        found = Frame(put, ranges).relation(group.relation)
        again = substitute(found, lambda symbol: back.get(symbol, symbol))
        assert (holds(again, q, k) == holds(group.relation, q, k)).all(), found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("causal & strided(8)", "causal & q % 8 == k % 8"),
        ("q - k >= 1 & q - k >= 3", "q - k >= 3"),
        ("causal & ~(causal & recent(3))", "q - k >= 3 & causal"),
        ("q < 3 & q >= 5", "none"),
        ("(q // 4) * 4 <= q", "all"),
        ("q // 4 <= 2", "q < 12"),
        ("abs(4 * q - 4 * k) <= 9", "abs(q - k) <= 2"),
        # a quotient of which nothing is known may be large
        ("q * 3000000000000 // (k + 1) <= 2000000000000", "q * 3000000000000 < 2000000000001 * (k + 1)"),
    ],
)
def test_laws(text: str, expected: str) -> None:
    at = np.arange(40)
    frame = Frame({}, {Q: (0, 39), K: (0, 39)})
    found, wanted = (patterndsl.parse(item).bind(40).relation for item in (text, expected))
    assert (holds(frame.relation(found), at[:, None], at) == holds(wanted, at[:, None], at)).all()


@many(1)
@given(st.data())
def test_divisions_by_multiples_decide_each_other(data: st.DataObject) -> None:
    """Remainders and blocks of divisors that divide one another, in unions under a conjunction."""
    divisors = st.sampled_from((2, 3, 4, 6, 8, 12))
    side, op = st.sampled_from(("q", "k", "(q + 2 * k)")), st.sampled_from(("==", "!="))

    def term() -> str:
        divisor = data.draw(divisors)
        if data.draw(st.booleans()):
            return f"{data.draw(side)} % {divisor} {data.draw(op)} {data.draw(st.integers(0, divisor - 1))}"
        return f"q // {divisor} {data.draw(op)} k // {divisor}"

    text = f"{term()} & {term()} & ({term()} | {term()}) & ({term()} | {term()})"
    relation = patterndsl.parse(text).bind(40).relation
    at = np.arange(40)
    found = Frame({}, {Q: (0, 39), K: (0, 39)}).relation(relation)
    assert (holds(found, at[:, None], at) == holds(relation, at[:, None], at)).all(), text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("q % 12 == 7 & (q % 4 == 3 | k < 5)", "q % 12 == 7"),
        ("q % 12 == 7 & (q % 4 != 3 | k < 5)", "q % 12 == 7 & k < 5"),
        ("q % 4 == 3 & q % 2 == 0", "none"),
        ("q // 4 == k // 4 & q // 8 != k // 8", "none"),
        ("q // 8 != k // 8 & (q // 4 != k // 4 | causal)", "q // 8 != k // 8"),
        ("q // 4 != k // 4 & (q // 8 == k // 8 | causal)", "q // 4 != k // 4 & (q // 8 == k // 8 | causal)"),
    ],
)
def test_divisions_by_multiples_in_normal_form(text: str, expected: str) -> None:
    frame = Frame({}, {Q: (0, 39), K: (0, 39)})
    found, wanted = (frame.relation(patterndsl.parse(item).bind(40).relation) for item in (text, expected))
    assert found == wanted
