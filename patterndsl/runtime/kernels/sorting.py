"""In which order do keys stand by their labels on a GPU? By counting, in three launches; the plain twin is `argsort`.

PyTorch sorts by any numbers in a dozen launches, for which the host takes longer than a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from patterndsl.device.launcher import Launcher
from patterndsl.runtime.kernels.sort_kernels import begin_kernel, count_kernel, place_kernel
from patterndsl.runtime.views import with_unit_stride

BLOCK = 1024
CHUNK = 4096
_count, _begin, _place = Launcher(count_kernel), Launcher(begin_kernel), Launcher(place_kernel)


class Counted(NamedTuple):
    """order: int32 [B, H, T], positions in the stable order by labels; begins: int32 [B, H, ..], how many positions
    have a lower label than 0, 1, ..."""

    order: Tensor
    begins: Tensor


def order_by_label(label: Tensor, labels: int) -> Counted:
    """The order by label [B, H, T], integers in 0..labels, of which there is a beginning for each.

    Work and memory: O(T + labels T / `BLOCK`) for each head.
    """
    label = with_unit_stride(label)
    batch, heads, length = label.shape
    number, padded = -(-length // BLOCK), max(16, 1 << (labels - 1).bit_length())
    counts, lower, order = (
        torch.empty(size, dtype=torch.int32, device=label.device)
        for size in ((batch, heads, padded, number), (batch, heads, padded, number), (batch, heads, length))
    )
    grid, steps, constants = (number, heads, batch), (*label.stride()[:2], length), {"labels": padded, "block": BLOCK}
    _count(grid, (label, counts, lower), steps, constants)
    _begin((batch * heads, 1, 1), (counts,), (padded * number,), {"chunk": CHUNK})
    _place(grid, (label, counts, lower, order), steps, constants)
    return Counted(order, counts[..., 0])
