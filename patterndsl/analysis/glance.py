"""Which relations are empty or symmetric at a glance? By the terms they share, whatever these mean: A & B & ~A.

It decides nothing that takes arithmetic; a relation that is not empty at a glance may be empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from patterndsl.ir.index import NK, NQ, Arithmetic, Function, Index, K, Q
from patterndsl.ir.relation import And, Compare, Everything, Not, Nothing, Or, Relation, negation, substitute


def is_empty(relation: Relation) -> bool:
    """Whether some term excludes the others. Work: O(terms^2)."""
    match relation:
        case Nothing():
            return True
        case Or(terms):
            return all(map(is_empty, terms))
        case And(terms):
            return any(_implied(negation(term), (*terms[:at], *terms[at + 1 :])) for at, term in enumerate(terms))
        case _:
            return False


def mirrored(relation: Relation) -> Relation:
    """{(q, k) : (k, q) in the relation}, of as many keys as it has queries."""
    turned: dict[Index, Index] = {Q: K, K: Q, NQ: NK, NK: NQ}
    return substitute(relation, lambda found: turned.get(found, found))


def not_symmetric(relation: Relation) -> tuple[Relation, ...]:
    """The parts that make it symmetric if they are: terms that are neither symmetric at a glance nor beside their
    mirror image. None where it is symmetric itself."""
    if _text(relation) == _text(mirrored(relation)):
        return ()
    if not isinstance(relation, And | Or):
        return (relation,)
    texts = {_text(term) for term in relation.terms}
    alone = [term for term in relation.terms if _text(mirrored(term)) not in texts]
    return tuple(part for term in alone for part in not_symmetric(term))


def _text(part: Relation | Index) -> str:
    """The same for what differs only in the order of operands that may change places."""
    match part:
        case And(terms) | Or(terms):
            return f"{type(part).__name__}({', '.join(sorted(map(_text, terms)))})"
        case Not(term):
            return f"Not({_text(term)})"
        case Compare("==" | "!=" as op, left, right) | Arithmetic("+" | "*" as op, left, right):
            return f"({op.join(sorted((_text(left), _text(right))))})"
        case Function("abs", (Arithmetic("-", left, right),)):
            return f"abs({'-'.join(sorted((_text(left), _text(right))))})"
        case Function("min" | "max" as name, arguments):
            return f"{name}({', '.join(sorted(map(_text, arguments)))})"
        case Compare(op, left, right) | Arithmetic(op, left, right):
            return f"({_text(left)}{op}{_text(right)})"
        case Function(name, arguments):
            return f"{name}({', '.join(map(_text, arguments))})"
        case _:
            return repr(part)


def _implied(relation: Relation, known: Sequence[Relation]) -> bool:
    """Whether it is known, or made of what is known."""
    if relation in known:
        return True
    match relation:
        case Everything():
            return True
        case Compare("<=", left, right):
            return any(replace(relation, op=op) in known for op in ("<", "==")) or Compare("==", right, left) in known
        case And(terms):
            return all(_implied(term, known) for term in terms)
        case Or(terms):
            chosen = (item.terms for item in known if isinstance(item, Or))
            return any(_implied(term, known) for term in terms) or any(set(terms) >= set(part) for part in chosen)
        case _:
            return False
