"""The keys that matter, chosen in each call, beside dense attention; and packed documents beside FlexAttention.

    python benchmarks/selections.py                                   # two CPU cores, float32, 4 heads of 64
    python benchmarks/selections.py --device cuda --dtype bfloat16    # 16 heads of 64

Each call of ours chooses and attends. Dense attention is PyTorch's scaled_dot_product_attention, causal where ours
is, by the best of its kernels. Documents have random lengths, 1,024 positions on average, and differ in each call:
FlexAttention makes its mask anew, by a compiled create_block_mask, as we do whatever we need. Forward, and with
backward, in turns in one run, with peak memory; on a GPU called some times in a row and captured in a CUDA graph,
others by what is faster. The selections were checked against float64 rows first. Writes
benchmarks/results/selections_<device>.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import patterndsl
from patterndsl.runtime.measure import machine_name, versions_of
from patterndsl.runtime.turns import first_line, in_turns

ROOT = Path(__file__).parents[1]
DIM, DOCUMENT = 64, 1024
SELECTIONS = {
    "blocks for blocks": """
select:
  top: topk(16, of = blocks(64), per = blocks(64), among = k < q, always = k == q)
attend: causal & top
""",
    "blocks for queries": """
select:
  top: topk(3, of = blocks(512), among = k < q // 512, always = k == q // 512)
attend: causal & top
""",
    "blocks of all, for blocks": """
select:
  top: topk(16, of = blocks(64), per = blocks(64))
attend: top
""",
    "blocks and a window": """
select:
  top: topk(16, of = blocks(64), per = blocks(64), among = k < q)
attend: causal & (top | recent(512) | first(64))
""",
}
Run: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


def selecting(spec: str, n: int, heads: int, device: torch.device) -> Run:
    return patterndsl.parse(spec).compile(n, heads=heads, device=device)


def dense(kernel: SDPBackend, *, is_causal: bool) -> Run:
    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return scaled_dot_product_attention(query, key, value, is_causal=is_causal)

    return run


def lengths(n: int, device: torch.device) -> Tensor:
    """The document of each position, int32 [n]: new ones in each call."""
    starts = torch.rand(n, device=device) < 1 / DOCUMENT
    return starts.cumsum(0, dtype=torch.int32)


def documents(n: int, heads: int, device: torch.device) -> Run:
    pattern = patterndsl.parse("causal & same(doc)", inputs={"doc": "int[N]"})
    program = pattern.compile(n, heads=heads, device=device)
    return lambda query, key, value: program(query, key, value, inputs={"doc": lengths(n, device)})


def flex_documents(n: int, device: torch.device) -> Run:
    attend, make = torch.compile(flex_attention), torch.compile(create_block_mask)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        doc = lengths(n, device)

        def keep(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (q >= k) & (doc[q] == doc[k])

        mask = make(keep, None, None, n, n, device=device)
        return attend(query, key, value, block_mask=mask)

    return run


def contest(name: str, n: int, heads: int, device: torch.device) -> dict[str, Run]:
    """Who computes the same, by what; dense attention is beside each selection."""
    if name == "documents":
        return {"ours": documents(n, heads, device), "flex": flex_documents(n, device)}
    kernels = {"dense flash": SDPBackend.FLASH_ATTENTION}
    if device.type == "cuda":
        kernels["dense cudnn"] = SDPBackend.CUDNN_ATTENTION
    spec = SELECTIONS[name]
    rivals = {who: dense(kernel, is_causal="causal" in spec) for who, kernel in kernels.items()}
    return {"ours": selecting(spec, n, heads, device), **rivals}


def check(run: Run, tensors: tuple[Tensor, ...], rows: int = 8) -> None:
    """Some rows in float64, from the selection of the call itself."""
    assert isinstance(run, patterndsl.runtime.program.Program)
    query, key, value = tensors
    out, found = run(query, key, value, return_labels=True)
    positions = torch.linspace(0, query.shape[2] - 1, rows, device=query.device).long()
    keep = run.rows(positions, found)
    scores = (query[:, :, positions].double() @ key.double().transpose(-1, -2)) * DIM**-0.5
    truth = scores.masked_fill(~keep, -torch.inf).softmax(-1) @ value.double()
    error = (out[:, :, positions].double() - truth).abs().max() / truth.abs().max()
    assert error < (2e-2 if query.dtype == torch.bfloat16 else 1e-4), f"wrong by {error:.1e}"


MODES = {"forward": False, "training": True}


def call_of(run: Run, tensors: Sequence[Tensor], backward: bool) -> Callable[[], object]:
    def call() -> object:
        if not backward:
            with torch.no_grad():
                return run(*tensors)
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = run(*leaves)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("-n", type=int, nargs="*", default=[16_384, 65_536])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", nargs="*", default=[*SELECTIONS, "documents"])
    parser.add_argument("--forward", action="store_true", help="no backward")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    heads = 16 if device.type == "cuda" else 4
    rows = []
    for n in arguments.n:
        torch.manual_seed(0)
        shape = (1, heads, n, DIM)
        tensors = tuple(torch.randn(shape, device=device, dtype=getattr(torch, arguments.dtype)) for _ in range(3))
        for name in arguments.only:
            runs = contest(name, n, heads, device)
            row: dict[str, Any] = {"n": n, "pattern": name}
            if name in SELECTIONS:
                check(runs["ours"], tensors)
            is_forward = arguments.forward or (name == "documents" and device.type == "cpu")
            calls = dict[tuple[str, str], Callable[[], object]]()
            for who, run in runs.items():
                try:
                    found = {
                        (who, mode): call_of(run, tensors, backward)
                        for mode, backward in MODES.items()
                        if not (backward and is_forward)
                    }
                    for (_, mode), call in found.items():
                        start = time.perf_counter()
                        call()
                        seconds = time.perf_counter() - start
                        print(
                            f"{name}, N = {n}, {who}, {mode}: first call {seconds:.1f} s", file=sys.stderr, flush=True
                        )
                    calls |= found
                except RuntimeError as failed:
                    row[who] = first_line(failed)
            row |= in_turns(calls, device, arguments.repeats)
            rows.append(row)
            print(row, flush=True)
    report = {
        "device": machine_name(device),
        "versions": versions_of(),
        "heads": heads,
        "head_dim": DIM,
        "dtype": arguments.dtype,
        "rows": rows,
    }
    path = arguments.out or ROOT / "benchmarks" / "results" / f"selections_{device.type}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
