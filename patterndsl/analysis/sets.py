"""What can be decided of affine relations? Sets of integer points by isl, within a limit of work.

The one owner of islpy. isl has no clock, but it counts its operations: past the limit it gives up, and so do we. One of
them takes the longer the more floors and symbols there are, so that large sets have fewer. Where islpy has no wheel
(Windows), everything here says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, TypeVar

from patterndsl.analysis.budget import GaveUpError as GaveUpError
from patterndsl.analysis.budget import check_time
from patterndsl.analysis.digits import Affine
from patterndsl.analysis.radix import NotAffineError

if TYPE_CHECKING:
    import islpy

_Points = TypeVar("_Points", "islpy.Set", "islpy.Map")

MAX_OPERATIONS = 12_000_000
"""Some 5 s on one core of 2026."""


FEW_COLUMNS = 24
"""Symbols and floors up to which an operation of isl takes some 0.4 us; with more it is the cube of that."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """factors . symbols + constant >= 0, or = 0."""

    factors: tuple[tuple[str, int], ...]
    constant: int
    is_equality: bool


@dataclass(frozen=True, slots=True)
class Floor:
    """(factors . symbols + constant) // divisor."""

    factors: tuple[tuple[str, int], ...]
    constant: int
    divisor: int


@contextmanager
def limited(operations: int = MAX_OPERATIONS) -> Iterator[islpy.Context]:
    """A context whose work is bounded. Raises GaveUpError at its end or where isl is not there."""
    try:
        import islpy
    except ImportError:
        raise GaveUpError("islpy is not installed here (it has no wheel for this system)") from None
    check_time()
    context = islpy.Context()
    context.set_max_operations(operations)
    try:
        yield context
        context.set_max_operations(0)  # what was found is small, and is asked again later
    except (islpy.Error, TypeError, AssertionError):  # islpy may pass on the nothing that a spent context gives
        if not _is_spent(context):
            raise
        check_time()
        seconds = round(5 * operations / MAX_OPERATIONS, 1)
        raise GaveUpError(f"isl gave up after work of some {seconds:g} s") from None


def weigh(context: islpy.Context, num_columns: int) -> None:
    """Lowers the limit of a context for sets of so many symbols and floors, so that it is about the same time."""
    share = max(1.0, (num_columns / FEW_COLUMNS) ** 3)
    context.set_max_operations(max(1, int(context.get_max_operations() / share)))


def num_columns(form: Affine) -> int:
    """Symbols of a form, and the different floors that are left to isl in it."""
    floors = {floor for text in (*form.texts, form.domain) for floor in _FLOOR.findall(text)}
    return len(form.params) + len(form.q_digits) + len(form.k_digits) + len(form.flags) + len(floors)


_FLOOR = re.compile(r"floor\(\([^()]*\)/\d+\)")


def _is_spent(context: islpy.Context) -> bool:
    """Whether the limit was reached: then every operation fails, while the first to fail may call it a syntax error."""
    import islpy

    try:
        islpy.Set("[n] -> { [x] : 0 <= x < n }", context=context)
    except islpy.Error:
        return True
    return False


def region(context: islpy.Context, params: Sequence[str], dims: Sequence[str], *texts: str) -> islpy.Set:
    """The set of integer points that satisfy every text."""
    import islpy

    space = f"[{', '.join(params)}] -> {{ [{', '.join(dims)}] : "
    result = None
    for text in texts:
        check_time()
        part = islpy.Set(f"{space}{text} }}", context=context)
        result = part if result is None else result.intersect(part)
    assert result is not None
    return coalesced(result)


def coalesced(points: _Points) -> _Points:
    """The same points in fewer pieces, if isl manages: its assertions fail on some sets (islpy 2025.2), and what they
    guard is only shorter."""
    import islpy

    try:
        return points.coalesce()
    except islpy.Error:
        if _is_spent(points.get_ctx()):
            raise
        return points


def regions(context: islpy.Context, form: Affine) -> tuple[islpy.Set, list[islpy.Set]]:
    """The domain of a form over its digits and flags, and its relations inside it.

    Raises NotAffineError where nothing is left of the domain under the divisions that the form assumes, and where a
    relation does not imply what it should.
    """
    weigh(context, num_columns(form))
    dims = (*form.q_digits, *form.k_digits, *form.flags)
    everywhere = region(context, form.params, dims, form.domain)
    if form.assumed and everywhere.is_empty():
        raise NotAffineError("no length fits the divisions that it would have to assume")
    found = [everywhere.intersect(region(context, form.params, dims, text)) for text in form.texts]
    implied = region(context, form.params, dims, form.implied)
    if not all(points.is_subset(implied) for points in found):
        raise NotAffineError("nothing else keeps a position below the length")
    return everywhere, found


def dim_names(points: islpy.Set | islpy.BasicSet, kind: islpy.dim_type) -> list[str]:
    """The names of its dimensions or parameters, in order; all have one."""
    names = [points.get_dim_name(kind, at) for at in range(points.dim(kind))]
    return [name for name in names if name is not None]


def constraints(basic: islpy.BasicSet) -> list[Constraint]:
    """Its constraints; existential dimensions are called `e0`, `e1` and so on."""
    import islpy

    found = []
    for item in basic.get_constraints():
        factors = {str(name): int(str(value)) for name, value in item.get_coefficients_by_name().items() if name != 1}
        for at in range(basic.dim(islpy.dim_type.div)):
            factors[f"e{at}"] = int(str(item.get_coefficient_val(islpy.dim_type.div, at)))
        kept = tuple((name, factor) for name, factor in factors.items() if factor)
        found.append(Constraint(kept, int(str(item.get_constant_val())), item.is_equality()))
    return found


def floors(basic: islpy.BasicSet) -> list[Floor]:
    """What its existential dimensions `e0`, `e1` and so on stand for, where all are known (`compute_divs`)."""
    import islpy

    kinds = (islpy.dim_type.param, islpy.dim_type.set)
    names = [f"e{at}" for at in range(basic.dim(islpy.dim_type.div))]
    found = []
    for at in range(len(names)):
        floor = basic.get_div(at)
        divisor = int(str(floor.get_denominator_val()))
        factors = {
            name: floor.get_coefficient_val(islpy.dim_type.in_ if kind == islpy.dim_type.set else kind, place)
            for kind in kinds
            for place, name in enumerate(dim_names(basic, kind))
        } | {name: floor.get_coefficient_val(islpy.dim_type.div, place) for place, name in enumerate(names)}
        whole = {name: int(Fraction(str(value)) * divisor) for name, value in factors.items()}
        rest = int(Fraction(str(floor.get_constant_val())) * divisor)
        found.append(Floor(tuple((name, value) for name, value in whole.items() if value), rest, divisor))
    return found
