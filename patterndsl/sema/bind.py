"""What is a pattern at given sizes? Lengths, parameters, layer and heads put in; heads that agree are one group.

After this only q, k and the inputs are left, every division is by something positive, and no value leaves 62
bits. It knows nothing of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Literal

from patterndsl.diagnostics import Diagnostic, PatternError, SourceRange, error
from patterndsl.ir.index import (
    HEAD,
    LAYER,
    NK,
    NQ,
    Arithmetic,
    Const,
    Facet,
    Function,
    Index,
    Param,
    Read,
    Var,
    arithmetic,
    operands,
)
from patterndsl.ir.interval import Box, Interval, Verdict, bounds
from patterndsl.ir.relation import (
    Listed,
    Random,
    Relation,
    at_head,
    children,
    depends_on,
    direct_indices,
    disjunction,
    inputs_read,
    renamed,
    subexpressions,
    substitute,
    substitute_index,
    with_lists,
)
from patterndsl.sema.learners import LEARNERS
from patterndsl.sema.model import InputDeclaration, LabelDeclaration, Resolved, SelectionDeclaration, Side
from patterndsl.sema.parameters import (
    MAX_HEADS,
    MAX_LAYER,
    MAX_SIZE,
    MAX_VALUE,
    ParamValue,
    Sizes,
    counted,
    param_values,
    put_size,
    sized,
    sizes_of,
)
from patterndsl.sema.selectors import By, Sharing
from patterndsl.syntax.tree import Merge

__all__ = [
    "Bound",
    "BoundLearner",
    "BoundSelection",
    "HeadGroup",
    "InputShape",
    "Sizes",
    "bind",
    "round_of",
    "sizes_of",
]


@dataclass(frozen=True)
class InputShape:
    """An input as the caller must give it: `length` values, or any number for a table where it is None; of a label with
    several rounds so many rows of them. learner: a label's, selection: that of listed keys, whose values are listed row
    by row; None for what only the caller knows."""

    name: str
    dtype: Literal["int", "bool"]
    side: Side
    length: int | None
    learner: BoundLearner | None = None
    selection: BoundSelection | None = None

    @property
    def found_by(self) -> Literal["call", "layer", "caller"]:
        """Who knows its values."""
        if self.selection is not None:
            return self.selection.found_by
        return "caller" if self.learner is None else LEARNERS[self.learner.name].found_by

    @cached_property
    def rounds(self) -> int:
        """How many values each position has; routes of a selection, each a list of its own."""
        if self.selection is not None:
            return self.selection.num_routes
        return 1 if self.learner is None else self.learner.setting("rounds", 1)

    @cached_property
    def inner(self) -> tuple[int | None, ...]:
        """The dimensions of one head's values, None for any number of them."""
        if self.selection is not None:
            is_route = self.selection.label is not None
            return (self.rounds if is_route else self.selection.num_rows, self.selection.width)
        return (self.length,) if self.rounds == 1 else (self.rounds, self.length)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """What the relation reads: one name for each round."""
        return (self.name,) if self.rounds == 1 else tuple(round_of(self.name, at) for at in range(self.rounds))

    @property
    def size(self) -> int | None:
        """How many values of one head that are, None for any number."""
        return None if self.length is None else prod(size for size in self.inner if size is not None)


@dataclass(frozen=True, slots=True)
class BoundLearner:
    """A learner with its settings; `sema.learners` says what they mean."""

    name: str
    settings: tuple[tuple[str, int], ...]

    def setting(self, name: str, default: int) -> int:
        return dict(self.settings).get(name, default)


@dataclass(frozen=True, slots=True)
class BoundSelection:
    """A selection at given sizes; `sema.model.SelectionDeclaration` says what its fields mean.

    num_rows: rows of lists, the first of which is of the block of queries that q_start lies in. num_blocks: of keys.
    among, always: between blocks of queries and of keys, counted from the first of all. num_routes: 1, or how many
    centroids have members, each of which has one row of tokens.
    """

    selector: str
    width: int
    of: int
    per: int
    by: By
    among: Relation
    always: Relation
    heads: Sharing
    label: str | None
    num_rows: int
    first_row: int
    num_blocks: int
    num_routes: int = 1

    @property
    def found_by(self) -> Literal["call", "layer", "caller"]:
        """Who knows the lists."""
        if self.selector == "given":
            return "caller"
        return "layer" if self.label is not None or self.by == "learned" else "call"


def round_of(label: str, at: int) -> str:
    """The name of a label's values in one of several rounds."""
    return f"{label}#{at}"


@dataclass(frozen=True, slots=True)
class HeadGroup:
    """Heads that share one relation."""

    relation: Relation
    heads: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Bound:
    """A pattern at given sizes. `relation` still has `head` in it where heads differ; the groups have not.

    A label of several rounds is read by the names `round_of` gives, and the relation is the union of all rounds. merge:
    whether a key counts once, or once for each term of that union. fallback: what rows attend that it leaves empty.
    """

    relation: Relation
    groups: tuple[HeadGroup, ...]
    inputs: tuple[InputShape, ...]
    sizes: Sizes
    num_heads: int
    layer: int
    merge: Merge = "set"
    fallback: Bound | None = None

    @property
    def found(self) -> tuple[InputShape, ...]:
        """The inputs that learners and selectors find."""
        return tuple(shape for shape in self.inputs if shape.learner is not None or shape.selection is not None)

    @property
    def is_plain(self) -> bool:
        """Whether each key counts once and there is no fallback: then the relation is all there is."""
        return self.merge == "set" and self.fallback is None


def bind(
    resolved: Resolved,
    sizes: Sizes,
    num_heads: int,
    layer: int = 0,
    overrides: Mapping[str, ParamValue] | None = None,
) -> Bound:
    """The pattern at these sizes. Raises PatternError (E4xx) with the place of what does not fit."""
    num_heads, layer = counted("heads", num_heads, 1, MAX_HEADS), counted("layer", layer, 0, MAX_LAYER)
    values = param_values(resolved, overrides or {}, sizes)
    _check_requirements(resolved, sizes, values, num_heads, layer)
    lists: dict[str, tuple[Index, ...]] = {
        name: tuple(map(Const, value)) for name, value in values.items() if isinstance(value, tuple)
    }

    def put(symbol: Var | Param) -> Index:
        return put_size(symbol, sizes, values, layer)

    def bound(symbolic: Relation) -> Bound:
        relation = with_lists(substitute(symbolic, put, lists), from_first_row)
        read = inputs_read(relation)
        inputs = tuple(
            _input_shape(item, learners.get(item.name), selections.get(item.name), sizes, values)
            for item in resolved.inputs
            if item.name in read
        )
        for item in inputs:
            relation = _of_all_rounds(relation, item)
        groups = _head_groups(relation, num_heads)
        for group in groups:
            _check_domains(group.relation, sizes.total, sizes.kv_len)
        return Bound(relation, groups, inputs, sizes, num_heads, layer)

    def from_first_row(node: Listed) -> Listed:
        first = selections[node.name].first_row
        return replace(node, row=arithmetic("-", node.row, Const(first)))

    learners = {label.name: _bound_learner(label, sizes, values) for label in resolved.labels}
    selections = {
        item.name: _bound_selection(item, sizes, values, learners, lambda part: substitute(part, put, lists))
        for item in resolved.selections
    }
    fallback = None if resolved.fallback is None else bound(resolved.fallback)
    return replace(bound(resolved.relation), merge=resolved.merge, fallback=fallback)


def selection_at(resolved: Resolved, name: str, sizes: Sizes, layer: int) -> BoundSelection:
    """A selection at these sizes, parameters at their defaults. Raises PatternError (E4xx)."""
    bound = bind(resolved, sizes, 1, layer)
    parts = (bound, *(part for part in [bound.fallback] if part is not None))
    found = (shape.selection for part in parts for shape in part.inputs if shape.name == name)
    return next(item for item in found if item is not None)


def _bound_selection(
    item: SelectionDeclaration,
    sizes: Sizes,
    values: Mapping[str, int | tuple[int, ...]],
    learners: Mapping[str, BoundLearner],
    bound: Callable[[Relation], Relation],
) -> BoundSelection:
    width, of, per = (sized(index, sizes, values) for index in (item.width, item.of, item.per))
    first_row, num_blocks = sizes.q_start // per, -(-sizes.kv_len // of)
    num_rows = -(-(sizes.q_start + sizes.q_len) // per) - first_row
    frame = {"Nq": -(-sizes.total // per), "Nk": num_blocks}

    def put(symbol: Var | Param) -> Index:
        return Const(frame[symbol.name]) if isinstance(symbol, Var) and symbol.name in frame else symbol

    among, always = (bound(substitute(part, put)) for part in (item.among, item.always))
    for part in (among, always):
        _check_domains(part, max(1, frame["Nq"]), max(1, num_blocks))
    routes = 1
    if item.label is not None:  # a row of tokens for each route, which queries and keys are asked for
        routes, num_rows, first_row = learners[item.label].setting("clusters", 1), 1, 0
        num_blocks, of, per = max(sizes.total, sizes.kv_len), 1, 1
        width = min(width, max(1, num_blocks))
    return BoundSelection(
        item.selector,
        width,
        of,
        per,
        item.by,
        among,
        always,
        item.heads,
        item.label,
        num_rows,
        first_row,
        num_blocks,
        routes,
    )


def _of_all_rounds(relation: Relation, label: InputShape) -> Relation:
    """The union over the rounds of a label, each with its own values."""
    if label.rounds == 1:
        return relation
    return disjunction(renamed(relation, label.name, name) for name in label.names)


def _bound_learner(label: LabelDeclaration, sizes: Sizes, values: Mapping[str, int | tuple[int, ...]]) -> BoundLearner:
    """Raises PatternError (E402) where there are more labels than positions, or hashing cannot be halved."""
    found = BoundLearner(label.learner, tuple((name, sized(index, sizes, values)) for name, index in label.settings))
    length = max(sizes.total, sizes.kv_len)
    for name, value in found.settings:
        if name in ("buckets", "clusters") and value > max(2, length):
            message = f"label `{label.name}` has {value:,} {name} for {length:,} positions"
            raise error("E402", message, label.place, f"give at most as many {name} as positions")
    buckets = found.setting("buckets", 2)
    if buckets % 2:
        message = f"label `{label.name}` has {buckets:,} buckets, an odd number"
        raise error("E402", message, label.place, "give an even number: each direction and its opposite are a bucket")
    return found


def _head_groups(relation: Relation, num_heads: int) -> tuple[HeadGroup, ...]:
    if not depends_on(relation, "head"):
        return (HeadGroup(relation, tuple(range(num_heads))),)
    groups: dict[Relation, list[int]] = {}
    for head in range(num_heads):
        groups.setdefault(at_head(relation, head), []).append(head)
    return tuple(HeadGroup(alike, tuple(heads)) for alike, heads in groups.items())


def _check_requirements(
    resolved: Resolved,
    sizes: Sizes,
    values: Mapping[str, int | tuple[int, ...]],
    num_heads: int,
    layer: int,
) -> None:
    def smallest(value: Index | str) -> int:
        if isinstance(value, str):
            items = values[value]
            return min(items) if isinstance(items, tuple) else items
        return min(value_at(value, head) for head in range(num_heads))

    def value_at(index: Index, head: int) -> int:
        put: dict[Index, Index] = {HEAD: Const(head), LAYER: Const(layer)}
        return sized(substitute_index(index, lambda symbol: put.get(symbol, symbol)), sizes, values)

    found: list[Diagnostic] = []
    for required in resolved.requirements:
        value, least = smallest(required.value), smallest(required.least)
        if required.kind == "grid" and value != least:
            help = "change the axis sizes, or the parameters that they depend on, until they multiply to N"
            here = "" if least == sizes.total else " here"
            message = f"the grid has {value} positions, but N is {least}{here}"
            found.append(Diagnostic("E404", message, required.place, help))
        if required.kind == "minimum" and value < least:
            message = f"`{required.label}` is {value}, and must be at least {least}"
            found.append(Diagnostic("E402", message, required.place, f"give {least} or more"))
    if found:
        raise PatternError(found)


def learner_at(resolved: Resolved, name: str, sizes: Sizes) -> BoundLearner:
    """A label's learner at these sizes, parameters at their defaults. Raises PatternError (E4xx)."""
    label = next(item for item in resolved.labels if item.name == name)
    return _bound_learner(label, sizes, param_values(resolved, {}, sizes))


def redraw_of(resolved: Resolved, label: LabelDeclaration) -> int:
    """After how many calls in training directions are drawn anew, 0 for never."""
    asked = dict(label.settings).get("redraw")
    return 0 if asked is None else fixed_settings(resolved, replace(label, settings=(("redraw", asked),)))["redraw"]


def fixed_settings(resolved: Resolved, label: LabelDeclaration) -> dict[str, int]:
    """The settings of a learner that has a state, the same for all lengths; parameters have their defaults.

    Raises PatternError (E209) where they depend on N, (E402) where a parameter has no value.
    """
    some = sizes_of(1, None, None, 0)
    values = param_values(resolved, {}, some)
    for _, index in label.settings:
        if depends_on_length(index, resolved):
            message = f"`{label.name}` learns, and how many it tells apart depends on N"
            help = "give a number: a layer keeps its centroids for all lengths"
            if label.learner == "lsh":
                message, help = f"after how many calls `{label.name}` is drawn anew depends on N", "give a number"
            raise error("E209", message, label.place, help)
    return {name: sized(index, some, values) for name, index in label.settings}


def depends_on_length(index: Index, resolved: Resolved) -> bool:
    """Whether it has a length in it, or a parameter whose default has."""
    defaults = {param.name: param.default for param in resolved.params}
    for part in subexpressions(index):
        if part in (NQ, NK):
            return True
        default = defaults.get(part.name) if isinstance(part, Param) else None
        if default is not None and not isinstance(default, tuple) and depends_on_length(default, resolved):
            return True
    return False


def _input_shape(
    declared: InputDeclaration,
    learner: BoundLearner | None,
    selection: BoundSelection | None,
    sizes: Sizes,
    values: Mapping[str, int | tuple[int, ...]],
) -> InputShape:
    if selection is not None:
        size = selection.num_rows * selection.width
        return InputShape(declared.name, declared.dtype, declared.side, size, selection=selection)
    match declared.side:
        case "both":
            length: int | None = max(sizes.total, sizes.kv_len)
        case "query":
            length = sizes.total
        case "key":
            length = sizes.kv_len
        case "table":
            length = None if declared.length is None else sized(declared.length, sizes, values)
    return InputShape(declared.name, declared.dtype, declared.side, length, learner)


# ---- domains ----------------------------------------------------------------------------------------------


class _AnyData:
    """Inputs before they are known: any 32-bit value."""

    def bounds(self, name: str, facet: Facet, index: Interval) -> Interval:
        return -(2**31), 2**31 - 1

    def any_drawn(self, node: Random, q: Interval, k: Interval) -> bool:
        raise AssertionError("draws have no part in the domain of an expression")

    def listed(self, node: Listed, row: Interval, key: Interval) -> Verdict:
        raise AssertionError("lists have no part in the domain of an expression")


def _check_domains(relation: Relation, num_q: int, num_k: int) -> None:
    """Every divisor positive, every function in its domain, every value within 62 bits, over all positions."""
    box = Box((0, max(0, num_q - 1)), (0, max(0, num_k - 1)), _AnyData())
    for index in direct_indices(relation):
        _check_index(index, box)
    for child in children(relation):
        _check_domains(child, num_q, num_k)
    if isinstance(relation, Random):
        frame_q, frame_k = _frame(relation)
        if isinstance(relation.count, Const) and relation.count.value < 0:
            message = f"`random` draws {relation.count.value} keys"
            raise error("E402", message, relation.place, "draw 0 or more")
        _check_domains(relation.avoid, frame_q, frame_k)


def _frame(relation: Random) -> tuple[int, int]:
    """How many queries draw among how many keys."""
    lengths = [length.value for length in (relation.num_q, relation.num_k) if isinstance(length, Const)]
    if len(lengths) < 2:
        message = "`random` stands where the lengths depend on a position or an input"
        raise error("E209", message, relation.place, "rescale `N` by numbers and parameters only")
    if min(lengths) < 0:
        message = f"`random` stands where the length is {min(lengths)}"
        raise error("E406", message, relation.place, "rescale `N` to 0 or more, for example N = max(0, ...)")
    if max(lengths) > MAX_SIZE:
        message = "`random` stands where the length is more than 2^40"
        raise error("E406", message, relation.place, "rescale `N` to something smaller")
    return lengths[0], lengths[1]


def _check_index(index: Index, box: Box) -> None:
    for operand in operands(index):
        _check_index(operand, box)
    match index:
        case Arithmetic("//" | "%" as op, _, right, place):
            least = bounds(right, box)[0]
            if least < 1:
                word = "division" if op == "//" else "modulo"
                message = f"{word} by something that can be {least}"
                raise error("E403", message, place, "make the divisor at least 1, for example max(1, ...)")
        case Function("isqrt" | "log2" as name, (argument,), place):
            least, allowed = bounds(argument, box)[0], int(name == "log2")
            if least < allowed:
                message = f"{name} of something that can be {least}"
                raise error("E407", message, place, f"make it at least {allowed}, for example max({allowed}, ...)")
    low, high = bounds(index, box)
    if max(abs(low), abs(high)) >= MAX_VALUE:
        place = _place_of(index)
        raise error("E407", "the value can leave 62 bits", place, "use smaller numbers")


def _place_of(index: Index) -> SourceRange | None:
    return None if isinstance(index, Const | Var | Param | Read) else index.place
