"""Which pieces of work does each program take that stays on its processor? Who is done first takes the next one.

That is known before: what a piece costs follows from its entries. As pieces come longest first, all programs are done
at about the same time, and what runs at the same time lies next to each other in the lists.
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

CLASSES = 8
"""Of costs, from one power of two to the next: pieces of a class stay in order, as neighbours read the same keys."""


def classes_of(costs: Tensor) -> Tensor:
    """Of pieces that cost so much, above 0; equal for about equal ones."""
    return (CLASSES * costs.log2()).ceil()


def deal(costs: Tensor, programs: int) -> tuple[Tensor, Tensor]:
    """int64 [programs + 1] and [pieces]: where the pieces of each program begin in the second and the last ones stop,
    and all pieces, those of a program in the order in which it takes them. A program has one at least, where there are
    so many.

    costs: float [pieces], above 0, whose classes descend. Work: a sort of each class.
    """
    busy = torch.zeros(programs, dtype=costs.dtype)  # until when each program is
    begins = classes_of(costs).diff().nonzero().flatten() + 1
    taker = torch.cat([_next_free(busy, mine) for mine in costs.tensor_split(begins)])
    stops = torch.bincount(taker, minlength=programs).cumsum(0)
    return torch.cat([stops.new_zeros(1), stops]), taker.argsort(stable=True)


def _next_free(busy: Tensor, costs: Tensor) -> Tensor:
    """Who takes each of some pieces of about one cost, if everyone takes the next one as soon as it is done."""
    cost, number = float(costs.mean()), len(costs)
    most = min(number, 1 + ceil(number / len(busy) + float(busy.max() - busy.min()) / cost))
    begins = busy[:, None] + cost * torch.arange(most)
    taker = begins.flatten().argsort(stable=True)[:number] // most
    busy.index_add_(0, taker, costs)
    return taker
