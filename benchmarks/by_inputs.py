"""Patterns that read inputs, whose tiles nobody knows before the call: how long does a call take, with all it needs?

    python benchmarks/by_inputs.py              # two CPU cores, float32, B = 1, 4 heads of 64, N = 16,384

Ours (what `auto` takes, and `gathered`, which finds tiles in each call), FlexAttention with a block mask made from the
inputs in each call (by patterndsl, which is the quickest way here, and by create_block_mask once), and dense SDPA. Each
output is compared with ours first. Writes benchmarks/results/by_inputs_cpu.json with medians in seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import scaled_dot_product_attention

import patterndsl
from patterndsl.runtime import flex
from patterndsl.runtime.measure import machine_name

RESULTS = Path(__file__).parent / "results"
HEADS, HEAD_DIM = 4, 64
PATTERNS = {
    "chunks": "causal & chunks(bucket, 64, 1)",
    "windows in documents": "recent(256) & same(doc)",
    "hybrid": "causal & (chunks(bucket, 64, 1) | recent(128) | first(4)) & same(doc)",
    "documents": "causal & same(doc)",
}
KINDS = {"bucket": "int[N]", "doc": "int[N]"}


def seconds(run: Callable[[], object], repeats: int) -> float:
    """The median after a first run; what is too slow for that runs once."""
    found = []
    for turn in range(repeats + 1):
        if turn == 1:
            found.clear()
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def measured(text: str, n: int, repeats: int) -> dict[str, float | str]:
    pattern = patterndsl.parse(text, inputs={name: kind for name, kind in KINDS.items() if name in text})
    ours = pattern.compile(n, heads=HEADS)
    values = {"bucket": torch.randint(0, n // 64, (n,)), "doc": torch.arange(n) // 1500}
    inputs = {shape.name: values[shape.name] for shape in ours.bound.inputs}
    query, key, value = (torch.randn(1, HEADS, n, HEAD_DIM) for _ in range(3))
    trained = [x.clone().requires_grad_() for x in (query, key, value)]
    of_flex, gathered = (pattern.compile(n, heads=HEADS, backend=name) for name in ("flex", "gathered"))

    def both(program: patterndsl.Program) -> Callable[[], object]:
        def run() -> object:
            out = program(*trained, inputs=inputs)
            return torch.autograd.grad(out.sum(), trained)

        return run

    figures: dict[str, float | str] = {"text": text, "backend": ours.backend}
    with torch.no_grad():
        expected = ours(query, key, value, inputs=inputs)
        for program in (of_flex, gathered):
            torch.testing.assert_close(program(query, key, value, inputs=inputs), expected, rtol=1e-3, atol=1e-4)
        figures["ours"] = seconds(lambda: ours(query, key, value, inputs=inputs), repeats)
        figures["gathered"] = seconds(lambda: gathered(query, key, value, inputs=inputs), 0)
        figures["flex, mask and all"] = seconds(lambda: of_flex(query, key, value, inputs=inputs), repeats)
        is_causal = isinstance(pattern.prove("causal", n=n), patterndsl.Proven)
        figures["dense SDPA"] = seconds(
            lambda: scaled_dot_product_attention(query, key, value, is_causal=is_causal), repeats
        )
        mod = flex.mask_mod(ours.bound, ours.tilings.data(inputs))
        figures["create_block_mask"] = seconds(lambda: create_block_mask(mod, 1, None, n, n, device="cpu"), 0)
    figures["ours, forward and backward"] = seconds(both(ours), repeats)
    figures["gathered, forward and backward"] = seconds(both(gathered), 0)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=16_384)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    found = {}
    for name, text in PATTERNS.items():
        found[name] = measured(text, arguments.n, arguments.repeats)
        shown = ", ".join(f"{what} {value:.3f}" for what, value in found[name].items() if isinstance(value, float))
        print(f"{name}: {shown}", flush=True)
    where = {
        "machine": machine_name(torch.device("cpu")),
        "torch": torch.__version__,
        "n": arguments.n,
        "heads": HEADS,
        "head_dim": HEAD_DIM,
    }
    (RESULTS / "by_inputs_cpu.json").write_text(json.dumps({**where, "seconds": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
