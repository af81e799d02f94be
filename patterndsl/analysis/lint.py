"""What would a user of a pattern be grateful to hear? Advice, each piece with numbers that were counted.

Nothing here is guessed: what could not be counted or proven within a bounded effort, some tenths of a second, is not
said. The rules about cost are in `advice.py`, those about names in `names.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache

import numpy as np

from patterndsl.analysis.advice import block_and_order, ragged
from patterndsl.analysis.kept import LENGTHS, Integers, Kept, Sample, sample
from patterndsl.analysis.names import conventions, unused
from patterndsl.analysis.proof import proven
from patterndsl.analysis.redundancy import redundancy
from patterndsl.analysis.terms import Term, at, in_heads, queries, terms_of
from patterndsl.diagnostics import MAX_ERRORS, Diagnostic, PatternError
from patterndsl.ir.draws import draw
from patterndsl.ir.index import Const, K, Q
from patterndsl.ir.relation import NOTHING, And, Or, Random, Relation, compare, conjunction
from patterndsl.sema.model import Resolved
from patterndsl.sema.parameters import param_values, sizes_of
from patterndsl.sema.resolve import resolve
from patterndsl.syntax import tree as ast

OPERATIONS = 300_000
"""Of isl, in one proof; some 0.1 s."""
MAX_PROOFS = 4
SECONDS = 1.5
"""For terms that change nothing."""
SOME_LENGTHS, SOME_HEADS = (256, 1024), 4
"""Where two specs are compared before a proof that they are equal is tried."""


def lint(
    spec: ast.Spec, resolved: Resolved, n: int | None = None, *, heads: int = 8, layer: int = 0
) -> tuple[Diagnostic, ...]:
    """Advice about a pattern at the length n, or at one that it fits; in the order of the text."""
    seen = sample(resolved, n, heads, layer)
    found = [*unused(spec), *conventions(spec, _values(resolved, n, seen), lambda: _is_causal(resolved, seen))]
    found.extend(_dead(spec))
    if seen is not None:
        terms = terms_of(spec, seen)
        found.extend(_empty_rows(spec, resolved, seen))
        found.extend(_almost_causal(spec, seen, terms))
        found.extend(_draws(seen))
        found.extend(_costs(spec, resolved, seen, terms, n))
        found.extend(ragged(spec, seen) if n is not None else ())
    return tuple(sorted(dict.fromkeys(found), key=_order)[:MAX_ERRORS])


def _values(resolved: Resolved, n: int | None, seen: Sample | None) -> Mapping[str, int | tuple[int, ...]]:
    """The parameters, at the length that was looked at or would have been."""
    if seen is not None:
        return seen.params
    try:
        return param_values(resolved, {}, sizes_of(LENGTHS[0] if n is None else n, None, None, 0))
    except PatternError:
        return {}


def _order(found: Diagnostic) -> tuple[int, str, int, str]:
    """The spec's own text before what it imports."""
    if found.where is None:
        return 0, "", 0, found.code
    return int(found.where.source.importer is not None), found.where.source.name, found.where.start, found.code


def _is_causal(resolved: Resolved, seen: Sample | None) -> bool:
    if seen is not None:
        return not any(group.later.any() for group in seen.groups)
    return proven("causal", resolved, operations=OPERATIONS) is not None


def _costs(
    spec: ast.Spec, resolved: Resolved, seen: Sample, terms: tuple[Term, ...], n: int | None
) -> Iterator[Diagnostic]:
    """What is told from a list of all pairs: of a shorter text where they are too many."""
    listed: Sample | None = seen
    while listed is not None and listed.is_too_long:
        listed = sample(resolved, n, listed.num_heads, listed.layer, below=listed.n)
    if listed is not None:
        yield from block_and_order(spec, listed, terms if listed is seen else terms_of(spec, listed))


# ---- what is kept -------------------------------------------------------------------------------------------


def _empty_rows(spec: ast.Spec, resolved: Resolved, seen: Sample) -> Iterator[Diagnostic]:
    """Queries without a key, in the heads that have most of them."""
    group = max(seen.groups, key=lambda group: np.count_nonzero(group.row_lengths == 0))
    (empty,) = np.nonzero(group.row_lengths == 0)
    if not empty.size:
        return
    if empty[-1] == empty.size - 1 and _has_no_pair(resolved, None if empty.size == seen.n else empty.size):
        where = "for every N"
    elif seen.is_as_asked:
        where = at(seen, spec)
    else:
        return  # seen at a shorter length only
    who = in_heads(seen, group.same_heads)
    if empty.size == seen.n:
        message = f"no query{who} attends any key; the output is 0 ({where})"
    elif empty.size == 1:
        message = f"{queries(empty, seen.n)}{who} attends no key; its output is 0 ({where})"
    else:
        message = f"{queries(empty, seen.n)}{who} attend no key; their output is 0 ({where})"
    help = "add a key that is always there, such as the query itself: `| q == k`"
    yield Diagnostic("W301", message, spec.attend.place, help)


def _has_no_pair(resolved: Resolved, num_rows: int | None) -> bool:
    """Whether the first queries, or all, have no key at any length, with any parameters."""
    few = [compare("<", Q, Const(num_rows))] if num_rows is not None else []
    pairs = replace(resolved, relation=conjunction([resolved.relation, *few]))
    nothing = replace(resolved, relation=NOTHING)
    return proven("within", pairs, nothing, operations=OPERATIONS) is not None


def _dead(spec: ast.Spec) -> Iterator[Diagnostic]:
    """Terms that change nothing, proven for every N; most are seen to change something before a proof is tried."""

    @cache
    def meaning(spec: ast.Spec) -> Resolved | None:
        try:
            return resolve(spec)
        except PatternError:
            return None  # integers were subtracted

    @cache
    def seen(resolved: Resolved, n: int) -> Sample | None:
        return sample(resolved, n, SOME_HEADS, 0) or sample(resolved, None, SOME_HEADS, 0)

    left = MAX_PROOFS

    def same(spec: ast.Spec, shorter: ast.Spec) -> str | None:
        nonlocal left
        whole, part = meaning(spec), meaning(shorter)
        if whole is None or part is None or not left:
            return None
        if not whole.inputs and not all(_as_many(seen(whole, n), seen(part, n)) for n in SOME_LENGTHS):
            return None
        left -= 1
        proof = proven("equals", whole, part, operations=OPERATIONS)
        return None if proof is None else proof.scope

    for term in redundancy(spec, same, SECONDS).dead:
        yield Diagnostic("W302", str(term), term.place, f"drop it ({term.scope})")


def _as_many(first: Sample | None, second: Sample | None) -> bool:
    """Whether all queries seen have as many keys in both."""
    if first is None or second is None or first.n != second.n:
        return False
    groups = zip(first.groups, second.groups, strict=False)
    return all(np.array_equal(group.row_lengths, other.row_lengths) for group, other in groups)


def _almost_causal(spec: ast.Spec, seen: Sample, terms: tuple[Term, ...]) -> Iterator[Diagnostic]:
    """A few queries that attend later keys, where all others do not."""
    for group in seen.groups:
        (rows,) = np.nonzero(group.later)
        if not rows.size or rows.size * 50 > seen.n:
            continue
        to_blame = [term for term in terms if _looks_ahead(seen, term, group, rows)]
        place = to_blame[0].expr.place if len(to_blame) == 1 else spec.attend.place
        verb = "attends" if rows.size == 1 else "attend"
        message = (
            f"causal{in_heads(seen, group.same_heads)} but for {queries(rows, seen.n)}, which {verb} "
            f"{int(group.later.sum()):,} later keys ({at(seen, spec)})"
        )
        yield Diagnostic("W303", message, place, "if they must not see what comes later, write `causal & (...)`")
        return


def _looks_ahead(seen: Sample, term: Term, group: Kept, rows: Integers) -> bool:
    q, k = rows[:, None], np.arange(seen.n)[None]
    return bool((seen.holds(term.relations[group.heads[0]], q, k) & (k > q)).any())


def _draws(seen: Sample) -> Iterator[Diagnostic]:
    """Draws that find too few keys, or of which the rest of the pattern drops many."""
    for group in seen.groups:
        for node in _added_draws(group.relation):
            keys = draw(node)
            rows, turns = np.nonzero(keys >= 0)
            assert isinstance(node.count, Const)
            short = np.count_nonzero(np.count_nonzero(keys >= 0, axis=1) < node.count.value)
            if 2 * short > keys.shape[0]:
                what = f"`random` finds fewer than {node.count.value:,} keys for {short:,} of {keys.shape[0]:,} queries"
                yield Diagnostic("W304", f"{what} (N = {seen.n:,})", node.place, "draw fewer, or avoid less")
            if node.q != Q or node.k != K or not rows.size:
                continue
            drawn = keys[rows, turns]
            lost = ~seen.holds(group.relation, rows, drawn)
            if 10 * np.count_nonzero(lost) <= lost.size:
                continue
            message = (
                f"the rest of the pattern drops {np.count_nonzero(lost):,} of the {lost.size:,} keys that `random` "
                f"draws{in_heads(seen, group.same_heads)} (N = {seen.n:,})"
            )
            later = bool((drawn[lost] > rows[lost]).all())
            help = "draw only what can be kept: add `avoid = ~causal`" if later else "let it avoid what is dropped"
            yield Diagnostic("W304", message, node.place, help)


def _added_draws(relation: Relation) -> Iterator[Random]:
    """Draws of keys to attend; those that take keys away are none of them."""
    match relation:
        case Random():
            yield relation
        case And(terms) | Or(terms):
            for term in terms:
                yield from _added_draws(term)
