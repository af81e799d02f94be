"""How is a pattern decoded token by token? A cache that holds what the pattern may still need, and attends to it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Literal, overload

import numpy as np
import torch
from torch import Tensor

from patterndsl.analysis.holding import MAX_POSITIONS, bound_for_decoding, holding
from patterndsl.composite import Composite
from patterndsl.diagnostics import error, input_error
from patterndsl.functional import as_pattern
from patterndsl.ir.relation import Random, Relation
from patterndsl.pattern import Pattern
from patterndsl.runtime.arguments import DTYPES, checked_device, checked_scale, with_positive_scale
from patterndsl.runtime.data import DeviceData, Inputs, facets_of
from patterndsl.runtime.decoding import gathered
from patterndsl.runtime.decoding.gathered import Newest
from patterndsl.runtime.decoding.history import History
from patterndsl.runtime.decoding.pages import Integers
from patterndsl.runtime.decoding.store import Store
from patterndsl.runtime.kernels.asked import asked_of, draws_for
from patterndsl.runtime.kernels.attention import check_can_run
from patterndsl.sema.bind import Bound
from patterndsl.sema.parameters import MAX_HEADS, MAX_LAYER, MAX_SIZE, counted, integers

BACKENDS = ("auto", "gathered", "triton")
PAGES = (16, 32, 64, 128)


@dataclass(frozen=True, eq=False)
class _Part:
    """Key heads that hold the same, and the relation of their query heads; `head` is in it where these differ."""

    store: Store
    q_heads: tuple[int, ...]
    relation: Relation
    bound: Bound

    @cached_property
    def draws(self) -> dict[Random, Tensor]:
        return draws_for(self.relation, self.bound.num_heads, self.store.device)

    def attend(self, asked: Newest, inputs: Inputs, backend: str) -> tuple[Tensor, Tensor]:
        """Output and lse of the query heads of these key heads."""
        if backend == "triton":
            from patterndsl.runtime.kernels.steps import attend

            return attend(self.store, asked, asked_of(self.relation, self.bound.sizes, inputs, self.draws))
        data = DeviceData(facets_of([self.relation], inputs) if inputs else {}, self.draws)
        return gathered.attend(self.store, asked, self.relation, data)


class Cache:
    """Keys and values for decoding by a pattern: of what is appended, all that a later query may attend.

        cache = patterndsl.Cache("causal & (recent(4096) | first(4))", batch=8, heads=32, kv_heads=8, head_dim=128)
        cache.append(key, value)          # the prompt's, [B, Hkv, T, D]
        cache.append(key, value)          # the next token's, [B, Hkv, 1, D]
        out = cache.attend(query)         # [B, Hq, 1, D], the rows of the newest positions

    A row of `attend` is that of full attention by the pattern. What is held follows from the pattern's cache policy:
    the newest keys in a ring, and older ones only where they last, so that memory does not grow with the sequence
    where the policy is bounded. Key heads hold what their own query heads need. Batch rows may have different lengths,
    stand still, and begin anew. Nothing here has gradients.
    """

    def __init__(
        self,
        pattern: Pattern | str,
        *,
        batch: int,
        heads: int,
        head_dim: int,
        kv_heads: int | None = None,
        value_dim: int | None = None,
        layer: int = 0,
        n: int | None = None,
        max_queries: int = 1,
        page: int = 64,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        backend: str = "auto",
    ) -> None:
        """heads, kv_heads, head_dim, value_dim, layer: as in attention. n: the length that the sequences will have,
        which patterns with N in them need. max_queries: the most newest positions that one call attends for. page:
        places that a row takes at once. backend: "triton", on a GPU, or "gathered"; by default the one that is there.

        Raises PatternError: E505 where a query attends a later key, or the pattern is of a kind that is not decoded
        here; E406 where it depends on N, and n is not given.
        """
        self.pattern = as_pattern(pattern)
        self.batch, self.heads = counted("batch", batch, 0, MAX_SIZE), counted("heads", heads, 1, MAX_HEADS)
        self.kv_heads = self.heads if kv_heads is None else counted("kv_heads", kv_heads, 1, MAX_HEADS)
        if self.heads % self.kv_heads:
            message = f"{self.heads} heads over {self.kv_heads} kv_heads"
            raise input_error("E503", message, "heads must be a multiple of kv_heads")
        self.head_dim = counted("head_dim", head_dim, 1, MAX_SIZE)
        self.value_dim = self.head_dim if value_dim is None else counted("value_dim", value_dim, 1, MAX_SIZE)
        self.max_queries = counted("max_queries", max_queries, 1, MAX_POSITIONS)
        if not isinstance(page, int) or page not in PAGES:
            raise input_error("E406", f"pages of {page!r} places", f"give one of {', '.join(map(str, PAGES))}")
        if dtype not in DTYPES:
            raise input_error("E505", f"a cache of {dtype}", "use float32, bfloat16, float16 or float64")
        self.dtype, self.device = dtype, checked_device(device)
        self.backend = _backend(backend, self.device, dtype)
        if isinstance(self.pattern, Composite):
            help = "decode a term of it, pattern.terms[0].pattern, or keep the keys and call patterndsl.attention"
            raise error("E505", "a pattern of several sources, branches or scores is not decoded here", None, help)
        self.n = None if n is None else counted("n", n, 0, MAX_SIZE)
        self.layer = counted("layer", layer, 0, MAX_LAYER)
        bound = bound_for_decoding(self.pattern.resolved, n, self.heads, self.layer)
        self._parts = tuple(self._parts_of(bound, n, page))
        self._history = History(bound, self.batch, self.device)
        self._lengths = np.zeros(self.batch, dtype=np.int64)

    def _parts_of(self, bound: Bound, n: int | None, page: int) -> Iterator[_Part]:
        """Key heads whose query heads need the same, together."""
        group_of = {head: at for at, group in enumerate(bound.groups) for head in group.heads}
        kv_group = self.heads // self.kv_heads
        alike = dict[tuple[int, ...], list[int]]()
        for kv_head in range(self.kv_heads):
            groups = {group_of[head] for head in range(kv_head * kv_group, (kv_head + 1) * kv_group)}
            alike.setdefault(tuple(sorted(groups)), []).append(kv_head)
        empty = (
            torch.empty(0, width, dtype=self.dtype, device=self.device) for width in (self.head_dim, self.value_dim)
        )
        like = tuple(empty)
        for members, kv_heads in alike.items():
            relations = [bound.groups[at].relation for at in members]
            store = Store(kv_heads, holding(relations, n), self.batch, self.max_queries, page, (like[0], like[1]))
            q_heads = tuple(kv_head * kv_group + at for kv_head in kv_heads for at in range(kv_group))
            yield _Part(store, q_heads, relations[0] if len(members) == 1 else bound.relation, bound)

    def __copy__(self) -> Cache:
        # places that two caches write to would be of neither
        return copy.deepcopy(self)

    def __repr__(self) -> str:
        shape = f"batch={self.batch}, heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}"
        return f"Cache({self.pattern.text!r}, {shape}, {self.kind}, backend={self.backend!r})"

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many tokens each batch row has."""
        return tuple(self._lengths.tolist())

    @property
    def kind(self) -> Literal["bounded", "growing"]:
        """Whether what a row holds has a bound, however long it becomes. (A pattern's inputs are kept in any case, an
        integer for each token.)"""
        return "bounded" if all(part.store.pages.holding.kind == "bounded" for part in self._parts) else "growing"

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values, and where they are."""
        return sum(part.store.nbytes for part in self._parts)

    @torch.no_grad()
    def append(
        self,
        key: Tensor,
        value: Tensor,
        *,
        counts: Sequence[int] | Tensor | None = None,
        inputs: Inputs | None = None,
    ) -> None:
        """The next tokens of each row: key [B, Hkv, T, D], value [B, Hkv, T, Dv], of any T.

        counts: how many of the T tokens each row has, the first ones; 0 lets a row stand still. On the host: a list, or
        a tensor on the CPU. inputs: of the pattern, [T] or [B, T], values of the new tokens. Raises InputError: E503 on
        other tensors, E406 on other counts or a sequence that becomes too long, E501 and E502 on inputs. Nothing is
        appended then. Work: O(B Hkv T D), of which only what is held is written.
        """
        num_tokens = key.shape[2] if isinstance(key, Tensor) and key.dim() == 4 else 0
        self._check("key", key, (self.batch, self.kv_heads, num_tokens, self.head_dim))
        self._check("value", value, (self.batch, self.kv_heads, num_tokens, self.value_dim))
        found = self._counts(counts, num_tokens)
        self._history.append(self._checked(inputs, num_tokens, found), self._lengths, found)
        for part in self._parts:
            heads = part.store.kv_heads
            part.store.append(_heads(key, heads, self.kv_heads), _heads(value, heads, self.kv_heads), found)
        self._lengths = self._lengths + found

    def check_next(self, num_tokens: int, inputs: Inputs | None = None) -> None:
        """Raises what `append` would for so many tokens of each row with these inputs, before any is appended."""
        self._checked(inputs, num_tokens, self._counts(None, num_tokens))

    @overload
    def attend(self, query: Tensor, *, scale: float | None = None, return_lse: Literal[False] = False) -> Tensor: ...

    @overload
    def attend(
        self, query: Tensor, *, scale: float | None = None, return_lse: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...

    @torch.no_grad()
    def attend(
        self, query: Tensor, *, scale: float | None = None, return_lse: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The rows of the T newest positions of each batch row, whose keys are appended already.

        query: [B, Hq, T, D], T at most max_queries; its last one is at the newest position. Returns the output
        [B, Hq, T, Dv] in the query's dtype, and with return_lse the lse [B, Hq, T]. An empty row, and one before the
        first token, yields 0 and -inf. Work: what the rows attend is read once; where the cache is growing, the
        predicate is asked at all that is held.
        """
        q_len = query.shape[2] if isinstance(query, Tensor) and query.dim() == 4 else 1
        self._check("query", query, (self.batch, self.heads, q_len, self.head_dim))
        if q_len > self.max_queries:
            message = f"queries at {q_len} positions, and the cache is made for {self.max_queries}"
            raise input_error(
                "E503", message, "make the cache with max_queries=, or attend for a whole prompt by attention()"
            )
        query, scale = with_positive_scale(query, checked_scale(scale, self.head_dim))
        parts = self._parts if query.numel() else ()
        group = self.heads // self.kv_heads
        found = [
            part.attend(
                Newest(_heads(query, part.q_heads, self.heads), q_len, group, scale),
                self._history.values,
                self.backend,
            )
            for part in parts
        ]
        if len(found) == 1:  # as it is: to write it once more would take a GPU about as long
            out, lse = found[0]
        else:
            wide = torch.promote_types(query.dtype, torch.float32)
            out = query.new_empty(self.batch, self.heads, q_len, self.value_dim)
            lse = query.new_empty(self.batch, self.heads, q_len, dtype=wide)
            for part, of_part in zip(parts, found, strict=True):
                at = list(part.q_heads)
                out[:, at], lse[:, at] = of_part
        return (out, lse) if return_lse else out

    def reset(self, rows: Iterable[int] | None = None) -> None:
        """These batch rows, or all, are empty again, and others may take their pages. Raises InputError (E406)."""
        given = range(self.batch) if rows is None else rows
        found = integers(list(given)) if isinstance(given, Iterable) else None
        if found is None or any(not 0 <= row < self.batch for row in found):
            raise input_error("E406", f"there are no rows {rows!r}", f"give integers in 0..{self.batch}")
        for part in self._parts:
            part.store.reset(found)
        self._lengths[list(found)] = 0

    def _check(self, name: str, x: object, shape: tuple[int, ...]) -> None:
        """Raises InputError (E503)."""
        form = ", ".join(map(str, shape))
        help = f"give {name}: [{form}] in {self.dtype} on {self.device}"
        if not isinstance(x, Tensor):
            raise input_error("E503", f"{name} is {type(x).__name__}, not a tensor", help)
        if tuple(x.shape) != shape or x.dtype != self.dtype or x.device != self.device:
            raise input_error("E503", f"{name} is {list(x.shape)}, {x.dtype} on {x.device}", help)

    def _checked(self, inputs: Inputs | None, num_tokens: int, counts: Integers) -> dict[str, Tensor]:
        """The inputs of new tokens. Raises InputError (E406, E501, E502)."""
        longest = int((self._lengths + counts).max(initial=0))
        most = MAX_POSITIONS if self.n is None else self.n
        if longest > most:
            message = f"a sequence of {longest:,} tokens, where {most:,} is the most"
            raise input_error("E406", message, "make the cache with a larger n=, or reset the row")
        return self._history.checked(inputs, num_tokens)

    def _counts(self, counts: Sequence[int] | Tensor | None, num_tokens: int) -> Integers:
        if counts is None:
            return np.full(self.batch, num_tokens, dtype=np.int64)
        found = integers(counts.tolist() if isinstance(counts, Tensor) else counts)
        if found is None or len(found) != self.batch or any(not 0 <= count <= num_tokens for count in found):
            help = f"give {self.batch} integers in 0..{num_tokens + 1}, one for each batch row"
            raise input_error("E406", f"counts is {counts!r}", help)
        return np.array(found, dtype=np.int64)


def _heads(x: Tensor, heads: Sequence[int], num_heads: int) -> Tensor:
    """[B, heads, T, D] of some heads."""
    return x if len(heads) == num_heads else x[:, list(heads)]


def _backend(asked: object, device: torch.device, dtype: torch.dtype) -> str:
    """What runs. Raises InputError (E505)."""
    if asked not in BACKENDS:
        raise input_error("E505", f"there is no decoding backend {asked!r}", f"the backends are {', '.join(BACKENDS)}")
    if asked == "triton":
        check_can_run(device)
        if dtype == torch.float64:
            raise input_error("E505", "the triton backend has no float64", "use backend='gathered'")
    if asked != "auto":
        return str(asked)
    return "triton" if device.type == "cuda" and dtype != torch.float64 and find_spec("triton") else "gathered"
