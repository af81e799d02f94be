"""Decoding: one-row queries against long caches, beside the bandwidth of a copy and the same row by dense SDPA.

    python benchmarks/decode.py                    # a GPU: bfloat16, 1,048,576 cached positions, 32 heads over 8 of 128
    python benchmarks/decode.py --device cpu --length 16384 --batches 1,2 --heads 4 --kv-heads 2

Each pattern is decoded from a cache that a prompt of that length went into. Every output is checked first, against
float64 over the keys that `program.row` lists. Then two times are taken: `attend`, the row alone, and `step`, which
appends a token before it. `of copy` is what a step must read (the keys and values of the rows that are attended, each
once for a head of keys) divided by the time and by the measured bandwidth of a copy, which reads and writes; `graph` is
attend captured in a CUDA graph, without the host, and `cold` the same where a graph has several caches in turn, so that
the L2 cache of the device holds none of them. `dense` is PyTorch's SDPA over all cached keys of one batch row.
Milliseconds, medians over the rounds. Writes benchmarks/results/decode_<device>.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import patterndsl
from patterndsl import Cache, Pattern
from patterndsl.runtime.bench import surroundings

RESULTS = Path(__file__).parent / "results"
PATTERNS = {
    "sinks": "causal & (recent(4096) | first(4))",
    "recent": "recent(4096)",
    "strided": "causal & (recent(256) | strided(256))",
    "fixed": "causal & (block(256) | columns(256, 8))",
    "causal": "causal",
}
ROUNDS = 5
SECONDS = 0.1
"""Of one contestant in one round."""
MOST_BYTES = 24 << 30
"""Of a cache; a pattern that would hold more is left out."""
COLD = 8
"""Caches that take turns."""


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one call, the mean over some that follow each other: the host runs ahead where it can."""

    def once(repeats: int) -> float:
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(repeats):
                run()
            end.record()
            torch.cuda.synchronize()
            return float(begin.elapsed_time(end)) / repeats
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) * 1000 / repeats

    run()
    repeats = max(2, min(1000, int(SECONDS * 1000 / max(1e-3, once(2)))))
    return statistics.median(once(repeats) for _ in range(ROUNDS))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy reads and writes, the best of some sizes."""
    found = []
    for size in (1 << 28, 1 << 30) if device.type == "cuda" else (1 << 26,):
        source = torch.empty(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        found.append(2 * size / milliseconds(lambda s=source, t=target: t.copy_(s), device) * 1000)
    return max(found)


def truth(pattern: Pattern, cache: Cache, tensors: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The newest row in float64, from the keys that the pattern lists for it; all heads keep the same."""
    query, key, value = tensors
    program = pattern.compile(q_len=1, kv_len=key.shape[2], q_start=key.shape[2] - 1, heads=cache.heads)
    at = program.row(key.shape[2] - 1).to(query.device)
    k, v = (x[:, :, at].double().repeat_interleave(cache.heads // cache.kv_heads, 1) for x in (key, value))
    return (query.double() @ k.mT * cache.head_dim**-0.5).softmax(-1) @ v


def num_keys(pattern: Pattern, length: int) -> int:
    """Of the newest row."""
    return len(pattern.compile(q_len=1, kv_len=length, q_start=length - 1).row(length - 1))


def filled(pattern: Pattern, batch: int, options: argparse.Namespace, key: Tensor, value: Tensor) -> Cache:
    """A cache of `length` positions in each batch row, which have the same tokens."""
    cache = Cache(
        pattern,
        batch=batch,
        heads=options.heads,
        kv_heads=options.kv_heads,
        head_dim=options.head_dim,
        dtype=key.dtype,
        device=key.device,
    )
    for start in range(0, key.shape[2], 1 << 16):
        here = slice(start, start + (1 << 16))
        cache.append(key[:, :, here].expand(batch, -1, -1, -1), value[:, :, here].expand(batch, -1, -1, -1))
    return cache


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """The call as a CUDA graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def measured(name: str, batch: int, options: argparse.Namespace, bandwidth: float) -> dict[str, Any] | None:
    """One line of the table; None where the cache would be too large."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    pattern = patterndsl.parse(PATTERNS[name])
    token = 2 * options.kv_heads * options.head_dim * dtype.itemsize
    probe = Cache(pattern, batch=1, heads=options.heads, kv_heads=options.kv_heads, head_dim=options.head_dim)
    if probe.kind == "growing" and batch * options.length * token > MOST_BYTES:
        return None
    torch.manual_seed(0)
    shape = (1, options.kv_heads, options.length, options.head_dim)
    key, value = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    query = torch.randn(batch, options.heads, 1, options.head_dim, device=device, dtype=dtype)
    cache = filled(pattern, batch, options, key, value)
    exact = truth(pattern, cache, (query[:1], key, value))
    error = float((cache.attend(query)[:1] - exact).abs().max())
    dense: dict[str, float] = {}
    if pattern.text == "causal" or batch == 1:
        gqa = {"enable_gqa": options.heads != options.kv_heads}
        row = query[:1]
        dense["dense, one row"] = milliseconds(lambda: scaled_dot_product_attention(row, key, value, **gqa), device)
        beside = scaled_dot_product_attention(row, key, value, **gqa) if pattern.text == "causal" else None
        if beside is not None:
            dense["error of dense"] = float((beside - exact).abs().max())
    read = num_keys(pattern, options.length) * token * batch
    attend = milliseconds(lambda: cache.attend(query), device)
    found = {
        "pattern": PATTERNS[name],
        "batch": batch,
        "backend": cache.backend,
        "held, MB": cache.nbytes / 1e6,
        "read, MB": read / 1e6,
        "largest error": error,
        "attend": attend,
        "attend of copy": read / attend * 1000 / bandwidth,
        **dense,
    }
    if device.type == "cuda":
        graph = milliseconds(captured(lambda: cache.attend(query)), device)
        found |= {"graph": graph, "graph of copy": read / graph * 1000 / bandwidth}
        if COLD * cache.nbytes <= MOST_BYTES:
            caches = [cache, *(copy.deepcopy(cache) for _ in range(COLD - 1))]
            cold = milliseconds(captured(lambda: [each.attend(query) for each in caches]), device) / COLD
            found |= {"cold": cold, "cold of copy": read / cold * 1000 / bandwidth}
    new = [x[:, :, :1].expand(batch, -1, -1, -1).contiguous() for x in (key, value)]

    def step() -> Tensor:
        cache.append(*new)
        return cache.attend(query)

    step_time = milliseconds(step, device)
    return found | {"step": step_time, "step of copy": read / step_time * 1000 / bandwidth}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    has_cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if has_cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if has_cuda else "float32")
    parser.add_argument("--length", type=int, default=1 << 20)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--batches", default="1,4,16,64", help="by commas")
    parser.add_argument("--only", default=",".join(PATTERNS), help="names of patterns, by commas")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    out = options.out or RESULTS / f"decode_{device.type}.json"
    bandwidth = copy_bandwidth(device)
    print(f"copy: {bandwidth / 1e9:,.0f} GB/s", flush=True)
    sizes = {name: getattr(options, name) for name in ("length", "heads", "kv_heads", "head_dim", "dtype")}
    results: dict[str, Any] = {"copy, GB/s": bandwidth / 1e9, **sizes, "rows": []}
    for name in options.only.split(","):
        for batch in map(int, options.batches.split(",")):
            found = measured(name, batch, options, bandwidth)
            if found is None:
                print(f"{name}, batch {batch}: the cache would be too large", flush=True)
                continue
            results["rows"].append(found)
            numbers = "  ".join(f"{what} {x:.3g}" for what, x in found.items() if isinstance(x, float))
            print(f"{name}, batch {batch}: {numbers}", flush=True)
            results["surroundings"] = surroundings(device, ("triton",))
            out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
