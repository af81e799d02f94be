"""What later tokens may choose: causality of keys and of the choice, witnesses against plain loops."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

import patterndsl
from patterndsl.analysis.selection import leaks, prove_causality
from patterndsl.analysis.verdict import Proven, Refuted, Unknown, Witness
from patterndsl.ir.index import Const
from patterndsl.sema import learners
from patterndsl.sema.model import LabelDeclaration

Labels = Sequence[int]


def with_label(attend: str, learner: str = "given", more: str = "") -> patterndsl.Pattern:
    """A pattern that may read the label `bucket`."""
    return patterndsl.parse(f'{more}\nlabels: {{bucket: "{learner}"}}\nattend: "{attend}"\n')


def places(label: Labels) -> list[int]:
    """The place of each position in the stable order by label."""
    order = sorted(range(len(label)), key=lambda at: (label[at], at))
    found = [0] * len(label)
    for place, at in enumerate(order):
        found[at] = place
    return found


def in_chunks(q: int, k: int, label: Labels, m: int, back: int) -> bool:
    """causal & chunks(bucket, m, back)"""
    place = places(label)
    return k <= q and 0 <= place[q] // m - place[k] // m <= back


def labels_of(witness: Witness) -> tuple[Labels, Labels]:
    """The two labels, which agree up to the query and have as many values as positions."""
    first, second = witness.inputs["bucket"], witness.changed["bucket"]
    assert len(first) == len(second) == witness.n
    assert first[: witness.q + 1] == second[: witness.q + 1]
    assert first != second
    return first, second


@pytest.mark.parametrize(
    "attend",
    [
        "causal & same(bucket)",
        "causal & (same(bucket) | recent(2))",
        "causal & q.bucket.start == k.bucket.start",
        "causal & k >= q.bucket.start",
        "causal & (same(bucket) at (q // 2, k // 2))",
        "causal & (same(bucket) at (max(q, k), k))",
    ],
)
@pytest.mark.parametrize("learner", ["given", "lsh(buckets = 4, rounds = 2)", "kmeans(clusters = 16)"])
def test_what_tokens_up_to_the_query_decide(attend: str, learner: str) -> None:
    pattern = with_label(attend, learner)
    assert str(pattern.prove("causal")) == "Proven: causal, for all N: value-causal and pattern-causal"
    assert str(pattern.prove("value_causal")) == "Proven: value-causal, for all N"
    assert str(pattern.prove("pattern-causal")) == "Proven: pattern-causal, for all N"


@pytest.mark.parametrize("learner", ["given", "lsh(buckets = 4, rounds = 2)", "kmeans(clusters = 64)"])
@pytest.mark.parametrize(("m", "back"), [(1, 1), (2, 0), (2, 1), (5, 2), (64, 1)])
def test_the_order_by_label_lets_later_tokens_choose(m: int, back: int, learner: str) -> None:
    pattern = with_label(f"causal & chunks(bucket, {m}, {back})", learner)
    assert isinstance(pattern.prove("value_causal"), Proven)
    for claim in ("pattern_causal", "causal"):
        verdict = pattern.prove(claim)
        assert isinstance(verdict, Refuted)
        standing = "" if claim == "pattern_causal" else "value-causal is proven (for all N), but the selection is not: "
        assert verdict.why == f"{standing}`bucket.rank` sees the whole sequence"
        at = verdict.witness
        first, second = labels_of(at)
        assert at.k is not None
        assert in_chunks(at.q, at.k, first, m, back)
        assert not in_chunks(at.q, at.k, second, m, back)
        pattern.bind(at.n)  # the spec allows this length


def test_parameters_are_searched_and_fixed() -> None:
    pattern = with_label("causal & chunks(bucket, m, back)", more="params: {m: {default: 64, min: 1}, back: 1}")
    for params in ({}, {"m": 3}, {"m": 64, "back": 1}):
        verdict = pattern.prove("pattern_causal", params=params)
        assert isinstance(verdict, Refuted)
        at = verdict.witness
        assert params.items() <= at.params.items()
        first, second = labels_of(at)
        assert at.k is not None
        assert in_chunks(at.q, at.k, first, at.params["m"], at.params["back"])
        assert not in_chunks(at.q, at.k, second, at.params["m"], at.params["back"])


@pytest.mark.parametrize("n", [8, 100, 1000, 100_000])
def test_a_length_that_is_given(n: int) -> None:
    verdict = with_label("causal & chunks(bucket, 2, 1)").prove("pattern_causal", n=n)
    assert isinstance(verdict, Refuted)
    assert verdict.witness.n == n
    first, second = labels_of(verdict.witness)
    assert verdict.witness.k is not None
    assert in_chunks(verdict.witness.q, verdict.witness.k, first, 2, 1)
    assert not in_chunks(verdict.witness.q, verdict.witness.k, second, 2, 1)


@pytest.mark.parametrize("n", [0, 1])
def test_where_there_are_no_later_tokens(n: int) -> None:
    assert isinstance(with_label("causal & chunks(bucket, 2, 1)").prove("causal", n=n), Proven)


def test_what_is_too_long_is_unknown() -> None:
    verdict = with_label("causal & chunks(bucket, 2, 1)").prove("causal", n=10**9)
    assert isinstance(verdict, Unknown)
    assert "value-causal is proven (for N = 1,000,000,000)" in verdict.reason
    assert "`bucket.rank` sees the whole sequence" in verdict.reason


@pytest.mark.parametrize(
    ("attend", "holds"),
    [
        ("causal & (same(bucket) at (q + 1, k))", lambda q, k, x: k <= q and q + 1 < len(x) and x[q + 1] == x[k]),
        ("same(bucket)", lambda q, k, x: x[q] == x[k]),
        ("causal & (same(bucket) at (q, N - 1))", lambda q, k, x: k <= q and x[q] == x[-1]),
    ],
)
def test_labels_of_later_tokens(attend: str, holds: object) -> None:
    verdict = with_label(attend).prove("pattern_causal")
    assert isinstance(verdict, Refuted)
    assert verdict.why == "`bucket` is read at a later position"
    at = verdict.witness
    first, second = labels_of(at)
    assert callable(holds)
    assert holds(at.q, at.k, first)
    assert not holds(at.q, at.k, second)


@pytest.mark.parametrize("attend", ["causal & recent(3)", "window(3)", "all", "none", "k <= N // 2"])
def test_what_reads_no_label_is_chosen_before_there_are_tokens(attend: str) -> None:
    pattern = patterndsl.parse(attend)
    assert str(pattern.prove("pattern_causal")) == "Proven: pattern-causal, for all N"
    value, causal = pattern.prove("value_causal"), pattern.prove("causal")
    assert replace(value, claim="causal") == causal
    unread = with_label(attend)
    assert unread.prove("causal") == causal


def test_inputs_are_not_made_of_tokens() -> None:
    pattern = patterndsl.parse("causal & chunks(doc, 2, 1)", inputs={"doc": "int[N]"})
    assert str(pattern.prove("causal")) == "Proven: causal, for all N"
    assert str(pattern.prove("pattern_causal")) == "Proven: pattern-causal, for all N"


def test_an_input_that_is_declared_a_label() -> None:
    pattern = patterndsl.parse("causal & chunks(bucket, 2, 1)", inputs={"bucket": "int[N]"})
    place = pattern.resolved.inputs[0].place
    label = LabelDeclaration("bucket", "lsh", (("buckets", Const(4)), ("rounds", Const(1)), ("seed", Const(0))), place)
    labelled = replace(pattern.resolved, labels=(label,))
    assert [str(leak) for leak in leaks(labelled)] == ["`bucket.rank` sees the whole sequence"]
    verdict = prove_causality("causal", labelled)
    assert isinstance(verdict, Refuted)
    assert max(*verdict.witness.inputs["bucket"], *verdict.witness.changed["bucket"]) < 4


def test_inputs_beside_labels_stay_as_they_are() -> None:
    pattern = with_label("causal & chunks(bucket, 1, 1) & same(doc)", more='inputs: {doc: "int[N]"}')
    verdict = pattern.prove("pattern_causal")
    assert isinstance(verdict, Refuted)
    at = verdict.witness
    assert at.k is not None
    assert set(at.changed) == {"bucket"}
    first, second = labels_of(at)
    doc = at.inputs["doc"]
    assert doc[at.q] == doc[at.k]
    assert in_chunks(at.q, at.k, first, 1, 1)
    assert not in_chunks(at.q, at.k, second, 1, 1)


def test_a_learner_that_sees_the_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    sorts = learners.Learner("sorts", "finds clusters in the whole sequence", (), "sequence", "call")
    monkeypatch.setitem(learners.LEARNERS, "sorts", sorts)
    verdict = with_label("causal & same(bucket)", "sorts").prove("causal")
    assert isinstance(verdict, Refuted)
    assert verdict.why.endswith("but the selection is not: `bucket` sees the whole sequence")
    at = verdict.witness
    assert at.k is not None
    first, second = at.inputs["bucket"], at.changed["bucket"]
    assert at.k <= at.q < at.n - 1  # there are later tokens
    assert first[at.q] == first[at.k]
    assert second[at.q] != second[at.k]


@pytest.mark.parametrize(
    ("attend", "said"),
    [
        ("same(bucket)", "neither value-causal nor pattern-causal: the query attends a later key"),
        ("causal & same(bucket) | k < 3", "pattern-causal is proven (for all N), but value-causal is not: "),
        ("causal & chunks(bucket, 2, 1)", "value-causal is proven (for all N), but the selection is not: "),
    ],
)
def test_a_refutation_says_which_of_the_two_holds(attend: str, said: str) -> None:
    verdict = with_label(attend).prove("causal")
    assert isinstance(verdict, Refuted)
    assert str(verdict).startswith(f"Refuted: causal; {said}")


def test_labels_that_are_not_known_to_matter() -> None:
    verdict = with_label("causal & k.bucket.rank < q.bucket.rank").prove("causal")  # the order of two is theirs alone
    assert isinstance(verdict, Unknown)
    assert verdict.reason.startswith(
        "value-causal is proven (for all N); pattern-causal is unknown (`bucket.rank` sees"
    )


def test_a_witness_in_words_and_as_data() -> None:
    verdict = with_label("causal & chunks(bucket, 2, 1)").prove("pattern_causal")
    assert isinstance(verdict, Refuted)
    expected = (
        "Refuted: pattern-causal; `bucket.rank` sees the whole sequence: "
        "q = 1 attends key 0 with bucket = [1, 0, 1], and not with bucket = [1, 0, 0], at N = 3"
    )
    assert str(verdict) == expected
    witness = json.loads(json.dumps(verdict.to_dict()))["witness"]
    assert (witness["inputs"], witness["changed"]) == ({"bucket": [1, 0, 1]}, {"bucket": [1, 0, 0]})
    long = str(with_label("causal & chunks(bucket, 64, 1)", "lsh(buckets = 64)").prove("pattern_causal"))
    assert long.endswith("with bucket = 1*64,0*63,1, and not with bucket = 1*64,0*64, at N = 128")


def test_a_claim_without_labels_has_no_changed_ones() -> None:
    verdict = patterndsl.parse("window(1)").prove("causal")
    assert isinstance(verdict, Refuted)
    assert "changed" not in json.dumps(verdict.to_dict())


# ---- rows that have no keys of their own

FALLBACKS: Mapping[tuple[str, str], tuple[str, str]] = {
    ("causal & q != k", "all"): ("Refuted", "q = 0, k = 1 at N = 2"),
    ("causal & q != k", "q == k"): ("Proven", "for all N"),
    ("causal & recent(3)", "all"): ("Proven", "for all N"),
    ("causal & q - k == 30", "all"): ("Refuted", "q = 0, k = 1 at N = 2"),
    ("window(1)", "q == k"): ("Refuted", "q = 0, k = 1 at N = 2"),
}


@pytest.mark.parametrize(("attend", "fallback"), FALLBACKS)
def test_causality_with_a_fallback(attend: str, fallback: str) -> None:
    kind, said = FALLBACKS[attend, fallback]
    verdict = patterndsl.parse(f"fallback: {fallback}\nattend: {attend}\n").prove("causal")
    assert type(verdict).__name__ == kind
    assert said in str(verdict)


def test_a_fallback_may_leak() -> None:
    more = "fallback: k == 0 & q.bucket.rank % 2 == 0"
    verdict = with_label("causal & same(bucket) & q != k", more=more).prove("causal")
    assert isinstance(verdict, Refuted)
    at = verdict.witness
    first, second = labels_of(at)

    def attends(q: int, k: int, label: Labels) -> bool:
        if any(label[q] == label[other] for other in range(q)):
            return k < q and label[q] == label[k]
        return k == 0 and places(label)[q] % 2 == 0

    assert at.k is not None
    assert attends(at.q, at.k, first)
    assert not attends(at.q, at.k, second)


@pytest.mark.parametrize(
    ("attend", "fallback", "kind"),
    [
        ("causal & q != k", "q == k", "Proven"),
        ("causal & q != k", "k == q + 1", "Refuted"),
        ("causal & q != k", "k == 0", "Proven"),
        ("causal & q - k == 3", "k < q & k == 0 | q < 3 & k == q", "Proven"),
    ],
)
def test_rows_with_a_fallback(attend: str, fallback: str, kind: str) -> None:
    verdict = patterndsl.parse(f"fallback: {fallback}\nattend: {attend}\n").prove("rows_nonempty")
    assert type(verdict).__name__ == kind


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        ("fallback: q == k\nattend: window(3, 0) & q != k", "fallback: q == k\nattend: recent(4) & q != k", "Proven"),
        ("fallback: q == k\nattend: recent(4) & q != k", "fallback: all\nattend: recent(4) & q != k", "Refuted"),
        ("fallback: all\nattend: recent(4)", "attend: recent(4)", "Proven"),
    ],
)
def test_equality_with_a_fallback(first: str, second: str, kind: str) -> None:
    verdict = patterndsl.parse(first).prove("equals", patterndsl.parse(second))
    assert type(verdict).__name__ == kind
