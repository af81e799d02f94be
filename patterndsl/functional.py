"""How does a user attend without thinking of programs? `attention` compiles once per pattern and shape."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from patterndsl.composite import Composite
from patterndsl.diagnostics import input_error
from patterndsl.loading import parse
from patterndsl.pattern import Pattern
from patterndsl.runtime import ops, scored_ops
from patterndsl.runtime.arguments import as_autocast, check_backend, check_no_others
from patterndsl.runtime.composed import Call, check_terms, combined
from patterndsl.runtime.data import Inputs
from patterndsl.runtime.learned import Learned
from patterndsl.runtime.program import Program
from patterndsl.runtime.projected import Roles
from patterndsl.runtime.scored_term import ScoredTerm
from patterndsl.sema.parameters import MAX_LAYER, Sizes, counted, sizes_of
from patterndsl.source.sequence import Keys
from patterndsl.terms import Term

MAX_PROGRAMS = 64


class CacheInfo(NamedTuple):
    """Programs kept by `attention`: found again, compiled, most that are kept, kept now."""

    hits: int
    misses: int
    max_size: int
    size: int


_programs: OrderedDict[tuple[object, ...], Program] = OrderedDict()
_counts = {"hits": 0, "misses": 0}


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern | str,
    *,
    inputs: Inputs | None = None,
    sources: Mapping[str, Keys] | None = None,
    gates: Mapping[str, Tensor] | None = None,
    scores: Mapping[str, Tensor] | None = None,
    tables: Mapping[str, Any] | None = None,
    roles: Roles | None = None,
    layer: int = 0,
    q_start: int = 0,
    n: int | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern | str,
    *,
    inputs: Inputs | None = None,
    sources: Mapping[str, Keys] | None = None,
    gates: Mapping[str, Tensor] | None = None,
    scores: Mapping[str, Tensor] | None = None,
    tables: Mapping[str, Any] | None = None,
    roles: Roles | None = None,
    layer: int = 0,
    q_start: int = 0,
    n: int | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern | str,
    *,
    inputs: Inputs | None = None,
    sources: Mapping[str, Keys] | None = None,
    gates: Mapping[str, Tensor] | None = None,
    scores: Mapping[str, Tensor] | None = None,
    tables: Mapping[str, Any] | None = None,
    roles: Roles | None = None,
    layer: int = 0,
    q_start: int = 0,
    n: int | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern | str,
    *,
    inputs: Inputs | None = None,
    sources: Mapping[str, Keys] | None = None,
    gates: Mapping[str, Tensor] | None = None,
    scores: Mapping[str, Tensor] | None = None,
    tables: Mapping[str, Any] | None = None,
    roles: Roles | None = None,
    layer: int = 0,
    q_start: int = 0,
    n: int | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sparse attention by a pattern (or its text), compiled once per pattern, shape and device.

    query: [B, Hq, Tq, D], key: [B, Hkv, Tk, D], value: [B, Hkv, Tk, Dv]; returns as `Program.__call__` does.
    q_start: position of the first query, for queries that continue a sequence; n: the N of the pattern, by default
    q_start + Tq. sources, gates, scores, tables, roles: what layers make, see `CompositeProgram.__call__`. The last
    MAX_PROGRAMS programs are kept.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor) or tensor.dim() != 4:
            shape = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise input_error("E503", f"{name} is {shape}", "give query [B, Hq, Tq, D], key and value [B, Hkv, Tk, D]")
    check_backend(backend)
    if isinstance(pattern, str) and not torch.compiler.is_compiling():  # a graph looks into no parser
        pattern = as_pattern(pattern)
    if isinstance(pattern, Composite):
        learned = Learned(sources or {}, gates or {}, scores or {}, tables or {}, roles={} if roles is None else roles)
        asked = ops.Call(layer, q_start, -1 if n is None else n)
        return composite_attention(
            (query, key, value), pattern, learned, inputs, asked, scale, backend, return_lse=return_lse
        )
    check_no_others({"sources": sources, "gates": gates, "scores": scores, "tables": tables, "roles": roles})
    if torch.compiler.is_compiling():
        return _traced(
            query,
            key,
            value,
            pattern,
            inputs,
            ops.Call(layer, q_start, -1 if n is None else n),
            scale,
            backend,
            return_lse,
        )
    sizes = sizes_of(n, query.shape[2], key.shape[2], q_start)
    layer = counted("layer", layer, 0, MAX_LAYER)
    program = _program(as_pattern(pattern), sizes, query.shape[1], layer, query.device, backend)
    return program(query, key, value, inputs=inputs, scale=scale, return_lse=return_lse)


def composite_attention(
    tensors: tuple[Tensor, Tensor, Tensor],
    pattern: Composite,
    learned: Learned,
    inputs: Inputs | None,
    asked: ops.Call,
    scale: float | None,
    backend: str,
    *,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` by a pattern of several terms, with all that a layer makes for it."""
    query, key, value = tensors
    terms = {term.name: term.pattern for term in pattern.terms}
    total = asked.q_start + query.shape[2] if asked.n == -1 else asked.n
    layer = counted("layer", asked.layer, 0, MAX_LAYER)
    if backend != "auto":
        check_terms(pattern, layer, backend)

    def program_of(name: str, num_keys: int) -> Program:
        sizes = sizes_of(total, query.shape[2], num_keys, asked.q_start)
        return _program(terms[name], sizes, query.shape[1], layer, query.device, backend)

    q_len, kv_len, q_start = query.shape[2], key.shape[2], asked.q_start
    if torch.compiler.is_compiling():  # lengths have no numbers yet, and are checked where a graph asks for programs
        sizes = Sizes(q_len, kv_len, q_start, total)
    else:
        sizes = sizes_of(total, q_len, kv_len, q_start)
    home = f"pattern:{backend}:{pattern.text}"
    call = _Call(program_of, sizes, inputs, scale, home, asked._replace(n=total), terms, backend)
    return combined(pattern, call, query, (key, value), learned, return_lse=return_lse)


@dataclass(frozen=True, slots=True, eq=False)
class _Call(Call):
    """The terms of a call, each an attention by itself, so that graphs find programs by the sizes of each call."""

    terms: Mapping[str, Pattern]
    backend: str

    def attend(self, term: Term, query: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
        """Output and lse of a term."""
        layer, q_start, n = self.asked
        out, lse = attention(
            query,
            *keys,
            self.terms[term.name],
            inputs=term.read_of(self.inputs),
            layer=layer,
            q_start=q_start,
            n=n,
            scale=self.scale,
            backend=self.backend,
            return_lse=True,
        )
        return out, lse


def _traced(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern | str,
    inputs: Inputs | None,
    call: ops.Call,
    scale: float | None,
    backend: str,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same in a graph of torch.compile, which finds a program for the sizes of each call, so that new ones do not
    compile it again."""
    text = pattern if isinstance(pattern, str) else as_pattern(pattern).text
    query, key, value = as_autocast(query), as_autocast(key), as_autocast(value)
    address = f"pattern:{backend}:{text}"
    output, lse = ops.traced(query, key, value, inputs, address, scale, call, want_lse=return_lse)
    return (output, lse) if return_lse else output


def _found(address: str, query: Tensor, key: Tensor, call: ops.Call) -> Program:
    """What a graph asks for."""
    backend, _, text = address.partition(":")
    if isinstance(as_pattern(text), Composite):
        message = "the text of a pattern with several terms stands in a compiled function"
        raise input_error("E505", message, "parse it outside: pattern = patterndsl.parse(text)")
    return program_for(as_pattern(text), query, key, call, backend)


def program_for(pattern: Pattern, query: Tensor, key: Tensor, call: ops.Call, backend: str) -> Program:
    """The program of a pattern of one relation for the sizes of a call, found again or compiled."""
    n = None if call.n == -1 else call.n
    sizes = sizes_of(n, query.shape[2], key.shape[2], call.q_start)
    layer = counted("layer", call.layer, 0, MAX_LAYER)
    return _program(pattern, sizes, query.shape[1], layer, query.device, backend)


def _found_term(address: str, query: Tensor, key: Tensor, call: ops.Call) -> ScoredTerm:
    """The same of a term of a pattern with several, or with scores of its own."""
    name, backend, text = address.split(":", 2)
    pattern = as_pattern(text)
    assert isinstance(pattern, Composite)
    term = next(term for term in pattern.terms if term.name == name)
    return ScoredTerm(pattern, term, program_for(term.pattern, query, key, call, backend))


ops.finders["pattern"] = _found
scored_ops.finders["pattern"] = _found_term


def as_pattern(pattern: object) -> Pattern:
    """A Pattern, or the one of a text. Raises InputError (E304) on anything else."""
    if isinstance(pattern, Pattern):
        return pattern
    if isinstance(pattern, str):
        return _parsed(pattern)
    if isinstance(pattern, Program):
        help = "a program is called itself: program(query, key, value)"
        raise input_error("E304", "a Program stands where a pattern belongs", help)
    kind = "None" if pattern is None else type(pattern).__name__
    raise input_error("E304", f"the pattern is {kind}", 'give text such as "causal & window(256)", or a Pattern')


@lru_cache(maxsize=MAX_PROGRAMS)
def _parsed(text: str) -> Pattern:
    return parse(text)


def _program(pattern: Pattern, sizes: Sizes, heads: int, layer: int, device: torch.device, backend: str) -> Program:
    cache_key = (pattern.text, sizes, heads, layer, device, backend)
    program = _programs.get(cache_key)
    if program is not None:
        _counts["hits"] += 1
        _programs.move_to_end(cache_key)
        return program
    _counts["misses"] += 1
    program = pattern.compile(
        sizes.total,
        q_len=sizes.q_len,
        kv_len=sizes.kv_len,
        q_start=sizes.q_start,
        heads=heads,
        layer=layer,
        device=device,
        backend=backend,
    )
    _programs[cache_key] = program
    if len(_programs) > MAX_PROGRAMS:
        _programs.popitem(last=False)
    return program


def cache_info() -> CacheInfo:
    """How the program cache is doing."""
    return CacheInfo(_counts["hits"], _counts["misses"], MAX_PROGRAMS, len(_programs))


def cache_clear() -> None:
    """Forgets all programs."""
    _programs.clear()
    _counts.update(hits=0, misses=0)
