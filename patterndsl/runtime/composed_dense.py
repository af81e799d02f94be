"""What is the right answer of a pattern with several terms? Dense, branch by branch, straight from membership.

What `oracle` is to one relation: every pair of a row is looked at, in the dtype of the tensors, by products over all
keys, and nothing of plans, tiles, merges or running sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from patterndsl.ir.meaning import Point
from patterndsl.runtime.composed import CompositeProgram
from patterndsl.runtime.data import Inputs
from patterndsl.runtime.heads import for_each_query_head
from patterndsl.runtime.learned import Learned
from patterndsl.runtime.program import Program
from patterndsl.runtime.projected import tensors_of
from patterndsl.runtime.scored import Met, ReadByBias, as_table, scores_of, tables_read
from patterndsl.runtime.scored_term import ScoredTerm
from patterndsl.runtime.summed import Features
from patterndsl.score.features import elementwise
from patterndsl.source.sequence import Keys

if TYPE_CHECKING:
    from patterndsl.terms import Branch, Term


@dataclass(frozen=True, slots=True, eq=False)
class _Seen:
    """What some rows see of a term: query [B, H, rows, D], key and value [B, H, keys, D], and how often each key
    counts, [B or 1, H or 1, rows, keys]."""

    term: Term
    program: Program
    query: Tensor
    key: Tensor
    value: Tensor
    counts: Tensor

    @property
    def num_pairs(self) -> int:
        """Over all heads and batch rows."""
        kept = self.counts > 0
        return int(kept.expand(*self.query.shape[:3], kept.shape[-1]).sum())


def dense_rows(
    program: CompositeProgram, query: Tensor, own: Keys, learned: Learned, inputs: Inputs | None, rows: Tensor
) -> tuple[Tensor, int]:
    """The output [B, H, rows, Dv] at some local rows, and the pairs that they attend; differentiable.

    query: [B, H, Tq, D], own: the sequence's key and value. inputs: with all labels and lists. An empty row yields 0.
    Work and memory: O(B H rows keys D).
    """
    pattern, outputs, num_pairs = program.pattern, [], 0
    for name, terms in pattern.branches_at(program.layer).items():
        branch = pattern.branches[name]
        seen = [_seen(program, term, query, learned.keys_of(term.source, own), learned, inputs, rows) for term in terms]
        num_pairs += sum(item.num_pairs for item in seen)
        if branch.is_kernel:
            out = _summed(program, branch, seen, learned, rows)
        else:
            out = _softmax(program, branch, seen, learned, inputs, rows)
        if pattern.combine == "gate":
            out = out * learned.gates[name].expand(query.shape[:3])[:, :, rows, None].to(out.dtype)
        outputs.append(out)
    if not outputs:
        return query.new_zeros((*query.shape[:2], len(rows), own[1].shape[3])), 0
    total = torch.stack(outputs).sum(0)
    return (total / len(outputs) if pattern.combine == "mean" else total), num_pairs


def _seen(
    program: CompositeProgram,
    term: Term,
    query: Tensor,
    keys: Keys,
    learned: Learned,
    inputs: Inputs | None,
    rows: Tensor,
) -> _Seen:
    query, keys = tensors_of(term, query, keys, learned.roles)
    of_term = program.program(term.name, keys[0].shape[2])
    counts = of_term.counts(rows + program.sizes.q_start, inputs=term.read_of(inputs))
    key, value = (for_each_query_head(x, query.shape[1]) for x in keys)
    return _Seen(term, of_term, query[:, :, rows], key, value, counts if counts.dim() == 4 else counts[None])


def _softmax(
    program: CompositeProgram,
    branch: Branch,
    seen: Sequence[_Seen],
    learned: Learned,
    inputs: Inputs | None,
    rows: Tensor,
) -> Tensor:
    """One softmax over the keys of all terms."""
    shape = seen[0].query.shape[:3]
    counts = torch.cat([item.counts.expand(*shape, -1) for item in seen], -1)
    value = torch.cat([item.value for item in seen], 2)
    has = (counts > 0).any(-1, keepdim=True)
    how_often = counts.clamp(min=1).to(value.dtype).log() if counts.dtype != torch.bool else 0.0
    if branch.runs == "planned" and value.dtype != torch.float64:  # the digits that PyTorch's own attention has
        mask = torch.zeros_like(counts, dtype=value.dtype).masked_fill(~(counts > 0) & has, -torch.inf) + how_often
        return _by_sdpa(seen, value, mask).masked_fill(~has, 0.0)
    scores = torch.cat([_scores(program, branch, item, learned, inputs, rows) for item in seen], -1)
    scores = (scores + how_often).masked_fill(~(counts > 0) & has, -torch.inf)
    return (scores.softmax(-1) @ value).masked_fill(~has, 0.0)


def _by_sdpa(seen: Sequence[_Seen], value: Tensor, mask: Tensor) -> Tensor:
    """PyTorch's dense attention. Terms whose queries differ by their roles have channels of their own, 0 in others."""
    width, out_width = seen[0].query.shape[3], value.shape[3]
    queries = {item.term.projections.query: item.query for item in seen}
    order = list(queries)
    query = torch.cat(list(queries.values()), -1)

    def placed(item: _Seen) -> Tensor:
        before = order.index(item.term.projections.query)
        return pad(item.key, (width * before, width * (len(order) - 1 - before)))

    key = torch.cat([placed(item) for item in seen], 2)
    value = pad(value, (0, max(0, query.shape[3] - out_width)))  # of one width the quick kernel takes them
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=width**-0.5)
    return out[..., :out_width]


def _scores(
    program: CompositeProgram, branch: Branch, seen: _Seen, learned: Learned, inputs: Inputs | None, rows: Tensor
) -> Tensor:
    """[B, H, rows, keys]."""
    pattern, device = program.pattern, seen.query.device
    kinds = {item.name: item.kind for item in pattern.resolved.tables}
    tables = {
        name: as_table(name, kinds[name], pattern.table_size(name), learned.tables[name], seen.query)
        for name in tables_read(branch.bias)
    }
    scored = ScoredTerm(pattern, seen.term, seen.program)
    scoring = scored.scoring(tables, None)
    given = scored.read_by_bias(scoring.bias, inputs, seen.query, seen.key)
    (batch, heads), num_keys = seen.query.shape[:2], seen.key.shape[2]
    read = ReadByBias.of(scoring.bias, given, heads, seen.query)
    at_heads = torch.arange(heads, device=device)
    data = read.at(torch.arange(batch, device=device), at_heads)
    at_keys = torch.arange(num_keys, device=device)
    point = Point((rows.to(device) + program.sizes.q_start)[:, None], at_keys, at_heads[:, None, None, None], data)
    made = None
    if branch.is_made_up:
        made = learned.scores[branch.name].expand(batch, -1, -1, -1)[:, :, rows, None, :num_keys].movedim(3, 2)
    met = Met(seen.query[:, :, None], seen.key[:, :, None], seen.query.shape[3] ** -0.5)
    return scores_of(met, made, scoring, point)[:, :, 0]


def _summed(program: CompositeProgram, branch: Branch, seen: Sequence[_Seen], learned: Learned, rows: Tensor) -> Tensor:
    """Products of features as weights of all pairs."""
    pattern, name, sizes = program.pattern, branch.name, program.sizes
    query, heads = seen[0].query, seen[0].query.shape[1]
    decay = pattern.decay(name, heads, program.layer)
    features = Features(branch.score.name, pattern.score_settings(name), learned.directions.get(name), decay)
    counts = torch.cat([item.counts for item in seen], -1)
    key, value = torch.cat([item.key for item in seen], 2), torch.cat([item.value for item in seen], 2)
    asked, held = (elementwise(features.phi, features.of(x)) for x in (query, key))
    weights, shift = _products(asked, held, features.is_log)
    if decay is not None:
        steps = (rows + sizes.q_start)[:, None] - torch.arange(key.shape[2])
        factors = torch.tensor(decay, dtype=torch.float64)[:, None, None] ** steps.clamp(min=0)
        weights = weights * factors.to(weights)
    weights = weights.masked_fill(~(counts > 0), 0.0)
    if not features.normalise:
        return ((weights @ value.to(weights.dtype)) * shift.exp()).to(value.dtype)
    total = weights.sum(-1, keepdim=True)
    quotient = (weights @ value.to(weights.dtype)) / torch.where(total == 0, 1, total)
    return torch.where(total == 0, 0, quotient).to(value.dtype)


def _products(asked: Tensor, held: Tensor, is_log: bool) -> tuple[Tensor, Tensor]:
    """Weights [B, H, rows, keys] of features, divided by exp(shift [B, H, rows, 1])."""
    if not is_log or not held.shape[2]:
        return asked @ held.mT, asked.new_zeros((*asked.shape[:3], 1))
    highest = held.detach().amax(2, keepdim=True)
    exponents = asked + highest
    shift = exponents.detach().amax(-1, keepdim=True)
    return (exponents - shift).exp() @ (held - highest).exp().mT, shift
