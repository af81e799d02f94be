"""A relation written and read is the same relation; what is none is refused."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any, get_args

import pytest
from hypothesis import given

import patterndsl
from patterndsl.ir.codec import FIELDS, read, written
from patterndsl.ir.index import Const, Index, Param, Select, Var
from patterndsl.ir.relation import EVERYTHING, Compare, Random, Relation
from tests.strategies import Case, cases, many


def test_the_table_has_every_node_with_its_fields() -> None:
    assert set(FIELDS) == {*get_args(Index), *get_args(Relation)}
    for node, kinds in FIELDS.items():
        assert len(kinds) == sum(field.compare for field in fields(node))


@many(3)
@given(case=cases())
def test_reading_is_the_inverse_of_writing(case: Case) -> None:
    pattern = case.pattern()
    bound = case.bound(pattern)
    for relation in (pattern.resolved.relation, bound.relation, *(group.relation for group in bound.groups)):
        data = json.loads(json.dumps(written(relation)))
        assert read(data) == relation
        assert written(read(data)) == data


def test_a_list_parameter_keeps_its_name() -> None:
    relation = Compare("<", Select("widths", Var("head")), Param("w"))
    assert read(written(relation)) == relation


def test_what_stands_twice_is_written_once() -> None:
    relation = patterndsl.parse("(q + k) % 7 == 0 & (q + k) % 9 == 0").bind(100).groups[0].relation
    rows = written(relation)
    assert len(rows) == len({json.dumps(row) for row in rows})


def test_draws_are_kept() -> None:
    (group,) = patterndsl.parse("blocks(8, random(2, seed = 5, avoid = window(1)))").bind(100).groups
    assert isinstance(group.relation, Random)
    assert read(written(group.relation)) == group.relation


@pytest.mark.parametrize(
    "data",
    [
        [],
        [["Const", 1]],
        [["Const", True], ["Compare", "<", 0, 0]],
        [["Const", "1"], ["Compare", "<", 0, 0]],
        [["Const", 1], ["Compare", "<", 0, 1]],
        [["Const", 1], ["Compare", "<", 0, -1]],
        [["Const", 1], ["Compare", ">", 0, 0]],
        [["Const", 1], ["Compare", "<", 0]],
        [["Const", 1], ["Not", 0]],
        [["Everything"], ["And", 0]],
        [["Everything"], ["Holds", 0]],
        [["object"]],
        [["Everything", 1]],
        [[]],
        ["Everything"],
        [[["Everything"]]],
    ],
    ids=str,
)
def test_what_is_no_relation_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match=r"node|field|last|is no"):
        read(data)


def test_everything_is_one_node() -> None:
    assert written(EVERYTHING) == [["Everything"]]
    assert read([["Everything"]]) == EVERYTHING
    assert written(Compare("<", Const(1), Const(2)))[-1] == ["Compare", "<", 0, 1]
