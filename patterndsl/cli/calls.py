"""With what is a program called? The tensors and inputs of a trial: given in files and options, or made."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from patterndsl.cli.specs import documents_of, inputs_of
from patterndsl.composite import Composite
from patterndsl.diagnostics import error

if TYPE_CHECKING:
    import torch

    from patterndsl.cli.specs import Array
    from patterndsl.pattern import Pattern
    from patterndsl.runtime.composed import CompositeProgram
    from patterndsl.runtime.data import Inputs
    from patterndsl.runtime.program import Program
    from patterndsl.runtime.tensors import Tensors


def drawn_inputs(pattern: Pattern, arguments: argparse.Namespace) -> tuple[str, ...]:
    """The inputs of a call that are drawn, as nobody gives any."""
    parts = pattern.terms if isinstance(pattern, Composite) else ()
    relations = (part.resolved.relation for part in (pattern, *(term.pattern for term in parts)))
    declared = {item.name for item in pattern.resolved.inputs}
    return tuple(sorted(documents_of(relations, arguments) & declared))


def inputs_given(
    pattern: Pattern, program: Program | CompositeProgram, arguments: argparse.Namespace
) -> dict[str, Array]:
    """The inputs of a call, by name. Raises PatternError (E501, E502) on missing, unknown and wrong ones."""
    from patterndsl.runtime.composed import CompositeProgram

    shapes = program.inputs if isinstance(program, CompositeProgram) else program.bound.inputs
    return inputs_of(shapes, arguments, drawn=True, documents=drawn_inputs(pattern, arguments))


def call_of(
    pattern: Pattern,
    program: Program | CompositeProgram,
    arguments: argparse.Namespace,
    device: torch.device,
    given: Tensors | None = None,
) -> tuple[Tensors, Inputs | None]:
    """given: query, key and value of a file; else random ones. What only layers know is made by an initialised one:
    keys of sources, gates, tables, made scores, tensors of roles, labels of centroids and lists of an index.

    Raises PatternError: E501 and E502 on inputs, E701 where a layer makes more of a sequence than a file holds.
    """
    from patterndsl.nn.synthetic import synthetic
    from patterndsl.runtime.composed import CompositeProgram
    from patterndsl.runtime.tensors import Shape, Tensors, as_inputs, random_tensors

    shapes = program.inputs if isinstance(program, CompositeProgram) else program.bound.inputs
    inputs = as_inputs(inputs_given(pattern, program, arguments), device) or None
    by_layer = [item.name for item in shapes if item.found_by == "layer" and item.name not in (inputs or {})]
    heads = program.num_heads
    shape = Shape(
        batch=arguments.batch or 1,
        heads=heads,
        kv_heads=arguments.kv_heads or heads,
        head_dim=arguments.head_dim or 64,
        dtype=arguments.dtype or "float32",
        device=device,
    )
    if given is not None:
        (batch, heads, _, head_dim), kv_heads = given.query.shape, given.key.shape[1]
        dtype = str(given.query.dtype).removeprefix("torch.")
        shape = Shape(batch, heads, kv_heads, head_dim, dtype, device)
    if not by_layer and not isinstance(program, CompositeProgram):
        if given is not None:
            return given, inputs
        return random_tensors(program.sizes, shape, arguments.seed), inputs
    layer = program.layer if isinstance(program, CompositeProgram) else program.bound.layer
    made, found = synthetic(pattern, program.sizes, shape, inputs, layer=layer, seed=arguments.seed)
    if given is None:
        return made, found
    told = [*(f"{kind} `{name}`" for (kind, name, *_) in made.more if kind != "table"), *(f"`{x}`" for x in by_layer)]
    if told:
        message = f"--input has no part here: a layer makes {told[0]} of the whole sequence"
        raise error("E701", message, None, "drop --input, or run a term: --term NAME")
    return Tensors(given.query, given.key, given.value, made.more), inputs
