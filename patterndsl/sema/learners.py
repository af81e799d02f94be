"""Which learners give labels, what are they told, and what do they look at? Names and settings; tensors are elsewhere.

A label is an integer for each position and head, computed from the keys in each call. What a learner sees decides
whether a pattern that reads its labels lets the future choose what the past attends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Sees: TypeAlias = Literal["token", "sequence"]
"""The label of a position depends on its own key alone, or on those of the whole sequence."""


@dataclass(frozen=True, slots=True)
class Setting:
    """An integer that a learner is told. default: None where it must be given; least: the smallest that makes sense."""

    name: str
    least: int
    default: int | None = None


@dataclass(frozen=True, slots=True)
class Learner:
    """A way to label positions. found_by: a call, from its keys alone; a layer, which learns while it trains; or the
    caller."""

    name: str
    doc: str
    settings: tuple[Setting, ...]
    sees: Sees
    found_by: Literal["call", "layer", "caller"]


LEARNERS: dict[str, Learner] = {
    learner.name: learner
    for learner in (
        Learner(
            "lsh",
            "the direction among random ones that a key is nearest to (Reformer)",
            (Setting("buckets", 2), Setting("rounds", 1, 1), Setting("seed", 0, 0), Setting("redraw", 0, 0)),
            "token",
            "call",
        ),
        Learner(
            "kmeans",
            "the centroid that a key is nearest to, learned by moving averages (Routing Transformer)",
            (Setting("clusters", 1), Setting("seed", 0, 0)),
            "token",
            "layer",
        ),
        Learner("given", "what the caller brings, found from each token alone", (), "token", "caller"),
    )
}
