"""Which blocks of keys go to which block of queries? A soft permutation of blocks, learned with the layer.

Tay et al. 2020, Sparse Sinkhorn Attention, arXiv 2002.11296, section 3: a sort net scores blocks, Sinkhorn balancing
makes a doubly stochastic matrix of the scores, and the matrix mixes blocks. This module attends nothing.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from patterndsl.diagnostics import input_error


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """Soft permutations [..., n, n], in float32 at least, of logits [..., n, n]. Differentiable.

    Each iteration normalises rows and then columns, in log space (section 3, Sinkhorn normalisation, in the order of
    the released code): columns sum to 1, rows tend to it, slowly where logits are far apart. Work: O(iterations n^2).
    """
    with torch.autocast(logits.device.type, enabled=False):
        balanced = logits.to(_wide(logits))
        for _ in range(iterations):
            balanced = balanced - balanced.logsumexp(-1, keepdim=True)
            balanced = balanced - balanced.logsumexp(-2, keepdim=True)
        return balanced.exp()


def causal_sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """[..., n, n], in float32 at least, of logits [..., n, n]: row u has weights for blocks v < u only, and depends on
    rows up to u only, bit for bit. Row 0 is zeros. Differentiable; the gradient of a logit that is not read is 0.

    Causal balancing (section 3, Causal Sinkhorn): what is not earlier is masked before each normalisation, and a
    column's normaliser for row u sums rows up to u. So block u - 1, which no row before u could have, always has
    weight 1 in row u, and rows sum to 1 or more. The one strictly causal matrix whose rows and columns all sum to 1
    gives each block the one before it: other weights fall to 0 like 1 / iterations. Work: O(iterations n^2).
    """
    with torch.autocast(logits.device.type, enabled=False):
        # without row 0 and the last column, which have no weights, no row is masked as a whole
        balanced = logits[..., 1:, :-1].to(_wide(logits))
        later = torch.ones(balanced.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        lowest = torch.finfo(balanced.dtype).min / 4  # as good as -inf in a sum, whose gradient would be NaN
        balanced = balanced.masked_fill(later, -torch.inf)
        for _ in range(iterations):
            balanced = balanced - balanced.logsumexp(-1, keepdim=True)
            balanced = balanced - balanced.masked_fill(later, lowest).logcumsumexp(-2)
        num_blocks = logits.shape[-1]  # of none, padding would make one
        return pad(balanced.exp(), (0, 1, 1, 0))[..., :num_blocks, :num_blocks]


class SortNet(nn.Module):
    """The sorting network (section 3): soft permutations of the blocks of a sequence, head by head.

    heads, dim: of the tokens. max_blocks: the most that a sequence may have; a shorter one uses the first columns.
    hidden: width of a layer with ReLU in between, none for a linear map; no layer has a bias. seed: of the start,
    normal with variance 1 / width of what comes in.
    """

    def __init__(self, heads: int, dim: int, max_blocks: int, *, hidden: int | None = None, seed: int = 0) -> None:
        super().__init__()
        self.max_blocks = max_blocks
        generator = torch.Generator().manual_seed(seed)
        widths = (dim, max_blocks) if hidden is None else (dim, hidden, max_blocks)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(heads, wide, out, generator=generator) * wide**-0.5)
            for wide, out in pairwise(widths)
        )

    def forward(self, x: Tensor, block: int, *, tau: float, iterations: int, causal: bool, noise: bool) -> Tensor:
        """[B, H, n, n] in float32 at least, n = ceil(T / block), of x [B, H, T, D]; the last block is filled up with
        zeros. Differentiable in x and in the weights.

        Logits are divided by tau, with Gumbel noise before where `noise` asks for it (section 3), from the global
        generator. Causal: row u depends on tokens up to the first of block u. Work: O(T D + n D max_blocks +
        iterations n^2). Raises InputError (E505) for more than max_blocks blocks.
        """
        num_blocks = -(-x.shape[2] // block)
        if num_blocks > self.max_blocks:
            message = f"{num_blocks} blocks of {block} tokens for a sort net of {self.max_blocks} blocks"
            least = -(-x.shape[2] // self.max_blocks)
            cure = f"make it with max_blocks = {num_blocks} or more, or take blocks of {least} tokens or more"
            raise input_error("E505", message, cure)
        with torch.autocast(x.device.type, enabled=False):
            logits = self.logits(x, block, causal=causal)
            logits = (logits + _gumbel(logits) if noise else logits) / tau
            return causal_sinkhorn(logits, iterations) if causal else sinkhorn(logits, iterations)

    def logits(self, x: Tensor, block: int, *, causal: bool) -> Tensor:
        """[B, H, n, n] of x [B, H, T, D], without noise and before tau: how much block u wants block v. It is told by
        the sum of the tokens of block u; causal: of all tokens up to its first."""
        num_blocks = -(-x.shape[2] // block)
        weights: list[Tensor] = list(self.weights)
        *inner, outer = weights
        dtype = torch.promote_types(_wide(x), outer.dtype)
        found = _prefixes(x, block, dtype) if causal else _blocks(x, block, num_blocks).sum(3, dtype=dtype)
        for weight in inner:
            found = (found @ weight.to(dtype)).relu()
        return found @ outer[..., :num_blocks].to(dtype)


def mixed(x: Tensor, weights: Tensor, block: int) -> Tensor:
    """psi(x), [B, H, m block, D] in x's dtype, of x [B, H, T, D] and weights [B, H, m, n]: block u is the sum of blocks
    v of x by weights[u, v] (section 3: weights kron I_block, times x), with zeros behind T.

    Computed in float32 at least; a weight of 0 drops what is finite. Differentiable in both. Work: O(m n block D).
    """
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(_wide(x), weights.dtype)
        blocks = _blocks(x, block, weights.shape[3]).flatten(3).to(dtype)
        sums = weights.to(dtype) @ blocks
        return sums.reshape(*x.shape[:2], weights.shape[2] * block, x.shape[3]).to(x.dtype)


def _prefixes(x: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """[B, H, n, D]: the sum of all tokens up to the first of each block, itself included (section 3)."""
    blocks = _blocks(x, block, -(-x.shape[2] // block))
    before = pad(blocks.sum(3, dtype=dtype).cumsum(2), (0, 0, 1, 0))[:, :, :-1]
    return before + blocks[:, :, :, 0].to(dtype)


def _blocks(x: Tensor, block: int, num_blocks: int) -> Tensor:
    """[B, H, num_blocks, block, D], zeros behind T."""
    missing = num_blocks * block - x.shape[2]
    assert missing >= 0, "more tokens than the blocks hold"
    x = pad(x, (0, 0, 0, missing)) if missing else x
    return x.reshape(*x.shape[:2], num_blocks, block, x.shape[3])


def _gumbel(logits: Tensor) -> Tensor:
    drawn = torch.empty_like(logits).exponential_()
    return -drawn.clamp(min=torch.finfo(drawn.dtype).tiny).log()


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
