"""Which relations are empty at a glance? By the terms they share, whatever these mean: A & B & ~A.

It decides nothing that takes arithmetic; a relation that is not empty at a glance may be empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from patterndsl.ir.relation import And, Compare, Everything, Nothing, Or, Relation, negation


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
