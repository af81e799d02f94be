"""With what is a program tried? Tensors at random or from a file, and what layers make beside them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from patterndsl.diagnostics import error
from patterndsl.runtime.learned import Path
from patterndsl.sema.parameters import Sizes


@dataclass(frozen=True, slots=True, eq=False)
class Tensors:
    """query: [B, Hq, Tq, D], key: [B, Hkv, Tk, D], value: [B, Hkv, Tk, Dv], one dtype, one device. more: what a layer
    makes beside them, see `runtime.learned`."""

    query: Tensor
    key: Tensor
    value: Tensor
    more: Mapping[Path, Tensor] = field(default_factory=dict)

    @property
    def all(self) -> tuple[Tensor, ...]:
        """Query, key and value first."""
        return (self.query, self.key, self.value, *self.more.values())

    @property
    def names(self) -> tuple[str, ...]:
        """What each is; what is made together, such as the key and value of a source, has one name."""
        return ("query", "key", "value", *(" ".join(filter(None, path[:2])) for path in self.more))

    def each(self, change: Callable[[Tensor], Tensor]) -> Tensors:
        """All of them changed."""
        more = {path: change(x) for path, x in self.more.items()}
        return Tensors(change(self.query), change(self.key), change(self.value), more)

    def trainable(self) -> Tensors:
        """Copies that gather gradients."""
        return self.each(lambda x: x.detach().clone().requires_grad_())

    def alone(self) -> Tensors:
        """Query, key and value."""
        return Tensors(self.query, self.key, self.value)


Attend: TypeAlias = Callable[[Tensors], Tensor]
"""Attention of some kind: [B, Hq, Tq, Dv]."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the tensors, but for their lengths. dtype: a name such as float32."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    device: torch.device


def random_tensors(sizes: Sizes, shape: Shape, seed: int) -> Tensors:
    """Normal deviates, the same for one seed. Raises PatternError (E503, E504)."""
    if shape.heads % shape.kv_heads:
        message = f"{shape.heads} heads do not share {shape.kv_heads} key heads evenly"
        raise error("E503", message, None, "make heads a multiple")
    of_keys = (shape.batch, shape.kv_heads, sizes.kv_len, shape.head_dim)
    shapes = ((shape.batch, shape.heads, sizes.q_len, shape.head_dim), of_keys, of_keys)
    dtype = dtype_of(shape.dtype)
    check_memory(3 * sum(map(math.prod, shapes)) * torch.finfo(dtype).bits // 8, shape.device)
    generator = torch.Generator("cpu").manual_seed(seed)
    # one generator on the host, so that every device gets the same numbers
    query, key, value = (torch.randn(item, generator=generator).to(shape.device, dtype) for item in shapes)
    return Tensors(query, key, value)


def check_memory(needed: int, device: torch.device) -> None:
    """Raises PatternError (E504) where so many bytes are more than the host has."""
    if device.type == "cpu" and needed > _physical_memory():
        message = f"tensors of these sizes need about {needed / 2**30:,.0f} GiB with their results"
        raise error("E504", message, None, "choose a smaller length, batch, head size or number of heads")


def read_tensors(path: str, *, dtype: str | None, device: torch.device) -> Tensors:
    """query, key and value of a safetensors file. Raises PatternError (E503, E601)."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
    except OSError as failed:
        raise error("E601", f"cannot read {path}: {failed.strerror or failed}", None, "check the path") from None
    except (SafetensorError, KeyError, ValueError) as failed:
        raise error("E601", f"cannot read {path}: {failed}", None, "give a safetensors file") from None
    missing = [name for name in ("query", "key", "value") if name not in found]
    if missing:
        held = f"it holds {', '.join(sorted(found))}" if found else "it is empty"
        help = "save query, key and value, each [B, H, T, D]"
        raise error("E503", f"{path} has no {', '.join(missing)}; {held}", None, help)
    parts = [found[name].to(device) for name in ("query", "key", "value")]
    if any(part.dim() != 4 for part in parts):
        shapes = ", ".join(str(list(part.shape)) for part in parts)
        raise error("E503", f"{path} holds query, key, value of shapes {shapes}", None, "make them [B, H, T, D]")
    return Tensors(parts[0], parts[1], parts[2]).each(lambda x: x.to(dtype_of(dtype)) if dtype else x)


def as_inputs(arrays: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """NumPy arrays as the inputs of a program."""
    return {name: torch.from_numpy(values).to(device) for name, values in arrays.items()}


def dtype_of(name: str) -> torch.dtype:
    """PyTorch's of that name."""
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def _physical_memory() -> float:
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return math.inf
