"""Which names of a spec will surprise? Those that nothing uses, and those that count differently in another library.

Facts about other libraries, as their code has them: transformers' causal `sliding_window` counts the query itself (its
bidirectional one does not: there `window(sliding_window)` is right); its Longformer's `attention_window` counts both
sides; NATTEN's `kernel_size` is the whole width; FlashAttention's `window_size_left` does not count the query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

from patterndsl.diagnostics import Diagnostic
from patterndsl.syntax import tree as ast
from patterndsl.syntax.render import render_expression
from patterndsl.syntax.used import expressions, reached

_KINDS = {
    ast.Param: "parameter",
    ast.Input: "input",
    ast.Label: "label",
    ast.Selection: "selection",
    ast.Definition: "definition",
    ast.Import: "import",
}

Values: TypeAlias = Mapping[str, int | tuple[int, ...]]


def unused(spec: ast.Spec) -> Iterator[Diagnostic]:
    """Parameters, inputs, definitions and imports that the pattern does without; those of imported specs too."""
    # every axis is part of the grid that must fit, used or not
    attended = [term.attend for branch in spec.branches for term in branch.terms] or [spec.attend]
    attended += [role.at for role in spec.roles]
    attended += [source.maker for source in spec.sources] + [table.maker for table in spec.tables]
    scored = [(branch.score, branch.bias, branch.softcap) for branch in spec.branches]
    attended += [expr for exprs in scored for expr in exprs if expr is not None]
    said = [*attended, *(expr for expr in (spec.fallback, spec.keys) if expr is not None)]
    used = reached(spec, *said, *(expr for axis in spec.grid for expr in expressions(axis)))
    declared: tuple[ast.Param | ast.Input | ast.Label | ast.Selection | ast.Definition | ast.Import, ...]
    declared = (*spec.params, *spec.inputs, *spec.labels, *spec.select, *spec.define, *spec.imports)
    for item in declared:
        if item.name not in used:
            message = f"{_KINDS[type(item)]} `{item.name}` is never used"
            yield Diagnostic("W202", message, item.place, "drop it, or use it in `attend`")
    for table in spec.tables:
        if table.name not in used:
            yield Diagnostic("W202", f"table `{table.name}` is never used", table.place, "drop it, or use it in `bias`")
    terms = {term.source for branch in spec.branches for term in branch.terms}
    for source in spec.sources:
        if source.name not in terms and source.name not in reached(spec, *(item.maker for item in spec.sources)):
            message = f"source `{source.name}` is never attended"
            yield Diagnostic("W202", message, source.place, "drop it, or say under `attend` what of it is attended")
    for imported in spec.imports:
        yield from unused(imported.spec)


def conventions(spec: ast.Spec, values: Values, is_causal: Callable[[], bool]) -> Iterator[Diagnostic]:
    """Windows whose size has the name, and not the meaning, that it has in another library.

    values: of the parameters; is_causal: whether no query attends a later key.
    """
    for imported in spec.imports:
        defaults = ((param.name, param.default) for param in imported.spec.params)
        known = {name: default.value for name, default in defaults if isinstance(default, ast.Number)}
        yield from conventions(imported.spec, known, is_causal)
    own = {definition.name for definition in spec.define} | {imported.name for imported in spec.imports}
    for expr in (spec.attend, *(definition.body for definition in spec.define)):
        for call in _calls(expr):
            if call.name in ("window", "recent", "dilated") and call.name not in own:
                yield from _convention(call, values, is_causal)


def _convention(call: ast.Call, values: Values, is_causal: Callable[[], bool]) -> Iterator[Diagnostic]:
    first = _argument(call, 0, ("w", "left", "n"))
    second = _argument(call, 1, ("right", "d"))
    if not isinstance(first, ast.Name):
        return
    name, size = first.name, values.get(first.name)
    if not isinstance(size, int) or size < 1:
        return
    looks_back = call.name == "window" and isinstance(second, ast.Number) and second.value == 0
    both_sides = call.name == "window" and second is None
    match name:
        case "sliding_window" if looks_back or (both_sides and is_causal()):
            theirs = f"transformers' `{name}` (Mistral, Gemma) gives {size:,}, the query itself counted"
            yield _counted(call, size + 1, theirs, f"write `recent({name})`")
        case "attention_window" if both_sides and not is_causal():
            theirs = f"transformers' `{name}` (Longformer) is the sum of both sides and gives {size // 2 * 2 + 1:,}"
            yield _counted(call, 2 * size + 1, theirs, f"write `window({name} // 2)`; or rename it, if it is one-sided")
        case "kernel_size" if looks_back or (both_sides and is_causal()):
            theirs = f"NATTEN's causal `{name}` gives {size:,}, the query itself counted"
            yield _counted(call, size + 1, theirs, f"write `recent({name})`")
        case "kernel_size" if both_sides or call.name == "dilated":
            theirs = f"NATTEN's `{name}` is the whole width and gives {size:,}"
            radius = f"{name} // 2"
            written = f"dilated({radius}, {render_expression(second)})" if second is not None else f"window({radius})"
            yield _counted(call, 2 * size + 1, theirs, f"write `{written}`")
        case "window_size_left" if call.name == "recent":
            theirs = f"FlashAttention's `{name}` gives {size + 1:,}, as it does not count the query itself"
            yield _counted(call, size, theirs, f"write `window({name}, 0)`")


def _counted(call: ast.Call, ours: int, theirs: str, help: str) -> Diagnostic:
    message = f"`{render_expression(call)}` gives a query {ours:,} keys; {theirs}"
    return Diagnostic("W201", message, call.place, help)


def _argument(call: ast.Call, at: int, names: tuple[str, ...]) -> ast.Expr | None:
    """The argument in a place, or with one of the names."""
    for place, argument in enumerate(call.arguments):
        if argument.name in names or (argument.name is None and place == at):
            return argument.value
    return None


def _calls(expr: ast.Expr) -> Iterator[ast.Call]:
    if isinstance(expr, ast.Call):
        yield expr
    for child in ast.children(expr):
        yield from _calls(child)
