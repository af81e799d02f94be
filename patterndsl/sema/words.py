"""Which of some known words does an expression name? With the nearest one where it names none."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar, cast

from patterndsl.diagnostics import nearest
from patterndsl.sema.expand import Expander
from patterndsl.syntax import tree as ast

_Word = TypeVar("_Word", bound=str)


def called(expander: Expander, expr: ast.Expr, known: Collection[str], what: str, otherwise: str, listed: str) -> str:
    """The known name of what an expression names or calls. otherwise: what is said where it does neither."""
    name = expr.name if isinstance(expr, ast.Name | ast.Call) else None
    if name in known:
        return cast("str", name)
    near = nearest(name, known) if name else None
    help = f"did you mean `{near}`?" if near else f"{listed} {', '.join(known)}"
    raise expander.report("E202", f"unknown {what} `{name}`" if name else otherwise, expr.place, help)


def word(expander: Expander, setting: str, given: Mapping[str, ast.Expr], words: Sequence[_Word]) -> _Word | None:
    """One of some words; None where it is not given."""
    if setting not in given:
        return None
    expr = given[setting]
    text = expr.name if isinstance(expr, ast.Name) else None
    found = next((word for word in words if word == text), None)
    if found is None:
        near = nearest(text, [str(word) for word in words]) if text else None
        help = f"did you mean `{near}`?" if near else f"it is one of {', '.join(map(str, words))}"
        message = f"`{setting}` is not `{text}`" if text else f"`{setting}` is a word"
        raise expander.report("E202", message, expr.place, help)
    return found
