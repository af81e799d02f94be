"""What did a call start from that a backward pass computes again? Gradient checkpointing runs a layer twice, and what a
layer changes in a call is changed once, in the first.

The second run is told from others by PyTorch's random state, which checkpointing restores.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

import torch

from patterndsl.diagnostics import input_error

T = TypeVar("T")
KEPT = 16
"""Calls that are remembered."""


class Calls(Generic[T]):
    """What each of the last calls started from."""

    def __init__(self) -> None:
        self._started: OrderedDict[int, T] = OrderedDict()

    def begin(self, start: T) -> None:
        """Remembers a call, which draws one number of PyTorch's generator. In a graph of torch.compile nothing is
        remembered: it keeps what it needs by itself."""
        if torch.compiler.is_compiling():
            return
        self._started[_number()] = start
        if len(self._started) > KEPT:
            self._started.popitem(last=False)

    def started(self) -> T | None:
        """What this call started from in its first run, None if this is the first.

        Raises InputError (E505) where a call runs again that is not remembered.
        """
        if torch.compiler.is_compiling() or not is_backward():
            return None
        number = _number()
        if number not in self._started:
            message = f"a call is computed again, and it is none of the last {KEPT} with the random state of now"
            help = "leave preserve_rng_state of torch.utils.checkpoint at True, and call backward earlier"
            raise input_error("E505", message, help)
        return self._started[number]


def is_backward() -> bool:
    """Whether a backward pass is running, as torch.utils.checkpoint asks it."""
    return bool(torch._C._current_graph_task_id() != -1)


def _number() -> int:
    return int(torch.randint(2**62, (), device="cpu"))
