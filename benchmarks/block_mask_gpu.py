"""What does a block mask cost on a GPU? Ours against create_block_mask, eager and compiled.

Both masks are compared block by block before anything is timed. Times are medians of device-synchronised calls, memory
is PyTorch's peak. Writes a JSON file.

    python benchmarks/block_mask_gpu.py benchmarks/results/block_mask_gpu.json
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

import patterndsl

PATTERNS = {
    "causal & (recent(512) | first(4))": lambda b, h, q, k: (k <= q) & ((q - k < 512) | (k < 4)),
    "window(256) | global(64)": lambda b, h, q, k: ((q - k).abs() <= 256) | (q < 64) | (k < 64),
    "causal & (recent(256) | strided(256))": lambda b, h, q, k: (k <= q) & ((q - k < 256) | ((q - k) % 256 == 0)),
}
LENGTHS = (16_384, 65_536)
LONG = 2**20


def timed(call: Callable[[], object], repeats: int = 7) -> tuple[float, float]:
    """Median milliseconds and peak MB beyond what was allocated before."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return 1e3 * statistics.median(taken), (torch.cuda.max_memory_allocated() - before) / 2**20


def same_blocks(ours: BlockMask, theirs: BlockMask) -> bool:
    names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
    names += tuple(name.replace("kv", "q") for name in names)
    return all(torch.equal(getattr(ours, name), getattr(theirs, name)) for name in names)


def measure(text: str, n: int) -> dict[str, object]:
    pattern = patterndsl.parse(text)
    compiled = torch.compile(create_block_mask)

    def ours() -> BlockMask:
        return pattern.compile(n, device="cuda").block_mask(128)

    def theirs() -> BlockMask:
        mask: BlockMask = compiled(PATTERNS[text], None, None, n, n, device="cuda")
        return mask

    row: dict[str, object] = {"pattern": text, "n": n}
    row["ours_ms"], row["ours_mb"] = timed(ours)
    if n >= LONG:
        return row
    row["same_blocks"] = same_blocks(ours(), theirs())
    row["create_block_mask_compiled_ms"], row["create_block_mask_compiled_mb"] = timed(theirs)
    if n <= LENGTHS[0]:
        eager = timed(lambda: create_block_mask(PATTERNS[text], None, None, n, n, device="cuda"), 3)
        row["create_block_mask_eager_ms"], row["create_block_mask_eager_mb"] = eager
    return row


def main() -> None:
    rows = []
    for n in (*LENGTHS, LONG):
        for text in PATTERNS if n < LONG else list(PATTERNS)[:2]:
            rows.append(measure(text, n))
            print(json.dumps(rows[-1]), flush=True)
    result = {
        "rows": rows,
        "machine": {"gpu": torch.cuda.get_device_name()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    Path(sys.argv[1]).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
