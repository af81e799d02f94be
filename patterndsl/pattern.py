"""What is a pattern to its user? A checked spec with its canonical text; loading, parsing, compiling.

Everything slow to import (NumPy, PyTorch) is loaded where it is first needed: checking a spec needs neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import TYPE_CHECKING, Literal, TypeAlias, cast, get_args

from patterndsl.analysis.latex import Shown
from patterndsl.diagnostics import Diagnostic, PatternError, Source, SourceRange, input_error, nearest
from patterndsl.ir.index import Const
from patterndsl.sema.model import Resolved
from patterndsl.sema.parameters import (
    MAX_HEADS,
    MAX_LAYER,
    MAX_SIZE,
    MAX_VALUE,
    ParamValue,
    checked_override,
    counted,
    integer,
    integers,
    self_sizes,
    too_small,
    unknown_parameter,
)
from patterndsl.sema.resolve import resolve
from patterndsl.syntax import tree as ast
from patterndsl.syntax.join import check_relation, joined
from patterndsl.syntax.parse import parse_expression, snippet_of
from patterndsl.syntax.render import render_expression, render_spec

if TYPE_CHECKING:
    import torch

    from patterndsl.analysis.explain import Explanation
    from patterndsl.analysis.policy import Policy
    from patterndsl.analysis.proof import Verdict
    from patterndsl.analysis.reach import Reach
    from patterndsl.analysis.redundancy import DeadTerm
    from patterndsl.analysis.report import Report
    from patterndsl.lower.devices import Machine
    from patterndsl.lower.machine import Constants
    from patterndsl.lower.tiles import OnEvent
    from patterndsl.runtime.program import Program
    from patterndsl.sema.bind import Bound


Claim: TypeAlias = Literal["causal", "value_causal", "pattern_causal", "rows_nonempty", "equals", "within", "symmetric"]


@dataclass(frozen=True, eq=False, repr=False)
class Pattern(Shown):
    """A checked attention pattern, symbolic in N and its parameters.

    `str()` is its canonical text: the bare expression where nothing is declared, a YAML spec otherwise, with imported
    specs written in place. Two patterns are equal when their canonical texts are. `parse(str(p)) == p`. Patterns are
    joined as in the language: `near & ~far | first`.
    """

    spec: ast.Spec
    resolved: Resolved
    text: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", render_spec(self.spec))

    @classmethod
    def of(cls, spec: ast.Spec, found: Sequence[Diagnostic] = ()) -> Pattern:
        """The pattern of a spec. Raises PatternError with everything that is wrong with it, `found` included."""
        return cls(spec, resolve(spec, found))

    @property
    def name(self) -> str | None:
        """The spec's name; it takes no part in equality."""
        return self.spec.name

    @property
    def title(self) -> str:
        """What reports are headed with: the spec's name, or its expression in one line."""
        return self.name or render_expression(self.spec.attend)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Pattern({self.text!r})"

    def __eq__(self, other: object) -> bool:
        return self.text == other.text if isinstance(other, Pattern) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.text)

    def __and__(self, other: Pattern) -> Pattern:
        """What both attend. Declarations of both are kept; one name must mean one thing: raises InputError (E208) where
        it does not, and (E505) on sources, branches, roles and fallbacks, which say more than which pairs there are."""
        return self._joined("&", other)

    def __or__(self, other: Pattern) -> Pattern:
        """What either attends; as `&`."""
        return self._joined("|", other)

    def __invert__(self) -> Pattern:
        """What the pattern does not attend; as `&`."""
        check_relation("~", self.spec)
        negated = ast.Not(self.spec.attend, place=self.spec.attend.place)
        return Pattern.of(replace(self.spec, attend=negated, name=None, doc=None, cite=None))

    def _joined(self, op: Literal["&", "|"], other: Pattern) -> Pattern:
        return Pattern.of(joined(op, self.spec, other.spec)) if isinstance(other, Pattern) else NotImplemented

    @property
    def listed_heads(self) -> int | None:
        """How many heads its lists have items for: the shortest that is indexed by `head` itself; None without one."""
        from patterndsl.sema.fits import listed_heads

        return listed_heads(self.resolved)

    def with_params(self, *unnamed: object, **values: ParamValue | str) -> Pattern:
        """The same pattern with other defaults: integers, lists, or expressions such as "isqrt(N)".

        Raises PatternError (E401, E402) on a name or value that is wrong.
        """
        if unnamed:
            help = "with_params(w=256), or with_params(**values)"
            raise input_error("E304", f"with_params takes names and values, not {kind_of(unnamed[0])}", help)
        return _with_params(self, values)

    def bind(
        self,
        n: int | None = None,
        *,
        q_len: int | None = None,
        kv_len: int | None = None,
        q_start: int = 0,
        heads: int = 1,
        layer: int = 0,
    ) -> Bound:
        """The pattern at given sizes, without PyTorch: what pictures and plans are made of. See `compile`."""
        from patterndsl.sema.bind import bind, sizes_of

        if kv_len is None and n is not None and self.resolved.num_keys is not None:
            kv_len = self_sizes(self.resolved, n).kv_len
        return bind(self.resolved, sizes_of(n, q_len, kv_len, q_start), heads, layer)

    def fit(self, n: int, *, heads: int = 1, layer: int = 0) -> None:
        """Raises PatternError (E4xx) where the sizes do not fit the pattern."""
        self.bind(n, heads=heads, layer=layer)

    def misfit(self, heads: int) -> PatternError | None:
        """What is wrong at every length, at the defaults of the parameters; see `sema.fits`."""
        from patterndsl.sema.fits import misfit

        return misfit(self.resolved, heads)

    def report(
        self,
        n: int | None = None,
        *,
        heads: int = 1,
        kv_heads: int | None = None,
        head_dim: int = 64,
        dtype: str | torch.dtype = "float32",
        layer: int = 0,
        block: int = 128,
        inputs: Mapping[str, object] | None = None,
    ) -> Report:
        """What the pattern costs as a self-attention: formulas for every N, and figures at one length where n is given.

        Formulas are exact in N and the parameters, on a stated domain, or there is a reason why there is none; figures
        say how certain they are. inputs: 1-D arrays for patterns that read some. Without PyTorch.
        Raises PatternError (E4xx) where the sizes do not fit the pattern.
        """
        from patterndsl.analysis.report import report

        return report(
            self.resolved,
            self.title,
            n=n,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            layer=layer,
            block=block,
            inputs=inputs,
        )

    def prove(
        self,
        claim: str,
        other: Pattern | None = None,
        *,
        n: int | None = None,
        params: Mapping[str, int] | None = None,
    ) -> Verdict:
        """Proven, Refuted with a witness, or Unknown with the reason, for every N and all values of the parameters.

        claim: causal, rows_nonempty or symmetric; equals or within with another pattern. Causal is value_causal, no
        query attends a later key, and pattern_causal, later tokens do not choose what a query attends (only labels
        can tell of them). n, params: what has one value only; `params={"w": 4}` fixes one. Parameters range from their
        declared minimum, or 0; those of one name in both patterns are one. Raises InputError (E506) on an unknown
        claim.
        """
        from patterndsl.analysis.proof import prove
        from patterndsl.analysis.selection import prove_causality

        known = checked_claim(claim, other is not None)
        if other is not None and not isinstance(other, Pattern):
            raise input_error("E506", f"the other pattern is {kind_of(other)}", "parse it first: patterndsl.parse(...)")
        if other is not None and other.spec.branches:
            help = "ask a term of it: other.terms[0].pattern"
            raise input_error("E506", f"`{known}` of one relation and a pattern of several sources or branches", help)
        n = None if n is None else counted("n", n, 0, MAX_SIZE)
        check_mapping("params", params, '{"w": 256}')
        sides = [side for side in (self, other) if side is not None]
        values = {name: fixed_value(name, value, sides) for name, value in dict(params or {}).items()}
        match known:
            case "causal" | "value_causal" | "pattern_causal":
                return prove_causality(known, self.resolved, n=n, fixed=values)
            case _:
                return prove(known, self.resolved, None if other is None else other.resolved, n=n, fixed=values)

    def cache_policy(self, *, head: int = 0, layer: int = 0) -> Policy:
        """Which keys step t of decoding must hold, for every t, N and all values of the parameters.

        A CachePolicy with its rule (`k > t - w or k < g`) and the number of keys, bounded or growing; LooksAhead where
        a query attends a later key; NoFormula with the reason. `Program.cache_plan` gives the slots at one length.
        """
        from patterndsl.analysis.pairs import symbolic
        from patterndsl.analysis.policy import cache_policy

        head, layer = counted("head", head, 0, MAX_HEADS - 1), counted("layer", layer, 0, MAX_LAYER)
        return cache_policy(symbolic(self.resolved, head=head, layer=layer))

    def reach(
        self,
        n: int,
        *,
        heads: int = 1,
        layers: int | None = None,
        inputs: Mapping[str, object] | None = None,
        on_event: OnEvent | None = None,
    ) -> Reach:
        """What can reach a position through several layers of a self-attention, and after how many all is connected.

        Heads of a layer are united, and each layer keeps a position's own content. layers: how many the model has,
        where the pattern uses `layer` (default 32); after the last they begin again. inputs: 1-D arrays. Without
        PyTorch. Raises PatternError: E4xx on sizes, E501 and E502 on inputs that do not fit.
        """
        from patterndsl.analysis.reach import reach

        return reach(self.resolved, self.title, n, heads, layers, inputs=inputs, on_event=on_event)

    def dead_terms(self) -> tuple[DeadTerm, ...]:
        """Terms of unions that the others cover, and differences that remove nothing, for every N; each with its place.

        Work: one proof per term, until 5 s are over; terms after that are not among them.
        """
        from patterndsl.analysis.redundancy import dead_terms

        return dead_terms(self.spec)

    def lint(self, n: int | None = None, *, heads: int | None = None, layer: int = 0) -> tuple[Diagnostic, ...]:
        """Advice with numbers: what costs far more than it keeps, attends nothing, changes nothing or is misnamed.

        n: the length to count at; without it 4,096 positions, or as many as the pattern's grid has.
        heads: by default as many as lists indexed by `head` have items, else 8. What cannot be counted or proven
        within some tenths of a second is not said. Raises PatternError (E4xx) where n does not fit.
        """
        from patterndsl.analysis.lint import lint

        heads = (self.listed_heads or 8) if heads is None else counted("heads", heads, 1, MAX_HEADS)
        layer = counted("layer", layer, 0, MAX_LAYER)
        if n is not None:
            self.bind(n, heads=heads, layer=layer)
        return lint(self.spec, self.resolved, n, heads=heads, layer=layer)

    def compile(
        self,
        n: int | None = None,
        *,
        q_len: int | None = None,
        kv_len: int | None = None,
        q_start: int = 0,
        heads: int = 1,
        layer: int = 0,
        device: str | torch.device = "cpu",
        backend: str = "auto",
        plan: int | None = None,
        machine: Machine | str | PathLike[str] | None = None,
    ) -> Program:
        """An executable program for these sizes.

        n: the length of a self-attention. Otherwise q_len and kv_len; queries are then the positions
        [q_start, q_start + q_len), keys [0, kv_len). Inside the pattern N is `n` where given, else q_start + q_len.
        heads: query heads; heads that agree share their tiles. layer: what `layer` is in the pattern.
        backend: auto, planned (dense passes on reordered positions), masked (for patterns with inputs), gathered (CPU
        and GPU, trains), flex (GPU; inference on CPU), triton (GPU) or oracle (dense, small sizes). plan: which of the
        ways that `program.plan` lists runs; by default the one predicted to be fastest, for inference or for training.
        machine: the constants of that prediction, by a built-in name ("cpu-2-core", "h100") or a calibration's file; by
        default those that `patterndsl calibrate` stored for this device, else built-in ones.
        Raises PatternError (E4xx) where the sizes do not fit the pattern; the program, when it plans, InputError (E406)
        where there are not so many ways.
        """
        from patterndsl.runtime.program import Program

        bound = self.bind(n, q_len=q_len, kv_len=kv_len, q_start=q_start, heads=heads, layer=layer)
        choice = None if plan is None else counted("plan", plan, 0, MAX_SIZE)
        return Program(bound, self.text, device, backend, choice, machine)

    def explain(
        self,
        n: int | None = None,
        *,
        q_len: int | None = None,
        kv_len: int | None = None,
        q_start: int = 0,
        heads: int = 1,
        layer: int = 0,
        head_dim: int = 64,
        device: str | PathLike[str] = "cpu",
        train: bool = False,
        on_event: OnEvent | None = None,
    ) -> Explanation:
        """Which plan runs, pass by pass with predicted times, what was rejected, and when something else runs.

        What `Program.explain` says, without PyTorch. device: cpu or cuda, with the constants that a program has there;
        or those of another machine, by a built-in name ("cpu-2-core", "h100") or a calibration's file.
        Raises PatternError: E4xx where the sizes do not fit, E505, E601 and E604 on the device.
        """
        from patterndsl.analysis.explain import explained

        bound = self.bind(n, q_len=q_len, kv_len=kv_len, q_start=q_start, heads=heads, layer=layer)
        head_dim = counted("head_dim", head_dim, 1, MAX_SIZE)
        constants = constants_for(device)
        return explained(bound, self.title, constants, head_dim=head_dim, train=train, on_event=on_event)


def constants_for(device: str | PathLike[str]) -> Constants:
    """Those that plans for a device are made with. PyTorch is asked for the GPU's name where a calibration of it is
    stored."""
    from patterndsl.lower.machine import constants_named, constants_of, cpu_name, stored_path

    if device == "cpu":
        return constants_of("cpu", cpu_name())
    if device != "cuda":
        return constants_named(device)
    if not stored_path("cuda").is_file():
        return constants_of("cuda", None)
    from patterndsl.runtime.constants import name_of_type

    return constants_of("cuda", name_of_type("cuda"))


def fixed_value(name: str, value: object, sides: Sequence[Pattern]) -> int:
    """A parameter's one value in a proof. Raises PatternError (E401, E402, E406)."""
    declared = {item.name: item for side in sides for item in side.resolved.params}
    if name not in declared:
        raise unknown_parameter(name, declared)
    found, least = counted(name, value, -MAX_VALUE, MAX_VALUE), declared[name].minimum
    if isinstance(least, Const) and found < least.value:
        raise too_small(declared[name], found, least.value)
    return found


def checked_claim(claim: str, has_other: bool) -> Claim:
    """The claim, if it is one and the other pattern is there where it needs one. Raises InputError (E506)."""
    word = claim.replace("-", "_") if isinstance(claim, str) else ""
    if word == "dead_terms":
        raise input_error("E506", f"`{claim}` is not true or false of a pattern", "ask pattern.dead_terms()")
    if word not in get_args(Claim):
        near = nearest(word, dict.fromkeys(get_args(Claim)))
        help = f"did you mean `{near}`?" if near else f"choose from {', '.join(get_args(Claim))}"
        raise input_error("E506", f"there is no claim `{claim}`", help)
    if (word in ("equals", "within")) != has_other:
        help = f'give it: prove("{word}", other)' if not has_other else f'write prove("{word}")'
        what = "needs another pattern" if not has_other else "is about one pattern"
        raise input_error("E506", f"`{word}` {what}", help)
    return cast("Claim", word)


def _with_params(pattern: Pattern, values: Mapping[str, ParamValue | str]) -> Pattern:
    declared = {param.name: param for param in pattern.resolved.params}
    trees: dict[str, ast.Expr | tuple[ast.Expr, ...]] = {}
    found: list[Diagnostic] = []
    for key, value in values.items():
        if key not in declared:
            raise unknown_parameter(key, declared)
        if not isinstance(value, str):
            value = checked_override(declared[key], value)
        trees[key] = value_tree(key, value, found)
    params = tuple(replace(param, default=trees.get(param.name, param.default)) for param in pattern.spec.params)
    return type(pattern).of(replace(pattern.spec, params=params), found)


def value_tree(name: str, value: ParamValue | str, found: list[Diagnostic]) -> ast.Expr | tuple[ast.Expr, ...]:
    """A parameter's value as expressions, a list's one by one; Broken where it was reported in `found` (E402, E407)."""
    number, listed = integer(value), integers(value)
    if number is not None:
        value = number
    elif listed is not None:
        value = listed
    items = value if isinstance(value, list | tuple) else (value,)
    for item in items or (None,):
        if isinstance(item, bool) or not isinstance(item, int | str):
            message = f"`{name}` is {kind_of(item) if items else 'an empty list'}"
            help = 'give an integer, a list of them, or text such as "isqrt(N)"'
            found.append(Diagnostic("E402", message, None, help))
            return ast.Broken(place=place_of(name))
        if isinstance(item, int) and abs(item) >= MAX_VALUE:
            found.append(Diagnostic("E407", f"`{name}` is a number beyond 62 bits", None, "use a smaller number"))
            return ast.Broken(place=place_of(name))
    trees = tuple(_tree(name, str(item), found) for item in items)
    return trees if items is value else trees[0]


def _tree(name: str, text: str, found: list[Diagnostic]) -> ast.Expr:
    snippet = snippet_of(Source(f"<{name}>", text))
    try:
        return parse_expression(snippet)
    except PatternError as failed:
        found.extend(failed.diagnostics)
        return ast.Broken(place=snippet.place(0, 1))


def place_of(what: str) -> SourceRange:
    """Where a mistake in an argument is pointed at: the argument itself, as it stands in no file."""
    return SourceRange(Source("<arguments>", what), 0, len(what))


def check_mapping(name: str, given: object, example: str) -> None:
    """Raises InputError (E304) on what has no names and values."""
    if given is not None and not isinstance(given, Mapping):
        raise input_error("E304", f"{name} is {kind_of(given)}, not a mapping", f"for example {name}={example}")
    for key in given or ():
        if not isinstance(key, str):
            raise input_error("E304", f"{name} has the key {key!r}, not a name", f"for example {name}={example}")


def kind_of(value: object) -> str:
    """What a wrong argument is, in words."""
    return "None" if value is None else type(value).__name__
