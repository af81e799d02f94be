"""Kernel attention beside dense attention and two libraries, and the length of its chunks.

    python benchmarks/kernel_scores.py          # CPU, float32, 4 heads of 64

Features of elu and of FAVOR+ (256 of them) are made inside each call. Forward, and forward and backward, in turns in
one run, with peak memory; ratios are of medians. Contestants are left out where they are not installed, or where what
they hold would be above --limit bytes:

- ours, and ours with chunks of other lengths (`causal.CHUNK`), at the first length only;
- dense: scaled_dot_product_attention, causal or not;
- performer-pytorch: its causal form without CUDA, which holds N x M x D sums, and its other form;
- linear-attention-transformer: position by position, which holds N x D x D sums, and its other form.

Writes benchmarks/results/kernel_scores_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from patterndsl.runtime.measure import cores_of_others, machine_name, timed, usage, versions_of
from patterndsl.score import causal as causal_module
from patterndsl.score import linear as linear_module
from patterndsl.score.features import directions, elu_features, favor_exponents
from patterndsl.score.linear import kernel_attention

ROOT = Path(__file__).parents[1]
HEADS, DIM, FEATURES = 4, 64, 256
CHUNKS = (16, 32, 64, 128, 256)
LIBRARIES = ("performer-pytorch", "linear-attention-transformer")
Run: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


def elu(causal: bool) -> Run:
    return lambda q, k, v: kernel_attention(elu_features(q), elu_features(k), v, causal=causal)[0]


def favor(causal: bool) -> Run:
    w = directions(FEATURES, DIM, orthogonal=True, seed=0)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        logs = [favor_exponents(part, w, False) for part in (query, key)]
        return kernel_attention(logs[0], logs[1], value, causal=causal, is_log=True)[0]

    return run


def with_chunk(run: Run, chunk: int) -> Run:
    """The same with chunks of another length; `linear` pads to what it has imported."""

    def changed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        kept = causal_module.CHUNK
        vars(causal_module)["CHUNK"] = vars(linear_module)["CHUNK"] = chunk
        try:
            return run(query, key, value)
        finally:
            vars(causal_module)["CHUNK"] = vars(linear_module)["CHUNK"] = kept

    return changed


def dense(causal: bool) -> Run:
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=causal)


def performer(causal: bool) -> Run:
    from performer_pytorch import performer_pytorch as peer

    w = directions(FEATURES, DIM, orthogonal=True, seed=0)
    attend = peer.causal_linear_attention_noncuda if causal else peer.linear_attention

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        phi = [
            peer.softmax_kernel(x, projection_matrix=w, is_query=is_query)
            for x, is_query in ((query, True), (key, False))
        ]
        out: Tensor = attend(*phi, value)
        return out

    return run


def linear_transformer(causal: bool) -> Run:
    from linear_attention_transformer import linear_attention_transformer as peer

    if causal:
        return lambda q, k, v: peer.causal_linear_attn(q, k, v, bucket_size=1)
    return lambda q, k, v: peer.linear_attn(q, k, v)


def held_bytes(name: str, n: int, causal: bool) -> int:
    """Of the sums that a library holds for each position."""
    features = {"performer-pytorch": FEATURES, "linear-attention-transformer": DIM}.get(name, 0)
    return 4 * HEADS * n * features * DIM if causal else 0


def contestants(n: int, causal: bool, limit: int, chunks: bool) -> dict[str, Run]:
    made: dict[str, Callable[[bool], Run]] = {"elu": elu, "favor": favor, "dense": dense}
    made |= {"performer-pytorch": performer, "linear-attention-transformer": linear_transformer}
    runs: dict[str, Run] = {}
    for name, make in made.items():
        if held_bytes(name, n, causal) > limit:
            print(f"{name} at N = {n} would hold {held_bytes(name, n, causal) / 2**30:.1f} GiB: left out")
            continue
        try:
            runs[name] = make(causal)
        except ImportError as missing:
            print(f"{name}: {missing}")
    if causal and chunks:
        for chunk in CHUNKS:
            for name, make in (("elu", elu), ("favor", favor)):
                runs[f"{name}, chunks of {chunk}"] = with_chunk(make(causal), chunk)
    return runs


def measured(run: Run, tensors: tuple[Tensor, ...], backward: bool) -> tuple[float, int | None]:
    """Seconds and peak bytes of a call."""

    def call() -> None:
        query, key, value = (x.detach().requires_grad_(backward) for x in tensors)
        with torch.set_grad_enabled(backward):
            out = run(query, key, value)
        if backward:
            torch.autograd.backward(out, torch.ones_like(out))

    return timed(call, tensors[0].device)


def same_for_all_chunks(tensors: tuple[Tensor, ...]) -> float:
    """The largest difference of an output by the length of chunks. Raises AssertionError where it is too large."""
    worst = 0.0
    with torch.no_grad():
        for make in (elu, favor):
            expected = make(True)(*tensors)
            found = [float((with_chunk(make(True), chunk)(*tensors) - expected).abs().max()) for chunk in CHUNKS]
            worst = max(worst, *found)
    assert worst < 1e-4, f"they differ by {worst}"
    return worst


def measured_rows(n: int, causal: bool, repeats: int, limit: int, chunks: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    tensors = tuple(torch.randn(1, HEADS, n, DIM) for _ in range(3))
    row: dict[str, Any] = {"n": n, "causal": causal}
    if causal and chunks:
        row["largest difference by chunks"] = same_for_all_chunks(tensors)
    runs, found = contestants(n, causal, limit, chunks), dict[tuple[str, str], list[tuple[float, int | None]]]()
    before = usage()
    for turn in range(repeats + 1):
        for name, run in runs.items():
            for mode, backward in (("forward", False), ("training", True)):
                call = measured(run, tensors, backward)
                if turn:  # the first one warms up
                    found.setdefault((name, mode), []).append(call)
    for (name, mode), calls in found.items():
        seconds, peaks = zip(*calls, strict=True)
        row[f"{name} {mode} ms"] = 1e3 * statistics.median(seconds)
        row[f"{name} {mode} ms, least and most"] = [1e3 * min(seconds), 1e3 * max(seconds)]
        row[f"{name} {mode} bytes"] = None if None in peaks else statistics.median(peaks)
    for ours, others in (("elu", ("dense", LIBRARIES[1])), ("favor", ("dense", LIBRARIES[0]))):
        for other in others:
            for mode in ("forward", "training"):
                if (other, mode) in found:
                    row[f"{ours}, {mode} to {other}"] = row[f"{ours} {mode} ms"] / row[f"{other} {mode} ms"]
    row["cores of others"] = cores_of_others(before, usage())
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, nargs="*", default=[2048, 8192])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit", type=int, default=1 << 30, help="bytes that a library may hold for its sums")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "kernel_scores_cpu.json")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for n in arguments.n:
        for causal in (False, True):
            rows.append(measured_rows(n, causal, arguments.repeats, arguments.limit, n == arguments.n[0]))
            print(rows[-1], flush=True)
    found = {
        "device": machine_name(torch.device("cpu")),
        "versions": versions_of(*LIBRARIES),
        "heads": HEADS,
        "head_dim": DIM,
        "favor features": FEATURES,
        "chunk": causal_module.CHUNK,
        "dtype": "float32",
        "repeats": arguments.repeats,
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
