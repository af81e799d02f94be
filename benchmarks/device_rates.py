"""How fast is a device at attention? The rates that predicted times are made of, and how well they predict.

Dense attention is PyTorch's own, sparse attention runs patterns of local tiles, sinks and blocks as programs. A
rate is work over time at the longest length (for sparse attention over the pairs of live tiles, the median of the
patterns), an overhead is the time of 128 positions, the bandwidth that of a large copy. Each row then compares its time
with the prediction from these. Times are medians.

    python benchmarks/device_rates.py cuda benchmarks/results/device_rates_h200.json
    python benchmarks/device_rates.py cpu benchmarks/results/device_rates_cpu.json
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

import patterndsl
from patterndsl.analysis.cost import Shape, forward_flops, least_bytes
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.tiles import find_tiles

PATTERNS = (
    "block(1024)",
    "recent(512)",
    "window(256)",
    "recent(1024) | causal & first(4)",
    "blocks(128, window(2) | global(1))",
    "causal",
)
SETTINGS: dict[str, dict[str, Any]] = {
    "cuda": {"heads": 16, "dtype": "bfloat16", "lengths": (4096, 16_384, 65_536), "repeats": 15, "copy": 2**30},
    "cpu": {"heads": 4, "dtype": "float32", "lengths": (2048, 8192, 16_384), "repeats": 5, "copy": 2**28},
}
HEAD_DIM, BLOCK, SHORT = 64, 128, 128


def timed(call: Callable[[], object], repeats: int, device: str) -> float:
    """Median seconds."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(2):
        call()
    taken = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        call()
        wait()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def tensors(n: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """query, key, value [1, heads, n, 64]"""
    setting = SETTINGS[device]
    dtype: torch.dtype = getattr(torch, setting["dtype"])
    query, key, value = torch.randn(3, 1, setting["heads"], n, HEAD_DIM, device=device).to(dtype)
    return query, key, value


def dense(n: int, device: str) -> dict[str, Any]:
    query, key, value = tensors(n, device)
    seconds = timed(lambda: scaled_dot_product_attention(query, key, value), SETTINGS[device]["repeats"], device)
    return {"pattern": "dense", "n": n, "seconds": seconds, "flops": float(forward_flops(n * n, HEAD_DIM))}


@torch.no_grad()
def sparse(text: str, n: int, device: str) -> dict[str, Any]:
    bound = patterndsl.parse(text).bind(n)
    tiles = find_tiles(bound.groups[0].relation, bound.sizes, Lookup({}), BLOCK, BLOCK)
    program = patterndsl.parse(text).compile(n, heads=SETTINGS[device]["heads"], device=device)
    query, key, value = tensors(n, device)
    seconds = timed(lambda: program(query, key, value), SETTINGS[device]["repeats"], device)
    flops = float(forward_flops(tiles.num_tiles * BLOCK * BLOCK, HEAD_DIM))
    return {"pattern": text, "n": n, "seconds": seconds, "flops": flops}


def copied(device: str) -> float:
    """bytes/s of a copy, read and written."""
    size = SETTINGS[device]["copy"]
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / timed(lambda: target.copy_(source), SETTINGS[device]["repeats"], device)


def rates(rows: list[dict[str, Any]], heads: int, longest: int) -> dict[str, float]:
    """flops per second and seconds per call, for dense and for sparse attention."""

    def rate(row: dict[str, Any]) -> float:
        return heads * float(row["flops"]) / float(row["seconds"])

    is_dense = [row["pattern"] == "dense" for row in rows]
    long = [(row, flag) for row, flag in zip(rows, is_dense, strict=True) if row["n"] == longest]
    short = [(row, flag) for row, flag in zip(rows, is_dense, strict=True) if row["n"] == SHORT]
    return {
        "dense_flops": statistics.median(rate(row) for row, flag in long if flag),
        "sparse_flops": statistics.median(rate(row) for row, flag in long if not flag),
        "dense_overhead": statistics.median(row["seconds"] for row, flag in short if flag),
        "sparse_overhead": statistics.median(row["seconds"] for row, flag in short if not flag),
    }


def predicted(row: dict[str, Any], found: dict[str, float], device: str) -> float:
    heads, kind = SETTINGS[device]["heads"], "dense" if row["pattern"] == "dense" else "sparse"
    moved = least_bytes(Shape(row["n"], row["n"], heads, heads, HEAD_DIM, SETTINGS[device]["dtype"]))
    work = heads * row["flops"] / found[f"{kind}_flops"]
    return float(max(work, moved / found["bandwidth"]) + found[f"{kind}_overhead"])


def main() -> None:
    device, path = sys.argv[1], Path(sys.argv[2])
    setting = SETTINGS[device]
    rows = []
    for n in (SHORT, *setting["lengths"]):
        for text in ("dense", *PATTERNS):
            rows.append(dense(n, device) if text == "dense" else sparse(text, n, device))
            print(json.dumps(rows[-1]), flush=True)
    found = rates(rows, setting["heads"], setting["lengths"][-1]) | {"bandwidth": copied(device)}
    for row in rows:
        row["predicted_over_measured"] = predicted(row, found, device) / row["seconds"]
    result = {
        "rates": found,
        "setting": {**setting, "head_dim": HEAD_DIM, "threads": torch.get_num_threads()},
        "rows": rows,
        "machine": {"device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "x86-64"},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(found, indent=2))
    off = [row["predicted_over_measured"] for row in rows if row["n"] != SHORT]
    print(f"predicted / measured: median {statistics.median(off):.2f}, from {min(off):.2f} to {max(off):.2f}")


if __name__ == "__main__":
    main()
