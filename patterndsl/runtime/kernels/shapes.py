"""On which blocks do kernels work, and which forward kernel is it? The one place that chooses, without measuring.

What was tuned on a device is taken there, where it takes the tensors; else small blocks of Triton's kernels, which take
all of them: many programs on a processor hide each other's waiting.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from patterndsl.lower.blocks import CANDIDATES, ROWS, Blocks, Pipeline, Role, Tuned, Use
from patterndsl.runtime.constants import constants_for
from patterndsl.runtime.kernels.lists import WorkLists
from patterndsl.runtime.kernels.told_lists import ToldLists
from patterndsl.runtime.kernels.work import MOST_BLOCKS

HALVES = (torch.bfloat16, torch.float16)
HOPPER = (9, 0)
LEAST_TRITON = (3, 6)
"""With the dialect of Hopper's kernel."""
FEWEST = 256
"""Pieces of work below which the large ones of Hopper's kernel leave processors idle: about two for each."""
BUILT_IN = (
    Tuned(Use("forward", 64, "short"), Pipeline(2, 64, 4, 2, 80, 104, 2)),
    Tuned(Use("forward", 128, "short"), Pipeline(3, 64, 4, 1, 128, 160)),
    Tuned(Use("forward", 128, "long"), Pipeline(2, 64, 4, 2, 168, 240)),
    Tuned(Use("queries", 64, "short"), Pipeline(3, 64, 4, 2, 128, 160)),
    Tuned(Use("queries", 128, "short"), Pipeline(2, 64, 4, 1, 168, 240)),
    Tuned(Use("queries", 128, "long"), Pipeline(2, 64, 4, 1, 168, 240)),
    Tuned(Use("keys", 64, "short"), Pipeline(2, 64, 6, 2, 168, 240)),
    Tuned(Use("keys", 64, "long"), Pipeline(2, 64, 6, 2, 168, 240)),
)
"""Measured on an H100 with `LEAST_TRITON`, and for that Triton on every Hopper: faster than Triton's kernel on the
patterns that were tried. On an H200 four consumers were up to 3 % faster on windows, and slower on all else, by a fifth
beside global rows. Gradients of queries, with heads of 64, gained 6 % on windows, lost 9 % where rows are global and
some on long lists; those of keys, with heads of 128, lost."""


ROLES: tuple[Role, Role, Role] = ("forward", "queries", "keys")


class Shapes(NamedTuple):
    """Of the forward kernel, of the gradient of queries, and of that of keys and values, all Triton's."""

    forward: Blocks
    queries: Blocks
    keys: Blocks


def blocks_for(
    role: Role,
    lists: WorkLists | ToldLists,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *beside: Tensor,
    ordered: bool = False,
) -> Blocks | Pipeline:
    """The blocks of a kernel for such lists and tensors. beside: what else it reads or writes in tiles, where that is
    given. ordered: whether tiles are of places that have an order.

    Lists that are made for one call are made once, for the usual blocks.
    """
    usual = getattr(usual_shapes(query.dtype, max(query.shape[3], value.shape[3])), role)
    assert isinstance(usual, Blocks)
    if ordered or isinstance(lists, ToldLists) or not lists.is_kept:
        return usual
    if query.dtype not in HALVES or query.shape[3] != value.shape[3]:
        return usual
    tuned = tuned_on(query.device)
    if not tuned:
        return usual
    blocks = tuned.get(Use(role, query.shape[3], lists.length), usual)
    if not isinstance(blocks, Pipeline):
        return blocks
    heads, length = (lists.kv_group, query.shape[2]) if role == "keys" else (1, key.shape[2])
    if heads * -(-length // ROWS) > MOST_BLOCKS or not suits_hopper(query, key, value, *beside):
        return usual
    if num_pieces(role, lists, blocks, query) < FEWEST:
        return usual
    # the parts of a row that is cut are alone in a program, whose other consumers then have less to do
    return usual if role == "queries" and lists.rows(blocks).num_joints else blocks


@cache
def usual_shapes(dtype: torch.dtype, head_dim: int) -> Shapes:
    """The blocks of Triton's kernels for tensors of this dtype and the larger of both widths of heads.

    Measured on an H100 at 65,536 positions, with a window. Float32 is multiplied without matrix units.
    """
    if dtype == torch.float32:
        size = 32 if head_dim <= 128 else 16
        small = Blocks(size, size, 4, 1)
        return Shapes(small, small, small)
    if head_dim > 128:
        return Shapes(Blocks(64, 32, 4, 1), Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1))
    forward, queries, keys = (CANDIDATES[role, 64 if head_dim <= 64 else 128][0] for role in ROLES)
    assert isinstance(forward, Blocks) and isinstance(queries, Blocks) and isinstance(keys, Blocks)
    return Shapes(forward, queries, keys)


@cache
def tuned_on(device: torch.device) -> dict[Use, Blocks | Pipeline]:
    """What was tuned on a device, by a calibration or by us. Read once in a process."""
    if device.type != "cuda":
        return {}
    known = BUILT_IN if has_hopper_kernel(device) and _triton_version() == LEAST_TRITON else ()
    return {item.use: item.blocks for item in (*known, *constants_for(device).tuned)}


def suits_hopper(*tensors: Tensor) -> bool:
    """Whether the kernel of Hopper takes such tensors [.., .., .., width]."""
    from patterndsl.runtime.kernels.descriptors import can_be_described

    dtype, width = tensors[0].dtype, tensors[0].shape[3]
    return (
        dtype in HALVES
        and width in (64, 128)
        and has_hopper_kernel(tensors[0].device)
        and all(x.numel() and can_be_described(x, width) for x in tensors)
    )


def num_pieces(role: Role, lists: WorkLists, blocks: Blocks | Pipeline, query: Tensor) -> int:
    """Of a launch for such queries."""
    work = lists.columns(blocks) if role == "keys" else lists.rows(blocks)
    return work.num_pieces * (query.shape[0] if work.is_shared else 1)


@cache
def has_hopper_kernel(device: torch.device) -> bool:
    """Whether it is a Hopper, and Triton has the dialect of its kernel as it is written."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != HOPPER:
        return False
    return _triton_version() >= LEAST_TRITON and find_spec("triton.experimental.gluon") is not None


def _triton_version() -> tuple[int, int]:
    import triton  # whose distribution has other names, too

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)
