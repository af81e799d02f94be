"""Which tensors does the copying engine of Hopper and later take? Those are described to it, in blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from patterndsl.runtime.views import make_room


class Seen(NamedTuple):
    """What loads take, see `rows`: descriptors of blocks where all tensors can be described, or the tensors."""

    tensors: Sequence[Any]
    described: bool


_KNOWN: dict[object, list[Any] | None] = {}
"""Descriptors of tensors of some forms, without these; None where some cannot be described. Making them takes as long
as the launch itself."""


def as_seen(
    *tensors: tuple[Tensor, int, int], ordered: bool = False, make: Callable[..., Any] = TensorDescriptor
) -> Seen:
    """Tensors with the rows and channels of their blocks. ordered: whether rows of a block lie apart. make: of a
    tensor, its sizes and strides, and a block."""
    if ordered:
        return Seen([x for x, _, _ in tensors], False)
    form = make, *((x.shape, x.stride(), x.dtype, x.data_ptr() % 16, block, width) for x, block, width in tensors)
    asked = tensors[0][0].device, *form
    if asked not in _KNOWN:
        make_room(_KNOWN)
        fit = all(can_be_described(x, width) for x, _, width in tensors)
        _KNOWN[asked] = [_described(x, block, make) for x, block, _ in tensors] if fit else None
    known = _KNOWN[asked]
    if known is None:
        return Seen([x for x, _, _ in tensors], False)
    return Seen([_of(like, x) for like, (x, _, _) in zip(known, tensors, strict=True)], True)


def _of(like: Any, x: Tensor) -> Any:
    """The descriptor of another tensor of the same form."""
    found = object.__new__(type(like))  # not checked again, which takes long
    found.__dict__.update(like.__dict__, base=x)
    return found


def can_be_described(x: Tensor, width: int) -> bool:
    """Whether the copying engine of Hopper and later takes it: it wants starts and steps of whole 16 bytes."""
    return x.data_ptr() % 16 == 0 and _has_engine(x.device) and _takes(x.shape, x.stride(), x.element_size(), width)


@cache
def _has_engine(device: torch.device) -> bool:
    """The interpreter has one, too."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9


@lru_cache(maxsize=4096)
def _takes(shape: tuple[int, ...], strides: tuple[int, ...], size: int, width: int) -> bool:
    steps = (step * size for length, step in zip(shape[:3], strides[:3], strict=True) if length > 1)
    return shape[3] == width and strides[3] == 1 and all(step > 0 and step % 16 == 0 for step in steps)


def _described(x: Tensor, block: int, make: Callable[..., Any]) -> Any:
    width = x.shape[3]
    # the step of a dimension of one is never taken, and may be anything: one that is allowed
    strides = [step if length > 1 else width for length, step in zip(x.shape, x.stride(), strict=True)]
    found = make(x, list(x.shape), [*strides[:3], 1], [1, 1, block, width])
    found.base = None  # what is remembered keeps no tensor
    found.form = f"{x.dtype} {found.block_shape} {getattr(found, 'layout', None)}"  # what `launcher` asks
    return found
