"""What a selection may be told, and what is said of mistakes."""

from __future__ import annotations

import pytest

import patterndsl
from patterndsl.diagnostics import PatternError


@pytest.mark.parametrize(
    ("selector", "code", "said"),
    [
        ("top(3)", "E202", "unknown selector `top`"),
        ("topk", "E204", "`topk` needs `k`"),
        ("topk(of = blocks(4))", "E204", "`topk` needs `k`"),
        ("topk(3, blocks(4))", "E204", "takes this setting by name"),
        ("topk(3, size = 4)", "E204", "size"),
        ("topk(3, of = 4)", "E203", "neither tokens nor blocks"),
        ("topk(3, of = blocks(4, 5))", "E203", "neither tokens nor blocks"),
        ("topk(3, by = average)", "E202", "`by` is not `average`"),
        ("topk(3, by = 2)", "E202", "`by` is a word"),
        ("topk(3, heads = none)", "E202", "`heads` is not `none`"),
        ("topk(3, by = learned, heads = each)", "E204", "for all heads"),
        ("topk(3, among = 4)", "E203", "must be a predicate"),
        ("topk(3, among = same(doc))", "E209", "depends on an input"),
        ("topk(3, among = top)", "E201", "unknown name `top`"),
        ("topk(q)", "E209", "cannot depend on a position"),
        ("topk(recent(3))", "E203", "must be an integer"),
        ("topk(3, k = 4)", "E204", "k"),
        ("given", "E204", "`given` needs `k`"),
        ("given(3, by = mean)", "E204", "by"),
        ("members(c)", "E204", "`members` needs `top`"),
        ("members(doc, top = 3)", "E202", "no centroids"),
        ("members(b, top = 3)", "E202", "no centroids"),
        ("members(4, top = 3)", "E203", "attribute"),
        ("3 + 4", "E202", "made by a selector"),
    ],
)
def test_mistakes(selector: str, code: str, said: str) -> None:
    text = f"""
inputs:
  doc: int[N]
labels:
  c: kmeans(clusters = 4)
  b: lsh(buckets = 4)
select:
  top: {selector}
attend: top
"""
    with pytest.raises(PatternError) as failed:
        patterndsl.parse(text)
    found = failed.value.diagnostics
    assert any(item.code == code and said in item.message for item in found), found
    assert all(item.where is not None for item in found)


@pytest.mark.parametrize("attend", ["blocks(4, top)", "transpose(top)", "top at (q + 1, k)"])
def test_other_queries_have_no_lists(attend: str) -> None:
    with pytest.raises(PatternError, match="for the queries of the sequence"):
        patterndsl.parse(f"select: {{top: topk(3)}}\nattend: {attend}\n")


@pytest.mark.parametrize("name", ["width", "b", "s"])
def test_sizes_are_positive(name: str) -> None:
    params = "{width: 3, b: 4, s: 4}"
    text = f"params: {params}\nselect: {{top: 'topk(width, of = blocks(b), per = blocks(s))'}}\nattend: top\n"
    with pytest.raises(PatternError) as failed:
        patterndsl.parse(text).with_params(**{name: 0}).compile(16)
    assert {item.code for item in failed.value.diagnostics} <= {"E402", "E403"}


def test_a_selection_is_written_again() -> None:
    selector = "topk(3, of = blocks(4), among = k < q)"
    text = f"select: {{top: '{selector}'}}\ndefine: {{near: top | recent(3)}}\nattend: causal & near\n"
    pattern = patterndsl.parse(text)
    assert patterndsl.parse(pattern.text) == pattern
    assert "topk(3, of = blocks(4), among = k < q)" in pattern.text


def test_a_name_means_one_selection() -> None:
    with pytest.raises(PatternError, match="declared twice"):
        patterndsl.parse("params: {top: 3}\nselect: {top: topk(3)}\nattend: top\n")


def test_an_unused_selection_is_told() -> None:
    warnings = patterndsl.parse("select: {top: topk(3)}\nattend: causal\n").lint()
    assert any("selection `top` is never used" in item.message for item in warnings)
