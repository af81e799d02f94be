"""How does a plan become a file, and a file the same plan? safetensors: masks and tile lists, all else in the metadata.

A file is trusted only after its digest was recomputed. What makes a program of a plan stands above; how passes become
data, in `lower.stored`.
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
from patterndsl.lower.plan import Option
from patterndsl.lower.stored import Arrays, read_option, read_tiles, written_option, written_tiles
from patterndsl.lower.tiles import Tiles
from patterndsl.sema.parameters import Sizes

FORMAT = 4
_KEY = "patterndsl"
_CURE = "compile the pattern again: patterndsl compile SPEC -n N -o FILE"


@dataclass(frozen=True, slots=True, eq=False)
class StoredPlan:
    """A compiled pattern as data: what it is, for which sizes and what kind of device, and what its backend found.

    backend: as it was asked for. options: of each head group the ways to run it that were chosen, for inference first
    and for training where that is another. tiles: of each head group, for backends without passes. Both are empty where
    tiles depend on inputs.
    """

    text: str
    sizes: Sizes
    num_heads: int
    layer: int
    device_type: str
    backend: str
    options: tuple[tuple[Option, ...], ...] = ()
    tiles: tuple[Tiles, ...] = ()


def write(plan: StoredPlan, path: str | PathLike[str], *, overwrite: bool) -> None:
    """Writes the plan's file. Raises PatternError (E602) where it exists or cannot be written."""
    write_atomically(Path(path), plan_bytes(plan), overwrite=overwrite)


def plan_bytes(plan: StoredPlan) -> bytes:
    """The plan file's bytes, the same for the same plan: one metadata key, as the order of several is not kept."""
    arrays = Arrays()
    body = json.dumps(
        {
            "pattern": plan.text,
            "sizes": asdict(plan.sizes),
            "heads": plan.num_heads,
            "layer": plan.layer,
            "device": plan.device_type,
            "backend": plan.backend,
            "options": [[written_option(option, arrays) for option in group] for group in plan.options],
            "tiles": [written_tiles(tiles, arrays) for tiles in plan.tiles],
        },
        sort_keys=True,
    )
    header = {"format": FORMAT, "digest": _digest(body, arrays.named), "body": body}
    return save_tensors(arrays.named, {_KEY: json.dumps(header, sort_keys=True)})


def _digest(body: str, tensors: Mapping[str, np.ndarray[Any, Any]]) -> str:
    digest = hashlib.sha256(body.encode())
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def read(path: str | PathLike[str]) -> StoredPlan:
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


def _plan(body: Mapping[str, Any], tensors: Mapping[str, np.ndarray[Any, Any]]) -> StoredPlan:
    return StoredPlan(
        body["pattern"],
        Sizes(**body["sizes"]),
        body["heads"],
        body["layer"],
        body["device"],
        body["backend"],
        tuple(tuple(read_option(option, tensors) for option in group) for group in body["options"]),
        tuple(read_tiles(tiles, tensors) for tiles in body["tiles"]),
    )
