"""Who lists the blocks with the highest scores on a device, and who hashes? Kernels of our own where there are some.

In a graph of torch.compile plain PyTorch does, which the compiler looks into.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from patterndsl.learn.lsh import lsh_labels
from patterndsl.learn.topk import Choose, highest, topk_lists
from patterndsl.runtime.kernels.attention import has_kernels
from patterndsl.sema.bind import BoundSelection


def topk_on(device: torch.device) -> Callable[[Tensor, Tensor, BoundSelection, int], Tensor]:
    """`topk_lists`, or what does the same."""
    if torch.compiler.is_compiling() or not has_kernels(device):
        return topk_lists
    from patterndsl.runtime.kernels import choosing

    return choosing.topk_lists


def highest_on(device: torch.device) -> Choose:
    """`highest`, or what does the same."""
    if torch.compiler.is_compiling() or not has_kernels(device):
        return highest
    from patterndsl.runtime.kernels import choosing

    return choosing.highest


def hash_on(device: torch.device) -> Callable[..., Tensor]:
    """`lsh_labels`, or what does the same in narrower integers, and for one round without a dimension for rounds."""
    if torch.compiler.is_compiling() or not has_kernels(device):
        return lsh_labels
    from patterndsl.runtime.kernels.hashing import hashed

    return hashed
