"""Which of several ways to attend is faster, and by how much? All in one run, in turns: a slow moment slows them all.

A contestant may have variants, of which the best runs. Each is checked against the oracle of what it should compute
before it is timed; one that is wrong, fails or would take too long is said to be so and left out.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from patterndsl.diagnostics import PatternError
from patterndsl.lower.tiles import OnEvent
from patterndsl.runtime.composed import CompositeProgram
from patterndsl.runtime.data import Inputs
from patterndsl.runtime.measure import cores_of_others, step_seconds, timed, usage
from patterndsl.runtime.program import Program
from patterndsl.runtime.tensors import Attend, Tensors
from patterndsl.runtime.trial import Check, check

_Raced: TypeAlias = Literal["forward", "training"]
_Steps: TypeAlias = tuple[Callable[[], object], ...]

FEWEST_ROUNDS, MOST_ROUNDS = 3, 25
SAMPLE_SECONDS = 0.1
"""A quick call is repeated within a round for about so long."""
MOST_REPEATS = 20
TRIES = 3
"""Calls that choose between variants."""
SAMPLE_ROWS = 64
AGREES = 32.0
"""Another's result is the same attention where its error is at most so many times dense attention's."""


@dataclass(frozen=True, slots=True, eq=False)
class Variant:
    """attend: what runs; truth: what it should compute. arranged: the tensors as it likes them, outside the clock."""

    name: str
    attend: Attend
    truth: Program | CompositeProgram
    inputs: Inputs | None = None
    arranged: Callable[[Tensors], Tensors] = lambda tensors: tensors
    trains: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Contestant:
    """A way to attend. expected_seconds: of a call, as far as known; memory_only: called once, for its memory;
    held_bytes: of what it keeps between calls beside the tensors, as part of its peaks; skipped: why it takes no
    part."""

    label: str
    variants: tuple[Variant, ...]
    note: str | None = None
    expected_seconds: float = 0.0
    memory_only: bool = False
    held_bytes: int = 0
    skipped: str | None = None


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of all rounds, and the middle half of them."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Timing:
    """ratio: seconds over those of the first contestant in the same round. variant: which one it was."""

    seconds: Spread
    ratio: Spread | None
    num_rounds: int
    variant: str


@dataclass(frozen=True, slots=True)
class Entry:
    """What was found of a contestant. forward: without gradients; backward: alone; training: a forward pass that keeps
    what backward needs, and both. Peaks in bytes, beyond the tensors that were there. first_seconds: of its first call,
    with whatever it compiles. failures: variants that were left out, and why."""

    label: str
    note: str | None = None
    skipped: str | None = None
    failures: tuple[str, ...] = ()
    check: Check | None = None
    first_seconds: float | None = None
    forward: Timing | None = None
    backward: Timing | None = None
    training: Timing | None = None
    forward_bytes: int | None = None
    training_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Contest:
    """Entries in the order of the contestants; cores_of_others: that other processes kept busy meanwhile, on Linux."""

    entries: tuple[Entry, ...]
    cores_of_others: float | None


@dataclass(slots=True, eq=False)
class _Racer:
    """A variant that is timed: the steps of a round, and the seconds of each step in each round."""

    contestant: int
    measure: _Raced
    variant: Variant
    steps: _Steps
    once: float
    rounds: list[list[float]]


@dataclass(frozen=True, slots=True)
class Limits:
    """rounds: seconds that the rounds of a contest take, roughly; call: seconds that a call may take.

    quiet: a round counts where other processes kept at most so many cores busy; it is waited for, and repeated, for
    `patience` seconds in all, after which the quietest rounds count. None: every round counts.
    """

    rounds: float = 10.0
    call: float = 20.0
    quiet: float | None = None
    patience: float = 0.0


def contest(
    contestants: Sequence[Contestant],
    tensors: Tensors,
    *,
    backward: bool = False,
    limits: Limits | None = None,
    on_event: OnEvent | None = None,
) -> Contest:
    """The first contestant is the one that the others are compared with."""
    limits = limits or Limits()
    entries: list[Entry] = []
    racers: list[_Racer] = []
    for place, contestant in enumerate(contestants):
        if on_event:
            on_event(f"trying {contestant.label}", place, len(contestants))
        entry, found = _tried(place, contestant, tensors, backward, limits)
        entries.append(entry)
        racers += found
    others = _race(racers, tensors.query.device, limits, on_event)
    for racer in racers:
        rival = next((r for r in racers if r.contestant == 0 and r.measure == racer.measure), None)
        entries[racer.contestant] = _with_timings(entries[racer.contestant], racer, rival)
    return Contest(tuple(entries), others)


def _tried(
    place: int, contestant: Contestant, tensors: Tensors, backward: bool, limits: Limits
) -> tuple[Entry, list[_Racer]]:
    """What is known before the race, and who takes part in it."""
    entry = Entry(contestant.label, contestant.note, contestant.skipped)
    if contestant.skipped is not None:
        return entry, []
    if contestant.expected_seconds > limits.call:
        limit = f"beyond the limit of {limits.call:g} s"
        return replace(entry, skipped=f"a call would take about {contestant.expected_seconds:,.0f} s, {limit}"), []
    if contestant.memory_only:
        return _measured_once(contestant, entry, tensors, backward), []
    tried: list[_Tried] = []
    failures = []
    for variant in contestant.variants:
        try:
            tried.append(_tried_variant(place, variant, tensors, backward and variant.trains))
        except (RuntimeError, PatternError) as failed:  # out of memory, not for this dtype, not compiled
            failures.append(": ".join(part for part in (variant.name, _first_line(failed)) if part))
    if not tried:
        return replace(entry, skipped="; ".join(failures)), []
    racers = [racer for found in tried for racer in found.racers]
    best, peaks = [], dict[str, int | None]()
    for measure in ("forward", "training"):
        able = [racer for racer in racers if racer.measure == measure]
        if able:
            best.append(min(able, key=lambda racer: racer.once))
            peaks[measure] = _peak(contestant, best[-1].steps, tensors.query.device)[1]
    entry = replace(
        entry,
        failures=tuple(failures),
        check=max((found.check for found in tried), key=lambda found: max(d.error for d in found.deviations)),
        first_seconds=tried[0].first_seconds,
        forward_bytes=peaks.get("forward"),
        training_bytes=peaks.get("training"),
    )
    return entry, best


def _measured_once(contestant: Contestant, entry: Entry, tensors: Tensors, backward: bool) -> Entry:
    """Its peaks, and what the one call took."""
    (variant,) = contestant.variants
    try:
        for measure, steps in _measures(variant, variant.arranged(tensors), backward).items():
            seconds, peak = _peak(contestant, steps, tensors.query.device)
            spread = _spread([seconds])
            if measure == "forward":
                entry = replace(entry, forward=Timing(spread, None, 1, variant.name), forward_bytes=peak)
            else:
                entry = replace(entry, training=Timing(spread, None, 1, variant.name), training_bytes=peak)
    except RuntimeError as failed:
        return replace(entry, skipped=_first_line(failed))
    return entry


def _peak(contestant: Contestant, steps: _Steps, device: torch.device) -> tuple[float, int | None]:
    """Seconds of a call, and its peak."""
    seconds, peak = timed(partial(_run, steps), device)
    return seconds, None if peak is None else peak + contestant.held_bytes


def _first_line(failed: Exception) -> str:
    lines = [line.strip() for line in str(failed).splitlines() if line.strip()]
    return (lines[0] if lines else type(failed).__name__)[:200]


@dataclass(frozen=True, slots=True, eq=False)
class _Tried:
    """A variant that is right; its racers are those of _measures, in order."""

    racers: tuple[_Racer, ...]
    check: Check
    first_seconds: float


def _tried_variant(place: int, variant: Variant, tensors: Tensors, backward: bool) -> _Tried:
    """Its first call, its check, and a few calls that say how fast it is. Raises RuntimeError where it is wrong."""
    tensors, device = variant.arranged(tensors), tensors.query.device
    measures = _measures(variant, tensors, backward)
    first_seconds, _ = timed(partial(_run, measures["forward"]), device)
    found = check(
        variant.truth, tensors, variant.inputs, sample_rows=SAMPLE_ROWS, backward=backward, attend=variant.attend
    )
    _refuse_different(found)
    racers = []
    for measure, steps in measures.items():
        once = _once(steps, device)
        racers.append(_Racer(place, measure, variant, steps, once, []))
    return _Tried(tuple(racers), found, first_seconds)


def _once(steps: _Steps, device: torch.device) -> float:
    """Seconds of a call that is not the first; of a slow one, one tells enough."""
    (first,) = step_seconds(steps, device, 1)
    if sum(first) > SAMPLE_SECONDS:
        return sum(first)
    return statistics.median(sum(parts) for parts in step_seconds(steps, device, TRIES))


def _measures(variant: Variant, tensors: Tensors, backward: bool) -> dict[_Raced, _Steps]:
    """The steps of what is timed."""
    found: dict[_Raced, _Steps] = {"forward": _forward_steps(variant.attend, tensors)}
    if backward:
        found["training"] = _training_steps(variant.attend, tensors)
    return found


def _refuse_different(found: Check) -> None:
    for item in found.deviations:
        if not item.error <= AGREES * max(item.dense_error, item.rounding):
            raise RuntimeError(
                f"computes something else: the error of its {item.what} is {item.error:.1e}, "
                f"dense attention's {item.dense_error:.1e}"
            )


def _run(steps: _Steps) -> None:
    for step in steps:
        step()


def _forward_steps(attend: Attend, tensors: Tensors) -> _Steps:
    def forward() -> None:
        with torch.no_grad():
            attend(tensors)

    return (forward,)


def _training_steps(attend: Attend, tensors: Tensors) -> _Steps:
    leaves = tensors.trainable()
    parts = leaves.all
    upstream = torch.ones(
        (*leaves.query.shape[:3], leaves.value.shape[3]), dtype=leaves.value.dtype, device=leaves.value.device
    )
    outputs: list[Tensor] = []

    def forward() -> None:
        outputs.append(attend(leaves))

    def backward() -> None:
        torch.autograd.grad(outputs.pop(), parts, upstream, allow_unused=True)

    return forward, backward


def _race(racers: Sequence[_Racer], device: torch.device, limits: Limits, on_event: OnEvent | None) -> float | None:
    """Rounds until the time is up, each begun by another racer; the cores that others kept busy in those that count."""
    began, spent = time.perf_counter(), 0.0
    quiet = math.inf if limits.quiet is None else limits.quiet
    disturbed: list[float] = []
    while racers:
        num_quiet = sum(others <= quiet for others in disturbed)
        patience_ends = began + spent + limits.patience
        is_patient = time.perf_counter() < patience_ends
        if num_quiet >= MOST_ROUNDS or (num_quiet >= FEWEST_ROUNDS and spent >= limits.rounds):
            break
        if limits.quiet is not None and len(disturbed) >= FEWEST_ROUNDS and not is_patient:
            break
        if on_event:
            on_event("timing in turns", min(int(spent), int(limits.rounds)), max(1, int(limits.rounds)))
        if limits.quiet is not None and is_patient:
            _wait_until_quiet(quiet, patience_ends)
        seconds, others = _round(racers, len(disturbed) % len(racers), device)
        disturbed.append(others)
        spent += seconds if others <= quiet else 0.0
    count = max(FEWEST_ROUNDS, sum(others <= quiet for others in disturbed))
    counted = sorted(sorted(range(len(disturbed)), key=disturbed.__getitem__)[:count])
    for racer in racers:
        racer.rounds = [racer.rounds[at] for at in counted]
    return None if usage() is None or not counted else statistics.mean(disturbed[at] for at in counted)


def _round(racers: Sequence[_Racer], turn: int, device: torch.device) -> tuple[float, float]:
    """Each racer once, for a while; the seconds that it took, and the cores that others kept busy: 0 where that is not
    known."""
    before, began = usage(), time.perf_counter()
    for racer in (*racers[turn:], *racers[:turn]):
        repeats = max(1, min(MOST_REPEATS, int(SAMPLE_SECONDS / max(racer.once, 1e-9))))
        found = step_seconds(racer.steps, device, repeats)
        racer.rounds.append([statistics.median(step) for step in zip(*found, strict=True)])
    return time.perf_counter() - began, cores_of_others(before, usage()) or 0.0


def _wait_until_quiet(cores: float, until: float) -> None:
    """Sleeps until other processes leave the cores alone."""
    while time.perf_counter() < until:
        before = usage()
        time.sleep(0.5)
        others = cores_of_others(before, usage())
        if others is None or others <= cores:
            return


def _with_timings(entry: Entry, racer: _Racer, rival: _Racer | None) -> Entry:
    """The entry with what the rounds say: forward, or backward and training."""

    def timing(of: Callable[[list[float]], float]) -> Timing:
        mine = [of(steps) for steps in racer.rounds]
        ratio = None if rival is None else _spread([a / of(b) for a, b in zip(mine, rival.rounds, strict=True)])
        return Timing(_spread(mine), ratio, len(mine), racer.variant.name)

    if racer.measure == "forward":
        return replace(entry, forward=timing(sum))
    return replace(entry, backward=timing(lambda steps: steps[-1]), training=timing(sum))


def _spread(values: Sequence[float]) -> Spread:
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)
