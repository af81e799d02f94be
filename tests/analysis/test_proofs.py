"""Proofs against brute force: on random patterns, on claims that are nearly true, and on patterns that are hard."""

from __future__ import annotations

import random
import re
import time
from typing import Any, get_args

import numpy as np
import pytest

import patterndsl
from patterndsl.analysis.proof import Claim, Proven, Refuted, Unknown, Verdict, _Problem
from tests import brute

CLAIMS: tuple[Claim, ...] = get_args(Claim)
PARAMS = {"w": "2", "g": "1", "s": "{default: 2, min: 1}"}
SIZES = [(1, 0, 0, 1), (2, 1, 2, 1), (3, 0, 1, 2), (4, 3, 0, 2), (5, 1, 1, 3), (6, 2, 1, 4), (7, 2, 3, 2), (9, 4, 0, 3)]
"""N, w, g, s"""


class Generator:
    """Random affine patterns: few operations deep, with parameters, floors and remainders."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def pattern(self, depth: int = 2) -> str:
        pick = self.random.random()
        if depth == 0 or pick < 0.2:
            return f"({self.atom()})"
        inner = [self.pattern(depth - 1) for _ in range(2)]
        if pick < 0.75:
            return f"({inner[0]} {self.random.choice('&&||-')} {inner[1]})"
        if pick < 0.85:
            return f"(~{inner[0]})"
        return f"({inner[0]}) at ({self.random.choice(['k, q', 'q // 2, k // 2', 'q // s, k // s', 'q + 1, k'])})"

    def atom(self) -> str:
        size, step = self.random.choice(["w", "g", "1", "3", "w + g"]), self.random.choice(["s", "2", "3"])
        return self.random.choice(
            [
                "causal",
                "all",
                f"window({size})",
                f"recent({size})",
                f"window({size}, g)",
                f"first({size})",
                f"global({size})",
                f"block({step})",
                f"strided({step})",
                f"columns({step}, 1)",
                f"dilated({size}, {step})",
                f"blocks({step}, recent(2))",
                f"{self.random.choice('qk')} % {step} == {self.random.choice('01g')}",
                f"{self.random.choice('qk')} // {step} < {size}",
                f"q - k {self.random.choice(['<', '<=', '==', '!=', '>'])} {size}",
                f"q + k <= N - {size}",
                f"k >= N - {size}",
                f"2 * k <= q + {size}",
                f"abs(q - k) in 1..{self.random.choice(['3', 'w'])}",
            ]
        )


def parsed(text: str) -> patterndsl.Pattern:
    """The pattern with the parameters that it names: small sizes are looked at for each value of any other, too."""
    params = ", ".join(f"{name}: {value}" for name, value in PARAMS.items() if re.search(rf"\b{name}\b", text))
    return patterndsl.parse(f'params: {{{params}}}\nattend: "{text}"')


def mask_at(pattern: patterndsl.Pattern, n: int, values: dict[str, int], head: int = 0, layer: int = 0) -> Any:
    """bool [n, n] by brute force."""
    declared = {item.name for item in pattern.resolved.params}
    known = pattern.with_params(**{name: value for name, value in values.items() if name in declared})
    kept = brute.keep(known.spec, brute.lengths(n), head + 1, layer)
    return kept[min(head, len(kept) - 1)]


def holds(claim: str, mask: Any, other: Any) -> bool:
    n = len(mask)
    match claim.replace("-", "_"):
        case "causal":
            return not np.triu(mask, 1).any()
        case "rows_nonempty":
            return bool(mask.any(axis=1).all())
        case "symmetric":
            return bool((mask == mask.T).all())
        case "within":
            return not (mask & ~other).any()
        case _:
            assert n == len(other)
            return bool((mask == other).all())


def refutes(claim: str, found: Refuted, mask: Any, other: Any) -> bool:
    """Whether the witness shows what it is said to show."""
    q, k = found.witness.q, found.witness.k
    if claim == "rows_nonempty":
        return k is None and not mask[q].any()
    assert k is not None
    match claim:
        case "causal":
            return bool(mask[q, k]) and k > q
        case "symmetric":
            return bool(mask[q, k]) and not mask[k, q]
        case "within":
            return bool(mask[q, k]) and not other[q, k]
        case _:
            return bool(mask[q, k] != other[q, k])


def assert_right(claim: Claim, verdict: Verdict, first: patterndsl.Pattern, second: patterndsl.Pattern | None) -> None:
    """A proof holds at every size that is tried, but where it assumes something; a witness is one."""
    if isinstance(verdict, Refuted):
        at = verdict.witness
        masks = [mask_at(side, at.n, dict(at.params), at.head, at.layer) for side in (first, second) if side]
        assert refutes(claim, verdict, masks[0], masks[-1]), str(verdict)
    if isinstance(verdict, Proven) and ", where " not in verdict.scope:
        for n, w, g, s in SIZES:
            values = {"w": w, "g": g, "s": s}
            masks = [mask_at(side, n, values) for side in (first, second) if side is not None]
            assert holds(claim, masks[0], masks[-1]), f"{verdict} at N = {n}, {values}"


CHUNKS, PER_CHUNK = 40, 55


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_patterns(chunk: int) -> None:
    """What isl decides, with little work; every tenth with the search of small sizes before it."""
    made = Generator(chunk)
    decided = 0
    for number in range(PER_CHUNK):
        claim = CLAIMS[number % len(CLAIMS)]
        text = made.pattern()
        first = parsed(text)
        second = None
        if claim in ("equals", "within"):
            second = parsed(
                made.random.choice([f"({text}) | ({made.atom()})", f"({text}) & ({made.atom()})", made.pattern(1)])
            )
        other = None if second is None else second.resolved
        problem = _Problem(claim, first.resolved, other, None, {}, operations=200_000)
        found = problem.search() if number % 10 == 7 else None
        verdict = problem.decide() if found is None else found
        assert_right(claim, verdict, first, second)
        decided += not isinstance(verdict, Unknown)
    assert decided >= 0.7 * PER_CHUNK, f"only {decided} of {PER_CHUNK} decided"


# ---- true claims, and claims that are nearly true -----------------------------------------------------------

TRUE = [
    ("causal & window(w)", "causal", None),
    ("recent(w)", "causal", None),
    ("block(s) & causal", "causal", None),
    ("blocks(s, recent(2)) & causal", "causal", None),
    ("causal & (recent(s) | strided(s))", "causal", None),
    ("(causal) at (q // s, k // s) & k <= q", "causal", None),
    ("k < q", "causal", None),
    ("shifted(causal, 1)", "causal", None),
    ("causal", "rows_nonempty", None),
    ("window(0)", "rows_nonempty", None),
    ("recent(w + 1)", "rows_nonempty", None),
    ("block(s)", "rows_nonempty", None),
    ("causal & global(1)", "rows_nonempty", None),
    ("strided(s) & causal", "rows_nonempty", None),
    ("window(w)", "symmetric", None),
    ("block(s)", "symmetric", None),
    ("strided(s)", "symmetric", None),
    ("global(g)", "symmetric", None),
    ("dilated(w, s)", "symmetric", None),
    ("recent(w + 1)", "equals", "window(w, 0)"),
    ("causal & window(w)", "equals", "window(w, 0)"),
    ("transpose(causal)", "equals", "q <= k"),
    ("blocks(1, window(w))", "equals", "window(w)"),
    ("recent(6)", "equals", "0 <= q - k < 6"),
    ("dilated(w, 1)", "equals", "window(w)"),
    ("strided(6)", "equals", "strided(2) & strided(3)"),
    ("block(s)", "within", "window(s - 1)"),
    ("dilated(w, s)", "within", "window(w * s)"),
    ("block(4)", "within", "block(8)"),
    ("blocks(s, recent(2)) & causal", "within", "recent(2 * s)"),
    ("recent(w)", "within", "recent(w + g)"),
]
FALSE = [
    ("window(w, 1)", "causal", None),
    ("blocks(s, recent(2))", "causal", None),
    ("recent(w) | global(1)", "causal", None),
    ("causal | q < 1", "causal", None),
    ("shifted(causal, 0 - 1)", "causal", None),
    ("(causal) at (q // s, k // s)", "causal", None),
    ("k <= q + q % 2", "causal", None),
    ("block(5) | recent(9)", "causal", None),
    ("recent(w)", "rows_nonempty", None),
    ("k < q", "rows_nonempty", None),
    ("causal & columns(s, 1)", "rows_nonempty", None),
    ("recent(5) - block(4)", "rows_nonempty", None),
    ("causal & strided(s) & k != q", "rows_nonempty", None),
    ("recent(2)", "symmetric", None),
    ("first(g)", "symmetric", None),
    ("window(w, g)", "symmetric", None),
    ("blocks(3, recent(2))", "symmetric", None),
    ("columns(4, 1) | block(4)", "symmetric", None),
    ("recent(w)", "equals", "window(w, 0)"),
    ("block(8)", "equals", "window(7)"),
    ("dilated(3, 2)", "equals", "window(6)"),
    ("strided(4)", "equals", "strided(2) & strided(4) & q != 11"),
    ("blocks(4, window(1))", "equals", "window(4)"),
    ("columns(8, 2)", "equals", "k % 8 > 6"),
    ("block(s)", "within", "window(s - 2)"),
    ("block(4)", "within", "block(6)"),
    ("blocks(4, recent(2)) & causal", "within", "recent(7)"),
    ("dilated(w, s)", "within", "window(w + s)"),
    ("global(2)", "within", "first(2)"),
    ("recent(9)", "within", "block(8) | recent(8)"),
    ("causal & window(300)", "within", "recent(300)"),
]


@pytest.mark.parametrize(("text", "claim", "other"), TRUE)
def test_true_claims(text: str, claim: Claim, other: str | None) -> None:
    second = None if other is None else parsed(other)
    verdict = parsed(text).prove(claim, second)
    assert isinstance(verdict, Proven), str(verdict)
    assert_right(claim, verdict, parsed(text), second)


@pytest.mark.parametrize(("text", "claim", "other"), FALSE)
def test_claims_that_are_nearly_true(text: str, claim: Claim, other: str | None) -> None:
    second = None if other is None else parsed(other)
    verdict = parsed(text).prove(claim, second)
    assert isinstance(verdict, Refuted), str(verdict)
    assert_right(claim, verdict, parsed(text), second)


def test_a_witness_has_the_smallest_length() -> None:
    verdict = patterndsl.parse("recent(300)").prove("equals", patterndsl.parse("window(300, 0)"))
    assert isinstance(verdict, Refuted)
    assert (verdict.witness.n, verdict.witness.q, verdict.witness.k) == (301, 300, 0)


@pytest.mark.parametrize(
    ("text", "inputs", "n", "witness"),
    [
        ("within(doc, causal)", {"doc": "int[N]"}, 3, {"doc": (0, 1, 0)}),
        ("causal | q.pad & ~k.pad", {"pad": "bool[N]"}, 2, {"pad": (1, 0)}),
        ("k < table[q.doc]", {"doc": "int[N]", "table": "int[]"}, 2, None),
        ("q.doc.rank >= k.doc.rank", {"doc": "int[N]"}, 2, {"doc": (1, 0)}),
        ("causal | q.a == 2 & k.b == 2 & q.b == 0", {"a": "int[N]", "b": "int[N]"}, 2, {"a": (2, 0), "b": (0, 2)}),
    ],
)
def test_inputs_of_few_values_are_all_looked_at(
    text: str, inputs: dict[str, str], n: int, witness: dict[str, tuple[int, ...]] | None
) -> None:
    for length in (None, n):
        verdict = patterndsl.parse(text, inputs=inputs).prove("causal", n=length)
        assert isinstance(verdict, Refuted), str(verdict)
        assert verdict.witness.n == n
        assert witness is None or verdict.witness.inputs == witness


@pytest.mark.parametrize(
    ("text", "claim", "other"),
    [
        ("causal & q * k > 5", "causal", None),
        ("causal - (q * k > 5)", "causal", None),
        ("causal & (window(w) | isqrt(q * k) % 3 == 1)", "causal", None),
        ("recent(w) & q * k > 5", "within", "recent(w + 1)"),
        ("recent(w)", "within", "window(w) | q * k > 5"),
        ("window(w) | q * k > 5", "rows_nonempty", None),
    ],
)
def test_what_is_not_affine_is_left_out_where_the_rest_decides(text: str, claim: Claim, other: str | None) -> None:
    second = None if other is None else parsed(other)
    verdict = parsed(text).prove(claim, second)
    assert isinstance(verdict, Proven), str(verdict)
    assert_right(claim, verdict, parsed(text), second)


@pytest.mark.parametrize("text", ["q * k > 5 & k <= q + (q * k) % 2 - 1", "k * k <= q * q"])
def test_what_is_not_affine_proves_nothing_alone(text: str) -> None:
    assert isinstance(parsed(text).prove("causal"), Unknown)


@pytest.mark.parametrize(
    "verdict",
    [
        patterndsl.parse("causal").prove("causal"),
        patterndsl.parse("window(1)").prove("causal"),
        patterndsl.parse("k * k <= q * q").prove("causal"),
    ],
    ids=["Proven", "Refuted", "Unknown"],
)
def test_a_verdict_is_no_truth_value(verdict: Verdict) -> None:
    with pytest.raises(TypeError, match="isinstance"):
        bool(verdict)


def test_lengths_have_separators() -> None:
    assert str(patterndsl.parse("causal").prove("causal", n=10**12)) == "Proven: causal, for N = 1,000,000,000,000"


# ---- hard ones ----------------------------------------------------------------------------------------------

HARD = {
    "40 terms": " | ".join(f"(q - k) % {7 + at} == {at % 5} & k >= {at}" for at in range(40)),
    "40 windows": "causal & (" + " | ".join(f"window({at * 9}) & q % {at + 2} == 1" for at in range(40)) + ")",
    "nested at": "((((causal & window(9)) at (q // 2, k // 2)) at (q // 3, k)) at (q, k // 2)) at (q + k // 5, k)",
    "coprime moduli": "causal & q % 7 == k % 11 & q % 13 == k % 17",
    "large coprime moduli": "causal & (q % 10007 == k % 10009 | (q - k) % 9973 == 1)",
    "deep": "(" * 30 + "causal" + "".join(f" {'&' if at % 2 else '|'} window({at + 1}))" for at in range(30)),
    "many symbols": "(q // s + k // w2) % 3 == (q // (s * w2) + k % s) % 5 & k % w2 <= q % s",
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("claim", ["causal", "rows_nonempty", "symmetric"])
def test_hard_patterns_are_decided_or_given_up_in_time(name: str, claim: Claim) -> None:
    params = {"s": 3, "w2": 4} if name == "many symbols" else None
    pattern = patterndsl.parse(HARD[name], params=params)
    start = time.process_time()
    verdict = pattern.prove(claim)
    assert time.process_time() - start < 60  # no race with the clock: a hang
    if isinstance(verdict, Unknown):
        assert verdict.reason
    mask = brute.keep(pattern.spec, brute.lengths(12))[0]
    if isinstance(verdict, Proven):
        assert holds(claim, mask, mask)
    if isinstance(verdict, Refuted):
        at = verdict.witness
        seen = pattern.with_params(**dict(at.params)).compile(at.n).mask()[0].numpy()
        assert refutes(claim, verdict, seen, seen)


@pytest.mark.parametrize("name", HARD)
def test_hard_patterns_have_a_report_in_time(name: str) -> None:
    params = {"s": 3, "w2": 4} if name == "many symbols" else None
    pattern = patterndsl.parse(HARD[name], params=params)
    start = time.process_time()
    report = pattern.report(200)
    assert time.process_time() - start < 60
    assert report.pairs is not None and report.pairs.value == int(pattern.compile(200).mask().sum())


@pytest.mark.parametrize(
    ("text", "least"),
    [
        ("causal & strided(s)", 1),  # settled without a look at the stride
        ("causal & (recent(3) | strided(s) & k >= q - 16 * s)", 1),
        ("causal & (q // (s * 2) == k)", 1),
        ("causal & recent(s)", 0),
    ],
)
def test_what_is_divided_by_is_at_least_1_however_the_proof_went(text: str, least: int) -> None:
    verdict = patterndsl.parse(text, params={"s": 4}).prove("causal")
    assert isinstance(verdict, Proven)
    assert verdict.scope == f"for all N and all s ≥ {least}"


def test_a_parameter_beside_an_input_on_the_diagonal() -> None:
    """What is known where q is k names the parameter, which nothing else does."""
    text = "causal & q.x - k.x <= back & q != k | q == k"
    verdict = patterndsl.parse(text, params={"back": 1}, inputs={"x": "int[N]"}).prove("causal")
    assert isinstance(verdict, Proven)
    assert verdict.scope == "for all N and all back ≥ 0"


LISTS = "params: {d: [1, 2]}\nattend: causal & {extra}(head < 1 & recent(4) | head >= 1 & dilated(2, d[head]))"


@pytest.mark.parametrize(("extra", "outcome"), [("", Proven), ("q != k & ", Refuted)])
def test_heads_are_those_that_lists_have_items_for(extra: str, outcome: type[Verdict]) -> None:
    pattern = patterndsl.parse(LISTS.replace("{extra}", extra))
    assert isinstance(pattern.prove("rows_nonempty"), outcome)


@pytest.mark.parametrize(
    "text",
    [
        "params: {w: 128, g: 4, s: 64}\ninputs: {doc: 'int[N]'}\n"
        "attend: same(doc) & (window(w) | strided(s)) | global(g)",
        "params: {f: 64}\ndefine: {dt: abs(q // f - k // f), ds: abs(q % f - k % f)}\n"
        "attend: dt <= 1 | ds <= f // max(1, dt)",
        "params: {h: 8, w: 8}\ngrid: {t: N // 64, y: h, x: w}\n"
        "attend: abs(q.y - k.y) <= 1 & abs(q.x - k.x) <= 1 & abs(q.t - k.t) <= 1 | along(t) | along(y) | along(x)",
        "random(2, seed = 1) | transpose(random(2, seed = 1))",
    ],
)
def test_what_is_symmetric_in_its_terms(text: str) -> None:
    assert isinstance(patterndsl.parse(text).prove("symmetric"), Proven)


@pytest.mark.parametrize(
    "text",
    ["window(3, 2) | strided(4)", "global(2) & k < 5", "random(2, seed = 1) | strided(4)", "abs(q - k) <= q | q < 2"],
)
def test_what_is_not_symmetric_in_some_term(text: str) -> None:
    assert isinstance(patterndsl.parse(text).prove("symmetric"), Refuted)
