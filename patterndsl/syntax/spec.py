"""How does a YAML file become a Spec? Section by section; every expression knows its place in the file.

Mistakes are collected, so that one bad entry does not hide the next.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias, TypeVar, cast

from patterndsl.diagnostics import Diagnostic, PatternError, Source, SourceRange, error, nearest
from patterndsl.syntax import tree as ast
from patterndsl.syntax.nodes import MAX_FILE_SIZE, MappingNode, Node, Nodes, ScalarNode, SequenceNode
from patterndsl.syntax.parse import KEYWORDS, Snippet, parse_definitions, parse_expression, snippet_of
from patterndsl.syntax.schema import (
    COMBINES,
    KEYS,
    MERGES,
    PARAM_KEYS,
    PROJECTIONS,
    REQUIRED,
    ROLE_KEYS,
    SCORED,
    SHARES,
)

_T = TypeVar("_T")
Make: TypeAlias = Callable[[str, Node, Node], _T]
"""What an entry declares: of its name, the node of the name and that of the value."""

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SIGNATURE = re.compile(r"([A-Za-z_]\w*)\s*(?:\(\s*([A-Za-z_]\w*(?:\s*,\s*[A-Za-z_]\w*)*)\s*\))?")
_HEADS = re.compile(r"^\s*([A-Za-z_]\w*)\s*(?:\([^)\n]*\))?\s*=(?!=)", re.MULTILINE)
_INPUT_TYPE = re.compile(r"\s*(int|bool)\s*\[(.*)\]\s*", re.DOTALL)


def read_expression(text: str, name: str = "<expression>") -> tuple[ast.Spec, list[Diagnostic]]:
    """A Spec with nothing but `attend`, and what is wrong with it."""
    snippet = snippet_of(Source(name, text))
    try:
        attend = parse_expression(snippet)
        return ast.Spec(attend, place=attend.place), []
    except PatternError as failed:
        place = snippet.place(0, 1)
        return ast.Spec(ast.Broken(place=place), place=place), list(failed.diagnostics)


def check_name(name: str, what: str, found: list[Diagnostic], place: SourceRange | None = None) -> bool:
    """Whether it can name something; else it is reported in `found`."""
    if isinstance(name, str) and _IDENTIFIER.fullmatch(name):
        return True
    help = "letters, digits and `_`, not first a digit"
    found.append(Diagnostic("E304", f"`{name}` is not a name for {what}", place, help))
    return False


def read_input(name: str, kind: str, found: list[Diagnostic]) -> ast.Input | None:
    """An input declared in code, `{"doc": "int[N]"}`; None where it was reported in `found`."""
    if not check_name(name, "an input", found):
        return None
    if not isinstance(kind, str):
        found.append(Diagnostic("E304", f"input `{name}` needs a type", None, "write int[N], bool[Nk], or int[]"))
        return None
    snippet = snippet_of(Source(f"<{name}>", kind))
    return _input(name, snippet, snippet.place(0, len(kind)), found)


def _input(name: str, snippet: Snippet, place: SourceRange, found: list[Diagnostic]) -> ast.Input | None:
    """An input's type and size; `place` is where it is declared."""
    match = _INPUT_TYPE.fullmatch(snippet.text)
    if match is None:
        help = "write int[N], bool[Nk], or int[] for a table of any length; quote it inside {...}"
        message = f"input `{name}` needs a type" + (f", and `{snippet.text}` is none" if snippet.text else "")
        found.append(Diagnostic("E304", message, snippet.place(0, len(snippet.text)), help))
        return None
    size: ast.Expr | None = None
    if match[2].strip():
        start, stop = match.span(2)
        try:
            size = parse_expression(Snippet(match[2], snippet.source, snippet.offsets[start : stop + 1]))
        except PatternError as failed:
            found.extend(failed.diagnostics)
            return None
    return ast.Input(name, "bool" if match[1] == "bool" else "int", size, place=place)


def read_yaml(source: Source, folder: Path | None = None) -> tuple[ast.Spec, list[Diagnostic]]:
    """The Spec of a YAML text, and what is wrong with it; imports are relative to `folder`."""
    return _read(source, folder, ())


def read_file(path: Path) -> tuple[ast.Spec, list[Diagnostic]]:
    """The Spec of a YAML file. Raises PatternError (E601) where the file cannot be read."""
    return _read_path(path, str(path), None, ())


def _read_path(
    path: Path, shown: str, place: SourceRange | None, importers: tuple[Path, ...]
) -> tuple[ast.Spec, list[Diagnostic]]:
    code = "E601" if place is None else "E307"
    try:
        if path.is_file() and path.stat().st_size > MAX_FILE_SIZE:
            raise error(
                "E102",
                f"{shown} has more than {MAX_FILE_SIZE:,} bytes",
                place,
                "split it and import the parts",
            )
        data = path.read_bytes()
        if data[8:9] == b"{" and 0 in data[:8]:  # as Safetensors begin
            raise error(code, f"{shown} holds tensors", place, "a plan is read by patterndsl.load_program")
        text = data.decode("utf-8-sig")
    except OSError as failed:
        help = f"name a file in it: {shown}/NAME.yaml" if path.is_dir() else _similar_file(path)
        raise error(code, f"cannot read {shown}: {failed.strerror}", place, help) from None
    except UnicodeDecodeError:
        raise error(code, f"{shown} is not UTF-8 text", place, "a spec is a YAML text file") from None
    source = Source(shown, text, importer=place.source.name if place else None)
    return _read(source, path.resolve().parent, (*importers, path.resolve()))


def _similar_file(path: Path) -> str:
    near = None
    if path.parent.is_dir():
        near = nearest(path.name, (other.name for other in path.parent.glob("*.y*ml")))
    return f"did you mean {near}, in the same folder?" if near else "check the path"


def _read(source: Source, folder: Path | None, importers: tuple[Path, ...]) -> tuple[ast.Spec, list[Diagnostic]]:
    reader = _Reader(source, folder=folder, importers=importers)
    root = reader.compose()
    return reader.spec(root), reader.diagnostics


@dataclass
class _Reader(Nodes):
    """What nodes mean. folder: where imports are; importers: the files that lead to this one, which is the last."""

    folder: Path | None = None
    importers: tuple[Path, ...] = ()

    # ---- values -------------------------------------------------------------------------------------------

    def expression(self, node: Node, what: str) -> ast.Expr:
        """An expression; Broken where it was reported."""
        broken = ast.Broken(place=self.place(node))
        if isinstance(node, ScalarNode) and not node.value.strip():
            self.report("E304", f"{what} is empty", self.place(node), "write an expression, such as `causal` or `4`")
            return broken
        if not isinstance(node, ScalarNode):
            help = "write one expression; join several with `&` or `|`"
            self.report("E304", f"{what} must be an expression", self.place(node), help)
            return broken
        if not self.is_text(node):
            return broken
        return self.parsed(parse_expression, self.snippet(node)) or broken

    def parsed(self, parse: Callable[[Snippet], ast.Expr], snippet: Snippet) -> ast.Expr | None:
        try:
            return parse(snippet)
        except PatternError as failed:
            self.diagnostics.extend(failed.diagnostics)
            return None

    def identifier(self, text: str, node: Node, what: str) -> bool:
        if check_name(text, what, self.diagnostics, self.place(node)):
            return True
        self.broken.update(_IDENTIFIER.findall(text))  # `my-w` is used as `my - w`
        return False

    # ---- sections -----------------------------------------------------------------------------------------

    def spec(self, root: Node) -> ast.Spec:
        """The spec of a root node, or of one that is imported in place."""
        place = self.place(root)
        found = self.sections(root)
        outer, self.broken = self.broken, set()
        attend, branches = self.attended(found, place)
        if "combine" in found and "branches" not in found:
            help = "it says how `branches` become one output"
            self.report("E304", "`combine` without `branches`", self.place(found["combine"]), help)
        spec = ast.Spec(
            attend=attend,
            params=self.declared(found, "params", "a parameter", self.param),
            grid=self.declared(found, "grid", "an axis", self.axis),
            inputs=self.declared(found, "inputs", "an input", self.unless_broken(self.input)),
            labels=self.declared(found, "labels", "a label", self.made("label", ast.Label)),
            select=self.declared(found, "select", "a selection", self.made("selection", ast.Selection)),
            imports=self.declared(found, "import", "an import", self.unless_broken(self.imported)),
            define=tuple(self.definitions(found["define"])) if "define" in found else (),
            merge=self.word(found, "merge", MERGES) or "set",
            fallback=self.optional(found, "fallback"),
            share=self.word(found, "share", SHARES),
            keys=self.optional(found, "keys"),
            sources=self.declared(found, "sources", "a source", self.made("source", ast.KeySource)),
            tables=self.declared(found, "tables", "a table", self.made("table", ast.Table)),
            roles=self.declared(found, "roles", "a role", self.role),
            branches=branches,
            combine=self.word(found, "combine", COMBINES) or "sum",
            name=self.told(found, "name"),
            doc=self.told(found, "doc"),
            cite=self.told(found, "cite"),
            place=place,
        )
        spec, self.broken = replace(spec, broken=frozenset(self.broken)), outer
        return spec

    def sections(self, root: Node) -> dict[str, Node]:
        """The values of a spec's keys; reports unknown and missing ones."""
        found: dict[str, Node] = {}
        for key, key_node, value in self.entries(root, "a spec"):
            if key in KEYS:
                found[key] = value
            elif near := self.unknown(key, key_node, KEYS):
                # read on as if it had been spelled so, or what it declares would be reported missing
                found.setdefault(near, value)
        for keys in REQUIRED:
            given = [key for key in keys if key in found]
            if not given and isinstance(root, MappingNode):
                start = SourceRange(self.source, root.start_mark.index, root.start_mark.index + 1)
                self.report("E305", f"the key `{keys[0]}` is missing", start, "write at least `attend: causal`")
            for extra in given[1:]:
                message = f"`{given[0]}` and `{extra}` are both given"
                self.report("E303", message, self.place(found[extra]), "keep one of the two")
        return found

    def unknown(self, key: str, node: Node, keys: Collection[str], of: str = "") -> str | None:
        """Reports a key that is none of some; the one that it may have been meant as."""
        near = nearest(key, keys)
        help = f"did you mean `{near}`?" if near else f"the keys are {', '.join(keys)}"
        self.report("E302", f"unknown key `{key}`{of}", self.place(node), help)
        return near

    def declared(self, found: Mapping[str, Node], section: str, what: str, make: Make[_T | None]) -> tuple[_T, ...]:
        """What the entries of a section declare, without those that were reported."""
        if section not in found:
            return ()
        made = (
            make(name, key, value)
            for name, key, value in self.entries(found[section], f"`{section}`")
            if self.identifier(name, key, what)
        )
        return tuple(item for item in made if item is not None)

    def made(self, what: str, node_type: Callable[..., _T]) -> Make[_T | None]:
        """Entries whose value is an expression that says who makes them."""

        def make(name: str, key: Node, value: Node) -> _T | None:
            maker = self.expression(value, f"{what} `{name}`")
            return None if isinstance(maker, ast.Broken) else node_type(name, maker, place=self.place(key))

        return make

    def unless_broken(self, make: Make[_T | None]) -> Make[_T | None]:
        """The same; a name without a declaration is remembered, so that its uses are not reported too."""

        def remembering(name: str, key: Node, value: Node) -> _T | None:
            found = make(name, key, value)
            if found is None:
                self.broken.add(name)
            return found

        return remembering

    def optional(self, found: Mapping[str, Node], key: str) -> ast.Expr | None:
        """The expression of a key, if it is there."""
        return self.expression(found[key], f"`{key}`") if key in found else None

    def word(self, found: Mapping[str, Node], key: str, words: Sequence[_T]) -> _T | None:
        """The word of a key, if it is there and one of some."""
        return self.choice(found[key], f"`{key}`", words) if key in found else None

    def told(self, found: Mapping[str, Node], key: str) -> str | None:
        """The text of a key, if it is there."""
        return self.text(found[key], f"`{key}`") if key in found else None

    def attended(self, found: dict[str, Node], place: SourceRange) -> tuple[ast.Expr, tuple[ast.Branch, ...]]:
        """What is attended, of a pattern with several terms that of the first one, and the branches of such."""
        if "branches" in found:
            branches = tuple(
                self.branch(name, key, value)
                for name, key, value in self.entries(found["branches"], "`branches`")
                if self.identifier(name, key, "a branch")
            )
            if not branches and isinstance(found["branches"], MappingNode):
                self.report("E304", "`branches` is empty", self.place(found["branches"]), "write `name: expression`")
            for key in SCORED:
                if key in found:
                    help = "give it in a branch: `name: {attend: ..., " + key + ": ...}`"
                    self.report("E304", f"`{key}` beside `branches`", self.place(found[key]), help)
        elif "attend" not in found:
            return ast.Broken(place=place), ()
        elif isinstance(found["attend"], MappingNode) or any(key in found for key in ("roles", *SCORED)):
            branches = (self.scored("", found["attend"], found["attend"], found),)
        else:
            return self.expression(found["attend"], "`attend`"), ()
        first = next((term.attend for branch in branches for term in branch.terms), ast.Broken(place=place))
        return first, branches

    def branch(self, name: str, key: Node, node: Node) -> ast.Branch:
        """A branch: an expression, terms by source, or what is attended and how it is scored."""
        is_scored = isinstance(node, MappingNode) and any(
            isinstance(name_node, ScalarNode) and name_node.value == "attend" for name_node, _ in node.value
        )
        if not is_scored:
            return self.scored(name, key, node, {})
        found: dict[str, Node] = {}
        for entry, entry_key, value in self.entries(node, f"branch `{name}`"):
            if entry in ("attend", *SCORED):
                found[entry] = value
            else:
                self.unknown(entry, entry_key, ("attend", *SCORED), " of a branch")
        return self.scored(name, key, found["attend"], found)

    def scored(self, name: str, key: Node, node: Node, found: dict[str, Node]) -> ast.Branch:
        """A branch with what is attended, and how it is scored where `found` says so."""
        what = f"branch `{name}`" if name else "`attend`"
        if isinstance(node, MappingNode):
            terms = tuple(
                ast.Term(source, self.expression(value, f"what of `{source}` is attended"), place=self.place(at))
                for source, at, value in self.entries(node, what)
            )
        else:
            terms = (ast.Term(ast.OWN_KEYS, self.expression(node, what), place=self.place(node)),)
        if not terms:
            self.report("E304", f"{what} is empty", self.place(node), "write `self: causal`")
        score, bias, softcap = (self.optional(found, word) for word in SCORED)
        return ast.Branch(name, terms, score, bias, softcap, place=self.place(key))

    def role(self, name: str, key: Node, node: Node) -> ast.Role:
        """A role: which pairs have it, and what of theirs is projected apart, all three where nothing is said."""
        if not isinstance(node, MappingNode):
            return ast.Role(name, self.expression(node, f"role `{name}`"), PROJECTIONS, place=self.place(key))
        found: dict[str, Node] = {}
        for entry, entry_key, value in self.entries(node, f"role `{name}`"):
            known = entry if entry in ROLE_KEYS else self.unknown(entry, entry_key, ROLE_KEYS, " of a role")
            if known is not None:
                found.setdefault(known, value)
        if "at" not in found:
            help = "say which pairs have it: {at: q < g}"
            self.report("E305", f"role `{name}` has no `at`", self.place(key), help)
            return ast.Role(name, ast.Broken(place=self.place(key)), PROJECTIONS, place=self.place(key))
        own = self.projections(name, found["own"]) if "own" in found else PROJECTIONS
        return ast.Role(name, self.expression(found["at"], f"`at` of role `{name}`"), own, place=self.place(key))

    def projections(self, role: str, node: Node) -> tuple[ast.Projection, ...]:
        """Which projections a role has, in their usual order."""
        what = f"`own` of role `{role}`"
        if isinstance(node, MappingNode) or not node.value:
            wrong = "is a mapping" if isinstance(node, MappingNode) else "is empty"
            self.report("E304", f"{what} {wrong}", self.place(node), "write some of query, key, value: [key, value]")
            return PROJECTIONS
        words: list[ast.Projection] = []
        for item in node.value if isinstance(node, SequenceNode) else (node,):
            word = self.choice(item, what, PROJECTIONS)
            if word in words:
                self.report("E303", f"`{word}` is given twice", self.place(item), "keep one of the two")
            words += [] if word is None else [word]
        return tuple(word for word in PROJECTIONS if word in words)

    def choice(self, node: Node, what: str, words: Sequence[_T]) -> _T | None:
        """One of some words; None where it was reported."""
        text = self.text(node, what)
        if text is None or text in words:
            return cast("_T | None", text)
        near = nearest(text, [str(word) for word in words])
        help = f"did you mean `{near}`?" if near else f"write {' or '.join(map(str, words))}"
        self.report("E304", f"{what} is `{text}`", self.place(node), help)
        return None

    def param(self, name: str, key: Node, node: Node) -> ast.Param:
        place = self.place(key)
        if not isinstance(node, MappingNode):
            return ast.Param(name, self.param_value(node), place=place)
        default: ast.Expr | tuple[ast.Expr, ...] | None = None
        minimum, doc = None, None
        for field_name, field_key, value in self.entries(node, f"parameter `{name}`"):
            match field_name:
                case "default":
                    default = self.param_value(value)
                case "min":
                    minimum = self.expression(value, "`min`")
                case "doc":
                    doc = self.text(value, "`doc`")
                case _:
                    self.unknown(field_name, field_key, PARAM_KEYS, " of a parameter")
        return ast.Param(name, default, minimum, doc, place=place)

    def param_value(self, node: Node) -> ast.Expr | tuple[ast.Expr, ...]:
        if not isinstance(node, SequenceNode):
            return self.expression(node, "a parameter's value")
        if not node.value:
            self.report("E304", "an empty list", self.place(node), "give one value per head or layer")
        return tuple(self.expression(item, "a list's item") for item in node.value)

    def axis(self, name: str, key: Node, node: Node) -> ast.Axis:
        if not isinstance(node, SequenceNode):
            return ast.Axis(name, self.expression(node, "an axis size"), place=self.place(key))
        parts = (self.text(item, "an axis name") for item in node.value)
        return ast.Axis(name, tuple(part for part in parts if part is not None), place=self.place(key))

    def input(self, name: str, key: Node, node: Node) -> ast.Input | None:
        # `doc: int[N]` is a scalar in a block mapping, but inside {...} YAML takes the bracket for a list
        if not isinstance(node, ScalarNode):
            help = 'write int[N]; quote it inside {...}: "int[N]"'
            self.report("E304", f"input `{name}` needs a type", self.place(node), help)
            return None
        return _input(name, self.snippet(node), self.place(key), self.diagnostics)

    def definitions(self, node: Node) -> Iterator[ast.Definition]:
        if isinstance(node, ScalarNode):
            try:
                yield from parse_definitions(self.snippet(node))
            except PatternError as failed:
                self.diagnostics.extend(failed.diagnostics)
                self.broken.update(_HEADS.findall(node.value))
            return
        for text, key, value in self.entries(node, "`define`"):
            signature = _SIGNATURE.fullmatch(text.strip())
            if signature is None:
                help = "write `name: body` or `name(a, b): body`"
                self.report("E304", f"`{text}` is not the head of a definition", self.place(key), help)
                self.broken.update(_IDENTIFIER.findall(text)[:1])
                continue
            params = tuple(re.split(r"\s*,\s*", signature[2])) if signature[2] else ()
            keyword = next((name for name in (signature[1], *params) if name in KEYWORDS), None)
            if keyword:
                self.report("E208", f"`{keyword}` belongs to the language", self.place(key), "choose another name")
                continue
            body = self.expression(value, f"`{signature[1]}`")
            yield ast.Definition(signature[1], params, body, place=self.place(key))

    def imported(self, name: str, key: Node, node: Node) -> ast.Import | None:
        if isinstance(node, MappingNode):  # a spec in place, as canonical texts have it
            return ast.Import(name, self.spec(node), place=self.place(key))
        path_text = self.text(node, "an import")
        if path_text is None:
            return None
        place = self.place(node)
        if not path_text.strip():
            self.report("E304", f"import `{name}` is empty", place, "write the path of a spec beside this file")
            return None
        if self.folder is None:
            self.report(
                "E307",
                "only a spec that is a file can import files",
                place,
                "save it beside the file it imports",
            )
            return None
        path = (self.folder / path_text).resolve()
        if path in self.importers:
            chain = [other.name for other in self.importers[self.importers.index(path) :]]
            self.report(
                "E308",
                f"import cycle: {' -> '.join([*chain, path.name])}",
                place,
                "move what both need into a third spec",
            )
            return None
        shown = os.path.normpath(os.path.join(os.path.dirname(self.source.name), path_text))  # from where the user is
        try:
            spec, found = _read_path(path, shown, place, self.importers)
        except PatternError as failed:
            self.diagnostics.extend(failed.diagnostics)
            return None
        self.diagnostics.extend(found)
        return ast.Import(name, spec, place=self.place(key))
