"""Every example beside its peers: is any slower than the best of them?

    python benchmarks/examples.py                      # two CPU cores, float32, N = 4,096, 4 heads of 64
    python benchmarks/examples.py --device cuda        # bfloat16, N = 65,536, 16 heads of 64
    python benchmarks/examples.py --train              # forward and backward; FlexAttention has no backward on CPUs
    python benchmarks/examples.py --only axial swin    # some; the others stay as they are in the file

In one run and in turn: ours, dense SDPA (causal where the pattern is, by cuDNN on a GPU, and masked where its mask has
less than 2^31 pairs), FlexAttention by blocks of 128. Packed documents have about 1,024 tokens each, and their tiles
are found in each call, for FlexAttention by a compiled create_block_mask. Writes
benchmarks/results/examples_<device>[_train].json with medians and ratios, after each example.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import scaled_dot_product_attention

import patterndsl
from patterndsl.runtime.flex import compiled_flex, flex
from patterndsl.runtime.measure import machine_name

ROOT = Path(__file__).parents[1]
MOST_PAIRS = 1 << 31
DOCUMENT = 1024

Run = Callable[[], torch.Tensor]


def peers(pattern: patterndsl.Pattern, n: int, tensors: list[torch.Tensor]) -> dict[str, Run]:
    query, key, value = tensors
    heads, device = query.shape[1], query.device
    ours = pattern.compile(n, heads=heads, device=device)
    given = {"doc": (torch.rand(n, device=device) < 1 / DOCUMENT).cumsum(0)} if ours.bound.inputs else {}
    found: dict[str, Run] = {"ours": lambda: ours(query, key, value, inputs=given)}
    if isinstance(pattern.prove("causal", n=n), patterndsl.Proven):
        found["causal"] = lambda: dense(query, key, value)
    if n * n < MOST_PAIRS:
        try:
            keep = ours.mask(given)[None]  # of four dimensions, else the CPU is slow
            found["masked"] = lambda: scaled_dot_product_attention(query, key, value, attn_mask=keep)
        except patterndsl.InputError:
            pass  # a mask for each head, too large to hold
    if device.type == "cuda" or not query.requires_grad:
        found["flex"] = by_flex(pattern, n, tensors, given)
    return found


def by_flex(pattern: patterndsl.Pattern, n: int, tensors: list[torch.Tensor], given: dict[str, torch.Tensor]) -> Run:
    query, key, value = tensors
    program = pattern.compile(n, heads=query.shape[1], device=query.device, backend="flex")
    if not given:  # tiles are looked for in the first call
        return lambda: program(query, key, value)
    keep, make, attend = program.block_mask(128, given).mask_mod, torch.compile(create_block_mask), compiled_flex()

    def run() -> torch.Tensor:
        mask = make(keep, None, None, n, n, device=query.device.type)
        return flex(attend, query, key, value, mask, scale=query.shape[3] ** -0.5, want_lse=False)[0]

    return run


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention by the fastest kernel there is."""
    if not query.is_cuda:
        return scaled_dot_product_attention(query, key, value, is_causal=True)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(query, key, value, is_causal=True)


def trained(run: Run, tensors: list[torch.Tensor], grad: torch.Tensor) -> Run:
    def both() -> torch.Tensor:
        return torch.autograd.grad(run(), tensors, grad)[0]

    return both


def medians(runs: dict[str, Run], device: torch.device, repeats: int) -> dict[str, float]:
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
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--no-flex", action="store_true", help="leave FlexAttention out")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    n = arguments.n or (65_536 if on_gpu else 4_096)
    shape, dtype = (1, 16 if on_gpu else 4, n, 64), torch.bfloat16 if on_gpu else torch.float32
    torch.manual_seed(0)
    tensors = [torch.randn(shape, device=device, dtype=dtype, requires_grad=arguments.train) for _ in range(3)]
    grad = torch.randn(shape, device=device, dtype=dtype)
    where = {"device": machine_name(device), "torch": torch.__version__, "shape": shape, "dtype": str(dtype)}
    what = "_train" if arguments.train else ""
    out = arguments.out or ROOT / "benchmarks" / "results" / f"examples_{device.type}{what}.json"
    found = json.loads(out.read_text())["milliseconds"] if arguments.only and out.is_file() else {}
    names = arguments.only or [path.stem for path in sorted((ROOT / "examples").glob("*.yaml"))]
    for path in [ROOT / "examples" / f"{name}.yaml" for name in names]:
        runs = peers(patterndsl.load(path), n, tensors)
        if arguments.no_flex:
            runs.pop("flex", None)
        if arguments.train:
            runs = {name: trained(run, tensors, grad) for name, run in runs.items()}
        with torch.set_grad_enabled(arguments.train):
            times = medians(runs, device, arguments.repeats)
        if len(times) == 1:  # nobody else can
            continue
        best = min((name for name in times if name != "ours"), key=times.__getitem__)
        found[path.stem] = {**times, "best_peer": best, "ratio": times[best] / times["ours"]}
        shown = ", ".join(f"{name} {ms:.2f}" for name, ms in times.items())
        print(f"{path.stem}: {shown} ms; {found[path.stem]['ratio']:.2f}x {best}", flush=True)
        load = os.getloadavg()[0]
        out.write_text(json.dumps({**where, "load": load, "milliseconds": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
