"""Which program of a launch comes last? Counters on a device, which are zero whenever no launch is counting in them.

The last program to count puts zero back, so that a counter can be used again without being cleared, also by each replay
of a CUDA graph. Launches that may run at the same time have counters of their own: those of a stream follow each other,
and what is captured into a graph, which may be replayed beside anything, gets counters that nobody else ever has.
"""

from __future__ import annotations

from threading import Lock

import torch
from torch import Tensor

ALIGNED = 32
"""Counters of two launches are so far apart that they share no line of a cache."""
SPARE = 1 << 18
"""Counters that are cleared once, of a device, for all that is captured."""

_lock = Lock()
_of_streams = dict[tuple[torch.device, int], Tensor]()
_spare = dict[torch.device, tuple[Tensor, int]]()
"""And how many of them are taken."""


def tickets(device: torch.device, count: int) -> Tensor:
    """int32 [count], zero when what was launched before on this stream has run.

    Where a graph is captured and no spare counters are left, or nothing ran on the device before that, clearing them
    is a part of the graph.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    is_captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    with _lock:
        if is_captured:
            return _captured(device, count)
        if device.type == "cuda" and device not in _spare:
            _spare[device] = torch.zeros(SPARE, dtype=torch.int32, device=device), 0
            torch.cuda.current_stream(device).synchronize()  # graphs run on any stream
        found = _of_streams.get((device, stream))
        if found is None or found.numel() < count:
            size = max(ALIGNED, 1 << (count - 1).bit_length())
            _of_streams[device, stream] = found = torch.zeros(size, dtype=torch.int32, device=device)
        return found[:count]


def _captured(device: torch.device, count: int) -> Tensor:
    spare, taken = _spare.get(device, (None, 0))
    if spare is None or taken + count > spare.numel():
        return torch.zeros(count, dtype=torch.int32, device=device)
    _spare[device] = spare, taken - (-count // ALIGNED) * ALIGNED
    return spare[taken : taken + count]
