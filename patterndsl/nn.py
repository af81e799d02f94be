"""How does a pattern become a layer? A module with the projections that the pattern needs."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn.functional import normalize

from patterndsl.diagnostics import input_error
from patterndsl.functional import as_pattern, attention
from patterndsl.ir.relation import inputs_read
from patterndsl.learn.index import Index
from patterndsl.learn.kmeans import KMeans
from patterndsl.pattern import Pattern
from patterndsl.runtime.arguments import check_backend, is_autocast_on
from patterndsl.runtime.data import Inputs
from patterndsl.sema.bind import BoundSelection, fixed_settings, selection_at
from patterndsl.sema.parameters import MAX_HEADS, MAX_LAYER, MAX_SIZE, counted, sizes_of


class Attention(nn.Module):
    """Multi-head attention by a pattern: query, key, value and output projections around `patterndsl.attention`.

    pattern: a Pattern, or the text of one. dim: model width. heads: query heads. kv_heads: key heads (grouped-query
    attention), by default as many. head_dim: dim // heads by default. layer: what `layer` is in the pattern.
    Programs are compiled on the first call of each length and kept.

    Where the pattern says `share: query_key`, the keys are the queries at unit length, and scores are their products as
    they are (Reformer). Labels by k-means are learned: their centroids are buffers that follow the keys while the layer
    trains, and `losses` then holds the commitment loss of the last call, to be added to the training loss by a small
    factor (1e-4 in Routing Transformer). A selection `by = learned` has an index of index_heads heads of index_dim, and
    its loss stands in `losses` too: it moves nothing but the index, which learns nothing unless it is added.
    """

    def __init__(
        self,
        pattern: Pattern | str,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        layer: int = 0,
        backend: str = "auto",
        index_heads: int = 4,
        index_dim: int = 32,
    ) -> None:
        super().__init__()
        self.pattern = as_pattern(pattern)
        dim, heads = counted("dim", dim, 1, MAX_SIZE), counted("heads", heads, 1, MAX_HEADS)
        kv_heads = heads if kv_heads is None else counted("kv_heads", kv_heads, 1, MAX_HEADS)
        if heads % kv_heads:
            raise input_error("E503", f"{heads} heads over {kv_heads} kv_heads", "heads must be a multiple of kv_heads")
        if head_dim is None and dim % heads:
            raise input_error("E503", f"dim {dim} is not a multiple of {heads} heads", "give head_dim")
        check_backend(backend)
        self.dim, self.heads, self.kv_heads = dim, heads, kv_heads
        self.head_dim = dim // heads if head_dim is None else counted("head_dim", head_dim, 1, MAX_SIZE)
        self.layer, self.backend = counted("layer", layer, 0, MAX_LAYER), backend
        self.query_projection = nn.Linear(dim, heads * self.head_dim, bias=bias)
        self.is_shared = self.pattern.resolved.share == "query_key"
        if self.is_shared and kv_heads != heads:
            message = f"{heads} query heads share their projection with {kv_heads} key heads"
            raise input_error("E503", message, "leave kv_heads out: `share: query_key` needs as many")
        separate = None if self.is_shared else nn.Linear(dim, kv_heads * self.head_dim, bias=bias)
        self.key_projection = self.query_projection if separate is None else separate
        self.value_projection = nn.Linear(dim, kv_heads * self.head_dim, bias=bias)
        self.output_projection = nn.Linear(heads * self.head_dim, dim, bias=bias)
        self.learners = nn.ModuleDict(
            {
                label.name: KMeans(kv_heads, self.head_dim, **fixed_settings(self.pattern.resolved, label))
                for label in self.pattern.resolved.labels
                if label.learner == "kmeans"
            }
        )
        self.indices = nn.ModuleDict(
            {
                item.name: Index(dim, index_heads, index_dim)
                for item in self.pattern.resolved.selections
                if item.by == "learned"
            }
        )
        relations = (self.pattern.resolved.relation, self.pattern.resolved.fallback)
        self.learns = bool(self.learners) or bool(self.indices)
        self.labels_read = frozenset[str]().union(*(inputs_read(part) for part in relations if part is not None))
        self.losses: dict[str, Tensor] = {}

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, inputs: Inputs | None = None, q_start: int = 0
    ) -> Tensor:
        """x: [B, T, dim] attends to itself, or to context: [B, Tk, dim]. Returns [B, T, dim].

        inputs: tensors that the pattern reads; labels that are not among them are found from the keys. q_start:
        position of x's first token. An empty row yields the output projection's bias.
        """
        source = x if context is None else context
        self._check("x", x)
        self._check("context", source)
        query = self._by_head(self.query_projection(x), self.heads)
        key = query if self.is_shared and context is None else self._by_head(self.key_projection(source), self.kv_heads)
        key, scale = (normalize(key, dim=-1), 1.0) if self.is_shared else (key, None)
        value = self._by_head(self.value_projection(source), self.kv_heads)
        self.losses = {}
        found = self._learned(x, source, (query, key), scale, q_start, inputs) if self.learns else {}
        attended = attention(
            query,
            key,
            value,
            self.pattern,
            inputs={**(inputs or {}), **found} if found else inputs,
            layer=self.layer,
            q_start=q_start,
            scale=scale,
            backend=self.backend,
        )
        return cast("Tensor", self.output_projection(attended.transpose(1, 2).flatten(2)))

    def _learned(
        self,
        x: Tensor,
        source: Tensor,
        tensors: tuple[Tensor, Tensor],
        scale: float | None,
        q_start: int,
        inputs: Inputs | None,
    ) -> dict[str, Tensor]:
        """What learners with a state say, unless the caller does; in training they learn from the keys first."""
        query, key = tensors

        def bound(name: str) -> BoundSelection:
            sizes = sizes_of(None, x.shape[1], source.shape[1], q_start)
            return selection_at(self.pattern.resolved, name, sizes, self.layer)

        found: dict[str, Tensor] = {}
        again = self.heads // self.kv_heads
        given = inputs or {}
        selections = [item for item in self.pattern.resolved.selections if item.name not in given]
        for name, learner in self.learners.items():
            assert isinstance(learner, KMeans)
            routed = [item for item in selections if item.label == name]
            if name in given and not routed:
                continue
            if self.training:
                learner.begin(key)
            scores = learner.scores(key)
            if name in self.labels_read and name not in given:
                found[name] = learner(key, scores).repeat_interleave(again, dim=1)
            for item in routed:
                found[item.name] = learner.members(key, bound(item.name).width, scores).repeat_interleave(again, dim=1)
            if self.training:
                self.losses[name] = learner.commitment(key, scores)
                learner.update(key, scores=scores)
        for item in selections:
            if item.name not in self.indices:
                continue
            index = cast("Index", self.indices[item.name])
            selection = bound(item.name)
            found[item.name] = index(x, source, selection, q_start)
            if self.training:
                keys = key.repeat_interleave(again, dim=1) if again > 1 else key
                attended = (query.detach(), keys.detach(), self.head_dim**-0.5 if scale is None else scale)
                self.losses[item.name] = index.loss(x, source, attended, found[item.name], selection, q_start)
        return found

    def _check(self, name: str, x: object) -> None:
        """Raises InputError (E503) where the projections cannot take it."""
        help = f"give {name}: [B, T, {self.dim}]"
        if not isinstance(x, Tensor):
            raise input_error("E503", f"{name} is {type(x).__name__}, not a tensor", help)
        if x.dim() != 3 or x.shape[2] != self.dim:
            raise input_error("E503", f"{name} is {list(x.shape)}", help)
        weight = self.query_projection.weight
        casts = is_autocast_on(x.device.type)
        # weights that are not floating point belong to somebody's quantisation, which knows what it takes
        if not x.is_floating_point() or (weight.is_floating_point() and weight.dtype != x.dtype and not casts):
            raise input_error(
                "E503", f"{name} is {x.dtype}, the layer {weight.dtype}", f"cast it: {name}.to({weight.dtype})"
            )

    def _by_head(self, projected: Tensor, heads: int) -> Tensor:
        """[B, T, heads * D] to [B, heads, T, D]."""
        return projected.view(*projected.shape[:2], heads, self.head_dim).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"{self.pattern.text!r}, heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}"
