"""How long do tile lists take at a million tokens, and how much memory? Writes benchmarks/results/tiles.json.

The peer, create_block_mask, evaluates all N x N points, so it is timed at a length it can hold.

    python benchmarks/tiles.py
"""

from __future__ import annotations

import json
import platform
import statistics
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention.flex_attention import create_block_mask

import patterndsl
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.tiles import Tiles, find_tiles

PATTERN = "causal & (recent(512) | first(4))"
BLOCK = 128
LENGTHS = (2**14, 2**17, 2**20)
PEER_LENGTHS = (4096, 16_384)
REPEATS = 7


def seconds(call: Callable[[], object], repeats: int = REPEATS) -> list[float]:
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return taken


def find(n: int) -> Tiles:
    bound = patterndsl.parse(PATTERN).bind(n)
    return find_tiles(bound.groups[0].relation, bound.sizes, Lookup(), BLOCK, BLOCK)


def peak_beyond_result(n: int) -> int:
    """Bytes allocated at the peak beyond the tile lists themselves (NumPy reports its buffers to tracemalloc)."""
    tracemalloc.start()
    tiles = find(n)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak - sum(part.nbytes for part in (tiles.q_blks, tiles.kv_blks, tiles.is_full))


def main() -> None:
    rows: list[dict[str, object]] = []
    for n in LENGTHS:
        find(n)
        taken = seconds(lambda n=n: find(n))  # type: ignore[misc]
        tiles = find(n)
        rows.append(
            {
                "what": "patterndsl tiles",
                "n": n,
                "ms_median": 1e3 * statistics.median(taken),
                "ms_spread": [1e3 * min(taken), 1e3 * max(taken)],
                "tiles": tiles.num_tiles,
                "boxes_visited": tiles.num_visited,
                "mb_beyond_result": peak_beyond_result(n) / 2**20,
            }
        )
    for n in LENGTHS:
        taken = seconds(lambda n=n: patterndsl.parse(PATTERN).compile(n).block_mask(BLOCK), 3)  # type: ignore[misc]
        rows.append({"what": "patterndsl block_mask", "n": n, "ms_median": 1e3 * statistics.median(taken)})

    def keep(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k <= q) & ((q - k < 512) | (k < 4))

    for n in PEER_LENGTHS:
        taken = seconds(lambda n=n: create_block_mask(keep, None, None, n, n, device="cpu"), 3)  # type: ignore[misc]
        rows.append({"what": "create_block_mask", "n": n, "ms_median": 1e3 * statistics.median(taken)})
    for row in rows:
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})
    result = {
        "pattern": PATTERN,
        "block": BLOCK,
        "rows": rows,
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }
    target = Path(__file__).parent / "results" / "tiles.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
