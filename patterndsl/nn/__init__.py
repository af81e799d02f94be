"""How does a pattern become a layer? `Attention`, with the projections and whatever else the pattern needs."""

from patterndsl.nn.attention import Attention

__all__ = ["Attention"]
