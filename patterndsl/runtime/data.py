"""What does a bound relation look up on a device? Inputs and draws as tensors, for membership point by point.

Operations on tensors only, without synchronisation and without reductions, so that membership traces into kernels.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from patterndsl.device.graphs import on_device
from patterndsl.diagnostics import InputError, input_error, nearest
from patterndsl.ir.draws import draw
from patterndsl.ir.index import Facet, Read
from patterndsl.ir.meaning import listed_by_reading
from patterndsl.ir.relation import Listed, Random, Relation, at_head, depends_on, draws_in, indices, lists_in
from patterndsl.sema.bind import Bound, InputShape

Inputs: TypeAlias = Mapping[str, Tensor]

INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True, slots=True)
class DeviceData:
    """The `Data` of membership, on one device.

    facets: [length] int64, or [batch, length] with `row` saying which batch row is asked for.
    draws: [heads or 1, num_q, count] per random node.
    """

    facets: Mapping[tuple[str, Facet], Tensor]
    draws: Mapping[Random, Tensor]
    row: Any = None

    def at_row(self, row: Any) -> DeviceData:
        """The same data, asked for one batch row (an int, or an index tensor)."""
        return replace(self, row=row)

    def read(self, name: str, facet: Facet, index: Any) -> Any:
        values = self.facets[name, facet]
        length = values.shape[-1]
        if length == 0:
            return index * 0 - 1
        index = on_device(index, values.device)
        inside = (index >= 0) & (index < length)
        place = index.clamp(0, length - 1)
        found = values[place] if values.dim() == 1 else values[0 if values.shape[0] == 1 else self.row, place]
        return torch.where(inside, found, -1)

    def drawn(self, node: Random, head: Any, q: Any) -> Iterable[Any]:
        keys = self.draws[node]
        num_q, count = keys.shape[1:]
        if num_q == 0:
            return
        q = on_device(q, keys.device)
        inside = (q >= 0) & (q < num_q)
        row = q.clamp(0, num_q - 1)
        for turn in range(count):
            yield torch.where(inside, keys[0 if keys.shape[0] == 1 else head, row, turn], -1)

    def lists(self, node: Listed, row: Any, key: Any) -> Any:
        return listed_by_reading(self, node, row, key)


def device_data(relation: Relation, num_heads: int, inputs: Inputs, device: torch.device) -> DeviceData:
    """Everything that the relation looks up, on the device. inputs: as `checked_inputs` returns them."""
    return data_of((relation,), num_heads, inputs, device)


def data_of(relations: Sequence[Relation], num_heads: int, inputs: Inputs, device: torch.device) -> DeviceData:
    """The same of several relations."""
    draws = {node: keys for part in relations for node, keys in draws_of(part, num_heads, device).items()}
    return DeviceData(facets_of(relations, inputs), draws)


def facets_of(relations: Iterable[Relation], inputs: Inputs) -> dict[tuple[str, Facet], Tensor]:
    """What the relations read of inputs."""
    reads = set[tuple[str, Facet]]()
    for relation in relations:
        reads |= {(index.name, index.facet) for index in indices(relation) if isinstance(index, Read)}
        reads |= {(node.name, "value") for node in lists_in(relation)}
    return {(name, facet): facet_of(inputs[name], facet) for name, facet in sorted(reads)}


def draws_of(relation: Relation, num_heads: int, device: torch.device) -> dict[Random, Tensor]:
    """What the relation draws, the same in each call."""
    return {node: _draws(node, num_heads, device) for node in draws_in(relation)}


def _draws(node: Random, num_heads: int, device: torch.device) -> Tensor:
    """[heads or 1, num_q, count]; heads with fewer rows or draws are filled up with -1."""
    heads = range(num_heads if depends_on(node, "head") else 1)
    nodes = [drawn for head in heads if isinstance(drawn := at_head(node, head), Random)]
    tables = [torch.from_numpy(draw(drawn).copy()) for drawn in nodes]
    num_q, count = (max(table.shape[dim] for table in tables) for dim in range(2))
    stacked = torch.full((len(tables), num_q, count), -1)
    for head, table in enumerate(tables):
        stacked[head, : table.shape[0], : table.shape[1]] = table
    return stacked.to(device)


def facet_of(values: Tensor, facet: Facet) -> Tensor:
    """[..., length]: the values, the first position of each one's run, or its place in the stable order by value."""
    match facet:
        case "value":
            return values
        case "start":
            places = torch.arange(values.shape[-1], device=values.device).expand_as(values)
            changes = torch.ones_like(values, dtype=torch.bool)
            changes[..., 1:] = values[..., 1:] != values[..., :-1]
            return torch.where(changes, places, 0).cummax(-1).values if values.shape[-1] else values
        case "rank":
            return place_of(values.argsort(stable=True, dim=-1))


def place_of(order: Tensor) -> Tensor:
    """Where each position stands in an order of all of them, [..., length]."""
    places = torch.arange(order.shape[-1], dtype=order.dtype, device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order.long(), places)


def checked_inputs(
    bound: Bound,
    inputs: Inputs | None,
    device: torch.device,
    batch: int | None = None,
    *,
    narrow: Container[str] = (),
    unchanged: Container[str] = (),
    whole: Container[str] = (),
) -> dict[str, Tensor]:
    """The inputs that the pattern reads, as int64 [length], [batch, length] or [batch, heads, length] on the device; a
    label of several rounds by the name of each, lists row by row, each key of a row once. narrow: those whose values
    are left in the integers that they came in. unchanged: lists that stay as they came, as they hold what there is,
    each once and in ascending order, or for who does not mind; whole: those that stay so, of all routes in one.

    Raises InputError (E501) on missing or unknown ones and (E502) on a wrong shape, dtype or device.
    """
    if inputs is not None and not isinstance(inputs, Mapping):
        example = f'{{"{bound.inputs[0].name}": ...}}' if bound.inputs else "None: the pattern reads none"
        raise input_error("E501", f"inputs is {type(inputs).__name__}, not a mapping", f"give inputs={example}")
    given = dict(inputs or {})
    wanted = {shape.name: shape for shape in bound.inputs}
    for name in given:
        if name not in wanted:
            near = nearest(str(name), wanted)
            listed = f"it reads {', '.join(wanted)}" if wanted else "it reads none"
            raise input_error(
                "E501", f"the pattern reads no input `{name}`", f"did you mean `{near}`?" if near else listed
            )
    found: dict[str, Tensor] = {}
    for name, shape in wanted.items():
        values = _checked_input(shape, given.get(name), bound.num_heads, device, batch)
        if name in whole:
            found[name] = values.flatten(-2)
            continue
        values = values if name in narrow else values.to(torch.int64)
        if shape.selection is not None:
            values = _row_by_row(shape, values if name in unchanged else each_once(values, shape.selection.num_blocks))
        found |= by_round(shape, values)
    return found


def route_by_route(bound: Bound, given: Inputs) -> dict[str, Tensor]:
    """Checked inputs whose lists came `whole`, as they would be otherwise."""
    found = dict(given)
    for shape in bound.inputs:
        if shape.selection is not None and shape.name in given:
            flat = found.pop(shape.name).to(torch.int64)
            lists = flat.reshape(*flat.shape[:-1], -1, shape.selection.width)
            found |= by_round(shape, _row_by_row(shape, each_once(lists, shape.selection.num_blocks)))
    return found


def _row_by_row(shape: InputShape, lists: Tensor) -> Tensor:
    """Lists [..., rows, width] as the relation reads them: in one row, but those of routes, which have names."""
    return lists if shape.rounds > 1 else lists.flatten(-2)


def by_round(shape: InputShape, values: Tensor) -> dict[str, Tensor]:
    """The values of an input as the relation reads them: those of several rounds by the name of each."""
    return {shape.name: values} if shape.rounds == 1 else dict(zip(shape.names, values.unbind(-2), strict=True))


def whole_lists(name: str, names: Sequence[str], given: Inputs) -> Tensor:
    """The lists [..., rows * width] of an input, as they came or route by route, which have names of their own."""
    return given[name] if name in given else torch.cat([given[one] for one in names], -1)


def each_once(lists: Tensor, num_blocks: int) -> Tensor:
    """Lists [..., rows, width] of what there is, each once and in ascending order, but for -1 in between. On a CPU a
    look tells of those that are so already, as what we list is; elsewhere it would wait for the device."""
    if lists.device.type == "cpu" and _ascend(lists, num_blocks):
        return lists
    ordered = lists.where((lists >= 0) & (lists < num_blocks), -1).sort(-1).values
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    return ordered.masked_fill(again, -1)


def _ascend(lists: Tensor, num_blocks: int) -> bool:
    if torch.compiler.is_compiling() or lists.numel() == 0:
        return False
    is_inside = (lists[..., 0] >= 0).all() & (lists[..., -1] < num_blocks).all()
    return bool(is_inside & (lists[..., 1:] > lists[..., :-1]).all())


def _checked_input(
    shape: InputShape, values: Tensor | None, num_heads: int, device: torch.device, batch: int | None
) -> Tensor:
    """[..., length], [..., rounds, length] of several rounds, [..., rows, width] of lists; without a dimension for
    heads where all have the same."""
    if values is None:
        how = f'pass inputs={{"{shape.name}": ...}}, {_form_of(shape)}'
        if shape.found_by == "layer":
            how = f"use patterndsl.nn.Attention, which learns it, or {how}"
        elif shape.found_by == "call":
            how = f"it is found in a call, or {how}"
        raise input_error("E501", f"input `{shape.name}` is missing", how)
    if not isinstance(values, Tensor):
        raise _misfit(shape, f"is {type(values).__name__}")
    allowed = (torch.bool,) if shape.dtype == "bool" else INTEGER_DTYPES
    if values.dtype not in allowed:
        raise _misfit(shape, f"has dtype {str(values.dtype).removeprefix('torch.')}")
    outer, last = values.dim() - len(shape.inner), values.shape[-len(shape.inner) :]
    if not 0 <= outer <= 2 or any(size not in (None, found) for size, found in zip(shape.inner, last, strict=False)):
        raise _misfit(shape, f"has shape {list(values.shape)}")
    if outer == 2 and values.shape[1] not in (1, num_heads):
        raise _misfit(shape, f"has {values.shape[1]} heads for {num_heads}")
    if outer >= 1 and batch is not None and values.shape[0] not in (1, batch):
        raise _misfit(shape, f"has {values.shape[0]} rows for a batch of {batch}")
    if values.device != device:
        problem = f"is on {values.device}, the tensors on {device}"
        raise _misfit(shape, problem, f" on {device}: {shape.name}.to('{device}')")
    return values.squeeze(1) if outer == 2 and values.shape[1] == 1 else values


def _form_of(shape: InputShape) -> str:
    """What its values are, in words."""
    kind = {"int": "an integer", "bool": "a bool"}[shape.dtype]
    inner = ", ".join("any length" if size is None else str(size) for size in shape.inner)
    return f"{kind} tensor [{inner}], [batch, {inner}] or [batch, heads, {inner}]"


def _misfit(shape: InputShape, problem: str, where: str = "") -> InputError:
    return input_error("E502", f"input `{shape.name}` {problem}", f"give {_form_of(shape)}{where}")
