"""How are the passes of a plan written as data, and read again? Geometry as JSON, masks and tile lists as arrays.

Reading is the exact inverse, the local relation of block-sparse passes included; only how many boxes a descent looked
at is not kept. What a file is, and whether it can be trusted, stands above.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias, assert_never, get_args

import numpy as np

from patterndsl.ir import codec
from patterndsl.lower.costs import Cost
from patterndsl.lower.devices import Kernel
from patterndsl.lower.geometry import Axis, Geometry, Side
from patterndsl.lower.order import Order, Patches
from patterndsl.lower.plan import Option, Pass, Plan
from patterndsl.lower.shapes import Band, Full, Keys, Masked, Orders, Piece, Shape, Sparse, Triangle
from patterndsl.lower.tiles import Tiles

Array: TypeAlias = np.ndarray[Any, Any]


@dataclass
class Arrays:
    """Arrays by name, each once however often it is used."""

    named: dict[str, Array] = field(default_factory=dict)
    _names: dict[tuple[str, tuple[int, ...], bytes], str] = field(default_factory=dict)

    def add(self, array: Array) -> str:
        """The name under which the array is found."""
        array = np.ascontiguousarray(array)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._names:
            self._names[key] = str(len(self.named))
            self.named[self._names[key]] = array
        return self._names[key]


# ---- writing


def chosen(plan: Plan) -> tuple[tuple[Option, ...], ...]:
    """Of each head group the option for inference, and the one for training where that is another."""
    pairs = zip(plan.forward, plan.training, strict=True)
    return tuple((first,) if first == second else (first, second) for first, second in pairs)


def written_option(option: Option, arrays: Arrays) -> dict[str, Any]:
    """The option as JSON; its masks and lists go to `arrays`."""
    return {"text": option.text, "passes": [_written_pass(item, arrays) for item in option.passes]}


def written_tiles(tiles: Tiles, arrays: Arrays) -> dict[str, Any]:
    """The tiles as JSON; their lists go to `arrays`."""
    narrow = max(tiles.num_q_blocks, tiles.num_kv_blocks) < 1 << 31
    lists = (tiles.q_blks, tiles.kv_blks)
    q_blks, kv_blks = (arrays.add(np.asarray(part, dtype=np.int32 if narrow else np.int64)) for part in lists)
    return {
        "blocks": [tiles.q_block, tiles.kv_block],
        "num_blocks": [tiles.num_q_blocks, tiles.num_kv_blocks],
        "lists": [q_blks, kv_blks, arrays.add(np.asarray(tiles.is_full, dtype=np.uint8))],
    }


def _written_pass(item: Pass, arrays: Arrays) -> dict[str, Any]:
    geometry = item.piece.geometry
    return {
        "heads": list(item.heads),
        "sign": item.sign,
        "kernel": item.kernel,
        "cost": [item.cost.forward, item.cost.backward],
        "groups": _written_axes(geometry.groups),
        "q": [geometry.q.start, _written_axes(geometry.q.axes)],
        "k": [geometry.k.start, _written_axes(geometry.k.axes)],
        "shape": _written_shape(item.piece.shape, arrays),
    }


def _written_axes(axes: Sequence[Axis]) -> list[list[int]]:
    return [[axis.size, axis.stride] for axis in axes]


def _written_shape(shape: Shape, arrays: Arrays) -> dict[str, Any]:
    match shape:
        case Full():
            return {"is": "full"}
        case Triangle():
            return {"is": "triangle"}
        case Band(tile, mask):
            return {"is": "band", "tile": tile, "mask": arrays.add(mask.astype(np.uint8))}
        case Masked(mask):
            return {"is": "masked", "mask": arrays.add(mask.astype(np.uint8))}
        case Keys(keys):
            return {"is": "keys", "keys": arrays.add(keys.astype(np.int64))}
        case Sparse(tiles, relation, finer, orders):
            kept = {"is": "sparse", "tiles": written_tiles(tiles, arrays), "relation": codec.written(relation)}
            more = {} if finer is None else {"finer": written_tiles(finer, arrays)}
            return {**kept, **more, **({} if orders is None else {"orders": [asdict(order) for order in orders]})}
        case _:
            assert_never(shape)


# ---- reading


def read_option(data: Mapping[str, Any], arrays: Mapping[str, Array]) -> Option:
    """The option. Raises KeyError, TypeError or ValueError where the data is none."""
    return Option(data["text"], tuple(_read_pass(item, arrays) for item in data["passes"]))


def read_tiles(data: Mapping[str, Any], arrays: Mapping[str, Array]) -> Tiles:
    """The tiles. Raises KeyError, TypeError or ValueError where the data is none."""
    q_blks, kv_blks, is_full = (arrays[name] for name in data["lists"])
    (q_block, kv_block), (num_q_blocks, num_kv_blocks) = data["blocks"], data["num_blocks"]
    lists = (q_blks.astype(np.int64), kv_blks.astype(np.int64), is_full.astype(bool))
    return Tiles(q_block, kv_block, num_q_blocks, num_kv_blocks, *lists, num_visited=0)


def _read_pass(data: Mapping[str, Any], arrays: Mapping[str, Array]) -> Pass:
    if data["kernel"] not in get_args(Kernel):
        raise ValueError(f"no kernel {data['kernel']}")
    geometry = Geometry(_read_axes(data["groups"]), _read_side(data["q"]), _read_side(data["k"]))
    piece = Piece(geometry, _read_shape(data["shape"], arrays))
    return Pass(tuple(data["heads"]), piece, data["kernel"], Cost(*data["cost"]), data["sign"])


def _read_axes(data: Sequence[Sequence[int]]) -> tuple[Axis, ...]:
    return tuple(Axis(size, stride) for size, stride in data)


def _read_side(data: Sequence[Any]) -> Side:
    start, axes = data
    return Side(start, _read_axes(axes))


def _read_orders(data: Sequence[Mapping[str, Any]]) -> Orders:
    q, k = map(_read_order, data)
    return q, k


def _read_order(data: Mapping[str, Any]) -> Order:
    patches = (tuple(data["patches"][name]) for name in ("chain", "sizes", "offsets"))
    return Order(Patches(*patches), data["start"], data["length"])


def _read_shape(data: Mapping[str, Any], arrays: Mapping[str, Array]) -> Shape:
    match data["is"]:
        case "full":
            return Full()
        case "triangle":
            return Triangle()
        case "band":
            return Band(data["tile"], arrays[data["mask"]].astype(bool))
        case "masked":
            return Masked(arrays[data["mask"]].astype(bool))
        case "keys":
            return Keys(arrays[data["keys"]].astype(np.int64))
        case "sparse":
            finer = read_tiles(data["finer"], arrays) if "finer" in data else None
            orders = _read_orders(data["orders"]) if "orders" in data else None
            return Sparse(read_tiles(data["tiles"], arrays), codec.read(data["relation"]), finer, orders)
        case other:
            raise ValueError(f"no shape {other}")
