"""How does a dense piece of a plan run? By PyTorch's own attention on strided views, with its log-sum-exp.

On the CPU that is the flash kernel, which takes a mask; on CUDA flash, which takes none. Its backward is given the
output and log-sum-exp of all passes together: then the gradients of the passes simply add up (as those of devices do in
Liu et al. 2023, Ring Attention, arXiv 2310.01889).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from patterndsl.lower.geometry import Axis, Geometry, Side
from patterndsl.lower.shapes import Band, Full, Masked, Piece, Triangle
from patterndsl.runtime.merge import Merged
from patterndsl.runtime.views import Launch, make_room

aten: Any = torch.ops.aten

Dense: TypeAlias = Full | Triangle | Band | Masked


FEW_KEYS = 256
"""Keys that are few: see `row_chunk`."""


def row_chunk(device: torch.device) -> int | None:
    """Queries that attend a few keys are taken in groups of so many on CUDA, where the backward pass would else leave
    each block of keys to one multiprocessor."""
    return 2048 if device.type == "cuda" else None


def launches(piece: Piece, chunk: int | None) -> Iterator[Launch]:
    """The calls that a piece takes, stairs apart: one, but for bands in groups, which take one for each group, and few
    keys with many queries, which take one for whole chunks of these and one for the rest."""
    geometry = piece.geometry
    if isinstance(piece.shape, Full) and chunk and _is_hot_column(geometry, chunk):
        yield from _chunks(geometry, chunk)
        return
    if not isinstance(piece.shape, Band):
        yield Launch.of(geometry)
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


def _is_hot_column(geometry: Geometry, chunk: int) -> bool:
    is_plain = not geometry.groups and len(geometry.q.axes) == 1
    return is_plain and geometry.k.length <= FEW_KEYS and geometry.q.length >= 2 * chunk


def _chunks(geometry: Geometry, chunk: int) -> Iterator[Launch]:
    (axis,) = geometry.q.axes
    whole, rest = divmod(axis.size, chunk)
    queries = Side(geometry.q.start, (Axis(chunk, axis.stride),))
    yield Launch((Axis(whole, chunk * axis.stride),), (Axis(whole, 0),), queries, geometry.k)
    if rest:
        start = geometry.q.start + whole * chunk * axis.stride
        yield Launch((), (), Side(start, (Axis(rest, axis.stride),)), geometry.k)


STAIR, LONGEST_STAIRS, FEWEST_ROWS = 32, 512, 1024
"""Queries of a stair; the longest groups that are cut into stairs, and the fewest queries of all groups."""


def _has_stairs(geometry: Geometry) -> bool:
    return geometry.q.length <= LONGEST_STAIRS and geometry.num_rows >= FEWEST_ROWS


def _stairs(geometry: Geometry) -> Iterator[Launch]:
    """A causal piece of short groups: some queries and the keys up to theirs at a time. The kernel's own causal form
    takes half as long again: it cuts groups so short into the same stairs, but masks the whole of each."""
    for first in range(0, geometry.q.length, STAIR):
        stop = min(first + STAIR, geometry.q.length)
        yield Launch.of(geometry.narrowed((first, stop), (0, stop)))


LARGE_TILE = 64
"""Queries of a tile of a band from which on half as many go forward faster, by 4 to 19 %; backward they are slower."""


def _halved(band: Band) -> Band | None:
    """The band in tiles of half as many queries, if both halves of a tile have one mask: fewer pairs are computed."""
    tile, width = band.mask.shape
    half = tile // 2
    if tile % 2 or width <= half:
        return None
    corner = band.mask[:half, : width - half]
    if (
        (band.mask[half:, half:] != corner).any()
        or band.mask[:half, width - half :].any()
        or band.mask[half:, :half].any()
    ):
        return None
    return Band(half, corner)


GRADIENT_BYTES = 1 << 23
"""About as many bytes of gradients does one call on the CPU give."""


def _is_oblong(geometry: Geometry) -> bool:
    short, long = sorted((geometry.q.length, geometry.k.length))
    return not geometry.groups and len(geometry.q.axes) == len(geometry.k.axes) == 1 and long >= 8 * short


def _pieces(geometry: Geometry, most: int) -> Iterator[Launch]:
    """A few queries of many keys, or few keys of many queries, in pieces of about `most` positions along the latter."""
    q_len, kv_len = geometry.q.length, geometry.k.length
    length, step = max(q_len, kv_len), max(8 * min(q_len, kv_len), most // 2)  # the short side is added once a piece
    for first in range(0, length, step):
        part, stop = (first, min(first + step, length)), min(q_len, kv_len)
        yield Launch.of(geometry.narrowed((0, stop), part) if q_len < kv_len else geometry.narrowed(part, (0, stop)))


class DensePass:
    """A dense piece made ready: its launches, and its mask as a bias on a device."""

    def __init__(self, piece: Piece, device: torch.device) -> None:
        self.device = device
        self.launches = tuple(launches(piece, row_chunk(device)))
        self._whole = self.launches
        if isinstance(piece.shape, Triangle) and device.type == "cpu" and _has_stairs(piece.geometry):
            self.launches = tuple(_stairs(piece.geometry))
        if isinstance(piece.shape, Band) and device.type == "cpu" and piece.shape.tile >= LARGE_TILE:
            half = _halved(piece.shape)
            self.launches = self._whole if half is None else tuple(launches(replace(piece, shape=half), None))
        self._parts: dict[int, list[Launch]] = {}
        self._stairs: dict[tuple[int, int, torch.dtype], Tensor] = {}
        self._oblong = piece.geometry if isinstance(piece.shape, Full) and _is_oblong(piece.geometry) else None
        self.is_causal = isinstance(piece.shape, Triangle)
        self._kept: Tensor | None = None
        self._empty: Tensor | None = None
        self._biases: dict[torch.dtype, Tensor] = {}
        if isinstance(piece.shape, Band | Masked) and not piece.shape.mask.all():
            self._kept = torch.tensor(piece.shape.mask, device=device)
            rows = piece.shape.mask.any(axis=1)
            self._empty = None if rows.all() else torch.tensor(~rows, device=device)

    def gradient_launches(self, row_bytes: int) -> Sequence[Launch]:
        """See `runtime.planned.Kernel`. On the CPU in parts whose gradients stay in its caches until they are added:
        those of overlapping keys would take many times the memory of the keys."""
        if self.device.type != "cpu":
            return self._whole
        found = self._parts.get(row_bytes)
        if found is None:
            make_room(self._parts)
            most = GRADIENT_BYTES // max(1, row_bytes)
            whole = self._whole if self._oblong is None else tuple(_pieces(self._oblong, most))
            found = self._parts[row_bytes] = [part for launch in whole for part in launch.split(most)]
        return found

    @property
    def is_masked(self) -> bool:
        """Whether pairs are computed that are not kept, so that what their keys hold must be finite."""
        return self.is_causal or self._kept is not None

    def forward(
        self, launch: Launch, query: Tensor, key: Tensor, value: Tensor, scale: float, train: bool
    ) -> tuple[Tensor, Tensor, object]:
        """See `runtime.planned.Kernel`. A row whose mask keeps nothing yields 0 and -inf."""
        q = launch.queries.grouped(query)
        k, v = launch.keys.grouped(key), launch.keys.grouped(value)
        if query.device.type != "cpu":
            return *self._forward_cuda(q, k, v, scale), None
        bias = self._stair_bias(q, k) if self.is_causal else self._bias(q.dtype)
        if bias is not None:  # of half a tile it is the corner
            bias = bias[: q.shape[2], : k.shape[2]]
        is_causal = self.is_causal and bias is None
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, attn_mask=bias, scale=scale
        )
        # the kernel says 0 of a row without keys
        return out, lse if self._empty is None else lse.masked_fill(self._empty[: q.shape[2]], -torch.inf), None

    def backward(
        self, launch: Launch, query: Tensor, key: Tensor, value: Tensor, merged: Merged, scale: float, _: object
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `runtime.planned.Kernel`."""
        rows = (query, merged.out, merged.grad_out, merged.lse)
        q, out, grad_out, lse = map(launch.queries.grouped, rows)
        k, v = launch.keys.grouped(key), launch.keys.grouped(value)
        if query.device.type != "cpu":
            return self._backward_cuda(grad_out, q, k, v, out, lse, scale)
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, out, lse, 0.0, self.is_causal, attn_mask=self._bias(q.dtype), scale=scale
        )
        return cast("tuple[Tensor, Tensor, Tensor]", found)

    def _forward_cuda(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        if _is_cudnn_better(q):
            found = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, self.is_causal, scale=scale)
            return found[0], found[1].reshape(q.shape[:3])
        found = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, self.is_causal, scale=scale)
        return found[0], found[1]

    def _backward_cuda(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        seed = torch.zeros((), dtype=torch.int64, device=q.device)  # of dropout, which there is none of
        lengths = (q.shape[2], k.shape[2])
        if _is_cudnn_better(q):
            saved = (grad_out, q, k, v, out, lse.contiguous().unsqueeze(-1))
            found = aten._scaled_dot_product_cudnn_attention_backward(
                *saved, seed, seed, None, None, None, *lengths, 0.0, self.is_causal, scale=scale
            )
        else:
            saved = (grad_out, q, k, v, out, lse.contiguous())
            found = aten._scaled_dot_product_flash_attention_backward(
                *saved, None, None, *lengths, 0.0, self.is_causal, seed, seed, scale=scale
            )
        return cast("tuple[Tensor, Tensor, Tensor]", found)

    def _stair_bias(self, q: Tensor, k: Tensor) -> Tensor | None:
        """What is added to the scores of a stair, whose last query has the last key; None for the first one."""
        q_len, kv_len = q.shape[2], k.shape[2]
        if q_len == kv_len:
            return None
        if (q_len, kv_len, q.dtype) not in self._stairs:
            full = torch.full((q_len, kv_len), -torch.inf, dtype=q.dtype, device=q.device)
            self._stairs[q_len, kv_len, q.dtype] = full.triu_(kv_len - q_len + 1)
        return self._stairs[q_len, kv_len, q.dtype]

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        """The mask as what is added to scores; None where everything is kept."""
        if self._kept is None:
            return None
        if dtype not in self._biases:
            zeros = torch.zeros(self._kept.shape, dtype=dtype, device=self._kept.device)
            self._biases[dtype] = zeros.masked_fill_(~self._kept, -torch.inf)
        return self._biases[dtype]


MIN_CUDNN_ROWS = 128
"""With fewer queries flash is faster: it splits the keys among multiprocessors."""


def _is_cudnn_better(q: Tensor) -> bool:
    return q.shape[2] >= MIN_CUDNN_ROWS and q.shape[3] <= 128 and q.shape[3] % 8 == 0
