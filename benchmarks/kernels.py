"""Kernels of our own beside FlexAttention, on a GPU: forward, and forward with backward.

    python benchmarks/kernels.py                       # bfloat16, B = 1, 16 heads of 64, N = 65,536
    python benchmarks/kernels.py --only bigbird,sinks  # some patterns; the others stay as they are in the file
    python benchmarks/kernels.py -n 262144 --head-dim 128

Everything is checked against float64 on sampled rows first, gradients too, by the rule of `patterndsl run`. Then all
contestants of a pattern are timed in one process, in turns: `triton` is the whole pattern over its tiles, `planned` the
plan that runs unasked, FlexAttention has our tiles, of 128 as by default, and of 64 with kernel tiles of 64 where it
only goes forward. Dense `causal` runs by flash and by cuDNN too.

Milliseconds of the device, medians over the rounds with the least and the most: the calls wait on the device until all
of them are asked for, so that no contestant's host counts; what the host takes to ask for a call stands beside them.
`rate` is the share of cuDNN's rate, measured in the same process on dense attention that is not causal, with which the
pairs that the pattern needs are computed. Writes benchmarks/results/kernels_cuda.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import patterndsl
from patterndsl import Pattern
from patterndsl.runtime import flex
from patterndsl.runtime.bench import surroundings
from patterndsl.runtime.program import Program
from patterndsl.runtime.tensors import Tensors
from patterndsl.runtime.trial import attend_of, check

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PATTERNS = {
    "recent": "recent(512)",
    "sinks": "recent(512) | causal & first(4)",
    "longformer": "window(256) | global(64)",
    "bigbird": "examples/bigbird.yaml",
    "dilated": "causal & dilated(511, 4)",
    "strided": "causal & (recent(256) | strided(256))",
    "heads": "causal & (head < 8 & recent(256) | head >= 8 & strided(256))",
    "fixed": "causal & (block(256) | columns(256, 8))",
    "axial": "grid: {row: N // 256, col: 256}\nattend: q.row == k.row | q.col == k.col\n",
    "neighborhood-2d": "examples/neighborhood-2d.yaml",
    "causal": "causal",
}
HEADS = 16
DENSE_LENGTH = 16_384
"""Where cuDNN's rate is measured."""
ROUNDS = 5
CYCLES = 2_000_000_000
"""Of a device in a second, at most."""
SECONDS, MOST_CALLS = 0.05, 20
"""Of one contestant in one round."""

Attend = Callable[[Tensors], Tensor]


def pattern_of(text: str) -> Pattern:
    if text == PATTERNS["neighborhood-2d"]:
        return patterndsl.load(ROOT / text).with_params(kernel=13)
    return patterndsl.load(ROOT / text) if text.endswith(".yaml") else patterndsl.parse(text)


def by_flex(program: Program, block: int) -> Attend:
    attend, mask = flex.compiled_flex(), program.block_mask(block)

    def run(tensors: Tensors) -> Tensor:
        scale = tensors.query.shape[-1] ** -0.5
        return flex.flex(attend, tensors.query, tensors.key, tensors.value, mask, scale=scale, want_lse=False)[0]

    return run


def by_sdpa(kernel: SDPBackend, tensors: Tensors) -> Tensor:
    with sdpa_kernel(kernel):
        return scaled_dot_product_attention(tensors.query, tensors.key, tensors.value, is_causal=True)


def step(attend: Attend, tensors: Tensors, upstream: Tensor | None) -> None:
    """One call; with upstream its gradients too."""
    if upstream is None:
        with torch.no_grad():
            attend(tensors)
        return
    leaves = (tensors.query, tensors.key, tensors.value)
    torch.autograd.grad(attend(tensors), leaves, upstream)


def milliseconds(run: Callable[[], None]) -> tuple[float, float]:
    """Of one call on the device, the mean over some that follow each other, and of the host that asks for it."""
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    repeats = max(2, min(MOST_CALLS, int(SECONDS / (time.perf_counter() - start))))
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(int(1.5 * host * repeats * CYCLES))
    begin.record()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    host = (time.perf_counter() - start) / repeats
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / repeats, 1e3 * host


def timed(contestants: dict[str, Callable[[], None]]) -> dict[str, dict[str, float]]:
    """In turns, so that all of them see the same clocks."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name, run in contestants.items():
            found[name].append(milliseconds(run))
    result = {}
    for name, rounds in found.items():
        device, host = zip(*rounds, strict=True)
        spread = {"median": statistics.median(device), "least": min(device), "most": max(device)}
        result[name] = {**spread, "host": statistics.median(host)}
    return result


def dense_rates(head_dim: int) -> tuple[float, float]:
    """FLOP/s of cuDNN forward and backward, counted as `patterndsl report` counts."""
    shape = (1, HEADS, DENSE_LENGTH, head_dim)
    tensors = Tensors(*(torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)))

    def attend(tensors: Tensors) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(tensors.query, tensors.key, tensors.value)

    leaves, upstream = tensors.trainable(), torch.randn_like(tensors.query)
    times = timed({"forward": partial(step, attend, tensors, None), "both": partial(step, attend, leaves, upstream)})
    flops, forward = 4.0 * DENSE_LENGTH**2 * head_dim * HEADS, times["forward"]["median"]
    return 1e3 * flops / forward, 1e3 * 2.5 * flops / (times["both"]["median"] - forward)


def right(program: Program, tensors: Tensors, attend: Attend, *, backward: bool) -> bool:
    """Whether it computes the pattern: see `runtime.trial`."""
    return check(program, tensors, sample_rows=16, backward=backward, attend=attend).passed


def rate(times: dict[str, dict[str, float]], flops: float, dense: float) -> dict[str, float]:
    """Shares of cuDNN's rate. times: of contestants in milliseconds; flops: that are needed."""
    return {name: 1e3 * flops / found["median"] / dense for name, found in times.items()}


def measured(text: str, n: int, head_dim: int, dense: tuple[float, float], *, has_flex: bool) -> dict[str, Any]:
    """Both tables of one pattern, and which contestants were wrong."""
    pattern = pattern_of(text)
    ours = {name: pattern.compile(n, heads=HEADS, device="cuda", backend=name) for name in ("triton", "planned")}
    ours = {name: program for name, program in ours.items() if name != "planned" or len(program.bound.groups) <= 8}
    program = ours["triton"]
    torch.manual_seed(0)
    shape = (1, HEADS, n, head_dim)
    tensors = Tensors(*(torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)))
    attends: dict[str, Attend] = {name: attend_of(each, None) for name, each in ours.items()}
    forward, training = dict(attends), dict(attends)
    if has_flex:
        forward["flex"] = training["flex"] = by_flex(program, 128)
        forward["flex, 64"] = by_flex(program, 64)
    if text == "causal":
        for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            name = kernel.name.partition("_")[0].lower()
            forward[name] = training[name] = partial(by_sdpa, kernel)
    wrong = {
        f"{name}, {what}"
        for what, group in (("forward", forward), ("with backward", training))
        for name, attend in group.items()
        if not right(program, tensors, attend, backward=group is training)
    }
    leaves, upstream = tensors.trainable(), torch.randn_like(tensors.query)
    times = timed({name: partial(step, each, tensors, None) for name, each in forward.items()})
    both = timed({name: partial(step, each, leaves, upstream) for name, each in training.items()})
    needed = pattern.report(n=n, heads=HEADS, head_dim=head_dim, dtype="bfloat16")
    backward = {name: {"median": both[name]["median"] - times[name]["median"]} for name in both}
    found = {"attend": text, "wrong": sorted(wrong), "forward": times, "forward and backward": both}
    if needed.flops is not None and needed.backward_flops is not None:
        found["rate, forward"] = rate(times, float(needed.flops.value), dense[0])
        found["rate, backward"] = rate(backward, float(needed.backward_flops.value), dense[1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names of patterns, by commas")
    parser.add_argument("-n", type=int, default=65_536)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--no-flex", action="store_true", help="leave FlexAttention out")
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels_cuda.json")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(PATTERNS)
    known = json.loads(options.out.read_text()) if options.out.is_file() else {"patterns": {}}
    dense = dense_rates(options.head_dim)
    print(f"cuDNN, dense: {dense[0] / 1e12:.0f} TFLOP/s forward, {dense[1] / 1e12:.0f} backward", flush=True)
    known |= {"n": options.n, "heads": HEADS, "head_dim": options.head_dim, "dtype": "bfloat16", "cudnn": dense}
    for name in names:
        found = measured(PATTERNS[name], options.n, options.head_dim, dense, has_flex=not options.no_flex)
        known["patterns"][name] = found
        known["surroundings"] = surroundings(torch.device("cuda"), ("triton",))
        options.out.write_text(json.dumps(known, indent=1) + "\n")
        for what in ("forward", "forward and backward"):
            row = "  ".join(f"{who} {times['median']:.3f} ({times['host']:.2f})" for who, times in found[what].items())
            print(f"{name}, {what} (host): {row}", flush=True)
        shares = ("rate, forward", "rate, backward")
        row = "; ".join(f"{what}: {found[what].get('planned', 0):.2f}" for what in shares if what in found)
        print(f"    {row}", flush=True)
        if found["wrong"]:
            print(f"{name}: WRONG: {found['wrong']}", flush=True)


if __name__ == "__main__":
    main()
