"""How does a pattern become a layer? A module with the projections that the pattern needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import scaled_dot_product_attention

from patterndsl.composite import Composite
from patterndsl.decoding import Cache
from patterndsl.diagnostics import input_error
from patterndsl.functional import as_pattern, attention, composite_attention, program_for
from patterndsl.ir.relation import inputs_read
from patterndsl.learn.index import Index
from patterndsl.learn.kmeans import KMeans
from patterndsl.learn.lsh import Redrawn, labels_of_heads
from patterndsl.learn.unit import unit
from patterndsl.nn import decoding
from patterndsl.nn.roles import Roles
from patterndsl.nn.scores import (
    ONLY,
    Directions,
    Table,
    WithProduct,
    Zeros,
    score_modules,
    tables_of,
)
from patterndsl.pattern import Pattern, check_mapping
from patterndsl.runtime.arguments import check_backend, is_autocast_on
from patterndsl.runtime.chosen import hash_on, highest_on
from patterndsl.runtime.data import Inputs
from patterndsl.runtime.learned import Learned
from patterndsl.runtime.ops import Call as Asked
from patterndsl.runtime.scored import relation_of
from patterndsl.sema.bind import BoundSelection, fixed_settings, learner_at, redraw_of, selection_at
from patterndsl.sema.model import Resolved
from patterndsl.sema.parameters import MAX_HEADS, MAX_LAYER, MAX_SIZE, counted, sizes_of
from patterndsl.source.named import Named
from patterndsl.source.sequence import Keys, Sequence
from patterndsl.source.sources import Sources, Told
from patterndsl.source.state import State, detached
from patterndsl.syntax.tree import OWN_KEYS


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """What a layer makes for a call. sequence: what sources are made of; query [B, H, T, D] and the sequence's own
    keys; learned: what is made beside them; inputs: the call's, and what learners with a state say."""

    sequence: Sequence
    query: Tensor
    keys: Keys
    learned: Learned
    inputs: Inputs | None


class Attention(nn.Module):
    """Multi-head attention by a pattern: query, key, value and output projections around `patterndsl.attention`.

    pattern: a Pattern, or the text of one. dim: model width. heads: query heads. kv_heads: key heads (grouped-query
    attention), by default as many. head_dim: dim // heads by default. layer: what `layer` is in the pattern.
    Programs are compiled on the first call of each length and kept.

    Where the pattern says `share: query_key`, the keys are the queries at unit length, and scores are their products as
    they are (Reformer). Labels by k-means are learned: their centroids are buffers that follow the keys while the layer
    trains, and `losses` then holds the commitment loss of the last call, to be added to the training loss by a small
    factor (1e-4 in Routing Transformer). A selection `by = learned` has an index of index_heads heads of index_dim, and
    its loss stands in `losses` too: it moves nothing but the index, which learns nothing unless it is added. Directions
    of `lsh(..., redraw = n)` are drawn anew every n calls in training.

    Sources of the pattern are modules in `sources`, by name. Where one recalls earlier segments, a call takes a state
    and returns the next: `state = layer.init_state(batch)`, `out, state = layer(x, state)`; what compressions lose
    stands in `losses`. Roles of the pattern have their projections in `roles`, by name, copies of the layer's at first
    (`roles["globals"].query_projection`). Gated branches have weights in `gate`, the sigmoid of a linear map of x for
    each head.
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

        def projection(name: Literal["query", "key"], width: int) -> Any:
            reads = not isinstance(self.pattern, Composite) or name in self.pattern.projections
            return nn.Linear(dim, width, bias=bias) if reads else Zeros(width)

        self.query_projection = projection("query", heads * self.head_dim)
        self.is_shared = self.pattern.resolved.share == "query_key"
        if self.is_shared and kv_heads != heads:
            message = f"{heads} query heads share their projection with {kv_heads} key heads"
            raise input_error("E503", message, "leave kv_heads out: `share: query_key` needs as many")
        separate = None if self.is_shared else projection("key", kv_heads * self.head_dim)
        self.key_projection = self.query_projection if separate is None else separate
        self.value_projection = nn.Linear(dim, kv_heads * self.head_dim, bias=bias)
        self.output_projection = nn.Linear(heads * self.head_dim, dim, bias=bias)
        self.roles = Roles(self.pattern, self._projections())
        self.learners = Named(
            {
                label.name: KMeans(kv_heads, self.head_dim, **fixed_settings(self.pattern.resolved, label))
                for label in self.pattern.resolved.labels
                if label.learner == "kmeans"
            }
        )
        self.indices = Named(
            {
                item.name: Index(dim, index_heads, index_dim)
                for item in self.pattern.resolved.selections
                if item.by == "learned"
            }
        )
        self.redrawn = Named(
            {
                label.name: Redrawn(redraw)
                for label in self.pattern.resolved.labels
                if (redraw := redraw_of(self.pattern.resolved, label))
            }
        )
        self.learns = bool(self.learners) or bool(self.indices) or bool(self.redrawn)
        terms = [term.pattern for term in self.pattern.terms] if isinstance(self.pattern, Composite) else [self.pattern]
        self.relations = tuple(term.resolved for term in terms)
        self.labels_read = _read_by_biases(self.pattern).union(*map(_read_by, self.relations))
        self.losses: dict[str, Tensor] = {}
        self.sources = Sources(_told(self.pattern), dim, kv_heads, self.head_dim)
        branches = tuple(self.pattern.branches) if isinstance(self.pattern, Composite) else ()
        self.gated = branches if self.pattern.spec.combine == "gate" else ()
        self.gate = nn.Linear(dim, heads * len(self.gated)) if self.gated else None
        self.tables = Named(
            {name: Table(kind, size, heads, self.head_dim, dim) for name, kind, size in tables_of(self.pattern)}
        )
        self.scores = nn.ModuleDict(score_modules(self.pattern, dim, heads, self.head_dim))
        self.sums = _summing(self.pattern, self.layer)
        if isinstance(self.pattern, Composite):
            self.pattern.branches_at(self.layer)  # found now, and not while a graph is made
        if self.sources.used and (len(branches) > 1 or len(self.roles)):
            message = "what is most used is told by one softmax of one query, and the pattern has branches or roles"
            raise input_error("E505", message, "compress by conv, mean or max")

    def copy_projections(self) -> None:
        """Makes the roles' projections equal to the layer's, which they are from the start: for a layer whose weights
        were loaded from one without roles (Longformer, Beltagy et al. 2020, section 3.1)."""
        for name in self.roles:
            self.roles.role(name).copy_from(self._projections())

    def _projections(self) -> dict[str, nn.Linear]:
        return {
            "query": self.query_projection,
            "key": self.key_projection,
            "value": self.value_projection,
        }

    def init_state(
        self,
        batch: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        n: int | None = None,
        max_queries: int = 1,
    ) -> State | Cache:
        """The state before the first segment or token, of the layer's device and dtype by default.

        Where the pattern recalls segments or sums features up to the query: nothing is recalled, and n and max_queries
        are refused. Otherwise an empty `patterndsl.Cache`, with which the layer decodes token by token; n, max_queries:
        see there.
        Raises PatternError (E505) where the pattern cannot be decoded, (E406) where it depends on N and has no n.
        """
        weight = self.value_projection.weight
        if decoding.is_cached(self.pattern):
            return decoding.start(self, batch, device or weight.device, dtype or weight.dtype, n, max_queries)
        if not self.sources.is_recurrent and not self.sums:
            message = "the pattern has no state: it is not one relation alone, nor recalls, nor sums up to the query"
            help = "without a state: layer(newest, context=all_so_far, q_start=position)"
            raise input_error("E505", message, help)
        if n is not None or max_queries != 1:
            message = "n and max_queries are of a cache, and this state takes segments of any length"
            raise input_error("E505", message, "leave both out: state = layer.init_state(batch)")
        like = torch.empty(0, device=device or weight.device, dtype=dtype or weight.dtype)
        return self._owned(self.sources.start(counted("batch", batch, 0, MAX_SIZE), like))

    def _owned(self, state: State) -> State:
        """As the state of this layer and no other."""
        return replace(state, pattern=self.pattern.text, layer=self.layer)

    def forward(
        self,
        x: Tensor,
        context: Tensor | State | Cache | None = None,
        state: State | Cache | None = None,
        *,
        inputs: Inputs | None = None,
        sources: Mapping[str, Tensor] | None = None,
        present: Tensor | None = None,
        q_start: int = 0,
    ) -> Tensor | tuple[Tensor, State | Cache]:
        """x: [B, T, dim] attends to itself, or to context: [B, Tk, dim]. Returns [B, T, dim].

        state: of earlier segments, as the second or third argument; returned is then (output, next state). A cache is
        changed itself, x continues what it holds, and nothing has a gradient but the output projection. inputs:
        tensors that the pattern reads; labels that are not among them are found from the keys. sources: states
        [B, any length, dim] of other sequences, by name. present: bool [B, Tk], False where a token is padding, which
        takes no part in keys that are made of several tokens. q_start: position of x's first token. An empty row yields
        the output projection's bias.
        """
        if isinstance(context, State | Cache):
            context, state = None, context
        scale = self._scale
        if isinstance(state, Cache):
            self._check("x", x)
            decoding.check(self, state, x.shape[0], others=(context, sources, present), q_start=q_start)
            attended = decoding.attended(state, *self._query_and_keys(x, None), inputs, scale, self.backend)
            return self.output_projection(attended.transpose(1, 2).flatten(2)), state
        made = self.prepared(x, context, state, inputs=inputs, sources=sources, present=present, q_start=q_start)
        if not isinstance(self.pattern, Composite):
            options: dict[str, Any] = {"layer": self.layer, "q_start": q_start, "scale": scale, "backend": self.backend}
            attended = attention(made.query, *made.keys, self.pattern, inputs=made.inputs, **options)
            return cast("Tensor", self.output_projection(attended.transpose(1, 2).flatten(2)))
        result = composite_attention(
            (made.query, *made.keys),
            self.pattern,
            made.learned,
            made.inputs,
            Asked(self.layer, q_start),
            scale,
            self.backend,
            return_lse=bool(self.sources.used),
        )
        attended, lse = result if isinstance(result, tuple) else (result, None)
        output = cast("Tensor", self.output_projection(attended.transpose(1, 2).flatten(2)))
        if state is None:
            return output
        query, keys = made.query, made.learned.sources
        usage = {} if lse is None else self._usage(query, keys, lse, scale, q_start, made.inputs)
        read = partial(partial, self._read, query.detach(), scale)
        after, losses = self.sources.after(made.sequence, state, usage, read)
        self.losses |= losses
        after = replace(after, sums={name: detached(sums) for name, sums in made.learned.after.items()})
        return output, self._owned(after)

    def prepared(
        self,
        x: Tensor,
        context: Tensor | None = None,
        state: State | None = None,
        *,
        inputs: Inputs | None = None,
        sources: Mapping[str, Tensor] | None = None,
        present: Tensor | None = None,
        q_start: int = 0,
    ) -> Prepared:
        """All that `forward` attends by, with the same arguments: everything but attention itself and the output
        projection. In training learners learn by it."""
        source = x if context is None else context
        self._check("x", x)
        self._check("context", source)
        self._check_remembered(x, source, state, present)
        check_mapping("sources", sources, "{'encoded': states}")
        for name, given in (sources or {}).items():
            self._check(f"sources[{name!r}]", given)
        self.losses = {}
        query, keys = self._query_and_keys(x, context)
        sequence = Sequence(source, keys, self._keys, present, self.training)
        of_sources = self.sources(sequence, state, sources or {})
        scale = self._scale
        found = self._learned(x, source, (query, keys[0]), scale, q_start, inputs) if self.learns else {}
        learned = Learned(
            of_sources,
            self._gates(x) or {},
            self._made(x, query, keys[0], scale, q_start),
            {name: cast("Table", table)() for name, table in self.tables.items()},
            {name: module() for name, module in self._drawn()},
            {} if state is None else state.sums,
            roles=self._of_roles(x, sequence, state, sources or {}, q_start),
        )
        return Prepared(sequence, query, keys, learned, {**(inputs or {}), **found} if found else inputs)

    def _query_and_keys(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Keys]:
        """[B, H, T, D] each."""
        query = self._by_head(self.query_projection(x), self.heads)
        if self.is_shared and context is None:
            return query, (unit(query), self._by_head(self.value_projection(x), self.kv_heads))
        return query, self._keys(x if context is None else context)

    @property
    def _scale(self) -> float | None:
        """What products are multiplied by; shared keys are at unit length already."""
        return 1.0 if self.is_shared else None

    def _drawn(self) -> Iterator[tuple[str, Directions]]:
        """The random directions of each branch that has some."""
        for name, module in self.scores.items():
            if isinstance(module, Directions):
                yield name.removeprefix(ONLY), module

    def _made(self, x: Tensor, query: Tensor, key: Tensor, scale: float | None, q_start: int) -> dict[str, Tensor]:
        """The scores of each branch that makes them up, [B or 1, H, T, Tk]."""
        found = {}
        for name, module in self.scores.items():
            if isinstance(module, Directions):
                continue
            made = module(x, key.shape[2], q_start)
            if isinstance(module, WithProduct):
                keys = key.repeat_interleave(self.heads // self.kv_heads, dim=1)
                products = query @ keys.transpose(-1, -2) * (self.head_dim**-0.5 if scale is None else scale)
                made = made + module.share() * products
            found[name.removeprefix(ONLY)] = made
        return found

    def _of_roles(
        self, x: Tensor, sequence: Sequence, state: State | None, given: Mapping[str, Tensor], q_start: int
    ) -> dict[str, dict[str, Tensor]]:
        """The tensors that each role has of its own, of the sequence and of sources."""
        if not isinstance(self.pattern, Composite) or not self.roles.wanted:
            return {}
        source = sequence.states
        sizes = partial(sizes_of, None, x.shape[1], source.shape[1], q_start)
        states = {"query": x, "key": source, "value": source}

        def by_head(what: str, projected: Tensor) -> Tensor:
            return self._by_head(projected, self.heads if what == "query" else self.kv_heads)

        found = self.roles.own_tensors(self.pattern, states, sizes, self.heads, self.layer, by_head)
        for role in self.roles.of_sources():
            project = partial(self._keys_by, role)
            again = replace(sequence, keys=project(source), project=project)
            for name, keys in self.sources(again, state, given).items():
                made = {f"{name}.key": keys[0], f"{name}.value": keys[1]}
                wanted = self.roles.wanted[role]
                found.setdefault(role, {}).update({what: x for what, x in made.items() if what in wanted})
        return found

    def _keys_by(self, role: str, states: Tensor) -> Keys:
        """`_keys` by the projections of a role, and the layer's where it has none."""
        module = self.roles.role(role)
        made = dict(zip(("key", "value"), self._keys(states), strict=True))
        made |= {
            what: self._by_head(module.projection(what)(states), self.kv_heads) for what in made if what in module.own
        }
        return made["key"], made["value"]

    def _keys(self, states: Tensor, *, frozen: bool = False) -> Keys:
        """Key and value [B, Hkv, T, D] of states [B, T, dim]. frozen: without gradient to the projections."""
        projected = []
        for module in (self.key_projection, self.value_projection):
            weights = {name: x.detach() for name, x in module.named_parameters()} if frozen else {}
            projected.append(functional_call(module, weights, (states,)) if frozen else module(states))
        key, value = (self._by_head(x, self.kv_heads) for x in projected)
        return unit(key) if self.is_shared else key, value

    def _gates(self, x: Tensor) -> dict[str, Tensor] | None:
        """The weight of each gated branch, [B, H, T]."""
        if self.gate is None:
            return None
        weights = self.gate(x).sigmoid().view(*x.shape[:2], self.heads, len(self.gated)).transpose(1, 2)
        return dict(zip(self.gated, weights.unbind(-1), strict=True))

    def _read(self, query: Tensor, scale: float | None, states: Tensor) -> Tensor:
        """What queries read of states as their only keys, without gradient to the projections."""
        key, value = self._keys(states, frozen=True)
        return scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=self.heads != self.kv_heads)

    @torch.no_grad()
    def _usage(
        self,
        query: Tensor,
        keys: Mapping[str, Keys],
        lse: Tensor,
        scale: float | None,
        q_start: int,
        inputs: Inputs | None,
    ) -> dict[str, Tensor]:
        """The part of the attention of all queries and heads that each recalled state has, [B, T]. Work: O(Tq T)."""
        found = {}
        assert isinstance(self.pattern, Composite)
        for term in self.pattern.terms:
            if term.source not in self.sources.used:
                continue
            key = keys[term.source][0].repeat_interleave(self.heads // self.kv_heads, dim=1)
            program = program_for(term.pattern, query, key, Asked(self.layer, q_start), self.backend)
            scores = (query @ key.transpose(-1, -2)) * (self.head_dim**-0.5 if scale is None else scale)
            weights = (scores - lse[..., None]).exp().masked_fill(~program.mask(term.read_of(inputs)), 0.0)
            found[term.source] = weights.nan_to_num(0.0).sum((1, 2))
        return found

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
            home = next(resolved for resolved in self.relations if name in _read_by(resolved))
            return selection_at(home, name, sizes, self.layer)

        found: dict[str, Tensor] = {}
        again = self.heads // self.kv_heads
        given = inputs or {}
        selections = [item for item in self.pattern.resolved.selections if item.name not in given]
        for name, learner in self.learners.items():
            assert isinstance(learner, KMeans)
            routed = [item for item in selections if item.label == name]
            if name in given and not routed:
                continue
            widths = {item.name: bound(item.name).width for item in routed}
            with learner.step(key, tuple(dict.fromkeys(widths.values()))) as assigned:
                if name in self.labels_read and name not in given:
                    found[name] = assigned.labels.repeat_interleave(again, dim=1)
                for selected, width in widths.items():
                    found[selected] = assigned.members[width].repeat_interleave(again, dim=1)
                if self.training:
                    self.losses[name] = learner.commitment(key, assigned.labels)
        for name, redrawn in self.redrawn.items():
            if name not in given:
                sizes = sizes_of(None, x.shape[1], source.shape[1], q_start)
                settings = dict(learner_at(self.pattern.resolved, name, sizes).settings)
                found[name] = labels_of_heads(key, settings, self.heads, redrawn(), hash_on(x.device))
        for item in selections:
            if item.name not in self.indices:
                continue
            index = cast("Index", self.indices[item.name])
            selection = bound(item.name)
            found[item.name] = index(x, source, selection, q_start, highest_on(x.device))
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
        weight = self.value_projection.weight
        casts = is_autocast_on(x.device.type)
        # weights that are not floating point belong to somebody's quantisation, which knows what it takes
        if not x.is_floating_point() or (weight.is_floating_point() and weight.dtype != x.dtype and not casts):
            raise input_error(
                "E503", f"{name} is {x.dtype}, the layer {weight.dtype}", f"cast it: {name}.to({weight.dtype})"
            )

    def _check_remembered(self, x: Tensor, source: Tensor, state: object, present: object) -> None:
        """Raises InputError (E503, E505) on a state that is not this layer's, or what does not say who is present."""
        if present is not None:
            help = f"give a bool tensor {list(source.shape[:2])}"
            if not isinstance(present, Tensor):
                raise input_error("E503", f"present is {type(present).__name__}", help)
            if present.dtype != torch.bool or present.shape != source.shape[:2]:
                raise input_error("E503", f"present is {list(present.shape)}, {present.dtype}", help)
        if state is None:
            return
        if not isinstance(state, State):
            raise input_error("E503", f"the state is {type(state).__name__}", "state = layer.init_state(batch)")
        if not self.sources.is_recurrent and not self.sums:
            raise input_error("E505", "the pattern has no state", "call the layer without one")
        start = self.sources.start(0, x)
        is_ours = state.recalled.keys() == start.recalled.keys() and state.compressed.keys() == start.compressed.keys()
        if not is_ours or not state.sums.keys() <= set(self.sums) or state.pattern != self.pattern.text:
            raise input_error("E503", "the state is of another pattern", "state = layer.init_state(batch)")
        if state.layer != self.layer:
            help = "keep a state for each layer: state = layer.init_state(batch)"
            raise input_error("E503", f"the state is of layer {state.layer}, and this is layer {self.layer}", help)
        for name, held in (*state.recalled.items(), *state.compressed.items()):
            if held.shape[0] != x.shape[0] or held.shape[2] != self.dim:
                message = f"`{name}` remembers {list(held.shape)}, and x is {list(x.shape)}"
                raise input_error("E503", message, "state = layer.init_state(batch) for each batch of sequences")
            if held.device != x.device or (held.dtype != x.dtype and not is_autocast_on(x.device.type)):
                message = f"`{name}` remembers {held.dtype} on {held.device}, and x is {x.dtype} on {x.device}"
                raise input_error("E503", message, "give init_state the device and dtype of x")

    def _by_head(self, projected: Tensor, heads: int) -> Tensor:
        """[B, T, heads * D] to [B, heads, T, D]."""
        return projected.view(*projected.shape[:2], heads, self.head_dim).transpose(1, 2)

    def __getstate__(self) -> dict[str, Any]:
        """Losses belong to a graph, and are not copied."""
        return {**self.__dict__, "losses": {}}

    def __repr__(self) -> str:
        """As of any module, without the containers that this pattern puts nothing into."""
        empty = {f"  ({name}): {child!r}" for name, child in self.named_children() if _is_empty(child)}
        return "\n".join(line for line in super().__repr__().splitlines() if line not in empty)

    def extra_repr(self) -> str:
        return f"{self.pattern.text!r}, heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}"


def _is_empty(module: nn.Module) -> bool:
    containers = (Named, Roles, Sources, nn.ModuleDict)
    return isinstance(module, containers) and next(module.children(), None) is None


def _summing(pattern: Pattern, layer: int) -> tuple[str, ...]:
    """The branches whose sums are a state: those that sum up to the query. None where the sequence's own keys are also
    attended otherwise in this layer, as these are not kept."""
    if not isinstance(pattern, Composite):
        return ()
    own = [term for term in pattern.terms if term.source == OWN_KEYS and term.takes_part(layer)]
    of_sums = [
        term
        for term in own
        if pattern.branches[term.branch].is_kernel and term.summable is not None and term.summable.reach == "causal"
    ]
    return tuple(term.branch for term in of_sums) if len(of_sums) == len(own) else ()


def _read_by(resolved: Resolved) -> frozenset[str]:
    """The inputs that a pattern reads."""
    read = inputs_read(resolved.relation)  # PyTorch 2.11 cannot trace an empty frozenset[str]
    return read if resolved.fallback is None else read | inputs_read(resolved.fallback)


def _read_by_biases(pattern: Pattern) -> frozenset[str]:
    """The inputs that biases read."""
    branches = pattern.branches.values() if isinstance(pattern, Composite) else ()
    return frozenset[str]().union(*(inputs_read(relation_of(branch.bias)) for branch in branches))


def _told(pattern: Pattern) -> tuple[Told, ...]:
    """The sources of a pattern with their settings as numbers."""
    if not isinstance(pattern, Composite):
        return ()
    attended = {term.source for term in pattern.terms}
    return tuple(
        Told(item.name, item.kind, pattern.settings(item.name), item.name in attended)
        for item in pattern.resolved.sources
    )
