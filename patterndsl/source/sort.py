"""Blocks of keys in a learned soft order."""

from __future__ import annotations

from torch import nn

from patterndsl.learn.sinkhorn import SortNet, mixed
from patterndsl.source.sequence import Keys, Sequence


class Sort(nn.Module):
    """Sorted blocks of keys and values (Tay et al. 2020, arXiv 2002.11296, section 3): a sort net on the states says
    which blocks go where, head by head, and Sinkhorn balancing makes soft permutations of it.

    blocks: tokens of a block; length: the longest sequence. tau: temperature; iterations: of the balancing; Gumbel
    noise in training alone. sees: sequence; or prefix, where block u is made of earlier blocks, by what is known at its
    first token. cut: how many sorted blocks there are, 0 for all (SortCut). hidden: width of the sort net, 0 for one
    linear map.
    """

    def __init__(
        self,
        dim: int,
        kv_heads: int,
        head_dim: int,
        *,
        blocks: int,
        length: int,
        iterations: int,
        tau: float,
        sees: str,
        cut: int,
        hidden: int,
    ) -> None:
        super().__init__()
        self.kv_heads = kv_heads
        self.block, self.iterations, self.tau, self.sees, self.cut = blocks, iterations, tau, sees, cut
        self.net = SortNet(kv_heads, dim, -(-length // blocks), hidden=hidden or None)

    def forward(self, sequence: Sequence) -> Keys:
        """Key and value [B, Hkv, sorted tokens, D]; the last block is filled up with zeros, which also stand for
        tokens that are not present. Differentiable in the states and the net. Work: O(n^2 block D), n = T / block
        blocks. Raises InputError (E505) where the sequence is longer than `length`."""
        given, (key, value), present = sequence.states, sequence.keys, sequence.present
        if present is not None:
            given = given.masked_fill(~present[..., None], 0.0)
            key, value = (x.masked_fill(~present[:, None, :, None], 0.0) for x in (key, value))
        states = given[:, None].expand(-1, self.kv_heads, -1, -1)
        weights = self.net(
            states,
            self.block,
            tau=self.tau,
            iterations=self.iterations,
            causal=self.sees == "prefix",
            noise=sequence.training,
        )
        if self.cut:
            weights = weights[:, :, : self.cut]
        return mixed(key, weights, self.block), mixed(value, weights, self.block)
