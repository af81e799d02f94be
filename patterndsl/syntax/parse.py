"""How does text become a tree? Owner of lark; knows the grammar's shape and nothing of what names mean."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path

from lark import Lark, Token, Tree
from lark.exceptions import UnexpectedCharacters, UnexpectedEOF, UnexpectedInput, UnexpectedToken

from patterndsl.diagnostics import PatternError, Source, SourceRange, error
from patterndsl.syntax import tree as ast
from patterndsl.syntax.grammar import grammar_text

MAX_LENGTH = 65_536
"""Characters in one expression."""
MAX_DEPTH = 100
"""Nesting of brackets, and of operators that do not chain flat."""
KEYWORDS = ("and", "or", "not", "in", "at")
MAX_DIGITS = 20
"""Of a decimal number; those after them are dropped."""
MAX_LITERAL = 2**53
"""Integers beyond this are refused: they are exact in no picture, plan or page."""


@dataclass(frozen=True, slots=True)
class Snippet:
    """A piece of a source: its text, and for each character its offset in the source, plus the stop offset."""

    text: str
    source: Source
    offsets: Sequence[int]

    def place(self, start: int, stop: int) -> SourceRange:
        if not self.text:
            return SourceRange(self.source, self.offsets[0], self.offsets[0])
        start = min(start, len(self.text))
        if start == len(self.text):
            return SourceRange(self.source, self.offsets[start], self.offsets[start])
        last = max(start, min(stop, len(self.text)) - 1)
        return SourceRange(self.source, self.offsets[start], self.offsets[last] + 1)


def snippet_of(source: Source) -> Snippet:
    """The whole source as one snippet."""
    return Snippet(source.text, source, range(len(source.text) + 1))


def parse_expression(snippet: Snippet) -> ast.Expr:
    """The tree of one expression. Raises PatternError (E101, E102) with the place."""
    parsed = _parse(snippet, "expression")
    return _Builder(snippet).expr(_only(parsed))


def parse_definitions(snippet: Snippet) -> tuple[ast.Definition, ...]:
    """The trees of a text of `name(params) = body` definitions."""
    builder = _Builder(snippet)
    return tuple(builder.definition(_tree(child)) for child in _parse(snippet, "definitions").children)


@cache
def _lark() -> Lark:
    """The parser. Its tables take a third of the time of a whole `check`, so lark keeps them in the user's cache."""
    return Lark(
        grammar_text("pattern.lark"),
        parser="lalr",
        start=["expression", "definitions"],
        propagate_positions=True,
        maybe_placeholders=False,
        cache=_table_file() or False,
    )


def _table_file() -> str | None:
    """Where lark may keep its tables (it checks that they fit the grammar and its version); None where it cannot."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "patterndsl"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a read-only or unknown home
        return None
    return str(folder / "pattern.lark.tables") if os.access(folder, os.W_OK) else None


def _parse(snippet: Snippet, start: str) -> Tree[Token]:
    _guard_size(snippet)
    try:
        parsed = _lark().parse(snippet.text, start=start)
    except UnexpectedInput as unexpected:
        raise _syntax_error(snippet, unexpected) from None
    _guard_depth(snippet, parsed)
    return parsed


def _guard_size(snippet: Snippet) -> None:
    if len(snippet.text) > MAX_LENGTH:
        raise error(
            "E102",
            f"the expression has {len(snippet.text):,} characters; at most {MAX_LENGTH:,} are read",
            snippet.place(0, 1),
            "name its parts under `define`, or import them from specs of their own",
        )
    depth = 0
    for offset, char in enumerate(snippet.text):
        depth += (char in "([{") - (char in ")]}")
        if depth > MAX_DEPTH:
            raise _too_deep(snippet, offset)


def _guard_depth(snippet: Snippet, parsed: Tree[Token]) -> None:
    stack = [(parsed, 0)]
    while stack:
        node, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise _too_deep(snippet, node.meta.start_pos)
        stack.extend((child, depth + 1) for child in node.children if isinstance(child, Tree))


def _too_deep(snippet: Snippet, offset: int) -> PatternError:
    return error(
        "E102",
        f"more than {MAX_DEPTH} brackets or operators inside each other",
        snippet.place(offset, offset + 1),
        "name the inner parts under `define`",
    )


_MISTAKES = {
    "&&": "write `&` (or `and`)",
    "||": "write `|` (or `or`)",
    "!": "write `~` (or `not`) for negation, `!=` for inequality",
    "^": "there is no `^`; symmetric difference is `(a - b) | (b - a)`",
    "=": "write `==` to compare",
    ".": "integers only: write a whole number; a range is written `start..stop`",
    "[": "a set is written `{0, 4}`, a range `0..4`; only a name can be indexed, such as `d[head]`",
    "{": "a set stands after `in`: `k in {0, 4}`",
    "if": "there is no `if`; write `c & p`, or `c & p | ~c & other`",
    "else": "there is no `else`; write `c & p | ~c & other`",
    "<>": "write `!=` for inequality",
    "≤": "write `<=`",
    "≥": "write `>=`",
    "≠": "write `!=`",
    "∧": "write `&`",
    "∨": "write `|`",
    "¬": "write `~`",
    "−": "write `-`",
    "–": "write `-`",
    "×": "write `*`",
    "÷": "write `//`",
    "…": "a range is written `start..stop`, half-open",
    "’": "expressions hold no strings",
    "”": "expressions hold no strings",
    "?": "there is no `?:`; write `c & a | ~c & b`",
    ":": "a range is written `start..stop`, half-open",
    ";": "one expression only; name parts under `define`",
    "'": "expressions hold no strings",
    '"': "expressions hold no strings",
}


def _syntax_error(snippet: Snippet, unexpected: UnexpectedInput) -> PatternError:
    text = snippet.text
    offset: int
    if isinstance(unexpected, UnexpectedToken) and unexpected.token.type != "$END":
        offset, found = unexpected.token.start_pos or 0, str(unexpected.token)
    elif isinstance(unexpected, UnexpectedCharacters):
        offset = unexpected.pos_in_stream or 0
        found = text[offset]
    else:
        assert isinstance(unexpected, UnexpectedEOF | UnexpectedToken)
        stop = len(text.rstrip())
        unclosed = _unclosed_bracket(text)
        if unclosed is not None:
            bracket = snippet.place(unclosed, unclosed + 1)
            rest = snippet.source.text[snippet.offsets[-1] :]
            cut = rest.startswith(",") and rest.strip() != text
            cure = "YAML ends the value at the comma: quote it" if cut else "close it"
            return error("E101", f"`{text[unclosed]}` is never closed", bracket, cure)
        is_empty = not re.sub(r"#[^\n]*", "", text).strip()
        message = "the expression is empty" if is_empty else "the expression ends too early"
        help = "write what follows, for example `causal & window(256)`"
        return error("E101", message, snippet.place(stop, stop), help, "something is missing here")
    number = _malformed_number(text, offset)
    if number is not None:
        return error("E101", f"`{number[0]}` is no number", snippet.place(*number.span()), _number_help(number[0]))
    if found == ")" and _AT.search(text[: _unclosed_bracket(text[:offset]) or 0]):
        place = snippet.place(offset, offset + 1)
        return error("E101", "`at` takes two positions", place, "write R at (q', k'), for example R at (q // 4, k)")
    if found in (")", "]", "}"):
        place = snippet.place(offset, offset + 1)
        if _unclosed_bracket(text[:offset]) is None:
            return error("E101", f"`{found}` closes nothing", place, "remove it, or open it before")
        return error("E101", f"`{found}` comes too early", place, _expectation(unexpected))
    start, mistake = _known_mistake(text, offset, found)
    place = snippet.place(start, start + len(mistake))
    if mistake in _MISTAKES:
        cure = _MISTAKES[mistake]
    elif mistake == "[" and not text[:offset].strip():
        cure = "a list is no expression: write it without quotes"
    elif _AT.search(text[:offset]):
        cure = "`at` takes two positions: write R at (q', k')"
    elif mistake == "~":
        cure = "put the negation in parentheses: `(~p)`"
    elif not mistake.isascii():
        cure = "names are made of the letters a to z, digits and `_`"
    else:
        cure = _expectation(unexpected)
    return error("E101", f"unexpected `{mistake}`", place, cure)


_AT = re.compile(r"\bat\s*$")
_NUMBER = re.compile(r"(?<!\w)[0-9]\w*")


def _malformed_number(text: str, offset: int) -> re.Match[str] | None:
    """Digits with letters behind them, `1e3` or `4k`, where the letters at `offset` were not understood."""
    return next((word for word in _NUMBER.finditer(text) if word.start() < offset < word.end()), None)


def _number_help(word: str) -> str:
    """What to write instead of such a number."""
    power = re.fullmatch(r"([0-9]{1,8})[eE]([0-9]{1,2})", word)
    if power:
        value = int(power[1]) * 10 ** int(power[2])
        return f"write {value}" if value <= MAX_LITERAL else "numbers up to 2^53 are read"
    if re.fullmatch(r"0([xX][0-9a-fA-F]{1,12}|[bB][01]{1,40}|[oO][0-7]{1,15})", word):
        return f"numbers are decimal: write {int(word, 0)}"
    product = re.fullmatch(r"([0-9]+)([A-Za-z]\w*)", word)
    return f"a product is written {product[1]} * {product[2]}" if product else "numbers are decimal, such as 1000"


def _known_mistake(text: str, offset: int, found: str) -> tuple[int, str]:
    """Where the mistake starts, and all of it: what was found may be its second character."""
    for mistake in _MISTAKES:
        for start in (offset - len(mistake) + 1, offset):
            if start >= 0 and len(mistake) > 1 and not mistake.isalpha() and text.startswith(mistake, start):
                return start, mistake
    return offset, found


def _unclosed_bracket(text: str) -> int | None:
    stack: list[int] = []
    for offset, char in enumerate(text):
        if char in "([{":
            stack.append(offset)
        elif char in ")]}" and stack:
            stack.pop()
    return stack[-1] if stack else None


def _expectation(unexpected: UnexpectedInput) -> str:
    expected: set[str] = set(getattr(unexpected, "accepts", None) or getattr(unexpected, "allowed", None) or ())
    if {"NAME", "INT"} & expected:
        return "an expression belongs here: a name, a number, or `(`"
    if "RPAR" in expected:
        return "an operator, `,` or `)` belongs here"
    return "an operator belongs here, such as `&`, `|`, `<=` or `+`"


def _tree(node: Token | Tree[Token]) -> Tree[Token]:
    assert isinstance(node, Tree)
    return node


def _only(node: Tree[Token]) -> Tree[Token]:
    (child,) = node.children
    return _tree(child)


class _Builder:
    """Turns lark's tree into ours, with places in the source."""

    def __init__(self, snippet: Snippet) -> None:
        self.snippet = snippet

    def place(self, node: Tree[Token] | Token) -> SourceRange:
        if isinstance(node, Token):
            return self.snippet.place(node.start_pos or 0, node.end_pos or 0)
        meta = node.meta
        return self.snippet.place(getattr(meta, "start_pos", 0), getattr(meta, "end_pos", 0))

    def definition(self, node: Tree[Token]) -> ast.Definition:
        name, *params = (child for child in node.children if isinstance(child, Token))
        body = _tree(node.children[-1])
        names = tuple(str(param) for param in params)
        return ast.Definition(str(name), names, self.expr(body), place=self.place(name))

    def argument(self, node: Tree[Token]) -> ast.Argument:
        name = str(node.children[0]) if node.data == "keyword" else None
        return ast.Argument(name, self.expr(_tree(node.children[-1])), place=self.place(node))

    def expr(self, node: Tree[Token]) -> ast.Expr:
        place = self.place(node)
        children = node.children
        match str(node.data):
            case "group":
                return self.expr(_only(node))
            case "number":
                value = int(str(children[0]).replace("_", "")) if len(str(children[0])) < 40 else MAX_LITERAL + 1
                if value > MAX_LITERAL:
                    raise error("E102", "the number is too large", place, "numbers up to 2^53 are read")
                return ast.Number(value, place=place)
            case "real":
                return ast.Real(Decimal(str(children[0])[:MAX_DIGITS]), place=place)
            case "name":
                return ast.Name(str(children[0]), place=place)
            case "attribute":
                position, name, *facet = (str(child) for child in children)
                return ast.Attribute(position, name, facet[0] if facet else None, place=place)
            case "subscript":
                return ast.Subscript(str(children[0]), self.expr(_tree(children[1])), place=place)
            case "call":
                arguments = tuple(self.argument(_tree(child)) for child in children[1:])
                return ast.Call(str(children[0]), arguments, place=place)
            case "negative":
                return ast.Negative(self.expr(_tree(children[1])), place=place)
            case "sum" | "product" | "power":
                left, op, right = children
                return ast.Binary(str(op), self.expr(_tree(left)), self.expr(_tree(right)), place=place)
            case "comparison":
                operands = tuple(self.expr(_tree(child)) for child in children[::2])
                return ast.Comparison(tuple(str(op) for op in children[1::2]), operands, place=place)
            case "in_range":
                operand, start, stop = (self.expr(_tree(child)) for child in children)
                return ast.InRange(operand, start, stop, place=place)
            case "in_set":
                operand, *items = (self.expr(_tree(child)) for child in children)
                return ast.InSet(operand, tuple(items), place=place)
            case "negation":
                return ast.Not(self.expr(_only(node)), place=place)
            case "conjunction" | "disjunction" as rule:
                return self.logic("&" if rule == "conjunction" else "|", node)
            case "at":
                relation, query, key, *lengths = (_tree(child) for child in children)
                new_lengths = tuple(self.argument(length) for length in lengths)
                return ast.At(self.expr(relation), self.expr(query), self.expr(key), new_lengths, place=place)
            case rule:
                raise AssertionError(f"the grammar has a rule {rule!r} that the builder does not know")

    def logic(self, op: str, node: Tree[Token]) -> ast.Expr:
        """`a & (b & c)` is the same flat union of terms as `a & b & c`."""
        terms: list[ast.Expr] = []
        for child in node.children:
            term = self.expr(_tree(child))
            terms.extend(term.terms if isinstance(term, ast.Logic) and term.op == op else (term,))
        return ast.Logic(op, tuple(terms), place=self.place(node))
