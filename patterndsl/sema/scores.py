"""Which scores say how much a query attends a key? Names and settings; tensors are elsewhere.

Softmax of the product of query and key is what is meant where nothing is said. A kernel is a product of features, whose
sums over keys are kept instead of the keys: it takes all keys, or all up to the query. A synthesizer makes scores of
the query's token alone, or of nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from patterndsl.sema.sources import SourceSetting

Maker: TypeAlias = Literal["dense", "random", "factored_dense", "factored_random", "product"]
"""Who makes scores up: two layers on the token, a matrix of positions, products of two shorter rows, two thin matrices;
`product` is that of query and key, in a mixture."""


@dataclass(frozen=True, slots=True)
class ScoreKind:
    """A way to score. kind: softmax of products, features whose products are weights, or scores that are made up."""

    name: str
    doc: str
    kind: Literal["softmax", "kernel", "synthesized"]
    settings: tuple[SourceSetting, ...] = ()

    @property
    def needed(self) -> tuple[str, ...]:
        return tuple(setting.name for setting in self.settings if setting.default is None)


MAKERS: tuple[Maker, ...] = get_args(Maker)

DECAY = SourceSetting("decay", "factor", "1")
"""What a weight is multiplied by for each token between query and key."""

NORMALISED = (DECAY, SourceSetting("normalise", "word", "yes", ("yes", "no")))
LINEAR = (DECAY, SourceSetting("normalise", "word", "no", ("yes", "no")))
"""Whether weights are divided by their sum, which of plain products may be anything."""

SCORES: dict[str, ScoreKind] = {
    kind.name: kind
    for kind in (
        ScoreKind("softmax", "products of query and key", "softmax"),
        ScoreKind("linear", "products of query and key, with no softmax (Lightning Attention)", "kernel", LINEAR),
        ScoreKind("elu", "features elu(x) + 1 (Linear Transformer)", "kernel", NORMALISED),
        ScoreKind("relu", "features relu(x) + 0.001 (Performer, generalised attention)", "kernel", NORMALISED),
        ScoreKind(
            "favor",
            "random positive features whose products are exp(q k) on average (Performer)",
            "kernel",
            (
                SourceSetting("features"),
                SourceSetting("draws", "word", "orthogonal", ("orthogonal", "independent")),
                SourceSetting("form", "word", "positive", ("positive", "hyperbolic")),
                SourceSetting("seed", default="0", least=0),
                SourceSetting("redraw", default="0", least=0),
                *NORMALISED,
            ),
        ),
        ScoreKind(
            "synthesize",
            "scores of the query's token or of its position alone (Synthesizer); of several makers, their mixture",
            "synthesized",
            (
                SourceSetting("length"),
                SourceSetting("rank", default="8"),
                SourceSetting("learned", "word", "yes", ("yes", "no")),
            ),
        ),
    )
}

TABLES: dict[str, str] = {
    "scalars": "a number of each head for each index (T5, Swin)",
    "vectors": "a vector of each head for each index, which meets the query (Shaw et al., ETC)",
    "sinusoids": "projected sinusoids of a distance, which meet the query, and a bias of queries (Transformer-XL)",
}
"""What a layer can learn for a bias to look up."""
