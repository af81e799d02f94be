"""How are labels and members of centroids found on a GPU, and how is the commitment? Their plain twin is `kmeans`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from patterndsl.device.launcher import Launcher
from patterndsl.learn.nearest_kernels import (
    commitment_gradient_kernel,
    commitment_kernel,
    members_kernel,
    nearest_kernel,
    split_kernel,
)

MOST_CHANNELS = 128
SHORTEST_CHUNK, LONGEST_CHUNK = 16, 64
"""Tokens of a chunk. Longer ones are fewer, and each member brings more tokens that are scored again."""
MOST_PLACES = 1 << 14
"""Chunks, and tokens in chunks with members, that registers hold."""
TILE = 64
"""Centroids that are scored at once."""
BLOCK = 64
"""Keys of a program of the commitment."""

_split, _nearest, _find_members = Launcher(split_kernel), Launcher(nearest_kernel), Launcher(members_kernel)
_commit, _commit_gradient = Launcher(commitment_kernel), Launcher(commitment_gradient_kernel)


def takes(key: Tensor, centroids: Tensor, tops: Sequence[int] = ()) -> bool:
    """Whether there are kernels for these: see `assigned`. Not for few clusters with very many members each."""
    return (
        key.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and centroids.dtype == torch.float32
        and key.numel() > 0
        and key.shape[3] <= MOST_CHANNELS
        and (not tops or _chunk_of(key.shape[2], tops) is not None)
    )


def _chunk_of(length: int, tops: Sequence[int]) -> int | None:
    """Tokens of a chunk, a power of two: as few as leave few enough of them; None where too many are scored again."""
    chunk = SHORTEST_CHUNK
    while chunk < LONGEST_CHUNK and -(-length // chunk) > MOST_PLACES // 2:
        chunk *= 2
    num_chunks = -(-length // chunk)
    fit = num_chunks <= MOST_PLACES and all(min(top, num_chunks) * chunk <= MOST_PLACES for top in tops)
    return chunk if fit else None


def assigned(key: Tensor, centroids: Tensor, tops: Sequence[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:
    """Labels int64 [B, H, T] of key [B, H, T, D] by float32 centroids [H, clusters, D], and for each of some numbers
    the members int64 [B, H, clusters, min(top, T)]: see `kmeans.Assigned`.

    Scores have the precision of float32, whatever the keys are, and the earlier of equal ones counts as the higher.
    The same bits each time. Without gradient. Work: O(T D clusters), of which O(top chunk D clusters) is done twice;
    memory: the highest score of each chunk, T / chunk for a centroid. Launches: two, and one for each of `tops`.
    """
    key, centroids = _with_unit_stride(key.detach()), centroids.contiguous()
    batch, heads, length, dim = key.shape
    clusters, padded = centroids.shape[1], _padded(dim)
    is_brief = key.dtype == torch.bfloat16
    parts = torch.empty(
        (3 if is_brief else 2, *centroids.shape), dtype=key.dtype if is_brief else torch.float32, device=key.device
    )
    number = centroids.numel()
    _split((-(-number // 1024), 1, 1), (centroids, parts), (number,), {"is_brief": is_brief, "block": 1024})
    chunk = _chunk_of(length, tops) or SHORTEST_CHUNK
    num_chunks = -(-length // chunk)
    labels = torch.empty((batch, heads, length), dtype=torch.int64, device=key.device)
    of_chunks = (batch, heads, clusters, num_chunks if tops else 0)
    maxima = torch.empty(of_chunks, dtype=torch.float32, device=key.device)
    is_small = key.element_size() == 2 and padded <= 64
    block = 128 if is_small else 64  # a multiprocessor then holds two programs
    _nearest(
        (-(-length // block), heads, batch),
        (key, parts, labels, maxima),
        (*key.stride()[:3], length, clusters, num_chunks),
        {
            "dim": dim, "padded": padded, "block": block, "tile": TILE, "chunk": chunk, "is_brief": is_brief,
            "is_whole": key.dtype == torch.float32, "even": clusters % TILE == 0, "wants_maxima": bool(tops),
        },
        {"num_warps": 4, "num_stages": 3 if is_small and is_brief else 2},
    )  # fmt: skip
    found = {top: _members(key, centroids, maxima, min(top, length), chunk) for top in tops}
    return labels, found


def _members(key: Tensor, centroids: Tensor, maxima: Tensor, top: int, chunk: int) -> Tensor:
    batch, heads, length, dim = key.shape
    clusters, num_chunks = maxima.shape[2:]
    num_chosen = min(top, num_chunks)
    chosen = torch.empty((batch, heads, clusters, num_chosen), dtype=torch.int32, device=key.device)
    scores = torch.empty((batch, heads, clusters, num_chosen * chunk), dtype=torch.float32, device=key.device)
    members = torch.empty((batch, heads, clusters, top), dtype=torch.int64, device=key.device)
    chunks_padded, scores_padded = _padded(num_chunks), _padded(num_chosen * chunk)
    _find_members(
        (clusters, heads, batch),
        (key, centroids, maxima, chosen, scores, members),
        (*key.stride()[:3], length, clusters, num_chunks, num_chosen, top),
        {
            "dim": dim, "padded": _padded(dim), "block": 128, "chunk": chunk, "chunks_padded": chunks_padded,
            "scores_padded": scores_padded,
        },
        {"num_warps": 8 if max(chunks_padded, scores_padded) > 1024 else 4},
    )  # fmt: skip
    return members


def commitment(key: Tensor, centroids: Tensor, labels: Tensor) -> Tensor:
    """The mean squared distance of unit keys [B, H, T, D] to the centroids of these labels, a scalar; differentiable
    once, in the keys. Launches: two, and one in the backward pass."""
    return _commitment(key, centroids, labels)


class _Commitment(Function):
    """Of the distances nothing is kept: they are made again from keys and centroids."""

    @staticmethod
    def forward(ctx: Any, key: Tensor, centroids: Tensor, labels: Tensor) -> Tensor:
        asked = _with_unit_stride(key), centroids.contiguous(), labels.contiguous()
        batch, heads, length, dim = key.shape
        grid = -(-length // BLOCK), heads, batch
        sums = torch.empty(grid[0] * heads * batch, dtype=torch.float32, device=key.device)
        _commit(
            grid,
            (*asked, sums),
            (*asked[0].stride()[:3], length, centroids.shape[1]),
            {"dim": dim, "padded": _padded(dim), "block": BLOCK},
            scale=1 / key.numel(),
        )
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(asked[0], asked[1].clone(), asked[2])  # a step moves the centroids
        return sums.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        key, centroids, labels = ctx.saved_tensors
        batch, heads, length, dim = key.shape
        grad_key = torch.empty_like(key)
        _commit_gradient(
            (-(-length // BLOCK), heads, batch),
            (key, centroids, labels, grad.contiguous(), grad_key),
            (*key.stride()[:3], *grad_key.stride()[:3], length, centroids.shape[1]),
            {"dim": dim, "padded": _padded(dim), "block": BLOCK},
            scale=1 / key.numel(),
        )
        return grad_key, None, None


def _with_unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _padded(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


# torch declares `apply` without types
_commitment: Callable[..., Tensor] = _Commitment.apply
