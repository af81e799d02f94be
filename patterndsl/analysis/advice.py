"""What would make a pattern cheaper? Another order of positions, another size of tiles, another length; counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from patterndsl.analysis.kept import BLOCK, Integers, Kept, Sample, divisors, draws_of
from patterndsl.analysis.layouts import BLOCKS, USUAL_BLOCK, WORTHWHILE, Layout, area, as_written, best, best_block
from patterndsl.analysis.terms import Term, at, in_heads
from patterndsl.diagnostics import Diagnostic, SourceRange
from patterndsl.ir.index import Const
from patterndsl.ir.relation import Relation
from patterndsl.syntax import tree as ast
from patterndsl.syntax.render import render_expression

MUCH, VERY_MUCH = 2.0, 4.0
"""Pairs computed for one that is kept: worth a cure, worth saying without one."""
LEAST_LENGTH = 8 * USUAL_BLOCK
"""In shorter texts tiles do not decide the time."""
MAX_SEARCHES = 3
"""Searches for an order."""
MAX_SHOWN = 60


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A term of the union, or all of the pattern where `expr` is None: the pairs that some heads keep of it.

    factor: pairs in its live tiles of the usual size for each pair that it keeps.
    """

    expr: ast.Expr | None
    group: Kept
    relation: Relation
    pairs: tuple[Integers, Integers]
    factor: float


def block_and_order(spec: ast.Spec, seen: Sample, terms: tuple[Term, ...]) -> Iterator[Diagnostic]:
    """Parts of a pattern that compute far more pairs than they keep, and the order or block in which they do not."""
    if seen.n < LEAST_LENGTH:
        return
    parts = [part for group in seen.groups if group.pairs is not None for part in _parts(seen, group, terms)]
    worst: dict[ast.Expr | None, Part] = {}
    for part in sorted(parts, key=lambda part: -part.factor):
        if part.factor >= MUCH:
            worst.setdefault(part.expr, part)
    found = [(part, _reordered(spec, seen, part)) for part in list(worst.values())[:MAX_SEARCHES]]
    yield from (advice for _, advice in found if advice is not None)
    if found and all(advice is None for _, advice in found):
        yield from _resized(spec, seen, [part for part, _ in found])


def _parts(seen: Sample, group: Kept, terms: tuple[Term, ...]) -> list[Part]:
    """The terms without which far fewer tiles would live; else the whole."""
    assert group.pairs is not None
    q, k = group.pairs
    plain = as_written(seen.n)
    found = []
    for term in terms:
        relation = term.relations[group.heads[0]]
        holds = seen.holds(relation, q, k)
        if holds.any():
            pairs = (q[holds], k[holds])
            live = plain.live(*pairs, USUAL_BLOCK)
            found.append((live, Part(term.expr, group, relation, pairs, area(live, USUAL_BLOCK) / len(pairs[0]))))
    if len(found) == 1:  # the others belong to other heads
        return [found[0][1]]
    guilty = []
    for _, part in found:
        others = np.logical_or.reduce([live for live, other in found if other is not part])
        every = np.logical_or.reduce([live for live, _ in found])
        if WORTHWHILE * np.count_nonzero(others) <= np.count_nonzero(every):
            guilty.append(part)
    if guilty or not len(q):
        return guilty
    return [_whole(seen, group)]


def _whole(seen: Sample, group: Kept) -> Part:
    assert group.pairs is not None
    live = as_written(seen.n).live(*group.pairs, USUAL_BLOCK)
    return Part(None, group, group.relation, group.pairs, area(live, USUAL_BLOCK) / len(group.pairs[0]))


def _reordered(spec: ast.Spec, seen: Sample, part: Part) -> Diagnostic | None:
    """An order in which the part lies in far fewer tiles; or that draws of single keys have none."""
    layout = best(seen.n, part.pairs, divisors(part.relation))
    if layout.text:
        factors = _factors(layout, part)
        block = best_block(factors)
        help = "as a pass of its own, " if part.expr is not None else ""
        help += f"{layout.text} it is {_times(factors[USUAL_BLOCK])}"
        help += f", in tiles of {block} {_times(factors[block])}" if block != USUAL_BLOCK else ""
    elif part.factor >= VERY_MUCH and any(node.num_q == Const(seen.n) for node in draws_of(part.relation)):
        help = "single keys share no tiles; draw blocks of them: `blocks(64, random(...))`"
    else:
        return None
    return Diagnostic("W401", _computes(seen, part) + f" ({at(seen, spec, part.expr)})", _place(spec, part), help)


def _resized(spec: ast.Spec, seen: Sample, parts: list[Part]) -> Iterator[Diagnostic]:
    """Tiles of another size for the whole pattern, as no order is better."""
    shown = parts[0] if len(parts) == 1 else _whole(seen, parts[0].group)
    factors = _factors(as_written(seen.n), shown)
    block = best_block(factors)
    what, where = _computes(seen, shown), f" ({at(seen, spec, shown.expr)})"
    if block != USUAL_BLOCK:
        what += f", {_times(factors[block])} in tiles of {block}"
        each = ", ".join(f"{_times(factors[size])} in {size}" for size in BLOCKS)
        yield Diagnostic("W402", what + where, _place(spec, shown), f"ask for tiles of {block}: {each}")
    elif shown.factor >= VERY_MUCH:
        help = "no order of positions that was tried is clearly better, nor are smaller tiles"
        yield Diagnostic("W401", what + where, _place(spec, shown), help)


def _factors(layout: Layout, part: Part) -> dict[int, float]:
    """Pairs computed for each pair that is kept, by block."""
    return {block: found / len(part.pairs[0]) for block, found in layout.areas(*part.pairs).items()}


def _computes(seen: Sample, part: Part) -> str:
    shown = render_expression(part.expr) if part.expr is not None else ""
    name = f"`{shown}`" if 0 < len(shown) <= MAX_SHOWN else ("this term" if shown else "the pattern")
    who = name + in_heads(seen, part.group.heads)
    return f"{who} computes {_times(part.factor)} the pairs that it keeps, in tiles of {USUAL_BLOCK}"


def _place(spec: ast.Spec, part: Part) -> SourceRange:
    return part.expr.place if part.expr is not None else spec.attend.place


def _times(factor: float) -> str:
    return f"{factor:.0f}x" if factor >= 9.95 else f"{factor:.1f}x"


def ragged(spec: ast.Spec, seen: Sample) -> Iterator[Diagnostic]:
    """A few positions behind the last whole tile, which cost a row and a column of tiles."""
    whole, few = divmod(seen.n, BLOCK)
    if not seen.is_as_asked or not 0 < few <= BLOCK // 4 or not whole:
        return
    live = sum(len(group.q_blks) for group in seen.groups)
    edge = sum(int(np.count_nonzero((group.q_blks == whole) | (group.kv_blks == whole))) for group in seen.groups)
    if not edge or edge * 20 < live:
        return
    end = "the last position costs" if few == 1 else f"the last {few} positions cost"
    message = f"{end} {edge:,} of {live:,} live tiles of {BLOCK}, {edge / live:.0%} (N = {seen.n:,})"
    help = f"cut the text to {whole * BLOCK:,}, or fill it up to {(whole + 1) * BLOCK:,} at no more tiles"
    yield Diagnostic("W403", message, spec.attend.place, help)
