"""From which length on is a pattern faster than dense attention? By predicted times, one length after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from patterndsl.analysis.at_length import EFFORT, area
from patterndsl.analysis.budget import GaveUpError, check_time, within
from patterndsl.analysis.cost import Shape, forward_flops, least_bytes, predicted
from patterndsl.analysis.figure import Figure
from patterndsl.analysis.kept import without_seeds
from patterndsl.diagnostics import PatternError
from patterndsl.ir.index import Const
from patterndsl.ir.relation import Relation, draws_in
from patterndsl.lower.devices import Device
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.tiles import find_tiles
from patterndsl.sema.bind import Bound

BLOCK, SHORTEST, LONGEST = 128, 128, 65_536
SECONDS = 2.0
MAX_DRAWN = 1 << 16
"""Keys that are drawn for the longest sequence; to draw more takes seconds."""


def overtakes(
    bind: Callable[[int], Bound], shape: Shape, devices: Sequence[Device], is_causal: bool
) -> dict[str, Figure | None]:
    """The least length, to a multiple of 128, from which on the pattern is predicted to be faster than dense.

    Expected, per device; None where it is not by 65,536 positions. No device where that takes longer than 2 s. Dense
    attention computes half of the pairs where the pattern is causal. Lengths that the spec does not allow are passed
    over. Work: a tile descent for each length tried.
    """
    work: dict[int, tuple[float, float] | None] = {}

    def flops(n: int) -> tuple[float, float] | None:
        if n not in work:
            work[n] = _flops(bind, n, shape.head_dim, is_causal)
        return work[n]

    try:
        with within(SECONDS):
            return {device.name: _first(flops, shape, device) for device in devices}
    except GaveUpError:
        return {}


def is_quick(bound: Bound) -> bool:
    """Whether few enough keys are drawn for the lengths to be tried, told from those of one length."""
    drawn = 0
    for node in (node for group in bound.groups for node in draws_in(group.relation)):
        if isinstance(node.num_q, Const) and isinstance(node.count, Const):
            drawn += node.num_q.value * node.count.value
    return drawn * LONGEST <= MAX_DRAWN * max(1, bound.sizes.total)


def _flops(bind: Callable[[int], Bound], n: int, head_dim: int, is_causal: bool) -> tuple[float, float] | None:
    """Forward work over all heads: of the pattern's live tiles, and of dense attention."""
    check_time()
    try:
        bound = bind(n)
    except PatternError:
        return None
    computed = 0
    num_heads: dict[Relation, int] = {}
    for group in bound.groups:  # other draws are about as many tiles
        alike = without_seeds(group.relation)
        num_heads[alike] = num_heads.get(alike, 0) + len(group.heads)
    for relation, number in num_heads.items():
        tiles = find_tiles(relation, bound.sizes, Lookup({}), BLOCK, BLOCK, tell_full=False, effort=EFFORT)
        computed += area(tiles, bound.sizes) * number
    dense = (n * (n + 1) // 2 if is_causal else n * n) * bound.num_heads
    return forward_flops(computed, head_dim), forward_flops(dense, head_dim)


def _first(flops: Callable[[int], tuple[float, float] | None], shape: Shape, device: Device) -> Figure | None:
    def is_faster(n: int) -> bool | None:
        found = flops(n)
        if found is None:
            return None
        moved = least_bytes(Shape(n, n, shape.num_q_heads, shape.num_kv_heads, shape.head_dim, shape.dtype))
        return predicted(device, found[0], moved).value < predicted(device, found[1], moved, dense=True).value

    lengths = [SHORTEST << step for step in range(10) if SHORTEST << step <= LONGEST]
    known = [(n, is_faster(n)) for n in lengths]
    faster = [n for n, fast in known if fast]
    slower = [n for n, fast in known if fast is False]
    if not faster or (slower and slower[-1] > faster[-1]):
        return None
    above = min(n for n in faster if not slower or n > slower[-1])
    below = max((n for n in slower if n < above), default=0)
    while above - below > BLOCK:
        middle = (above + below) // 2 // BLOCK * BLOCK
        fast = is_faster(middle)
        if fast is None or middle in (above, below):
            break
        above, below = (middle, below) if fast else (above, middle)
    return Figure(above, "Expected", "positions", f"roofline of {device.how}")
