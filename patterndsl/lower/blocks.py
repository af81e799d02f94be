"""On which blocks do generated kernels work? What a calibration found fastest, for each use, as plain data.

Kernels read it when they run and never measure: see `runtime.kernels.shapes`. What is built in stands there too.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias, get_args

Role: TypeAlias = Literal["forward", "queries", "keys"]
"""The forward kernel, that of gradients of queries, and that of gradients of keys and values."""
Length: TypeAlias = Literal["short", "long"]
"""Of the lists of tiles: a window has short ones, dense attention has long ones."""

ROWS = 64
"""Queries that a group of four warps multiplies."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Queries and keys of a tile, warps of a program, and tiles that are loaded ahead. registers: at most so many in a
    thread, where one program more then fits on a processor; None leaves it to the compiler."""

    q_block: int
    kv_block: int
    warps: int
    stages: int
    registers: int | None = None


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A kernel of Hopper: so many groups of warps with `ROWS` queries each, tiles of so many keys, of which some are in
    shared memory at once (ring), and tiles of queries of each group that are (ahead); where gradients of keys are
    made, queries and keys are the other way round. registers: of a thread when the kernel begins; of_consumers: of one
    that multiplies, which takes them from the others. programs: that a processor has at once."""

    consumers: int
    kv_block: int
    ring: int
    ahead: int
    registers: int
    of_consumers: int
    programs: int = 1

    @property
    def q_block(self) -> int:
        """Queries of a piece of work."""
        return ROWS * self.consumers


@dataclass(frozen=True, slots=True)
class Use:
    """What blocks are for, in half precision. head_dim: of queries, keys and values alike."""

    role: Role
    head_dim: int
    length: Length


@dataclass(frozen=True, slots=True)
class Tuned:
    """The fastest blocks that were tried."""

    use: Use
    blocks: Blocks | Pipeline


CANDIDATES: dict[tuple[Role, int], tuple[Blocks | Pipeline, ...]] = {
    ("forward", 64): (
        Blocks(64, 64, 4, 2, 96),
        Blocks(64, 64, 4, 3),
        Blocks(128, 64, 4, 3),
        Pipeline(2, 64, 4, 2, 80, 104, 2),
        Pipeline(4, 64, 6, 2, 96, 112),
        Pipeline(3, 128, 4, 2, 128, 160),
    ),
    ("forward", 128): (
        Blocks(64, 64, 4, 1),
        Blocks(64, 64, 4, 3),
        Blocks(128, 64, 8, 3),
        Pipeline(3, 64, 4, 1, 128, 160),
        Pipeline(2, 64, 4, 2, 168, 240),
        Pipeline(2, 128, 2, 1, 168, 240),
    ),
    ("queries", 64): (
        Blocks(64, 64, 4, 2),
        Blocks(64, 64, 4, 3),
        Blocks(128, 64, 8, 2),
        Pipeline(3, 64, 4, 2, 128, 160),
    ),
    ("queries", 128): (
        Blocks(64, 64, 4, 2),
        Blocks(64, 64, 4, 1),
        Blocks(128, 64, 8, 2),
        Pipeline(2, 64, 4, 1, 168, 240),
    ),
    ("keys", 64): (
        Blocks(32, 64, 4, 2, 128),
        Blocks(64, 64, 4, 2),
        Blocks(64, 128, 8, 2),
        Pipeline(2, 64, 6, 2, 168, 240),
    ),
    ("keys", 128): (Blocks(64, 64, 4, 2), Blocks(32, 64, 4, 2), Blocks(64, 128, 8, 2)),
}
"""What is tried for a role and a width of heads in half precision; the first is what runs where nothing was tuned."""


def tuned_from(data: object) -> Tuned | None:
    """What `asdict` made of it; None where it is something else, or where kernels do not try such blocks any more."""
    tried = (
        Tuned(Use(role, head_dim, length), blocks)
        for (role, head_dim), candidates in CANDIDATES.items()
        for length in get_args(Length)
        for blocks in candidates
    )
    return next((tuned for tuned in tried if asdict(tuned) == data), None)
