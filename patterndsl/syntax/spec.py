"""How does a YAML file become a Spec? Owner of yaml; maps every expression back to its place in the file.

It reads PyYAML's node graph rather than loaded values, as only the nodes know where they stand. Mistakes are
collected, so that one bad entry does not hide the next.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar, cast

import yaml

from patterndsl.diagnostics import Diagnostic, PatternError, Source, SourceRange, error, nearest
from patterndsl.syntax import tree as ast
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

MAX_FILE_SIZE = 1_000_000
MAX_YAML_DEPTH = 20
MAX_NODES = 5_000

_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_QUOTE_IN_BRACES = 'close the bracket, or quote the value where it holds `[` or `,` inside {...}: "int[N]"'
_YAML_PROBLEMS = (
    ("a tab in the", ("a tab in the indentation", "indent with spaces: YAML allows no tabs there")),
    ("a quote is never closed", ("a quote is never closed", "close it on the line where the value ends")),
    ("expected ',' or", ("neither `,` nor the closing bracket follows", _QUOTE_IN_BRACES)),
    ("alphabetic or numeric", ("YAML takes `&` and `*` for anchors here", "quote the value, or start it otherwise")),
    ("undefined alias", ("YAML takes `*` for an alias here", "quote the value, or start it otherwise")),
    ("mapping values", ("a second `:` in one value", "quote a value that holds a colon; check the line before")),
    ("more behind a value", ("something follows a value that is closed", "a quote inside quotes is written twice")),
    ("expected key", ("the indentation does not fit", "start the entries of one section in one column")),
    ("but found another document", ("a second spec in one file", "remove the `---`, or make two files")),
    ("cannot start any token", ("no value starts with `FOUND` in YAML", "quote the value")),
    ("could not find expected ':'", ("a line without `:`", "write `key: value`, and indent what continues a value")),
    ("unknown escape", ("an escape that YAML has not", "in double quotes write a backslash twice")),
)
"""What libyaml says, and what a user should read instead, with the cure."""

_MARK = re.compile(r"[^\s,\[\]{}]*")
_UNIT = re.compile(r"\S")
_ESCAPED_UNIT = re.compile(r"\\(?:x..|u.{4}|U.{8}|.)|\S", re.DOTALL)
_WHITE_ESCAPES = tuple(f"\\{sign}" for sign in (*"tnvfr_NLP \t\r\n", "x20", "x09"))

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_T = TypeVar("_T")

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
        text = path.read_bytes().decode("utf-8-sig")
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
    reader = _Reader(source, folder, importers)
    root = reader.compose()
    return reader.spec(root), reader.diagnostics


def _num_open(node: yaml.Node) -> int:
    """Brackets that a plain value leaves open: inside {...} YAML ends it at the first comma."""
    is_plain = isinstance(node, yaml.ScalarNode) and not node.style
    return int(node.value.count("(") - node.value.count(")")) if is_plain else 0


@dataclass
class _Reader:
    source: Source
    folder: Path | None
    importers: tuple[Path, ...]
    diagnostics: list[Diagnostic] = field(default_factory=list)
    visited: int = 0
    broken: set[str] = field(default_factory=set)  # names whose declaration was reported

    # ---- YAML ---------------------------------------------------------------------------------------------

    def compose(self) -> yaml.Node:
        """The node graph, after guarding against size, depth and YAML errors."""
        if len(self.source.text) > MAX_FILE_SIZE:
            raise error("E102", f"the spec has more than {MAX_FILE_SIZE:,} characters", None, "split it")
        unprintable = _UNPRINTABLE.search(self.source.text)
        if unprintable is not None:
            place = SourceRange(self.source, unprintable.start(), unprintable.end())
            raise error(
                "E301", f"a character that YAML does not allow: U+{ord(unprintable[0]):04X}", place, "remove it"
            )
        try:
            self.guard_events()
            root = yaml.compose(self.source.text, Loader=_Loader)
        except yaml.YAMLError as failed:
            raise self.yaml_error(failed) from None
        if root is None:
            place = SourceRange(self.source, 0, 0)
            raise error("E305", "the spec is empty", place, "write at least `attend: causal`")
        return root

    def guard_events(self) -> None:
        """Events come one by one, without recursion, so this refuses what `compose` would choke on, or drop."""
        depth = 0
        unused: dict[str, SourceRange] = {}
        for event in yaml.parse(self.source.text, Loader=_Loader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            offset = event.start_mark.index if event.start_mark else 0
            if depth > MAX_YAML_DEPTH:
                place = SourceRange(self.source, offset, offset + 1)
                raise error("E102", f"YAML nested more than {MAX_YAML_DEPTH} levels deep", place, "a spec is flat")
            if isinstance(event, yaml.AliasEvent):
                unused.pop(event.anchor or "", None)
                continue
            if not isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent):
                continue
            if event.tag is not None:
                place, written = self.mark("!", offset)
                help = "write `~` for not, or quote the text"
                raise error("E301", f"YAML takes `{written}` for a tag here", place, help)
            if event.anchor is not None:
                unused[event.anchor], _ = self.mark("&", offset)
        for name, place in unused.items():
            message = f"YAML takes `&{name}` for an anchor here, and nothing uses it"
            raise error("E301", message, place, "quote the text, or drop the anchor")

    def mark(self, sign: str, offset: int) -> tuple[SourceRange, str]:
        """The tag or anchor before a value: its place and how it is written."""
        start = self.source.text.index(sign, offset)
        found = _MARK.match(self.source.text, start)
        assert found is not None
        return SourceRange(self.source, start, found.end()), found[0]

    def yaml_error(self, failed: yaml.YAMLError) -> PatternError:
        """What YAML's parser says, in words of someone who wrote a spec."""
        text = self.source.text
        problem = getattr(failed, "problem", None) or "not a YAML document"
        context = getattr(failed, "context", None) or ""
        mark = getattr(failed, "problem_mark", None) or getattr(failed, "context_mark", None)
        if "quoted scalar" in context and "end of stream" in problem:
            problem = "a quote is never closed"
        if problem.startswith(("a quote", "could not find expected ':'")):
            mark = getattr(failed, "context_mark", None)
        offset = min(mark.index, len(text)) if mark is not None else 0
        found = text[offset : offset + 1]
        if found == "\t":
            problem = "a tab in the indentation"
        elif "expected key" in problem and text[text.rfind("\n", 0, offset) + 1 : offset].strip():
            problem = "more behind a value"
        problem, help = next(
            (said for sign, said in _YAML_PROBLEMS if sign in problem),
            (f"not YAML: {problem}", "check the indentation and the quotes here and just before"),
        )
        place = SourceRange(self.source, offset, offset + 1)
        return error("E301", problem.replace("FOUND", found), place, help)

    def report(self, code: str, message: str, place: SourceRange, help: str | None = None, label: str = "") -> None:
        self.diagnostics.append(Diagnostic(code, message, place, help, label))

    def place(self, node: yaml.Node) -> SourceRange:
        start = node.start_mark.index
        stop = max(start + 1, node.end_mark.index)
        line_stop = self.source.text.find("\n", start)
        return SourceRange(self.source, start, min(stop, line_stop) if line_stop > start else stop)

    def entries(self, node: yaml.Node, what: str) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
        """Key text, key node, value node of a mapping; reports what is no mapping, duplicates and truth values."""
        if not isinstance(node, yaml.MappingNode):
            self.report(
                "E304",
                f"{what} must be a mapping of names to values",
                self.place(node),
                "write `key: value` lines",
            )
            self.broken.add(ast.ANY_NAME)
            return
        seen: set[str] = set()
        num_open = 0
        for key, value in node.value:
            self.visited += 1
            if self.visited > MAX_NODES:
                raise error(
                    "E102",
                    f"more than {MAX_NODES:,} entries, aliases unfolded",
                    self.place(node),
                    "drop the aliases",
                )
            if not isinstance(key, yaml.ScalarNode):
                self.report("E304", "a key must be a name", self.place(key), "write `name: value`")
            elif num_open > 0 and not value.value:
                num_open += _num_open(key)  # the rest of the value before, which is reported as never closed
            elif key.value in seen:
                self.report("E303", f"`{key.value}` is given twice", self.place(key), "keep one of the two")
            else:
                seen.add(key.value)
                num_open = _num_open(value) if node.flow_style else 0
                if self.is_text(key):
                    yield key.value, key, value

    def is_text(self, node: yaml.ScalarNode) -> bool:
        if node.tag == "tag:yaml.org,2002:bool" and node.style not in ("'", '"'):
            self.report(
                "E306",
                f"YAML 1.1 reads `{node.value}` as a truth value",
                self.place(node),
                f'quote it: "{node.value}", or choose another word',
            )
            return False
        return True

    def snippet(self, node: yaml.ScalarNode) -> Snippet:
        """The scalar's text with each character's place in the file.

        YAML folds, strips and indents white space but keeps the order of all other characters, so the n-th
        visible character of the value is the n-th visible character of its raw text.
        """
        text, raw_start, raw_stop = node.value, node.start_mark.index, node.end_mark.index
        if node.style in ("|", ">"):
            header_stop = self.source.text.find("\n", raw_start)  # the header may hold a comment
            raw_start = raw_stop if header_stop < 0 else header_stop
        elif node.style in ("'", '"'):
            raw_start += 1
        units = _ESCAPED_UNIT if node.style == '"' else _UNIT
        found = units.finditer(self.source.text, raw_start, raw_stop)
        visible = [unit.start() for unit in found if not unit[0].startswith(_WHITE_ESCAPES)]
        offsets: list[int] = []
        seen = 0
        last = raw_start
        for char in text:
            if not char.isspace() and seen < len(visible):
                last = visible[seen]
                seen += 1
                offsets.append(last)
                last += 1
            else:
                offsets.append(last)
        return Snippet(text, self.source, (*offsets, last))

    # ---- values -------------------------------------------------------------------------------------------

    def text(self, node: yaml.Node, what: str) -> str | None:
        if isinstance(node, yaml.ScalarNode):
            return str(node.value)
        self.report(
            "E304",
            f"{what} must be a text",
            self.place(node),
            "quote it if it holds `:` or starts with a bracket",
        )
        return None

    def expression(self, node: yaml.Node, what: str) -> ast.Expr:
        """An expression; Broken where it was reported."""
        broken = ast.Broken(place=self.place(node))
        if isinstance(node, yaml.ScalarNode) and not node.value.strip():
            self.report("E304", f"{what} is empty", self.place(node), "write an expression, such as `causal` or `4`")
            return broken
        if not isinstance(node, yaml.ScalarNode):
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

    def identifier(self, text: str, node: yaml.Node, what: str) -> bool:
        if check_name(text, what, self.diagnostics, self.place(node)):
            return True
        self.broken.update(_IDENTIFIER.findall(text))  # `my-w` is used as `my - w`
        return False

    # ---- sections -----------------------------------------------------------------------------------------

    def spec(self, root: yaml.Node) -> ast.Spec:
        place = self.place(root)
        found: dict[str, yaml.Node] = {}
        for key, key_node, value in self.entries(root, "a spec"):
            if key in KEYS:
                found[key] = value
                continue
            near = nearest(key, KEYS)
            help = f"did you mean `{near}`?" if near else f"the keys are {', '.join(KEYS)}"
            self.report("E302", f"unknown key `{key}`", self.place(key_node), help)
            if near:  # read on as if it had been spelled so, or what it declares would be reported missing
                found.setdefault(near, value)
        for keys in REQUIRED:
            given = [key for key in keys if key in found]
            if not given and isinstance(root, yaml.MappingNode):
                start = SourceRange(self.source, root.start_mark.index, root.start_mark.index + 1)
                self.report("E305", f"the key `{keys[0]}` is missing", start, "write at least `attend: causal`")
            for extra in given[1:]:
                message = f"`{given[0]}` and `{extra}` are both given"
                self.report("E303", message, self.place(found[extra]), "keep one of the two")

        def section(key: str) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
            return self.entries(found[key], f"`{key}`") if key in found else iter(())

        def text(key: str) -> str | None:
            return self.text(found[key], f"`{key}`") if key in found else None

        outer, self.broken = self.broken, set()
        attend, branches = self.attended(found, place)
        if "combine" in found and "branches" not in found:
            help = "it says how `branches` become one output"
            self.report("E304", "`combine` without `branches`", self.place(found["combine"]), help)
        spec = ast.Spec(
            attend=attend,
            params=tuple(
                self.param(name, key, value)
                for name, key, value in section("params")
                if self.identifier(name, key, "a parameter")
            ),
            grid=tuple(
                self.axis(name, key, value)
                for name, key, value in section("grid")
                if self.identifier(name, key, "an axis")
            ),
            inputs=tuple(
                declared
                for name, key, value in section("inputs")
                if self.identifier(name, key, "an input")
                and (declared := self.unless_broken(name, self.input(name, key, value)))
            ),
            labels=tuple(
                ast.Label(name, learner, place=self.place(key))
                for name, key, value in section("labels")
                if self.identifier(name, key, "a label")
                and not isinstance(learner := self.expression(value, f"label `{name}`"), ast.Broken)
            ),
            select=tuple(
                ast.Selection(name, selector, place=self.place(key))
                for name, key, value in section("select")
                if self.identifier(name, key, "a selection")
                and not isinstance(selector := self.expression(value, f"selection `{name}`"), ast.Broken)
            ),
            imports=tuple(
                imported
                for name, key, value in section("import")
                if self.identifier(name, key, "an import")
                and (imported := self.unless_broken(name, self.imported(name, key, value)))
            ),
            define=tuple(self.definitions(found["define"])) if "define" in found else (),
            merge=self.choice(found["merge"], "`merge`", MERGES) or "set" if "merge" in found else "set",
            fallback=self.expression(found["fallback"], "`fallback`") if "fallback" in found else None,
            share=self.choice(found["share"], "`share`", SHARES) if "share" in found else None,
            keys=self.expression(found["keys"], "`keys`") if "keys" in found else None,
            sources=tuple(
                ast.KeySource(name, maker, place=self.place(key))
                for name, key, value in section("sources")
                if self.identifier(name, key, "a source")
                and not isinstance(maker := self.expression(value, f"source `{name}`"), ast.Broken)
            ),
            tables=tuple(
                ast.Table(name, maker, place=self.place(key))
                for name, key, value in section("tables")
                if self.identifier(name, key, "a table")
                and not isinstance(maker := self.expression(value, f"table `{name}`"), ast.Broken)
            ),
            roles=tuple(
                self.role(name, key, value)
                for name, key, value in section("roles")
                if self.identifier(name, key, "a role")
            ),
            branches=branches,
            combine=self.choice(found["combine"], "`combine`", COMBINES) or "sum" if "combine" in found else "sum",
            name=text("name"),
            doc=text("doc"),
            cite=text("cite"),
            place=place,
        )
        spec, self.broken = replace(spec, broken=frozenset(self.broken)), outer
        return spec

    def attended(self, found: dict[str, yaml.Node], place: SourceRange) -> tuple[ast.Expr, tuple[ast.Branch, ...]]:
        """What is attended, of a pattern with several terms that of the first one, and the branches of such."""
        if "branches" in found:
            branches = tuple(
                self.branch(name, key, value)
                for name, key, value in self.entries(found["branches"], "`branches`")
                if self.identifier(name, key, "a branch")
            )
            if not branches and isinstance(found["branches"], yaml.MappingNode):
                self.report("E304", "`branches` is empty", self.place(found["branches"]), "write `name: expression`")
            for key in SCORED:
                if key in found:
                    help = "give it in a branch: `name: {attend: ..., " + key + ": ...}`"
                    self.report("E304", f"`{key}` beside `branches`", self.place(found[key]), help)
        elif "attend" not in found:
            return ast.Broken(place=place), ()
        elif isinstance(found["attend"], yaml.MappingNode) or any(key in found for key in ("roles", *SCORED)):
            branches = (self.scored("", found["attend"], found["attend"], found),)
        else:
            return self.expression(found["attend"], "`attend`"), ()
        first = next((term.attend for branch in branches for term in branch.terms), ast.Broken(place=place))
        return first, branches

    def branch(self, name: str, key: yaml.Node, node: yaml.Node) -> ast.Branch:
        """A branch: an expression, terms by source, or what is attended and how it is scored."""
        is_scored = isinstance(node, yaml.MappingNode) and any(
            isinstance(name_node, yaml.ScalarNode) and name_node.value == "attend" for name_node, _ in node.value
        )
        if not is_scored:
            return self.scored(name, key, node, {})
        found: dict[str, yaml.Node] = {}
        for entry, entry_key, value in self.entries(node, f"branch `{name}`"):
            if entry in ("attend", *SCORED):
                found[entry] = value
                continue
            near = nearest(entry, ("attend", *SCORED))
            help = f"did you mean `{near}`?" if near else f"the keys are attend, {', '.join(SCORED)}"
            self.report("E302", f"unknown key `{entry}` of a branch", self.place(entry_key), help)
        return self.scored(name, key, found["attend"], found)

    def scored(self, name: str, key: yaml.Node, node: yaml.Node, found: dict[str, yaml.Node]) -> ast.Branch:
        """A branch with what is attended, and how it is scored where `found` says so."""
        what = f"branch `{name}`" if name else "`attend`"
        if isinstance(node, yaml.MappingNode):
            terms = tuple(
                ast.Term(source, self.expression(value, f"what of `{source}` is attended"), place=self.place(at))
                for source, at, value in self.entries(node, what)
            )
        else:
            terms = (ast.Term(ast.OWN_KEYS, self.expression(node, what), place=self.place(node)),)
        if not terms:
            self.report("E304", f"{what} is empty", self.place(node), "write `self: causal`")
        score, bias, softcap = (self.expression(found[word], f"`{word}`") if word in found else None for word in SCORED)
        return ast.Branch(name, terms, score, bias, softcap, place=self.place(key))

    def role(self, name: str, key: yaml.Node, node: yaml.Node) -> ast.Role:
        """A role: which pairs have it, and what of theirs is projected apart, all three where nothing is said."""
        if not isinstance(node, yaml.MappingNode):
            return ast.Role(name, self.expression(node, f"role `{name}`"), PROJECTIONS, place=self.place(key))
        found: dict[str, yaml.Node] = {}
        for entry, entry_key, value in self.entries(node, f"role `{name}`"):
            near = nearest(entry, ROLE_KEYS)
            if entry not in ROLE_KEYS:
                help = f"did you mean `{near}`?" if near else f"the keys are {', '.join(ROLE_KEYS)}"
                self.report("E302", f"unknown key `{entry}` of a role", self.place(entry_key), help)
            if entry in ROLE_KEYS or near:
                found.setdefault(near or entry, value)
        if "at" not in found:
            help = "say which pairs have it: {at: q < g}"
            self.report("E305", f"role `{name}` has no `at`", self.place(key), help)
            return ast.Role(name, ast.Broken(place=self.place(key)), PROJECTIONS, place=self.place(key))
        own = self.projections(name, found["own"]) if "own" in found else PROJECTIONS
        return ast.Role(name, self.expression(found["at"], f"`at` of role `{name}`"), own, place=self.place(key))

    def projections(self, role: str, node: yaml.Node) -> tuple[ast.Projection, ...]:
        """Which projections a role has, in their usual order."""
        what = f"`own` of role `{role}`"
        if isinstance(node, yaml.MappingNode) or not node.value:
            wrong = "is a mapping" if isinstance(node, yaml.MappingNode) else "is empty"
            self.report("E304", f"{what} {wrong}", self.place(node), "write some of query, key, value: [key, value]")
            return PROJECTIONS
        words: list[ast.Projection] = []
        for item in node.value if isinstance(node, yaml.SequenceNode) else (node,):
            word = self.choice(item, what, PROJECTIONS)
            if word in words:
                self.report("E303", f"`{word}` is given twice", self.place(item), "keep one of the two")
            words += [] if word is None else [word]
        return tuple(word for word in PROJECTIONS if word in words)

    def choice(self, node: yaml.Node, what: str, words: Sequence[_T]) -> _T | None:
        """One of some words; None where it was reported."""
        text = self.text(node, what)
        if text is None or text in words:
            return cast("_T | None", text)
        near = nearest(text, [str(word) for word in words])
        help = f"did you mean `{near}`?" if near else f"write {' or '.join(map(str, words))}"
        self.report("E304", f"{what} is `{text}`", self.place(node), help)
        return None

    def unless_broken(self, name: str, declared: _T | None) -> _T | None:
        """The declaration; a name without one is remembered, so that its uses are not reported too."""
        if declared is None:
            self.broken.add(name)
        return declared

    def param(self, name: str, key: yaml.Node, node: yaml.Node) -> ast.Param:
        place = self.place(key)
        if not isinstance(node, yaml.MappingNode):
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
                    near = nearest(field_name, PARAM_KEYS)
                    help = f"did you mean `{near}`?" if near else f"the keys are {', '.join(PARAM_KEYS)}"
                    self.report("E302", f"unknown key `{field_name}` of a parameter", self.place(field_key), help)
        return ast.Param(name, default, minimum, doc, place=place)

    def param_value(self, node: yaml.Node) -> ast.Expr | tuple[ast.Expr, ...]:
        if not isinstance(node, yaml.SequenceNode):
            return self.expression(node, "a parameter's value")
        if not node.value:
            self.report("E304", "an empty list", self.place(node), "give one value per head or layer")
        return tuple(self.expression(item, "a list's item") for item in node.value)

    def axis(self, name: str, key: yaml.Node, node: yaml.Node) -> ast.Axis:
        if not isinstance(node, yaml.SequenceNode):
            return ast.Axis(name, self.expression(node, "an axis size"), place=self.place(key))
        parts = (self.text(item, "an axis name") for item in node.value)
        return ast.Axis(name, tuple(part for part in parts if part is not None), place=self.place(key))

    def input(self, name: str, key: yaml.Node, node: yaml.Node) -> ast.Input | None:
        # `doc: int[N]` is a scalar in a block mapping, but inside {...} YAML takes the bracket for a list
        if not isinstance(node, yaml.ScalarNode):
            help = 'write int[N]; quote it inside {...}: "int[N]"'
            self.report("E304", f"input `{name}` needs a type", self.place(node), help)
            return None
        return _input(name, self.snippet(node), self.place(key), self.diagnostics)

    def definitions(self, node: yaml.Node) -> Iterator[ast.Definition]:
        if isinstance(node, yaml.ScalarNode):
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

    def imported(self, name: str, key: yaml.Node, node: yaml.Node) -> ast.Import | None:
        if isinstance(node, yaml.MappingNode):  # a spec in place, as canonical texts have it
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
