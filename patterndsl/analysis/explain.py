"""Which plan runs, why, and when does something else? Passes with predicted figures, rejected ways, and the rules.

What is predicted is Expected, by the cost model of `lower.costs`, which decides between plans. Nothing runs here, so a
plan for a device that is not there is explained too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from patterndsl.analysis.figure import readable
from patterndsl.analysis.pass_pairs import kept_pairs
from patterndsl.lower.choice import Choice, Runner
from patterndsl.lower.costs import NO_COST, Cost, Moved, computed_pairs, cost, moved
from patterndsl.lower.devices import Machine
from patterndsl.lower.fallback import FALLBACK, MANY_GROUPS, NOT_FINITE
from patterndsl.lower.hulls import Hull, Lists, num_listed
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.machine import Constants, device_type_of
from patterndsl.lower.plan import HEAD_DIM, Option, Pass, Plan, plan, runs_first
from patterndsl.lower.shapes import Band, Masked, Triangle
from patterndsl.lower.tiles import OnEvent
from patterndsl.sema.bind import Bound

MAX_SHOWN = 8
"""Passes of a plan, and rejected ways, that are shown; `to_dict` has all."""
NOTHING_MOVED = Moved(0, 0)


@dataclass(frozen=True, slots=True)
class PassFigures:
    """A pass and what it costs, over all its heads. kept: None where the pairs are too many to count.

    A pass with sign -1 takes out again what others hold twice.
    """

    kernel: str
    text: str
    sign: int
    num_groups: int
    computed: int
    kept: int | None
    cost: Cost
    moved: Moved

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "kernel": self.kernel,
            "text": self.text,
            "sign": self.sign,
            "num_groups": self.num_groups,
            "computed_pairs": self.computed,
            "kept_pairs": self.kept,
            **_figures(self.cost, self.moved),
        }


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run a head group; number is what `plan=` takes. runs: in words, what also runs and has no figures, as
    only a call's inputs say how long it is."""

    number: int
    text: str
    passes: tuple[PassFigures, ...]
    runs: tuple[str, ...] = ()

    @property
    def cost(self) -> Cost:
        return sum((item.cost for item in self.passes), NO_COST)

    @property
    def moved(self) -> Moved:
        return sum((item.moved for item in self.passes), NOTHING_MOVED)

    @property
    def excess(self) -> float | None:
        """Pairs computed for each that is kept; None where they were not all counted, or there is none."""
        kept = [item.kept for item in self.passes]
        total = sum(item.sign * item.kept for item in self.passes if item.kept is not None)
        return None if None in kept or total <= 0 else sum(item.computed for item in self.passes) / total

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        passes = [item.to_dict() for item in self.passes]
        figures = _figures(self.cost, self.moved)
        return {"plan": self.number, "text": self.text, **figures, "passes": passes, "runs": list(self.runs)}


@dataclass(frozen=True, slots=True)
class GroupWays:
    """The ways of the heads that attend alike, the cheapest forward pass first, and which of them runs."""

    heads: tuple[int, ...]
    ways: tuple[Way, ...]
    forward: int
    training: int

    def chosen(self, train: bool) -> Way:
        """The way that runs."""
        return self.ways[self.training if train else self.forward]

    def rejected(self, train: bool) -> tuple[Way, ...]:
        """The others, the cheapest for the purpose first."""
        others = (way for way in self.ways if way is not self.chosen(train))
        return tuple(sorted(others, key=lambda way: way.cost.of(train)))

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "heads": list(self.heads),
            "forward_plan": self.ways[self.forward].number,
            "training_plan": self.ways[self.training].number,
            "ways": [way.to_dict() for way in self.ways],
        }


@dataclass(frozen=True, slots=True)
class Explanation:
    """What runs and why, of one layer and one batch row. `str()` shows the plan for inference, or for training.

    dtype: what the constants were measured in. backend, runs: what runs by default or was asked for, and in words.
    groups: none where there is no plan, and then `no_plan` says why. rules: what else runs, when, in words.
    """

    title: str
    sizes: str
    num_heads: int
    head_dim: int
    machine: str
    dtype: str
    source: str
    backend: str
    runs: str
    train: bool
    groups: tuple[GroupWays, ...]
    no_plan: str | None
    rules: tuple[str, ...]

    @property
    def cost(self) -> Cost:
        """Of all head groups, for the purpose that is shown."""
        return sum((group.chosen(self.train).cost for group in self.groups), NO_COST)

    @property
    def moved(self) -> Moved:
        """Bytes of the same."""
        return sum((group.chosen(self.train).moved for group in self.groups), NOTHING_MOVED)

    @property
    def is_partly_known(self) -> bool:
        """Whether something runs whose length only a call's inputs say, which no figure has in it."""
        return any(group.chosen(self.train).runs for group in self.groups)

    def to_dict(self) -> dict[str, object]:
        """For JSON; predictions are seconds and bytes, Expected."""
        return {
            "pattern": self.title,
            "sizes": self.sizes,
            "heads": self.num_heads,
            "head_dim": self.head_dim,
            "machine": self.machine,
            "dtype": self.dtype,
            "constants": self.source,
            "backend": self.backend,
            "runs": self.runs,
            "purpose": "training" if self.train else "inference",
            **_figures(self.cost, self.moved),
            "groups": [group.to_dict() for group in self.groups],
            "no_plan": self.no_plan,
            "rules": list(self.rules),
        }

    def lines(self) -> list[str]:
        """For a terminal."""
        heads = f"{self.num_heads:,} head{'s' * (self.num_heads != 1)} of {self.head_dim}"
        found = [f"{self.title}: {self.sizes}, {heads}", f"  {self.machine}, {self.dtype}: {self.source}"]
        return [*found, *(f"  {line}" for line in (*self.what_runs(), *self.rules))]

    def what_runs(self) -> list[str]:
        """What runs and why, pass by pass."""
        found = [f"runs {self.runs}"]
        if self.no_plan:
            found.append(f"no plan: {self.no_plan}")
        for group in self.groups:
            found.extend(_group_lines(group, self.train, len(self.groups) > 1))
        if len(self.groups) > 1:
            but = ", but what is not predicted" if self.is_partly_known else ""
            found.append(f"all heads{but}: {_predicted(self.cost, self.moved)}")
        return found

    def __str__(self) -> str:
        return "\n".join(self.lines())


def explanation(
    bound: Bound,
    title: str,
    made: Plan | None,
    lookup: Lookup,
    *,
    constants: Constants,
    choice: Choice,
    head_dim: int,
    train: bool,
) -> Explanation:
    """The explanation of a plan; of None where the pattern reads inputs. choice: who runs it.

    Work: that of counting what passes keep, which is bounded.
    """
    sizes, machine = bound.sizes, constants.machine
    shown = f"N = {sizes.total:,}"
    if sizes.q_len != sizes.kv_len or sizes.q_start:
        shown += f", {sizes.q_len:,} queries from {sizes.q_start:,} on, {sizes.kv_len:,} keys"
    groups: tuple[GroupWays, ...] = ()
    if made is not None:
        chosen = zip(made.options, made.forward, made.training, strict=True)
        groups = tuple(
            _group(options, forward, training, bound.groups[at].heads, machine, lookup, head_dim)
            for at, (options, forward, training) in enumerate(chosen)
        )
    why = None
    found = _hulls_of(choice)
    if found is not None:
        groups = tuple(_masked_groups(bound, found, machine, head_dim))
    if bound.inputs and not groups:
        named = ", ".join(f"`{item.name}`" for item in bound.inputs)
        why = f"the pattern reads {named}, so its tiles depend on each call and are found then"
    return Explanation(
        title,
        shown,
        bound.num_heads,
        head_dim,
        machine.name,
        "bfloat16" if machine.itemsize == 2 else "float32",
        constants.source,
        choice.backend,
        _runs(choice),
        train,
        groups,
        why,
        (*_composed(choice), *_rules(choice, made, head_dim)),
    )


def _hulls_of(choice: Choice) -> Sequence[Hull] | None:
    """Where who runs computes pairs of a pattern with inputs; None where that is known in a call, or not at all."""
    match choice.usual:
        case "slotted":
            assert choice.slots is not None
            beside = choice.slots.beside
            if choice.slots.told is not None:
                beside = tuple(replace(hull, passes=(), in_call=True) for hull in beside)
            return *choice.slots.listed, *beside
        case "ordered":
            return choice.ordered
        case "chunked":
            return choice.chunks
        case "routed":
            return choice.routes
        case "masked":
            return choice.hulls
        case _:
            return None


def explained(
    bound: Bound,
    title: str,
    constants: Constants,
    *,
    head_dim: int,
    train: bool,
    on_event: OnEvent | None = None,
) -> Explanation:
    """The explanation of what a program for this kind of device runs by default. Work: that of planning."""
    lookup, device_type = Lookup(), device_type_of(constants.machine)
    made = None if bound.inputs else plan(bound, lookup, constants.machine, on_event=on_event)
    return explanation(
        bound,
        title,
        made,
        lookup,
        constants=constants,
        choice=Choice(bound, constants.machine, device_type, "auto", has_kernels=device_type == "cuda"),
        head_dim=head_dim,
        train=train,
    )


def _group(
    options: Sequence[Option],
    forward: Option,
    training: Option,
    heads: tuple[int, ...],
    machine: Machine,
    lookup: Lookup,
    head_dim: int,
) -> GroupWays:
    counted: dict[int, int | None] = {}  # passes of several ways share pieces
    ways = []
    for number, option in enumerate(options):
        passes = []
        for item in option.passes:
            if id(item.piece) not in counted:
                counted[id(item.piece)] = kept_pairs(item.piece, lookup)
            is_first = item is runs_first(option.passes)
            passes.append(_pass(item, counted[id(item.piece)], machine, head_dim, is_first=is_first))
        ways.append(Way(number, option.text, tuple(passes)))
    places = [next(at for at, option in enumerate(options) if option is chosen) for chosen in (forward, training)]
    return GroupWays(heads, tuple(ways), places[0], places[1])


RUNS = {"causal": "causal", "full": "every pair", "masked": "masked"}


def _masked_groups(bound: Bound, found: Sequence[Hull], machine: Machine, head_dim: int) -> Iterator[GroupWays]:
    """The passes of hulls. How many of their pairs are kept, only a call's inputs say."""
    for group in bound.groups:
        passes, runs = list[PassFigures](), list[str]()
        for hull in found:
            if hull.heads != group.heads:
                continue
            if hull.runs is not None:
                how = RUNS[hull.runs]
                if hull.inside is not None:
                    how = f"{len(hull.inside.passes)} passes cut to the length of each, {how} where broken"
                runs.append(f"runs of equal `{hull.order}`, {how}, as long as a call's inputs make them: not predicted")
            if hull.in_call:
                runs.append("tiles of which a call's inputs tell that there can be pairs: not predicted")
            if hull.lists is not None:
                runs.append(
                    f"{_listed_text(hull.lists)}, at most {num_listed(hull, bound.sizes):,} pairs: not predicted"
                )
            placed = "" if hull.order is None else f"by `{hull.order}`, "
            figures = (_pass(item, None, machine, head_dim) for item in hull.passes)
            passes.extend(replace(shown, kernel="masked", text=placed + shown.text) for shown in figures)
        yield GroupWays(group.heads, (Way(0, "where pairs can be", tuple(passes), tuple(runs)),), 0, 0)


def _listed_text(lists: Lists) -> str:
    if lists.is_route:
        name = lists.names[0].partition("#")[0]
        return f"`{name}`: {len(lists.names):,} routes of {lists.width:,} members with each other"
    keys = f"{lists.width:,} " + ("keys" if lists.of == 1 else f"blocks of {lists.of:,} keys")
    queries = "each query" if lists.per == 1 else f"each {lists.per:,} queries"
    return f"`{lists.names[0]}`: {keys} for {queries}, as each call lists them"


def _pass(item: Pass, kept: int | None, machine: Machine, head_dim: int, *, is_first: bool = False) -> PassFigures:
    num_heads = len(item.heads)
    return PassFigures(
        item.kernel,
        item.text,
        item.sign,
        item.piece.geometry.num_groups,
        round(computed_pairs(item.piece, machine)) * num_heads,
        None if kept is None else kept * num_heads,
        cost(item.piece, machine, num_heads=num_heads, head_dim=head_dim, is_first=is_first),
        moved(item.piece, machine, num_heads=num_heads, head_dim=head_dim),
    )


def _figures(seconds: Cost, num_bytes: Moved) -> dict[str, object]:
    return {
        "forward_s": seconds.forward,
        "backward_s": seconds.backward,
        "forward_bytes": num_bytes.forward,
        "backward_bytes": num_bytes.backward,
    }


# ---- what runs


def _composed(choice: Choice) -> Iterator[str]:
    """What a pattern is beside its relation."""
    bound = choice.bound
    if choice.by_inputs is not None and choice.has_kernels:
        yield "FlexAttention instead where Triton is missing, and for heads wider than 256"
    if bound.merge != "set":
        how = "merged" if bound.merge == "multiset" else "averaged, each a softmax of its own"
        yield f"a {bound.merge}: each term of the union and each round runs by itself, and all are {how}"
    if bound.fallback is not None:
        yield "rows without keys attend what `fallback` says"
    if bound.found and choice.by_inputs is None:
        yield "labels and lists may differ from head to head: then each head is a batch row of its own"


def _rules(choice: Choice, made: Plan | None, head_dim: int) -> Iterator[str]:
    """When something else runs, and when nothing does."""
    backend = choice.backend
    if made is not None and head_dim != HEAD_DIM:
        yield f"plans are chosen for heads of {HEAD_DIM}; these figures are of that plan with heads of {head_dim}"
    if not choice.is_by_rule:
        yield f"{backend} was asked for, so it runs or refuses: nothing falls back"
        yield from (f"refused: {rule.when}" for rule in choice.rules)
        if _looks(choice, made):
            yield f"refused: {NOT_FINITE}"
        return
    for rule in choice.rules:
        yield f"{rule.to} instead for {rule.when}"
    if choice.device_type == "cuda":
        yield "keys and values must be finite, as for dense attention: a look at them would wait for the GPU"
    elif _looks(choice, made):
        yield f"{FALLBACK} instead for {NOT_FINITE}"
    yield "refused but by the oracle backend: second derivatives, forward-mode derivatives, torch.vmap"


WORDS: dict[Runner, str] = {
    "told": "generated kernels on tiles that each call tells",
    "slotted": "generated kernels with a slot for each route that a query is in, or for each block that it lists",
    "ordered": "generated kernels in the orders by inputs, where the pattern can have pairs, with masks of each call",
    "chunked": "masked, block by block of chunks in the orders by inputs, with masks from each call's inputs",
    "routed": "masked, some routes at a time, as each call lists them",
    "planned": "planned, the passes below",
    "flex": "flex, FlexAttention on the tiles of the whole pattern",
    "triton": "triton, generated kernels on the tiles of the whole pattern",
    "gathered": "gathered, plain PyTorch on the tiles of the whole pattern",
    "oracle": "oracle, dense float64",
}


def _runs(choice: Choice) -> str:
    """What runs unless a rule says otherwise."""
    bound, who, kind = choice.bound, choice.usual, choice.device_type
    if choice.refusal is not None:
        return f"nothing: the {choice.backend} backend, which was asked for, refuses it: {choice.refusal.message}"
    if who == "masked":
        how = "dense on views" if kind == "cpu" else "FlexAttention on tiles"
        what = f"masked, {how} where the pattern can have pairs, with masks from each call's inputs"
    else:
        what = WORDS[who]
    if not choice.is_by_rule:
        return f"{what}, as asked for"
    why = f"as usual on {kind}"
    if bound.inputs:
        return f"{what}, {why} for a pattern with inputs"
    if len(bound.groups) > MANY_GROUPS and kind == "cuda":
        why = f"{why} for more than {MANY_GROUPS} kinds of heads"
    others = "" if who == "planned" else "; backend='planned' runs the plan below"
    return f"{what}, {why}{others}"


def _looks(choice: Choice, made: Plan | None) -> bool:
    """Whether calls look at the numbers, as what a pass masks is multiplied by 0."""
    if choice.device_type != "cpu":
        return False
    masks = choice.usual == "planned" and made is not None and _masks(made)
    return masks or choice.usual in ("masked", "chunked", "routed")


def _masks(made: Plan) -> bool:
    """Whether a pass of either purpose weighs keys with 0."""
    used = [item for options in (made.forward, made.training) for option in options for item in option.passes]
    return any(isinstance(item.piece.shape, Triangle | Band | Masked) for item in used)


# ---- words


def _group_lines(group: GroupWays, train: bool, has_others: bool) -> Iterator[str]:
    way = group.chosen(train)
    heads = f"{_heads_text(group.heads)}: " if has_others else ""
    yield f"{heads}{_way_text(way)}: {_predicted_of(way)}"
    yield from (f"  {line}" for line in _aligned(_rows(way, train)))
    yield from (f"  and {run}" for run in way.runs)
    rejected = group.rejected(train)
    for other in rejected[:MAX_SHOWN]:
        yield f"rejected {_way_text(other)}: {_predicted_of(other)}"
        yield from (f"  {line}" for line in _aligned(_rows(other, train)))
    if len(rejected) > MAX_SHOWN:
        yield f"rejected too: {len(rejected) - MAX_SHOWN} ways more"


def _way_text(way: Way) -> str:
    return f"plan {way.number}, {way.text}"


def _predicted_of(way: Way) -> str:
    if not way.passes:
        return "no pass with figures" if way.runs else "no pairs, nothing runs"
    excess = "" if way.excess is None else f"; computes {way.excess:.2f}x the pairs kept"
    return _predicted(way.cost, way.moved) + excess


def _predicted(seconds: Cost, num_bytes: Moved) -> str:
    times = f"forward {readable(seconds.forward, 's')}, backward {readable(seconds.backward, 's')}"
    return (
        f"{times}, moved {readable(num_bytes.forward, 'bytes')} and {readable(num_bytes.backward, 'bytes')} (Expected)"
    )


def _rows(way: Way, train: bool) -> list[list[str]]:
    """A table of the passes, the words at the end; none where there is no pass."""
    if not way.passes:
        return []
    rows = [["forward", "backward", "moved", "computed", "kept", "pass"]]
    for item in way.passes[:MAX_SHOWN]:
        seconds, num_bytes = item.cost, item.moved.forward + (item.moved.backward if train else 0)
        times = (readable(seconds.forward, "s"), readable(seconds.backward, "s"), readable(num_bytes, "bytes"))
        kept = "not counted" if item.kept is None else f"{item.kept:,}"
        rows.append([*times, f"{item.computed:,}", kept, f"{item.kernel}: {item.text}"])
    if len(way.passes) > MAX_SHOWN:
        rows.append(["", "", "", "", "", f"and {len(way.passes) - MAX_SHOWN} passes more"])
    return rows


def _heads_text(heads: Sequence[int]) -> str:
    """heads 0, 2 and 4 of several."""
    listed = [str(head) for head in heads[:MAX_SHOWN]] + ["..."] * (len(heads) > MAX_SHOWN)
    return f"head{'s' * (len(heads) != 1)} {', '.join(listed)}"


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns two spaces apart, numbers but for the last."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]) - 1)] if rows else []
    for row in rows:
        yield "  ".join([*(cell.rjust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
