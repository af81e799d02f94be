"""Who runs a pattern: what was asked for, what the device has, and what the tensors of a call are."""

from __future__ import annotations

import pytest

import patterndsl
from patterndsl.lower.choice import NO_HULLS, NO_PLAN, Choice, Refusal, Verdict, refusal_of_terms
from patterndsl.lower.devices import built_in
from patterndsl.lower.fallback import Call

DOC = "inputs: {doc: 'int[N]'}\n"
LABELS = "labels: {b: given}\n"
LISTS = "select: {top: 'given(2, of = blocks(16))'}\n"
ROUTES = "labels: {c: 'kmeans(clusters = 8)'}\nselect: {route: 'members(c, top = 64)'}\n"
ANY = f"{DOC}attend: causal & q.doc < k.doc"
FLOAT32, BFLOAT16, FLOAT64 = (Call(dtype, 64, 64, False) for dtype in ("float32", "bfloat16", "float64"))


def choice(text: str, kind: str = "cpu", asked: str = "auto", n: int = 4096, heads: int = 2) -> Choice:
    bound = patterndsl.parse(text).bind(n, heads=heads)
    return Choice(bound, built_in(kind), kind, asked, has_kernels=kind == "cuda")


@pytest.mark.parametrize(
    ("text", "kind", "call", "who"),
    [
        ("causal", "cpu", FLOAT32, "planned"),
        ("causal", "cpu", Call("float32", 64, 32, False), "gathered"),
        ("causal", "cuda", BFLOAT16, "planned"),
        ("causal", "cuda", FLOAT32, "flex"),
        (f"{DOC}attend: causal & same(doc)", "cuda", FLOAT32, "told"),
        (f"{DOC}attend: causal & same(doc)", "cuda", FLOAT64, "gathered"),
        (f"{DOC}attend: causal & same(doc)", "cpu", FLOAT32, "masked"),
        (f"{LABELS}attend: causal & chunks(b, 16, 1)", "cuda", BFLOAT16, "ordered"),
        (f"{LABELS}fallback: q == k\nattend: causal & chunks(b, 16, 1)", "cuda", BFLOAT16, "ordered"),
        (f"{LABELS}fallback: first(3)\nattend: causal & chunks(b, 16, 1)", "cuda", BFLOAT16, "parts"),
        (f"{LABELS}attend: causal & chunks(b, 16, 1)", "cpu", FLOAT32, "chunked"),
        (f"{LABELS}merge: multiset\nfallback: q == k\nattend: chunks(b, 16, 1)", "cpu", FLOAT64, "chunked"),
        (f"{LABELS}attend: causal & chunks(b, 16, 1)", "cpu", Call("float32", 64, 64, True), "gathered"),
        (f"{LABELS}fallback: first(3)\nattend: causal & chunks(b, 16, 1)", "cpu", FLOAT32, "parts"),
        (f"{LABELS}attend: causal & chunks(b, 16, 1) | same(b)", "cpu", FLOAT32, "masked"),
        (f"{ROUTES}merge: mean\nattend: causal & route", "cpu", FLOAT32, "routed"),
        (f"{ROUTES}merge: multiset\nattend: causal & route", "cpu", FLOAT32, "parts"),
        (f"{ROUTES}merge: mean\nattend: causal & route | recent(9)", "cpu", FLOAT32, "parts"),
        (f"{ROUTES}merge: mean\nfallback: q == k\nattend: causal & route", "cpu", FLOAT32, "parts"),
        (f"{LISTS}attend: causal & top", "cuda", BFLOAT16, "slotted"),
        (f"{LISTS}attend: causal & top", "cuda", Call("bfloat16", 64, 264, False), "masked"),
        ("merge: multiset\nattend: recent(3) | first(2)", "cpu", FLOAT32, "parts"),
    ],
)
def test_who_runs_by_rule(text: str, kind: str, call: Call, who: str) -> None:
    found = choice(text, kind).of(call)
    assert isinstance(found, Verdict) and found.who == who


def test_a_rule_is_the_reason() -> None:
    left, kept = choice("causal", "cuda").of(FLOAT32), choice("causal", "cuda").of(BFLOAT16)
    assert isinstance(left, Verdict) and left.rule is not None and "float32" in left.rule.when
    assert isinstance(kept, Verdict) and kept.rule is None and kept.if_not_finite is None
    on_cpu = choice("causal").of(FLOAT32)
    assert isinstance(on_cpu, Verdict) and on_cpu.if_not_finite == "gathered"


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ("planned", "causal"),
        ("masked", f"{DOC}attend: recent(16) & same(doc)"),
        ("masked", f"{LABELS}attend: causal & chunks(b, 16, 1)"),
        ("masked", f"{ROUTES}merge: mean\nattend: causal & route"),
    ],
)
def test_what_was_asked_for_refuses_what_is_not_finite(asked: str, text: str) -> None:
    """Where passes on a CPU may mask."""
    found = choice(text, "cpu", asked).of(FLOAT32)
    assert isinstance(found, Verdict) and isinstance(found.if_not_finite, Refusal)
    assert f"the {asked} backend does not take tensors with NaN" in found.if_not_finite.message


@pytest.mark.parametrize("asked", ["planned", "masked", "flex", "triton"])
def test_what_was_asked_for_refuses_what_it_cannot_do(asked: str) -> None:
    text = f"{DOC}attend: recent(16) & q.doc < k.doc" if asked == "masked" else "causal"
    chosen = choice(text, "cuda", asked)
    assert chosen.of(BFLOAT16) == Verdict(chosen.usual)
    refused = chosen.of(FLOAT64 if asked != "masked" else Call("float64", 64, 64, True))
    if asked == "masked":  # kernels leave it to the backend, and that refuses
        assert chosen.by_inputs is not None
    assert isinstance(refused, Refusal) and f"the {asked} backend does not take" in refused.message


def test_what_no_tensors_make_possible() -> None:
    assert choice(ANY, asked="planned").of(FLOAT32) == NO_PLAN
    assert choice(ANY, asked="masked").of(FLOAT32) == NO_HULLS
    assert choice("causal", asked="planned").refusal is None
    for asked in ("planned", "masked"):
        refused = patterndsl.parse(ANY).compile(8192, backend=asked)
        reason = refused.choice.refusal
        assert reason is not None and reason.message in refused.explain().runs


def test_who_takes_what_is_not_finite() -> None:
    plain = f"{LABELS}attend: causal & chunks(b, 16, 1)"
    by_head = Call("float32", 64, 64, False, by_head=True)
    assert choice(plain).of(FLOAT32) == Verdict("chunked", None, "gathered")
    assert choice(plain).of(by_head) == Verdict("chunked", None, "parts")
    assert choice(f"{LABELS}merge: multiset\nattend: chunks(b, 16, 1)").of(FLOAT32) == Verdict("chunked", None, "parts")


def test_routes_of_many_members_are_parts() -> None:
    text = f"{ROUTES}merge: mean\nattend: causal & route".replace("64", "1024")
    assert choice(text).of(FLOAT32) == Verdict("parts")


def test_heads_with_inputs_of_their_own_are_parts_but_of_kernels() -> None:
    by_head = Call("float32", 64, 64, False, by_head=True)
    assert choice(ANY).of(by_head) == Verdict("parts")
    assert choice(ANY, "cuda", "triton").of(by_head) == Verdict("triton")
    assert choice(f"{DOC}attend: causal & same(doc)", "cuda").of(by_head) == Verdict("told")


def test_terms_that_run_in_one_way() -> None:
    assert refusal_of_terms({"scored"}, "auto") is None
    assert refusal_of_terms({"scored"}, "gathered") is None
    assert refusal_of_terms({"planned", "summed"}, "flex") is None
    scored, summed = refusal_of_terms({"scored"}, "oracle"), refusal_of_terms({"summed"}, "gathered")
    assert scored is not None and "more than products" in scored.message
    assert summed is not None and "sums" in summed.message
