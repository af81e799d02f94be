"""How is a tree written canonically? The inverse of the parser: `parse(render(tree)) == tree`.

One spelling per tree: `&`, `|`, `~`, single spaces, no parenthesis that precedence makes needless.
"""

from __future__ import annotations

import re
from typing import assert_never

from patterndsl.syntax import tree as ast
from patterndsl.syntax.schema import PROJECTIONS

# How tightly a construct binds; an operand is put in parentheses where it binds less tightly than its place asks.
_OR, _AND, _NOT, _RELATION, _SUM, _PRODUCT, _UNARY, _POWER, _POSTFIX = range(9)


def render_expression(expr: ast.Expr) -> str:
    """Canonical text of an expression."""
    return _text(expr, _OR)


def _text(expr: ast.Expr, needed: int) -> str:
    text, binding = _written(expr)
    return f"({text})" if binding < needed else text


def _arguments(arguments: tuple[ast.Argument, ...]) -> list[str]:
    return [
        (f"{argument.name} = " if argument.name else "") + render_expression(argument.value) for argument in arguments
    ]


def _written(expr: ast.Expr) -> tuple[str, int]:
    """The text and how tightly it binds."""
    match expr:
        case ast.Broken():
            raise AssertionError("a broken expression has no canonical text")
        case ast.Number(value=value):
            return str(value), _POSTFIX
        case ast.Real(value=value):
            return f"{value.normalize():f}" if value % 1 else f"{value:.1f}", _POSTFIX
        case ast.Name(name=name):
            return name, _POSTFIX
        case ast.Attribute(position=position, name=name, facet=facet):
            return ".".join(filter(None, (position, name, facet))), _POSTFIX
        case ast.Subscript(name=name, index=index):
            return f"{name}[{render_expression(index)}]", _POSTFIX
        case ast.Call(name=name, arguments=arguments):
            return f"{name}({', '.join(_arguments(arguments))})", _POSTFIX
        case ast.Negative(operand=operand):
            return f"-{_text(operand, _UNARY)}", _UNARY
        case ast.Binary(op="**", left=left, right=right):
            return f"{_text(left, _POSTFIX)} ** {_text(right, _UNARY)}", _POWER
        case ast.Binary(op=op, left=left, right=right):
            own = _SUM if op in "+-" else _PRODUCT
            return f"{_text(left, own)} {op} {_text(right, own + 1)}", own
        case ast.Comparison(ops=ops, operands=operands):
            parts = [_text(operands[0], _SUM)]
            for op, operand in zip(ops, operands[1:], strict=True):
                parts += [op, _text(operand, _SUM)]
            return " ".join(parts), _RELATION
        case ast.InRange(operand=operand, start=start, stop=stop):
            return f"{_text(operand, _SUM)} in {_text(start, _SUM)}..{_text(stop, _SUM)}", _RELATION
        case ast.InSet(operand=operand, items=items):
            return (
                f"{_text(operand, _SUM)} in {{{', '.join(_text(item, _SUM) for item in items)}}}",
                _RELATION,
            )
        case ast.Not(operand=operand):
            return f"~{_text(operand, _NOT)}", _NOT
        case ast.Logic(op=op, terms=terms):
            own = _AND if op == "&" else _OR
            return f" {op} ".join(_text(term, own + 1) for term in terms), own
        case ast.At(relation=relation, query=query, key=key, lengths=lengths):
            inside = ", ".join([render_expression(query), render_expression(key), *_arguments(lengths)])
            return f"{_text(relation, _POSTFIX)} at ({inside})", _POSTFIX
        case _:
            assert_never(expr)


def render_spec(spec: ast.Spec) -> str:
    """Canonical text of a spec: the bare expression where nothing is declared, YAML otherwise.

    Name, doc and cite are left out, as they do not change the pattern; imported specs are written in place, so
    that the text stands alone.
    """
    declared = any((spec.params, spec.grid, spec.inputs, spec.labels, spec.select, spec.imports, spec.define))
    declared = declared or bool(spec.sources or spec.tables or spec.roles or spec.branches) or spec.keys is not None
    declared = declared or spec.fallback is not None or spec.share is not None or spec.merge != "set"
    return "\n".join(_spec_lines(spec)) + "\n" if declared else render_expression(spec.attend)


def _spec_lines(spec: ast.Spec) -> list[str]:
    lines: list[str] = []
    if spec.params:
        lines += ["params:", *(f"  {_key(param.name)}: {_param(param)}" for param in spec.params)]
    if spec.grid:
        lines += ["grid:", *(f"  {_key(axis.name)}: {_axis_size(axis)}" for axis in spec.grid)]
    if spec.inputs:
        lines += [
            "inputs:",
            *(f"  {_key(declared.name)}: {_scalar(input_type(declared))}" for declared in spec.inputs),
        ]
    if spec.labels:
        lines += [
            "labels:",
            *(f"  {_key(label.name)}: {_scalar(render_expression(label.learner))}" for label in spec.labels),
        ]
    if spec.select:
        lines += [
            "select:",
            *(f"  {_key(item.name)}: {_scalar(render_expression(item.selector))}" for item in spec.select),
        ]
    if spec.sources:
        lines += [
            "sources:",
            *(f"  {_key(item.name)}: {_scalar(render_expression(item.maker))}" for item in spec.sources),
        ]
    if spec.tables:
        lines += [
            "tables:",
            *(f"  {_key(item.name)}: {_scalar(render_expression(item.maker))}" for item in spec.tables),
        ]
    if spec.roles:
        lines += ["roles:", *(line for role in spec.roles for line in _role_lines(role))]
    if spec.imports:
        lines.append("import:")
        for imported in spec.imports:
            lines.append(f"  {_key(imported.name)}:")
            lines += [f"    {line}" for line in _spec_lines(imported.spec)]
    if spec.define:
        lines.append("define:")
        lines += [f"  {_key(_signature(item))}: {_scalar(render_expression(item.body))}" for item in spec.define]
    lines += [f"merge: {spec.merge}"] * (spec.merge != "set")
    lines += [] if spec.fallback is None else [f"fallback: {_scalar(render_expression(spec.fallback))}"]
    lines += [] if spec.share is None else [f"share: {spec.share}"]
    lines += [] if spec.keys is None else [f"keys: {_scalar(render_expression(spec.keys))}"]
    return [*lines, *_attended(spec)]


def _role_lines(role: ast.Role) -> list[str]:
    at = _scalar(render_expression(role.at))
    if role.own == PROJECTIONS:
        return [f"  {_key(role.name)}: {at}"]
    return [f"  {_key(role.name)}:", f"    at: {at}", f"    own: [{', '.join(role.own)}]"]


def _attended(spec: ast.Spec) -> list[str]:
    if not spec.branches:
        return [f"attend: {_scalar(render_expression(spec.attend))}"]
    if [branch.name for branch in spec.branches] == [""]:
        return _branch_lines(spec.branches[0])
    lines = ["branches:"]
    for branch in spec.branches:
        lines += [f"  {_key(branch.name)}:", *(f"    {line}" for line in _branch_lines(branch))]
    return [*lines, f"combine: {spec.combine}"]


def _branch_lines(branch: ast.Branch) -> list[str]:
    scored = (("score", branch.score), ("bias", branch.bias), ("softcap", branch.softcap))
    lines = [f"{key}: {_scalar(render_expression(expr))}" for key, expr in scored if expr is not None]
    return [*lines, "attend:", *_term_lines(branch, "  ")]


def _term_lines(branch: ast.Branch, indent: str) -> list[str]:
    return [f"{indent}{_key(term.source)}: {_scalar(render_expression(term.attend))}" for term in branch.terms]


def _signature(definition: ast.Definition) -> str:
    return definition.name + (f"({', '.join(definition.params)})" if definition.params else "")


def _param(param: ast.Param) -> str:
    if param.minimum is None and param.default is not None:
        return _param_value(param.default)
    parts = [] if param.default is None else [f"default: {_param_value(param.default)}"]
    parts += [] if param.minimum is None else [f"min: {_quoted(render_expression(param.minimum))}"]
    return "{" + ", ".join(parts) + "}"


def _param_value(value: ast.Expr | tuple[ast.Expr, ...]) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_quoted(render_expression(item)) for item in value) + "]"
    return _quoted(render_expression(value))


def _axis_size(axis: ast.Axis) -> str:
    if isinstance(axis.size, tuple):
        return "[" + ", ".join(axis.size) + "]"
    return _scalar(render_expression(axis.size))


def input_type(declared: ast.Input) -> str:
    """`int[N]`, `bool[Nk]`, `int[]`."""
    return f"{declared.dtype}[{'' if declared.size is None else render_expression(declared.size)}]"


_PLAIN = re.compile(r"[A-Za-z0-9_(-][^:#\n]*")
_SIMPLE = re.compile(r"-?[A-Za-z0-9_]+")
_YAML_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}


def _scalar(text: str) -> str:
    """A YAML scalar in block context: plain where YAML reads it back unchanged, else quoted."""
    return text if _PLAIN.fullmatch(text) and text.lower() not in _YAML_WORDS else f'"{text}"'


def _quoted(text: str) -> str:
    """A YAML scalar inside a flow collection, where commas and brackets would end it."""
    return text if _SIMPLE.fullmatch(text) and text.lower() not in _YAML_WORDS else f'"{text}"'


def _key(text: str) -> str:
    return f'"{text}"' if text.lower() in _YAML_WORDS else text
