"""Which selectors list keys, and what are they told? Names and settings; tensors are elsewhere.

A selection lists keys, or blocks of keys, for each query or block of queries, found in each call. What it sees decides
whether the future chooses what the past attends: `topk` sees its own queries and the candidates, `members` all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

By: TypeAlias = Literal["mean", "max", "learned"]
"""How `topk` scores a block of keys for a query: its product with their mean (MoBA, NSA), the largest product that a
key between their least and greatest channels could have (Quest), or what a layer learns (DSA)."""
Sharing: TypeAlias = Literal["each", "group", "all"]
"""Whether each query head has lists of its own, those that share a key head have the same (NSA), or all (DSA)."""

BYS: tuple[By, ...] = get_args(By)
SHARINGS: tuple[Sharing, ...] = get_args(Sharing)


@dataclass(frozen=True, slots=True)
class Selector:
    """A way to list keys. settings: names of all that it is told, those without a default first; needed: of them."""

    name: str
    doc: str
    settings: tuple[str, ...]
    needed: tuple[str, ...]


SELECTORS: dict[str, Selector] = {
    selector.name: selector
    for selector in (
        Selector(
            "topk",
            "the k candidates with the highest scores, those of `always` before all others",
            ("k", "of", "per", "by", "among", "always", "heads"),
            ("k",),
        ),
        Selector("given", "k places that the caller fills, -1 where there are fewer", ("k", "of", "per"), ("k",)),
        Selector(
            "members",
            "the `top` tokens that point most to each centroid of a k-means label (Routing Transformer)",
            ("label", "top"),
            ("label", "top"),
        ),
    )
}
