"""What does a CUDA graph ask of calls that it holds? That nothing waits for the device, and that what it reads stays.

A graph reads tensors where they lay when it was captured. What a call makes is the graph's own; what is remembered from
call to call, and forgotten where it is too much, must not go as long as a graph may read it. As nobody says when a
graph goes, it stays as long as the process.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T", bound=Callable[..., Any])

_held = dict[int, object]()


def is_capturing() -> bool:
    """Whether the device's work of now is captured in a graph and not done."""
    is_used: Callable[[], bool] = torch.cuda.is_initialized  # which PyTorch leaves untyped
    return is_used() and torch.cuda.is_current_stream_capturing()


def hold(read: object) -> None:
    """Keeps what a graph reads that is captured now, if one is."""
    if is_capturing():
        _held[id(read)] = read


def remembered(most: int) -> Callable[[T], T]:
    """`lru_cache` of tensors, which keeps those that graphs read. Gradients may need them, too."""

    def of(make: T) -> T:
        @lru_cache(maxsize=most)
        def found(*arguments: Any) -> Any:
            with torch.inference_mode(False):
                return make(*arguments)

        @wraps(make)
        def remember(*arguments: Any) -> Any:
            if torch.compiler.is_compiling():
                return make(*arguments)
            result = found(*arguments)
            hold(result)
            return result

        return cast("T", remember)

    return of


def on_device(x: Any, device: torch.device) -> Tensor:
    """A number as a tensor, or the tensor that it is. A copy from the host would wait for the device; this is filled in
    there."""
    return x if isinstance(x, Tensor) else torch.full((), x, device=device)
