"""Chunks of hashed keys beside the libraries that do nothing else: Reformer's attention, in one round and in four.

    python benchmarks/labels.py                        # two CPU cores, float32, 4 heads of 64
    python benchmarks/labels.py --device cuda          # 16 heads of 64

Each call hashes, sorts and attends, causally, in chunks of 64 and the chunk before; a query attends itself only where
it has nothing else. Forward, and forward and backward, in turns in one run, with peak memory; on a GPU called some
times in a row and captured in a CUDA graph, a library by what is faster. The libraries, where installed:
reformer-pytorch (LSHAttention on shared query and key, its own defaults but for dropout) and transformers
(LSHSelfAttention, with its projections of as many channels as the heads have). They wrap the first chunk around, and
hash with directions of their own; that changes which keys are near, not how many. Writes
benchmarks/results/labels_<device>.json, row by row.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import patterndsl
from patterndsl.learn.unit import unit
from patterndsl.runtime.measure import machine_name, versions_of
from patterndsl.runtime.turns import calls_that_run, in_turns

ROOT = Path(__file__).parents[1]
CHUNK, DIM = 64, 64
SPEC = """
labels: {{bucket: "lsh(buckets = {buckets}, rounds = {rounds})"}}
merge: multiset
fallback: q == k
attend: causal & chunks(bucket, {chunk}, 1) & q != k
"""


def ours(n: int, heads: int, rounds: int, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    pattern = patterndsl.parse(SPEC.format(buckets=n // CHUNK, rounds=rounds, chunk=CHUNK))
    program = pattern.compile(n, heads=heads, device=device)
    return lambda query, value: program(query, unit(query), value, scale=1.0)


def reformer_pytorch(n: int, heads: int, rounds: int, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    from reformer_pytorch import LSHAttention

    attend = LSHAttention(bucket_size=CHUNK, n_hashes=rounds, causal=True).to(device)

    def run(query: Tensor, value: Tensor) -> Tensor:
        return attend(query.flatten(0, 1), value.flatten(0, 1))[0].view(value.shape)

    return run


def transformers(n: int, heads: int, rounds: int, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    config = ReformerConfig(
        hidden_size=heads * DIM,
        num_attention_heads=heads,
        attention_head_size=DIM,
        lsh_attn_chunk_length=CHUNK,
        lsh_num_chunks_before=1,
        lsh_num_chunks_after=0,
        num_hashes=rounds,
        num_buckets=buckets_of(n // CHUNK),
        is_decoder=True,
        lsh_attention_probs_dropout_prob=0.0,
        hash_seed=0,
    )
    layer: Any = LSHSelfAttention(config).to(device)

    def run(query: Tensor, value: Tensor) -> Tensor:
        # in half precision it mixes types by itself
        with torch.autocast(device.type, query.dtype, enabled=query.dtype != torch.float32):
            return layer(query.transpose(1, 2).flatten(2)).hidden_states

    return run


def buckets_of(number: int) -> list[int]:
    """Two even factors, as transformers takes them."""
    small = next(size for size in range(int(number**0.5), 0, -1) if not (size % 2 or number % (2 * size)))
    return [small, number // small]


CONTESTANTS = {"ours": ours, "reformer-pytorch": reformer_pytorch, "transformers": transformers}


MODES = {"forward": False, "training": True}


def call_of(run: Callable[[Tensor, Tensor], Tensor], tensors: Sequence[Tensor], backward: bool) -> Callable[[], object]:
    def call() -> object:
        if not backward:
            with torch.no_grad():
                return run(*tensors)
        leaves = [x.detach().requires_grad_() for x in tensors]  # transformers makes values by itself
        out = run(*leaves)
        return torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)

    return call


def calls_of(make: Callable[..., Any], sizes: Sequence[Any], tensors: Sequence[Tensor]) -> dict[str, Any]:
    run = make(*sizes)
    return {mode: call_of(run, tensors, backward) for mode, backward in MODES.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("-n", type=int, nargs="*", default=[16_384, 65_536])
    parser.add_argument("--rounds", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    heads = 16 if device.type == "cuda" else 4
    rows = list[dict[str, Any]]()
    report = {
        "device": machine_name(device),
        "versions": versions_of("reformer-pytorch", "transformers"),
        "heads": heads,
        "head_dim": DIM,
        "dtype": arguments.dtype,
        "rows": rows,
    }
    path = arguments.out or ROOT / "benchmarks" / "results" / f"labels_{device.type}.json"
    for n in arguments.n:
        for rounds in arguments.rounds:
            torch.manual_seed(0)
            shape = (1, heads, n, DIM)
            tensors = [torch.randn(shape, device=device, dtype=getattr(torch, arguments.dtype)) for _ in range(2)]
            calls, failures = calls_that_run(
                {
                    name: partial(calls_of, make, (n, heads, rounds, device), tensors)
                    for name, make in CONTESTANTS.items()
                }
            )
            rows.append({"n": n, "rounds": rounds, **failures, **in_turns(calls, device, arguments.repeats)})
            print(rows[-1], flush=True)
            path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
