"""What runs of a pattern with several terms, and how long should it take?

Each term, the merge, and their sum. Terms with plain scores have plans, see `analysis.explain`. Others are predicted by
the work of their products and by what their elementwise steps move.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from patterndsl.analysis.explain import Explanation
from patterndsl.analysis.figure import readable
from patterndsl.lower.costs import BACKWARD, NO_COST, Cost, Moved
from patterndsl.lower.devices import Machine
from patterndsl.lower.gather import gather_tiles
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.machine import Constants
from patterndsl.sema.bind import Bound

RUNS = {
    "scored": "no plan: block by block over the live tiles, as scores have a bias or a cap, or are made up",
    "summed": "no plan: sums of the features of keys, and no pair is looked at",
}
"""How terms run that no plan is made for, see `terms.Branch.runs`."""

SWEEPS = 28
"""How often plain operations read or write each score, in float32: mask, bias, the largest, exponent, sum, quotient.
This and the two below were fitted to calls on two CPU cores, which they meet within a factor of two."""
CHUNK = 64
"""Tokens of a chunk of causal sums, see `score.causal`."""
FEATURE_SWEEPS = 16
"""How often plain operations read or write each feature of a query or a key, in float32."""
AGAIN = 2.0
"""A backward pass of plain operations to a forward pass: they are run again, and each has two gradients."""


@dataclass(frozen=True, slots=True)
class Part:
    """A term to explain. explanation: of its plan, None where there is none. features: of sums, how many each key
    has."""

    name: str
    branch: str
    runs: Literal["planned", "scored", "summed"]
    bound: Bound
    explanation: Explanation | None
    features: int | None


@dataclass(frozen=True, slots=True)
class Step:
    """What runs, and what it should cost; why there are no figures where that is not known. explanation: of a plan."""

    name: str
    text: str
    cost: Cost | None
    moved: Moved | None
    explanation: Explanation | None = None

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        known = None if self.cost is None or self.moved is None else (self.cost, self.moved)
        figures = (
            None
            if known is None
            else {
                "forward_s": known[0].forward,
                "backward_s": known[0].backward,
                "forward_bytes": known[1].forward,
                "backward_bytes": known[1].backward,
            }
        )
        plan = None if self.explanation is None else self.explanation.to_dict()
        return {"runs": self.text, "expected": figures, "plan": plan}

    def lines(self) -> list[str]:
        """For a terminal."""
        if self.explanation is not None:
            made = self.explanation
            return [f"{made.title}: {made.sizes}", *(f"  {line}" for line in made.what_runs())]
        return [self.text, f"  {_predicted(self.cost, self.moved)}"]


@dataclass(frozen=True, slots=True)
class WholeExplanation:
    """What runs of a layer and one batch row, term by term, and how results meet. `str()` shows it."""

    title: str
    machine: str
    source: str
    terms: tuple[Step, ...]
    merges: tuple[Step, ...]
    train: bool

    @property
    def cost(self) -> Cost:
        """Of all steps whose figures are known."""
        return sum((step.cost for step in self._steps if step.cost is not None), NO_COST)

    @property
    def moved(self) -> Moved:
        """Bytes of the same."""
        return sum((step.moved for step in self._steps if step.moved is not None), Moved(0, 0))

    @property
    def unknown(self) -> tuple[str, ...]:
        """The steps whose figures are not known, or not all of them."""
        return tuple(step.name for step in self._steps if step.cost is None or _is_partly_known(step))

    @property
    def _steps(self) -> tuple[Step, ...]:
        return (*self.terms, *self.merges)

    def to_dict(self) -> dict[str, object]:
        """For JSON; predictions are seconds and bytes, Expected."""
        return {
            "pattern": self.title,
            "machine": self.machine,
            "constants": self.source,
            "purpose": "training" if self.train else "inference",
            "terms": {step.name: step.to_dict() for step in self.terms},
            "merges": {step.name: step.to_dict() for step in self.merges},
            "forward_s": self.cost.forward,
            "backward_s": self.cost.backward,
            "forward_bytes": self.moved.forward,
            "backward_bytes": self.moved.backward,
            "unknown": list(self.unknown),
        }

    def lines(self) -> list[str]:
        """For a terminal."""
        found = [f"{self.title}: {self.machine}, {self.source}"]
        for step in self.terms:
            first, *rest = step.lines()
            found += ["", f"of {step.name}: {first}", *rest]
        found.append("")
        found += [f"{step.name}: {step.text}: {_predicted(step.cost, step.moved)}" for step in self.merges]
        but = f", but what is not known of {', '.join(self.unknown)}" if self.unknown else ""
        found.append(f"all of it{but}: {_predicted(self.cost, self.moved)}")
        plans = (step.explanation for step in self.terms if step.explanation is not None)
        return [*found, *dict.fromkeys(f"  {rule}" for made in plans for rule in made.rules)]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def whole_explanation(
    title: str, parts: Sequence[Part], combine: str, constants: Constants, *, head_dim: int, train: bool
) -> WholeExplanation:
    """The explanation of terms. Work: that of the live tiles of terms without a plan."""
    machine = constants.machine
    terms = tuple(_step(part, machine, head_dim) for part in parts)
    return WholeExplanation(
        title, machine.name, constants.source, terms, tuple(_merges(parts, combine, machine, head_dim)), train
    )


def _step(part: Part, machine: Machine, head_dim: int) -> Step:
    if part.explanation is not None:
        made = part.explanation
        has_figures = bool(made.groups)
        return Step(part.name, made.runs, made.cost if has_figures else None, made.moved if has_figures else None, made)
    text = RUNS[part.runs]
    if part.features is not None:
        return Step(part.name, text, *_summed(part.bound, part.features, machine, head_dim))
    if part.bound.inputs:
        named = ", ".join(f"`{item.name}`" for item in part.bound.inputs)
        return Step(part.name, f"{text}; which tiles live, {named} of each call decides", None, None)
    return Step(part.name, text, *_scored(part.bound, machine, head_dim))


def _is_partly_known(step: Step) -> bool:
    """Whether its plan is."""
    return step.explanation is not None and step.explanation.is_partly_known


def _scored(bound: Bound, machine: Machine, head_dim: int) -> tuple[Cost, Moved]:
    """Products of the pairs in live tiles, and the sweeps over their scores."""
    pairs = 0
    for group in bound.groups:
        tiles = gather_tiles(group.relation, bound.sizes, Lookup())
        pairs += len(group.heads) * tiles.num_tiles * tiles.q_block * tiles.kv_block
    work = 4.0 * head_dim * pairs / machine.dense_rate
    swept = SWEEPS * 4 * pairs
    num_bytes = _moved(bound, machine, head_dim)
    sweeps = swept / machine.bandwidth
    backward = BACKWARD * work / machine.backward_rate + work + AGAIN * sweeps
    moved = Moved(num_bytes.forward + swept, num_bytes.backward + round(AGAIN * swept))
    return Cost(work + sweeps + machine.sparse_call, backward + machine.sparse_call), moved


def _summed(bound: Bound, features: int, machine: Machine, head_dim: int) -> tuple[Cost, Moved]:
    """A product to add keys and one to read them, those within chunks, and the sweeps over features."""
    sizes, heads = bound.sizes, bound.num_heads
    positions = heads * (sizes.q_len + sizes.kv_len)
    products = 2.0 * positions * (features * (head_dim + 1) + CHUNK * (features + head_dim) / 2)
    swept = FEATURE_SWEEPS * 4 * positions * features
    work, sweeps = products / machine.dense_rate, swept / machine.bandwidth
    num_bytes = _moved(bound, machine, head_dim)
    cost = Cost(
        work + sweeps + machine.sparse_call,
        BACKWARD * work / machine.backward_rate + AGAIN * sweeps + machine.sparse_call,
    )
    return cost, Moved(num_bytes.forward + swept, num_bytes.backward + round(AGAIN * swept))


def _moved(bound: Bound, machine: Machine, head_dim: int) -> Moved:
    """Query, output, keys and values once; backward these, the output's gradient and three more."""
    row = bound.num_heads * head_dim * machine.itemsize
    forward = 2 * row * (bound.sizes.q_len + bound.sizes.kv_len)
    return Moved(forward, 2 * forward)


def _merges(parts: Sequence[Part], combine: str, machine: Machine, head_dim: int) -> Sequence[Step]:
    """The merge of each branch with several softmax terms, and what branches become."""
    if not parts:
        return []
    branches: dict[str, list[Part]] = {}
    for part in parts:
        branches.setdefault(part.branch, []).append(part)
    bound = parts[0].bound
    rows = bound.sizes.q_len * bound.num_heads * head_dim * machine.itemsize
    found = []
    for name, terms in branches.items():
        if len(terms) == 1 or terms[0].runs == "summed":  # sums go on in one state
            continue
        of = f" of {name}" if name else ""
        text = f"{len(terms)} results weighed by their log-sum-exp"
        found.append(_pointwise(f"merge{of}", text, 3 * len(terms) * rows, machine))
    if len(branches) > 1:
        each = 5 if combine == "gate" else 3
        text = {"gate": "times a gate each, and added", "mean": "averaged", "sum": "added"}[combine]
        found.append(_pointwise("combine", f"{len(branches)} branches {text}", each * len(branches) * rows, machine))
    return found


def _pointwise(name: str, text: str, num_bytes: int, machine: Machine) -> Step:
    """What reads and writes so many bytes, and twice as many backward."""
    moved = Moved(num_bytes, 2 * num_bytes)
    return Step(name, text, Cost(moved.forward / machine.bandwidth, moved.backward / machine.bandwidth), moved)


def _predicted(seconds: Cost | None, num_bytes: Moved | None) -> str:
    if seconds is None or num_bytes is None:
        return "not predicted"
    times = f"forward {readable(seconds.forward, 's')}, backward {readable(seconds.backward, 's')}"
    moved = f"{readable(num_bytes.forward, 'bytes')} and {readable(num_bytes.backward, 'bytes')}"
    return f"{times}, moved {moved} (Expected)"
