"""How does a plan become a file, and a file the same plan? safetensors: tile lists, and the text in the metadata.

A file is trusted only after its digest was recomputed. What makes a program of a plan stands above.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from patterndsl.diagnostics import error
from patterndsl.files import write_atomically
from patterndsl.lower.tiles import Tiles
from patterndsl.sema.parameters import Sizes

FORMAT = 1
_KEY = "patterndsl"
_CURE = "compile the pattern again: patterndsl compile SPEC -n N -o FILE"


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A compiled pattern as data: what it is, for which sizes, and the tiles of each head group (none where they
    depend on inputs)."""

    text: str
    sizes: Sizes
    num_heads: int
    layer: int
    tiles: tuple[Tiles, ...]


def write(plan: Plan, path: str | PathLike[str], *, overwrite: bool) -> None:
    """Writes the plan's file. Raises PatternError (E602) where it exists or cannot be written."""
    write_atomically(Path(path), plan_bytes(plan), overwrite=overwrite)


def plan_bytes(plan: Plan) -> bytes:
    """The plan file's bytes, the same for the same plan: one metadata key, as the order of several is not kept."""
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for at, tiles in enumerate(plan.tiles):
        tensors[f"{at}.q_blks"] = np.ascontiguousarray(tiles.q_blks, dtype=np.int32)
        tensors[f"{at}.kv_blks"] = np.ascontiguousarray(tiles.kv_blks, dtype=np.int32)
        tensors[f"{at}.is_full"] = np.ascontiguousarray(tiles.is_full, dtype=np.uint8)
    body = json.dumps(
        {
            "pattern": plan.text,
            "sizes": asdict(plan.sizes),
            "heads": plan.num_heads,
            "layer": plan.layer,
            "groups": [{"q_block": tiles.q_block, "kv_block": tiles.kv_block} for tiles in plan.tiles],
        },
        sort_keys=True,
    )
    header = {"format": FORMAT, "digest": _digest(body, tensors), "body": body}
    return save_tensors(tensors, {_KEY: json.dumps(header, sort_keys=True)})


def _digest(body: str, tensors: Mapping[str, np.ndarray[Any, Any]]) -> str:
    digest = hashlib.sha256(body.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()


def read(path: str | PathLike[str]) -> Plan:
    """The plan in a file. Raises PatternError: E601 unreadable, E603 damaged or not a plan."""
    shown = str(path)
    try:
        data = Path(path).read_bytes()
    except OSError as failed:
        raise error("E601", f"cannot read {shown}: {failed.strerror}", None, "check the path") from None
    try:
        tensors = load_tensors(data)
        header = json.loads(_metadata(data)[_KEY])
        if header["format"] != FORMAT:
            raise error("E603", f"{shown} is a plan of format {header['format']}", None, _CURE)
        if header["digest"] != _digest(header["body"], tensors):
            raise error("E603", f"{shown} is damaged: its digest does not match", None, _CURE)
        return _plan(json.loads(header["body"]), tensors)
    except (SafetensorError, KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise error("E603", f"{shown} is not a plan, or is damaged", None, _CURE) from None


def _metadata(data: bytes) -> dict[str, str]:
    """The file's own metadata: eight bytes of length, then a JSON header."""
    length = int.from_bytes(data[:8], "little")
    return cast("dict[str, str]", json.loads(data[8 : 8 + length])["__metadata__"])


def _plan(body: Mapping[str, Any], tensors: Mapping[str, np.ndarray[Any, Any]]) -> Plan:
    sizes = body["sizes"]
    tiles = tuple(_tiles(at, group, sizes, tensors) for at, group in enumerate(body["groups"]))
    return Plan(body["pattern"], Sizes(**sizes), body["heads"], body["layer"], tiles)


def _tiles(
    at: int, group: Mapping[str, int], sizes: Mapping[str, int], tensors: Mapping[str, np.ndarray[Any, Any]]
) -> Tiles:
    q_block, kv_block = group["q_block"], group["kv_block"]
    return Tiles(
        q_block,
        kv_block,
        -(-sizes["q_len"] // q_block),
        -(-sizes["kv_len"] // kv_block),
        tensors[f"{at}.q_blks"].astype(np.int64),
        tensors[f"{at}.kv_blks"].astype(np.int64),
        tensors[f"{at}.is_full"].astype(bool),
        0,
    )
