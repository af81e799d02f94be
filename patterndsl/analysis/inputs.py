"""What data does an analysis read? Arrays of the caller, checked against the spec, or what learners can be expected to
say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from patterndsl.diagnostics import input_error
from patterndsl.ir.index import Read, Var
from patterndsl.ir.meaning import Point, member
from patterndsl.ir.relation import Compare, Relation, children
from patterndsl.lower.lookup import Lookup
from patterndsl.sema.bind import BoundSelection, InputShape

MAX_SCORES = 1 << 26
"""Of random ones, that lists are drawn by; more are too many."""
ROWS_AT_ONCE = 128
"""Rows of lists that are drawn together, so that their scores stay in the cache."""


def checked_inputs(
    shapes: Iterable[InputShape], inputs: Mapping[str, Any], others: Mapping[str, Any] | None = None
) -> Lookup:
    """The inputs that are read, as int64, and others that are known. Raises InputError: E501 on a missing one, E502 on
    a wrong shape or dtype."""
    arrays: dict[str, Any] = dict(others or {})
    for shape in shapes:
        if shape.name not in inputs:
            help = f'pass inputs={{"{shape.name}": ...}}, {_form(shape)}'
            raise input_error("E501", f"input `{shape.name}` is missing", help)
        values = np.asarray(inputs[shape.name])
        values = values[0] if values.ndim == len(shape.inner) + 1 and len(values) == 1 else values
        if values.dtype.kind not in "iub":
            raise input_error("E502", f"input `{shape.name}` has dtype {values.dtype}", f"give {shape.dtype}")
        fits = values.ndim == len(shape.inner) and all(
            size in (None, found) for size, found in zip(shape.inner, values.shape, strict=True)
        )
        if not fits:
            raise input_error("E502", f"input `{shape.name}` has shape {list(values.shape)}", f"give {_form(shape)}")
        arrays |= _named(shape, values.astype(np.int64))
    return Lookup(arrays)


def _form(shape: InputShape) -> str:
    sizes = ["any number of" if size is None else f"{size:,}" for size in shape.inner]
    return f"{sizes[0]} values in one dimension" if len(sizes) == 1 else f"values [{', '.join(sizes)}]"


def _named(shape: InputShape, values: Any) -> dict[str, Any]:
    """The values by the names that a relation reads."""
    if shape.rounds > 1:
        return dict(zip(shape.names, values, strict=True))
    return {shape.name: values.ravel()}


def expected_inputs(shapes: Iterable[InputShape]) -> dict[str, Any] | None:
    """What learners and selectors can be expected to say, by the names that a relation reads: labels at random, each
    as often as the others, and lists of candidates at random. None where only the caller knows something, or it is too
    much to draw. Work: O(values)."""
    random, arrays = np.random.default_rng(0), dict[str, Any]()
    for shape in shapes:
        values: Any = None
        if shape.selection is not None and shape.selection.selector != "given":
            values = _lists(shape.selection, shape.rounds, random)
        elif shape.learner is not None and shape.length is not None:
            settings = dict(shape.learner.settings)
            number = settings.get("buckets", settings.get("clusters"))
            if number is not None:
                labels = np.arange(shape.length, dtype=np.int64) % number
                values = np.stack([random.permutation(labels) for _ in range(shape.rounds)])
                values = values if shape.rounds > 1 else values[0]
        if values is None:
            return None
        arrays |= _named(shape, values)
    return arrays


NUM_DOCUMENTS = 6


def documents_in(relations: Iterable[Relation]) -> frozenset[str]:
    """The inputs that relations ask to be equal at the query and the key: of these a sample is easily drawn."""
    found = set[str]()
    for relation in relations:
        for part in _parts(relation):
            match part:
                case Compare("==" | "!=", Read(name, "value", Var()), Read(other, "value", Var())) if name == other:
                    found.add(name)
    return frozenset(found)


def _parts(relation: Relation) -> Iterator[Relation]:
    yield relation
    for child in children(relation):
        yield from _parts(child)


def drawn_documents(length: int, seed: int = 0) -> Any:
    """Ascending numbers of documents of random lengths that are packed into one sequence, int64 [length]."""
    random = np.random.default_rng(seed)
    starts = np.zeros(length, dtype=np.int64)
    if length > 1:
        starts[random.choice(np.arange(1, length), size=min(NUM_DOCUMENTS, -(-length // 8)) - 1, replace=False)] = 1
    return starts.cumsum()


def _lists(selection: BoundSelection, routes: int, random: np.random.Generator) -> Any:
    """int64 [routes, width] or [rows, width], or None."""
    if selection.label is not None:
        if routes * selection.num_blocks > MAX_SCORES:
            return None
        scores = random.random((routes, selection.num_blocks))
        found = np.argpartition(scores, selection.width - 1, axis=1)[:, : selection.width]
        return found.astype(np.int64)
    if selection.num_rows * selection.num_blocks > MAX_SCORES:
        return None
    found = np.full((selection.num_rows, selection.width), -1, dtype=np.int64)
    for start in range(0, selection.num_rows, ROWS_AT_ONCE):
        part = found[start : start + ROWS_AT_ONCE]
        drawn = _drawn(selection, selection.first_row + start, len(part), random)
        part[:, : drawn.shape[1]] = drawn
    return found


def _drawn(selection: BoundSelection, first_row: int, num_rows: int, random: np.random.Generator) -> Any:
    """Of some rows: those of `always`, and of the candidates any; int64 [rows, at most width], -1 where there are
    fewer."""
    rows, blocks = np.arange(first_row, first_row + num_rows)[:, None], np.arange(selection.num_blocks)
    among, always = (
        np.broadcast_to(np.asarray(member(part, Point(rows, blocks[None], 0, Lookup()))), (num_rows, len(blocks)))
        for part in (selection.among, selection.always)
    )
    stop = len(blocks) - int(np.argmax((among | always).any(0)[::-1])) if len(blocks) else 0  # none is listed behind
    scores = random.random((num_rows, stop), dtype=np.float32)
    scores[~among[:, :stop]] = -1.0
    scores[always[:, :stop]] += 4.0
    width = min(selection.width, stop)
    order = np.broadcast_to(np.arange(stop), scores.shape)
    if 0 < width < stop:
        order = np.argpartition(scores, stop - width, axis=1)[:, stop - width :]
    return np.where(np.take_along_axis(scores, order, axis=1) >= 0, order, -1)[:, :width]
