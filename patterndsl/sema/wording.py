"""How is a mistake of names, kinds and arguments put into words?"""

from __future__ import annotations

from patterndsl.sema.scope import Kind
from patterndsl.syntax import tree as ast

A_KIND: dict[Kind | None, str] = {
    "integer": "an integer",
    "predicate": "a predicate",
    "attribute": "an attribute's name",
    "list": "a list",
}

FORMS = {
    "abs": "abs(x)",
    "min": "min(x, y)",
    "max": "max(x, y)",
    "clamp": "clamp(x, low, high)",
    "isqrt": "isqrt(x)",
    "log2": "log2(x)",
    "ceildiv": "ceildiv(x, step)",
    "random": "random(r)",
    "along": "along(axis)",
}
"""How the functions of the language are written."""

OTHER_WORDS = {
    "true": "all",
    "false": "none",
    "i": "q",
    "j": "k",
    "query": "q",
    "key": "k",
    "q_idx": "q",
    "kv_idx": "k",
}
"""What other languages and libraries call it."""


def counted(*counts: int) -> str:
    """`1 or 2 arguments`, `no arguments`."""
    listed = " or ".join(str(count or "no") for count in sorted(counts))
    return f"{listed} argument{'s' * (max(counts) != 1)}"


def given_count(count: int) -> str:
    """`none is given`, `2 are given`."""
    return {0: "none is given", 1: "1 is given"}.get(count, f"{count} are given")


def wrong_kind(wanted: Kind | None, kind: Kind, expr: ast.Expr, text: str, own: bool) -> tuple[str, str]:
    """What stands there and what to do about it; `text` is the expression's, `own` if the user wrote it just so."""
    if kind == "predicate" and isinstance(expr, ast.Attribute | ast.Subscript):
        alone = f"it stands by itself: {text}, or ~{text}"
        return "a truth value", alone if own else "give it a grid axis, or an input of integers"
    return A_KIND[kind], _kind_help(wanted, kind, text)


def _kind_help(wanted: Kind | None, kind: Kind, text: str) -> str:
    match wanted, kind:
        case "predicate", "integer":
            return "compare it with something, such as `q - k < 4`"
        case "integer", "predicate":
            return "combine predicates with `&`, `|`, `~` and `-`, and put a comparison in parentheses"
        case _, "attribute":
            return f"an attribute belongs to a position: write q.{text} or k.{text}"
        case "attribute", _:
            return "name a grid axis or an input, without q. or k."
    return "index lists by head or layer"
