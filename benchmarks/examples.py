"""Every example beside its peers: is any slower than the best of them?

    python benchmarks/examples.py                      # two CPU cores, float32, N = 4,096, 4 heads of 64
    python benchmarks/examples.py --device cuda        # bfloat16, N = 16,384, 16 heads of 64

Forward passes, in one run and in turn: ours, dense SDPA (causal where the pattern is, and masked), FlexAttention by
blocks of 128. Writes benchmarks/results/examples_<device>.json with medians and ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

import patterndsl

ROOT = Path(__file__).parents[1]
SKIPPED = ("packed-documents", "packed-sinks-strided")  # they read inputs, and have no plan


def peers(pattern: patterndsl.Pattern, n: int, tensors: list[torch.Tensor]) -> dict[str, Callable[[], object]]:
    query, key, value = tensors
    heads, device = query.shape[1], query.device
    ours = pattern.compile(n, heads=heads, device=device)
    flex = pattern.compile(n, heads=heads, device=device, backend="flex")
    found: dict[str, Callable[[], object]] = {"ours": lambda: ours(query, key, value)}
    if isinstance(pattern.prove("causal", n=n), patterndsl.Proven):
        found["causal"] = lambda: scaled_dot_product_attention(query, key, value, is_causal=True)
    try:
        keep = ours.mask()[None]  # of four dimensions, else the CPU is slow
        found["masked"] = lambda: scaled_dot_product_attention(query, key, value, attn_mask=keep)
    except patterndsl.InputError:
        pass  # a mask for each head, too large to hold
    found["flex"] = lambda: flex(query, key, value)
    return found


def medians(runs: dict[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, float]:
    """Milliseconds, one after the other in each round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("-n", type=int)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    n = arguments.n or (16_384 if on_gpu else 4_096)
    shape, dtype = (1, 16 if on_gpu else 4, n, 64), torch.bfloat16 if on_gpu else torch.float32
    torch.manual_seed(0)
    tensors = [torch.randn(shape, device=device, dtype=dtype) for _ in range(3)]
    found = {}
    for path in sorted((ROOT / "examples").glob("*.yaml")):
        if path.stem in SKIPPED or (arguments.only and path.stem not in arguments.only):
            continue
        with torch.no_grad():
            times = medians(peers(patterndsl.load(path), n, tensors), device, arguments.repeats)
        best = min((name for name in times if name != "ours"), key=times.__getitem__)
        found[path.stem] = {**times, "best_peer": best, "ratio": times[best] / times["ours"]}
        shown = ", ".join(f"{name} {ms:.2f}" for name, ms in times.items())
        print(f"{path.stem}: {shown} ms; {found[path.stem]['ratio']:.2f}x {best}", flush=True)
    machine = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, {torch.get_num_threads()} threads"
    where = {"device": machine, "torch": torch.__version__, "shape": shape, "dtype": str(dtype)}
    load = os.getloadavg()[0]
    path = arguments.out or ROOT / "benchmarks" / "results" / f"examples_{device.type}.json"
    path.write_text(json.dumps({**where, "load": load, "milliseconds": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
