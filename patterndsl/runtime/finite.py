"""Is every number finite? What is masked weighs 0, and 0 x NaN is NaN: so who masks looks at the numbers first."""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor

from patterndsl.runtime.derivatives import no_vmap


def is_finite(*tensors: Tensor) -> bool:
    """Whether every number of floating point tensors on one device is.

    A sum is finite only where every summand is, and takes a pass over memory; where finite ones overflow, as they soon
    do in float16, each number is asked. Raises InputError (E505) under torch.vmap, where a number cannot be looked at.
    """
    total = torch.stack([x.sum() for x in tensors]).sum()
    if _is_mapped(total):
        raise no_vmap()
    return isfinite(total.item()) or all(bool(x.isfinite().all()) for x in tensors)


def _is_mapped(x: Tensor) -> bool:
    """Whether torch.vmap is at work, around torch.func.grad as well."""
    functorch = torch._C._functorch
    while functorch.is_gradtrackingtensor(x):
        x = functorch.get_unwrapped(x)
    return functorch.is_batchedtensor(x)
