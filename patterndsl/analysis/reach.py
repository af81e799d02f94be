"""What can reach a position through several layers, and after how many layers is everything connected?

Exact where every position can be followed (up to MAX_POSITIONS), and at any length for one query, for one path, and for
the number of layers where the pattern is affine; else bounds from blocks of positions, and the figures say so. Of one
layer the heads are united, as their outputs are mixed, and each layer keeps a position's own content. It says what can
flow and not what does: weights have no part in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import cache
from typing import Any, Literal

import numpy as np

from patterndsl.analysis.budget import GaveUpError, within
from patterndsl.analysis.compose import Closure, Composed, composed
from patterndsl.analysis.figure import Certainty, Figure
from patterndsl.analysis.flow import (
    Bits,
    FieldSizes,
    Growth,
    Integers,
    Matrix,
    Stack,
    blocks,
    closed,
    field_of,
    first_columns,
    grow,
    levels,
    looks_ahead,
    path,
    positions,
    unpacked,
    without_partner,
)
from patterndsl.analysis.inputs import checked_inputs
from patterndsl.diagnostics import input_error
from patterndsl.ir.index import Const, Index, Param, Var
from patterndsl.ir.relation import Relation, at_head, depends_on, disjunction, indices, substitute
from patterndsl.lower.tiles import OnEvent
from patterndsl.sema.bind import bind
from patterndsl.sema.model import Resolved
from patterndsl.sema.parameters import MAX_LAYER, counted, integer, sizes_of

MAX_POSITIONS = 1 << 14
"""Of so many positions all are followed, in 32 MB for each different layer."""
MAX_PAIR_WORK = 1 << 32
"""Index expressions of single pairs: some 4 s."""
MAX_BLOCKS = 1 << 10
MAX_PERIOD = 32
"""Layers of a pattern that uses `layer`, where nobody says how many there are."""
MOST_SIZES = 64
"""Layers whose field sizes are worth finding where the number of layers is known already."""
EXAMPLES = 3
ROWS = 256
"""Rows unpacked at once."""


@dataclass(frozen=True, slots=True)
class Field:
    """Positions that can reach a query after so many layers: the fewest, the mean and the most over all queries."""

    layers: int
    least: Figure
    mean: Figure
    most: Figure


@dataclass(frozen=True, slots=True)
class Alone:
    """Positions that exchange nothing in one direction, and the first of them."""

    number: int
    examples: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Reach:
    """How far content gets in a self-attention of n positions.

    fields: after 0, 1, 2, ... layers and in the end, where layers add nothing more; before it some may be left out.
    layers_to_connect: after so many layers everything is connected that any number of layers connects.
    closure: what that is: all pairs, all with k <= q ("causal"), or only a part; None where it is not known.
    at_every_length: the same for all N at once, where the parameters do not grow with N and there is one answer.
    unreachable: pairs that no number of layers connects; of a pattern that never looks ahead, pairs with k <= q.
    example: such a pair, (q, k). deaf: queries that nothing else reaches; unheard: keys that reach nothing else; both
    None where the closure is not known.
    islands: sets of positions between which nothing flows in either direction.
    blocks: positions per block where bounds come from blocks, else 1.
    """

    name: str
    n: int
    num_heads: int
    period: int
    fields: tuple[Field, ...]
    layers_to_connect: Figure
    closure: Closure | None
    is_causal: bool
    at_every_length: Composed | None
    unreachable: Figure
    example: tuple[int, int] | None
    deaf: Alone | None
    unheard: Alone | None
    islands: Figure
    block: int
    _stack: Stack = field(repr=False)

    @property
    def is_complete(self) -> bool | None:
        """Whether all pairs are connected in the end, or all with k <= q where none looks ahead; None: not known."""
        return None if self.closure is None else self.closure != "part"

    def field(self, q: int, num_layers: int) -> Integers:
        """int64: the positions whose content can reach q through the lowest layers, ascending; q always. Exact."""
        num_layers = counted("layers", num_layers, 0, 2**20)
        return np.flatnonzero(field_of(self._stack, self._position(q), num_layers))

    def path(self, q: int, k: int) -> tuple[int, ...] | None:
        """Where the content of k is after 0, 1, 2, ... layers on a shortest way to q: k first, q last. Exact.

        None where there is no way. From one layer to the next it stays, or goes to a position that attends it.
        """
        return path(self._stack, self._position(q), self._position(k))

    def _position(self, at: object) -> int:
        found = integer(at)
        if found is None or not 0 <= found < self.n:
            help = f"the positions are 0 to {self.n - 1}" if self.n else "there are none at N = 0"
            raise input_error("E406", f"there is no position {at!r}", help)
        return found

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        every = self.at_every_length
        return {
            "name": self.name,
            "n": self.n,
            "heads": self.num_heads,
            "period": self.period,
            "block": self.block,
            "fields": [
                {"layers": item.layers} | {name: getattr(item, name).to_dict() for name in ("least", "mean", "most")}
                for item in self.fields
            ],
            "layers_to_connect": self.layers_to_connect.to_dict(),
            "closure": self.closure,
            "is_complete": self.is_complete,
            "is_causal": self.is_causal,
            "at_every_length": None if every is None else {"layers": every.layers, "closure": every.closure},
            "unreachable": self.unreachable.to_dict(),
            "example": None if self.example is None else {"q": self.example[0], "k": self.example[1]},
            "deaf": _alone_dict(self.deaf),
            "unheard": _alone_dict(self.unheard),
            "islands": self.islands.to_dict(),
        }

    def lines(self) -> list[str]:
        """For a terminal."""
        heads = f", {self.num_heads} heads united" if self.num_heads > 1 else ""
        found = [f"{self.name} at N = {self.n:,}{heads}", *_field_lines(self)]
        closure = "what ever will be" if self.closure is None else CLOSURES[self.closure]
        connected = f"connected after {_layers(_said(self.layers_to_connect), self.layers_to_connect.value)}: {closure}"
        found.append(f"{connected} ({self.layers_to_connect.certainty}, {self.layers_to_connect.how})")
        if self.at_every_length is not None:
            layers = self.at_every_length.layers
            found.append(
                f"at every N: after {_layers(f'{layers:,}', layers)}, {CLOSURES[self.at_every_length.closure]}"
            )
        if self.unreachable.value:
            pairs = "pairs with k <= q" if self.is_causal else "pairs"
            example = "" if self.example is None else f", such as q = {self.example[0]}, k = {self.example[1]}"
            found.append(f"never connected: {_said(self.unreachable)} {pairs}{example}")
        for what, alone in (("nothing else reaches", self.deaf), ("that reach nothing else", self.unheard)):
            if alone is not None and alone.number:
                more = ", ..." if alone.number > len(alone.examples) else ""
                found.append(f"positions {what}: {alone.number:,} ({', '.join(map(str, alone.examples))}{more})")
        if self.islands.value > 1:
            found.append(f"islands between which nothing flows: {_said(self.islands)}")
        return [found[0], *(f"  {line}" for line in found[1:])]

    def __str__(self) -> str:
        return "\n".join(self.lines())


CLOSURES: Mapping[Closure, str] = {
    "all": "every pair",
    "causal": "every pair with k <= q",
    "part": "all that ever will be, not every pair",
}


def reach(
    resolved: Resolved,
    name: str,
    n: int,
    heads: int = 1,
    layers: int | None = None,
    *,
    inputs: Mapping[str, Any] | None = None,
    on_event: OnEvent | None = None,
) -> Reach:
    """How far content gets in a self-attention of n positions.

    layers: how many there are before they begin again, where the pattern uses `layer`. inputs: 1-D arrays.
    Raises PatternError (E4xx) where the sizes do not fit, (E501, E502) on inputs that are missing or do not fit.
    Work: for each different layer its live tiles; where all positions are followed, for each layer what it adds.
    """
    period = period_of(resolved, layers)
    sizes = sizes_of(n, None, None, 0)
    layer_of = cache(lambda layer: bind(resolved, sizes, heads, layer))
    shapes = {shape.name: shape for layer in range(period) for shape in layer_of(layer).inputs}
    stack = Stack(layer_of, period, checked_inputs(shapes.values(), inputs or {}), on_event)
    known = _composed([stack.relation(layer) for layer in range(period)], stack.n)
    is_followed = stack.n <= MAX_POSITIONS and _pair_work(stack) <= MAX_PAIR_WORK
    block = 1 if is_followed else 1 << (-(-stack.n // MAX_BLOCKS) - 1).bit_length()
    is_causal = known.is_causal if known is not None else not any(looks_ahead(stack, it) for it in stack.relations())
    starts = np.arange(0, stack.n, block)
    complete = first_columns(np.arange(len(starts)) + 1 if is_causal else np.full(len(starts), len(starts)))
    growth = _growth(stack, np.minimum(block, stack.n - starts), complete, known, block)
    missing = complete & ~growth.reached
    closure = known.closure if known is not None else _closure(growth, is_causal, bool(missing.any()), stack.n)
    is_whole = closure in ("all", "causal")
    connect = _layers_to_connect(stack, known, growth, block)
    return Reach(
        name,
        stack.n,
        heads,
        period,
        _fields(growth, block, connect, closure, stack.n),
        connect,
        closure,
        is_causal,
        _at_every_length(resolved, heads, period),
        Figure(0, "Exact", "pairs") if is_whole else _unreachable(growth, is_causal, stack.n, block),
        None if is_whole else _first_pair(missing, block),
        _alone(stack, "q", is_causal, closure),
        _alone(stack, "k", is_causal, closure),
        Figure(min(1, stack.n), "Exact", "islands") if is_whole else _islands(growth, block),
        block,
        stack,
    )


def _pair_work(stack: Stack) -> int:
    """What it takes to look at every pair of the partial tiles, in index expressions."""
    found = 0
    for relation in stack.relations():
        tiles = stack.rows(relation).tiles
        num_indices = sum(1 for _ in indices(relation))
        found += int((~tiles.is_full).sum()) * tiles.q_block * tiles.kv_block * num_indices
    return found


def _growth(stack: Stack, lengths: Integers, complete: Bits, known: Composed | None, block: int) -> Growth:
    """As many layers as are of interest, and where it is known after how many nothing more is added, that end."""

    def followed(most_layers: int | None) -> Growth:
        return grow(stack, matrix_of, lengths, complete=complete, most_layers=most_layers)

    def matrix_of(relation: Relation) -> Matrix:
        return positions(stack, relation) if block == 1 else blocks(stack, relation, block)

    if known is None or (known.closure == "part" and block > 1):
        return followed(None)
    growth = followed(MOST_SIZES)
    if known.closure != "part" or growth.is_closed:
        return growth
    ended = closed(stack, growth, matrix_of, lengths)
    return followed(None) if ended is None else ended


def period_of(resolved: Resolved, layers: int | None) -> int:
    """After how many layers they begin again: 1 where they are alike. Raises InputError (E406) on fewer than 1."""
    period = counted("layers", MAX_PERIOD if layers is None else layers, 1, MAX_LAYER)
    return period if depends_on(resolved.relation, "layer") else 1


def _at_every_length(resolved: Resolved, num_heads: int, period: int) -> Composed | None:
    """The answer for all N at once, if there is one; None also where a parameter depends on N."""
    values = {item.name: item.default for item in resolved.params}
    numbers = {name: value for name, value in values.items() if isinstance(value, Const)}
    lists = {name: value for name, value in values.items() if isinstance(value, tuple)}
    if len(numbers) + len(lists) < len(values):
        return None

    def layer(number: int) -> Relation:
        def put(symbol: Var | Param) -> Index:
            known = numbers if isinstance(symbol, Param) else {"layer": Const(number)}
            return known.get(symbol.name, symbol)

        relation = substitute(resolved.relation, put, lists)
        return disjunction(at_head(relation, head) for head in range(num_heads))

    return _composed(list(map(layer, range(period))), None)


def _composed(layers: Sequence[Relation], n: int | None) -> Composed | None:
    """What isl says, if it can."""
    try:
        with within():
            return composed(layers if len(set(layers)) > 1 else layers[:1], n)
    except GaveUpError:
        return None


def _closure(growth: Growth, is_causal: bool, is_missing: bool, n: int) -> Closure | None:
    if is_missing:
        return "part"
    if not growth.is_exact:
        return None
    return "causal" if is_causal and n > 1 else "all"


def _layers_to_connect(stack: Stack, known: Composed | None, growth: Growth, block: int) -> Figure:
    """Known from formulas, or from all positions; else what some keys need, and others may need more."""
    if known is not None:
        return Figure(known.layers, "Exact", "layers", "composed as formulas")
    if growth.is_exact:
        return Figure(len(growth.sizes) - 1, "Exact", "layers", _method(block))
    keys = (0, stack.n // 2, stack.n - 1)
    return Figure(max(int(levels(stack, k).max()) for k in keys), "LowerBound", "layers", f"followed {len(keys)} keys")


def _fields(growth: Growth, block: int, connect: Figure, closure: Closure | None, n: int) -> tuple[Field, ...]:
    """As they grew, and where all is connected in the end, what it then must be."""
    certain: Certainty = "Exact" if growth.is_exact else "UpperBound"
    grown = [_field(layers, sizes, certain, _method(block)) for layers, sizes in enumerate(growth.sizes)]
    whole = {"all": FieldSizes(n, n, n), "causal": FieldSizes(min(1, n), (n + 1) / 2, n)}.get(closure or "part")
    layers = int(connect.value) if connect.certainty == "Exact" else 0
    if (
        whole is None and growth.is_closed and block == 1 and layers > len(grown) - 1
    ):  # what is between was not followed
        return (*grown[:-1], replace(grown[-1], layers=layers))
    if whole is None or connect.certainty != "Exact":
        return tuple(grown)
    return (*grown[:layers], _field(layers, whole, "Exact", connect.how))


def _field(layers: int, sizes: FieldSizes, certain: Certainty, how: str) -> Field:
    return Field(layers, *(Figure(value, certain, "positions", how) for value in astuple(sizes)))


def _method(block: int) -> str:
    return "followed every position" if block == 1 else f"followed blocks of {block:,}"


def _unreachable(growth: Growth, is_causal: bool, n: int, block: int) -> Figure:
    allowed = n * (n + 1) // 2 if is_causal else n * n
    reached = round(growth.sizes[-1].mean * n)
    certain: Certainty = "Exact" if growth.is_exact else "LowerBound"
    return Figure(max(0, allowed - reached), certain, "pairs", _method(block))


def _first_pair(missing: Bits, block: int) -> tuple[int, int] | None:
    """The first positions of the first pair of blocks that are not connected."""
    rows = np.flatnonzero(missing.any(axis=1))
    if not len(rows):
        return None
    q = int(rows[0])
    return q * block, int(unpacked(missing[q : q + 1], len(missing)).argmax()) * block


def _alone(stack: Stack, side: Literal["q", "k"], is_causal: bool, closure: Closure | None) -> Alone | None:
    """Of a pattern that never looks ahead the first query and the last key have nobody to miss."""
    if closure != "part":
        return None if closure is None else Alone(0, ())
    found = without_partner(stack, side)
    if is_causal:
        found = found[found != (0 if side == "q" else stack.n - 1)]
    return Alone(len(found), tuple(found[:EXAMPLES].tolist()))


def _alone_dict(alone: Alone | None) -> dict[str, object] | None:
    return None if alone is None else {"number": alone.number, "examples": list(alone.examples)}


def _islands(growth: Growth, block: int) -> Figure:
    """Connected parts, whatever the direction. Blocks may join what positions would not.

    In the closure each row holds its own position; joining the neighbours in each row joins the same, with few edges.
    """
    import networkx as nx

    size = len(growth.reached)
    joined = np.zeros((size, size), dtype=bool)
    for start in range(0, size, ROWS):
        q, k = np.nonzero(unpacked(growth.reached[start : start + ROWS], size))
        same_row = q[1:] == q[:-1]
        joined[k[:-1][same_row], k[1:][same_row]] = True
    graph = nx.Graph()
    graph.add_nodes_from(range(size))
    graph.add_edges_from(np.argwhere(joined).tolist())
    certain: Certainty = "Exact" if growth.is_exact else "LowerBound"
    return Figure(nx.number_connected_components(graph), certain, "islands", _method(block))


# ---- as text ------------------------------------------------------------------------------------------------


def _field_lines(reach: Reach) -> list[str]:
    """A table of the fields: the first layers, then each power of two, and the last."""
    last = reach.fields[-1]
    shown = [item for item in reach.fields if item is last or item.layers == 3 or item.layers.bit_count() == 1]
    rows = [["positions that reach a query", "least", "mean", "most"]]
    for item in shown:
        numbers = [_rounded(figure) for figure in (item.least, item.mean, item.most)]
        rows.append([f"  after {_layers(f'{item.layers:,}', item.layers)}", *numbers])
    widths = [max(len(row[at]) for row in rows) for at in range(4)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    lines[0] += f"  ({shown[0].least.certainty}, {shown[0].least.how})"
    return lines


def _rounded(figure: Figure) -> str:
    mark = "≤ " if figure.certainty == "UpperBound" else ""
    is_short = figure.value < 100 and not float(figure.value).is_integer()
    return f"{mark}{figure.value:,.{int(is_short)}f}"


def _layers(text: object, number: float) -> str:
    return f"{text} {'layer' if number == 1 else 'layers'}"


def _said(figure: Figure) -> str:
    """The number, and whether it is one or a bound."""
    lead = {"UpperBound": "at most ", "LowerBound": "at least "}.get(figure.certainty, "")
    return f"{lead}{figure.value:,.0f}"
