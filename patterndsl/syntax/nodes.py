"""How does a YAML text become nodes that know where they stand? Owner of yaml; reports its mistakes in a user's words.

It reads PyYAML's node graph rather than loaded values, as only the nodes know their places. What nodes mean is said in
`spec`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import yaml
from yaml import MappingNode, Node, ScalarNode, SequenceNode

from patterndsl.diagnostics import Diagnostic, PatternError, Source, SourceRange, error
from patterndsl.syntax import tree as ast
from patterndsl.syntax.parse import Snippet

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


def _num_open(node: Node) -> int:
    """Brackets that a plain value leaves open: inside {...} YAML ends it at the first comma."""
    is_plain = isinstance(node, ScalarNode) and not node.style
    return int(node.value.count("(") - node.value.count(")")) if is_plain else 0


@dataclass
class Nodes:
    """The nodes of one text. diagnostics: what is wrong with them; broken: names whose declaration was reported."""

    source: Source
    diagnostics: list[Diagnostic] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)
    visited: int = 0

    def compose(self) -> Node:
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

    def place(self, node: Node) -> SourceRange:
        start = node.start_mark.index
        stop = max(start + 1, node.end_mark.index)
        line_stop = self.source.text.find("\n", start)
        return SourceRange(self.source, start, min(stop, line_stop) if line_stop > start else stop)

    def entries(self, node: Node, what: str) -> Iterator[tuple[str, Node, Node]]:
        """Key text, key node, value node of a mapping; reports what is no mapping, duplicates and truth values."""
        if not isinstance(node, MappingNode):
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
            if not isinstance(key, ScalarNode):
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

    def is_text(self, node: ScalarNode) -> bool:
        if node.tag == "tag:yaml.org,2002:bool" and node.style not in ("'", '"'):
            self.report(
                "E306",
                f"YAML 1.1 reads `{node.value}` as a truth value",
                self.place(node),
                f'quote it: "{node.value}", or choose another word',
            )
            return False
        return True

    def snippet(self, node: ScalarNode) -> Snippet:
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

    def text(self, node: Node, what: str) -> str | None:
        if isinstance(node, ScalarNode):
            return str(node.value)
        self.report(
            "E304",
            f"{what} must be a text",
            self.place(node),
            "quote it if it holds `:` or starts with a bracket",
        )
        return None


__all__ = ["MAX_FILE_SIZE", "MappingNode", "Node", "Nodes", "ScalarNode", "SequenceNode"]
