"""Which sources give keys, what are they told, and where do their keys stand? Names, settings and positions as texts of
the language; tensors are elsewhere.

A term of a pattern says what of one source is attended. Its expression is about positions: `k` is where a key stands,
which is a function of its number. With that put in, a term is a pattern like any other, between queries and numbers of
keys, and everything that is known of patterns is known of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, TypeAlias

from patterndsl.diagnostics import Source
from patterndsl.syntax import tree as ast
from patterndsl.syntax.parse import parse_expression, snippet_of

Takes: TypeAlias = Literal["integer", "word", "real", "source", "factor"]


@dataclass(frozen=True, slots=True)
class SourceSetting:
    """What a source or score is told. default: a text, None where it must be given; words: those that it may be, of a
    word. A factor is a real number of head and layer."""

    name: str
    takes: Takes = "integer"
    default: str | None = None
    words: tuple[str, ...] = ()
    least: int = 1


@dataclass(frozen=True, slots=True)
class SourceKind:
    """A way to come by keys. The texts may use the settings, N, `k`, the number of a key, and `Nk`, how many there are.

    keys: how many there are. position: where a key stands, None where that would say nothing. start: the first position
    that it is made of, where that is another. seen: the last position that it depends on, before 0 for none of the
    sequence. exists: which of the keys there are. found_by: a call, from keys and values alone, a layer, or the caller.
    """

    name: str
    doc: str
    settings: tuple[SourceSetting, ...]
    keys: str
    position: str | None
    seen: str
    start: str | None = None
    exists: str | None = None
    found_by: Literal["call", "layer", "caller"] = "layer"

    @property
    def needed(self) -> tuple[str, ...]:
        return tuple(setting.name for setting in self.settings if setting.default is None)


OF = SourceSetting("of", "word", "states", ("states", "keys"))
"""Whether keys are made of the layer's input and then projected, or of what was projected."""

SOURCES: dict[str, SourceKind] = {
    kind.name: kind
    for kind in (
        SourceKind("memory", "learned rows, before the sequence", (SourceSetting("size"), OF), "size", "k - Nk", "-1"),
        SourceKind(
            "recall",
            "the last states of earlier segments, without gradient (Transformer-XL)",
            (SourceSetting("size"),),
            "size",
            "k - Nk",
            "-1",
        ),
        SourceKind(
            "pool",
            "one key for each window of tokens (Memory Compressed Transformer, NSA)",
            (
                SourceSetting("size"),
                SourceSetting("stride", default="size"),
                SourceSetting("by", "word", "mean", ("mean", "max", "conv")),
                SourceSetting("pad", "word", "none", ("none", "left", "right")),
                OF,
            ),
            "min(N, max(0, N - size + stride) // stride)",
            "k * stride + size - 1",
            "k * stride + size - 1",
            "k - size + 1",
        ),
        SourceKind(
            "project",
            "mixtures of all tokens by learned weights (Linformer)",
            (
                SourceSetting("size"),
                SourceSetting("length"),
                SourceSetting("share", "word", "none", ("none", "heads", "keys")),
            ),
            "size",
            None,
            "N - 1",
        ),
        SourceKind(
            "sort",
            "blocks of keys in a learned soft order (Sparse Sinkhorn Attention)",
            (
                SourceSetting("blocks"),
                SourceSetting("length"),
                SourceSetting("iterations", default="5"),
                SourceSetting("tau", "real", "0.75"),
                SourceSetting("sees", "word", "sequence", ("sequence", "prefix")),
                SourceSetting("cut", default="0", least=0),
                SourceSetting("hidden", default="0", least=0),
            ),
            "ceildiv(N, blocks) * blocks",
            "k",
            "N - 1",
        ),
        SourceKind(
            "compress",
            "what `recall` has forgotten, with fewer keys (Compressive Transformer)",
            (
                SourceSetting("past", "source"),
                SourceSetting("rate"),
                SourceSetting("size"),
                SourceSetting("by", "word", "conv", ("conv", "dilated", "mean", "max", "most_used")),
                SourceSetting("loss", "word", "attention", ("attention", "states", "none")),
            ),
            "size",
            "(k + 1 - Nk) * rate - 1 - past",
            "-1",
        ),
        SourceKind(
            "cross",
            "another sequence, given in each call; `k` is its own position",
            (SourceSetting("size", default="N"),),
            "size",
            "k",
            "-1",
            found_by="caller",
        ),
    )
}

LEFT = replace(
    SOURCES["pool"],
    keys="min(N, ceildiv(N, stride))",
    position="(k + 1) * stride - 1 - (0 - N) % stride",
    seen="(k + 1) * stride - 1 - (0 - N) % stride",
    start="max(0, k - size + 1)",
)
RIGHT = replace(
    SOURCES["pool"],
    keys="min(N, ceildiv(N, stride), max(1, ceildiv(N - size, stride) + 1))",
    position="min(k * stride + size, N) - 1",
    seen="min(k * stride + size, N) - 1",
    start="max(0, ceildiv(k - size + 1, stride) * stride)",
)
PREFIX = replace(SOURCES["sort"], seen="k // blocks * blocks", exists="k >= blocks")
CUT = replace(SOURCES["sort"], keys="cut * blocks", position=None)


@dataclass(frozen=True, slots=True)
class Given:
    """A source as it is declared: its kind, as its settings change it, and each setting's expression."""

    kind: SourceKind
    settings: Mapping[str, ast.Expr]


def as_told(kind: SourceKind, settings: Mapping[str, ast.Expr]) -> SourceKind:
    """The kind with what some words change of positions."""
    match kind.name, settings:
        case "pool", {"pad": ast.Name(name="left")}:
            return LEFT
        case "pool", {"pad": ast.Name(name="right")}:
            return RIGHT
        case "sort", {"cut": cut} if cut != ast.Number(0, place=cut.place):
            return CUT
        case "sort", {"sees": ast.Name(name="prefix")}:
            return PREFIX
        case _:
            return kind


def keys_of(given: Given) -> ast.Expr:
    """How many keys there are."""
    return _with_settings(given, given.kind.keys)


def with_starts(given: Given, expr: ast.Expr) -> ast.Expr:
    """An expression with `k.start`, where the first token of a key stands, said by the key's position."""
    if given.kind.start is None:
        return expr
    start = _with_settings(given, given.kind.start)
    return ast.put(expr, lambda part: start if _is_start(part) else None)


def at_any_start(declared: Iterable[ast.KeySource], expr: ast.Expr) -> ast.Expr:
    """An expression of a definition, which no term uses yet: `k.start` is a position where some source has it."""
    makers = (item.maker for item in declared)
    names = {maker.name for maker in makers if isinstance(maker, ast.Name | ast.Call)}
    if all(name not in SOURCES or SOURCES[name].start is None for name in names):
        return expr
    return ast.put(expr, lambda part: ast.Name("k", place=part.place) if _is_start(part) else None)


def in_numbers(given: Given, attend: ast.Expr) -> ast.Expr:
    """What a term says of positions, said of the numbers of keys."""
    kind = given.kind
    attend = with_starts(given, attend)
    if kind.position not in (None, "k"):
        position = _with_settings(given, str(kind.position))
        attend = ast.At(attend, ast.Name("q", place=attend.place), position, (), place=attend.place)
    if kind.exists is None:
        return attend
    return ast.Logic("&", (attend, _with_settings(given, kind.exists)), place=attend.place)


def seen_by_query(given: Given) -> ast.Expr:
    """Whether all that a key depends on is before the query or at it."""
    last = _with_settings(given, given.kind.seen)
    return ast.Comparison(("<=",), (last, ast.Name("q", place=last.place)), place=last.place)


def where_keys_stand(given: Given) -> ast.Expr:
    """`position < q`: an expression that has the position of key number k at its left."""
    position = _with_settings(given, given.kind.position or "k")
    return ast.Comparison(("<",), (position, ast.Name("q", place=position.place)), place=position.place)


@cache
def text_of_setting(text: str) -> ast.Expr:
    return parse_expression(snippet_of(Source("<sources>", text)))


def _with_settings(given: Given, text: str) -> ast.Expr:
    """The expression of a text with the settings put in."""

    def found(part: ast.Expr) -> ast.Expr | None:
        return given.settings.get(part.name) if isinstance(part, ast.Name) else None

    return ast.put(text_of_setting(text), found)


def _is_start(part: ast.Expr) -> bool:
    """`k.start`."""
    return isinstance(part, ast.Attribute) and (part.position, part.name, part.facet) == ("k", "start", None)
