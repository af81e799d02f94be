"""How does a dense piece of a plan run? By PyTorch's own attention on strided views, with its log-sum-exp.

On the CPU that is the flash kernel, which takes a mask; on CUDA flash, which takes none. Its backward is given the
output and log-sum-exp of all passes together: then the gradients of the passes simply add up (as those of devices do in
Liu et al. 2023, Ring Attention, arXiv 2310.01889).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from patterndsl.lower.geometry import Axis, Side
from patterndsl.lower.shapes import Band, Full, Masked, Piece, Triangle
from patterndsl.runtime.views import grouped, places, split

aten: Any = torch.ops.aten

Dense: TypeAlias = Full | Triangle | Band | Masked


@dataclass(frozen=True, slots=True)
class Launch:
    """What one call of the kernel sees: groups of queries, and of keys, which overlap where a band is cut in tiles."""

    q_groups: tuple[Axis, ...]
    k_groups: tuple[Axis, ...]
    q: Side
    k: Side
    keys_overlap: bool


def launches(piece: Piece) -> Iterator[Launch]:
    """The calls that a piece takes: one, but for bands in groups, which take one for each group."""
    geometry = piece.geometry
    if not isinstance(piece.shape, Band):
        yield Launch(geometry.groups, geometry.groups, geometry.q, geometry.k, False)
        return
    tile, width = piece.shape.mask.shape
    ((q_axis,), (k_axis,)) = geometry.q.axes, geometry.k.axes
    num_tiles = q_axis.size // tile
    for moved in geometry.group_starts().tolist():
        yield Launch(
            (Axis(num_tiles, tile * q_axis.stride),),
            (Axis(num_tiles, tile * k_axis.stride),),
            Side(geometry.q.start + moved, (Axis(tile, q_axis.stride),)),
            Side(geometry.k.start + moved, (Axis(width, k_axis.stride),)),
            True,
        )


class DensePass:
    """A dense piece made ready: its launches, and its mask as a bias on a device."""

    def __init__(self, piece: Piece, device: torch.device) -> None:
        self.launches = tuple(launches(piece))
        self.is_causal = isinstance(piece.shape, Triangle)
        self._kept: Tensor | None = None
        self._empty: Tensor | None = None
        self._biases: dict[torch.dtype, Tensor] = {}
        if isinstance(piece.shape, Band | Masked) and not piece.shape.mask.all():
            self._kept = torch.tensor(piece.shape.mask, device=device)
            rows = self._kept.any(dim=1)
            self._empty = None if bool(rows.all()) else ~rows

    @property
    def is_masked(self) -> bool:
        """Whether pairs are computed that are not kept, so that what their keys hold must be finite."""
        return self.is_causal or self._kept is not None

    def forward(self, launch: Launch, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Output [B * H, groups, length, D] in the inputs' dtype and lse [B * H, groups, length], float32 or float64.

        query: [B, H, Tq, D], key, value: [B, H, Tk, D]. A row whose mask keeps nothing yields 0 and -inf.
        """
        q = grouped(query, launch.q_groups, launch.q)
        k, v = (grouped(x, launch.k_groups, launch.k) for x in (key, value))
        if query.device.type != "cpu":
            found = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, self.is_causal, scale=scale)
            return found[0], found[1]
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, self.is_causal, attn_mask=self._bias(q.dtype), scale=scale
        )
        # the kernel says 0 of a row without keys
        return out, lse if self._empty is None else lse.masked_fill(self._empty, -torch.inf)

    def backward(
        self,
        launch: Launch,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the launch's queries and keys, [B * H, groups, length, D], from the merged out, lse, grad_out.

        lse: +inf instead of -inf where a row is empty, so that its weights are 0.
        """
        q, merged, d_out = (grouped(x, launch.q_groups, launch.q) for x in (query, out, grad_out))
        k, v = (grouped(x, launch.k_groups, launch.k) for x in (key, value))
        rows = grouped(lse, launch.q_groups, launch.q)
        if query.device.type == "cpu":
            found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                d_out, q, k, v, merged, rows, 0.0, self.is_causal, attn_mask=self._bias(q.dtype), scale=scale
            )
            return cast("tuple[Tensor, Tensor, Tensor]", found)
        seed = torch.zeros((), dtype=torch.int64, device=q.device)
        lengths = (q.shape[2], k.shape[2])
        found = aten._scaled_dot_product_flash_attention_backward(
            d_out,
            q,
            k,
            v,
            merged,
            rows.contiguous(),
            None,
            None,
            *lengths,
            0.0,
            self.is_causal,
            seed,
            seed,
            scale=scale,
        )
        return cast("tuple[Tensor, Tensor, Tensor]", found)

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        """The mask as what is added to scores; None where everything is kept."""
        if self._kept is None:
            return None
        if dtype not in self._biases:
            zeros = torch.zeros(self._kept.shape, dtype=dtype, device=self._kept.device)
            self._biases[dtype] = zeros.masked_fill_(~self._kept, -torch.inf)
        return self._biases[dtype]


def add_to_queries(into: Tensor, launch: Launch, part: Tensor) -> None:
    """Adds gradients of the launch's queries to those of all, [B, H, Tq, D]."""
    seen = places(into, (*launch.q_groups, *launch.q.axes), launch.q.start)
    seen.add_(split(part, into, launch.q_groups, launch.q))


def add_to_keys(into: Tensor, launch: Launch, part: Tensor) -> None:
    """Adds gradients of the launch's keys to those of all, [B, H, Tk, D]; keys of a band are in several tiles."""
    if not launch.keys_overlap:
        seen = places(into, (*launch.k_groups, *launch.k.axes), launch.k.start)
        seen.add_(split(part, into, launch.k_groups, launch.k))
        return
    ((tiles,), (axis,)) = launch.k_groups, launch.k.axes
    tile = tiles.stride // axis.stride
    for first in range(0, axis.size, tile):  # strips of a tile's width do not overlap
        strip = Side(launch.k.start + first * axis.stride, (Axis(min(tile, axis.size - first), axis.stride),))
        seen = places(into, (tiles, *strip.axes), strip.start)
        seen.add_(split(part[:, :, first : first + strip.length], into, launch.k_groups, strip))
