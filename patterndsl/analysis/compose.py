"""How many layers does it take until a pattern connects all that it ever will? Relations composed by isl.

Exact at any length, and for every length at once where the parameters do not grow with it; the work follows the
formula of the pattern and not its size. What is not affine, draws or reads inputs has no answer here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from patterndsl.analysis.budget import check_time
from patterndsl.analysis.sets import GaveUpError, coalesced, limited, weigh
from patterndsl.ir.index import Arithmetic, Const, Function, Index, Var, operands
from patterndsl.ir.relation import And, Compare, Everything, Not, Nothing, Or, Relation

if TYPE_CHECKING:
    import islpy

Closure: TypeAlias = Literal["all", "causal", "part"]
"""What any number of layers connects: all pairs, all with k <= q and no other, or less than that."""

OPERATIONS = 400_000
"""Operations of isl that one answer may take: below a second, and most need a hundredth of it."""
MAX_PIECES = 12
MAX_FLOORS = 4
"""Convex pieces of a composed relation, and floors in a piece. isl counts too few operations where there are more, and
its coalescing has crashed on 88 pieces with 14 floors; what people write stays within these."""
MAX_TEXT = 4_000
"""Characters of a composed relation: numbers that double in length with each square are not counted either."""
MAX_NESTED = 4
"""Floors inside one another: each takes isl four times as long to read."""
MAX_READ = 20_000
"""Characters of a relation."""
MAX_SQUARES = 5
"""Of one layer, where the answer is to hold for every length: more than 2^5 layers are taken to grow with it."""
MAX_ROUNDS = 64
"""Of layers that differ."""


@dataclass(frozen=True, slots=True)
class Composed:
    """After `layers` layers, and no fewer, everything is connected that ever will be. is_causal: no pair has k > q."""

    layers: int
    closure: Closure
    is_causal: bool


def composed(layers: Sequence[Relation], n: int | None) -> Composed:
    """layers: the bottom one first, in q, k and constants; after the last they begin again, and each keeps a position's
    own content. n: the length; None for every length, where the answer must be one for all of them.

    Raises GaveUpError where a relation is not affine or isl has to work too hard.
    """
    texts = [_text(layer) for layer in layers]
    if any(len(text) > MAX_READ for text in texts):
        raise GaveUpError("its formula is too long")
    if n is not None and not n:
        return Composed(0, "all", True)
    with limited(OPERATIONS) as context:
        weigh(context, 3 + max(text.count("floor(") + text.count(" mod ") for text in texts))
        maps = [_map(context, f"q = k or {text}", n) for text in texts]
        same = _map(context, "q = k", n)
        num_layers, closure = _of_one(maps[0], same, n) if len(maps) == 1 else _of_several(maps, same)
        is_causal = closure.is_subset(_map(context, "k <= q", n))
        if is_causal and n != 1:
            return Composed(num_layers, "causal" if _map(context, "k <= q", n).is_subset(closure) else "part", True)
        is_all = _map(context, "q = q", n).is_subset(closure)
        return Composed(num_layers, "all" if is_all else "part", is_causal)


def _of_one(layer: islpy.Map, same: islpy.Map, n: int | None) -> tuple[int, islpy.Map]:
    """The least power of a relation that equals all higher ones, by repeated squares and then bit by bit."""
    powers = [layer]
    while not (square := _then(powers[-1], powers[-1])).is_subset(powers[-1]):
        powers.append(square)
        if n is None and len(powers) > MAX_SQUARES:
            raise GaveUpError("the number of layers grows with the length")
    closure, short, num_short = powers[-1], same, 0
    if closure.is_subset(same):
        return 0, closure
    for exponent, power in reversed(list(enumerate(powers))):
        longer = _then(power, short)
        if not closure.is_subset(longer):
            short, num_short = longer, num_short + (1 << exponent)
    return num_short + 1, closure


def _of_several(layers: Sequence[islpy.Map], same: islpy.Map) -> tuple[int, islpy.Map]:
    """The same, layer by layer, until a whole round adds nothing."""
    reached, last = same, 0
    for number in range(1, MAX_ROUNDS * len(layers)):
        further = _then(layers[(number - 1) % len(layers)], reached)
        if not further.is_subset(reached):
            reached, last = further, number
        if number - last == len(layers):
            return last, reached
    raise GaveUpError(f"more than {MAX_ROUNDS} rounds of the layers")


def _then(upper: islpy.Map, lower: islpy.Map) -> islpy.Map:
    """{q -> k : q -> p in the upper layers, p -> k in the lower ones}."""
    return _coalesced(upper.apply_range(lower))


def _coalesced(relation: islpy.Map) -> islpy.Map:
    """The same in fewer pieces. Raises GaveUpError where it is too large to work with, before and after."""
    import islpy

    check_time()

    def check(relation: islpy.Map, most_pieces: int) -> None:
        pieces = relation.get_basic_maps()
        if len(pieces) > most_pieces or any(piece.dim(islpy.dim_type.div) > MAX_FLOORS for piece in pieces):
            raise GaveUpError("it falls into too many pieces")

    check(relation, MAX_PIECES**2)
    relation = coalesced(relation)
    check(relation, MAX_PIECES)
    if len(str(relation)) > MAX_TEXT:
        raise GaveUpError("its formula grows too long")
    return relation


def _map(context: islpy.Context, text: str, n: int | None) -> islpy.Map:
    import islpy

    space, length = ("[N] -> ", "N") if n is None else ("", str(n))
    inside = f"0 <= q < {length} and 0 <= k < {length}"
    relation = islpy.Map(f"{space}{{ [q] -> [k] : {inside} and ({text}) }}", context=context)
    return _coalesced(relation)


# ---- a bound relation as isl writes it ----------------------------------------------------------------------


def _text(relation: Relation) -> str:
    match relation:
        case Everything():
            return "(q = q)"
        case Nothing():
            return "(q < q)"
        case Compare(op, left, right):
            return f"({_index(left)} {'=' if op == '==' else op} {_index(right)})"
        case And(terms):
            return f"({' and '.join(map(_text, terms))})"
        case Or(terms):
            return f"({' or '.join(map(_text, terms))})"
        case Not(term):
            return f"(not {_text(term)})"
        case _:
            raise GaveUpError("it draws at random or reads an input")


def _index(index: Index) -> str:
    if _num_nested(index) > MAX_NESTED:
        raise GaveUpError("it has too many divisions inside one another")
    return _written(index)


def _num_nested(index: Index) -> int:
    """Divisions inside one another."""
    inside = max(map(_num_nested, operands(index)), default=0)
    return inside + (isinstance(index, Arithmetic) and index.op in ("//", "%"))


def _written(index: Index) -> str:
    match index:
        case Const(value):
            return f"({value})"
        case Var("q") | Var("k"):
            return index.name
        case Var("Nq") | Var("Nk"):
            return "N"
        case Arithmetic("+" | "-" as op, left, right):
            return f"({_written(left)} {op} {_written(right)})"
        case Arithmetic("*", Const(factor), other) | Arithmetic("*", other, Const(factor)):
            return f"({factor} * {_written(other)})"
        case Arithmetic("//", left, Const(divisor)):
            return f"floor({_written(left)} / {divisor})"
        case Arithmetic("%", left, Const(divisor)):
            return f"({_written(left)} mod {divisor})"
        case Function("min" | "max" as name, arguments):
            return f"{name}({', '.join(map(_written, arguments))})"
        case Function("abs", (argument,)):
            return f"max({_written(argument)}, -{_written(argument)})"
        case _:
            raise GaveUpError("it is not affine, or reads an input")


__all__ = ["Closure", "Composed", "composed"]
