"""Causal sums on a GPU beside flash-linear-attention, performer-pytorch and dense attention.

    python benchmarks/kernel_scores_gpu.py              # bfloat16, 16 heads of 64, N = 16,384 and 65,536
    python benchmarks/kernel_scores_gpu.py --tune       # other warps and segments of our kernels, nothing else
    python benchmarks/kernel_scores_gpu.py --draw       # measures nothing: the picture of what the file holds

Each call makes its features: those of elu inside our kernels, by PyTorch before flash-linear-attention's, which takes
[B, T, H, D] and is given that. Rows of one comparison compute the same, but for an epsilon:

- sums: q k without decay or normaliser; fla is `chunk_linear_attn` with normalize=False;
- lightning: with the decay of flash-linear-attention, layer 3 of 24; fla is `chunk_lightning_attn`;
- elu: features elu(x) + 1, normalised; fla is `chunk_linear_attn`;
- favor: 256 random features; performer is performer-pytorch's causal form without an extension, in float32 as ours is
  inside; it holds N x M x D sums for its backward pass and is left out where these are above --limit bytes;
- dense: scaled_dot_product_attention, causal.

"plain" is the twin of our kernels in PyTorch. Everything is checked at 2,048 tokens against float64 first, outputs and
gradients: ours to twice the error of the plain twin and a hundredth of the largest number. Forward, and forward and
backward, in turns in one run, by events of the device; ratios are of medians. Writes
benchmarks/results/kernel_scores_cuda.json and its picture, kernel_scores_cuda.svg.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import elu as elu_of
from torch.nn.functional import scaled_dot_product_attention

from patterndsl.runtime.measure import step_seconds, versions_of
from patterndsl.score import fused, fused_logs
from patterndsl.score.features import Elementwise, directions, favor_exponents
from patterndsl.score.linear import kernel_attention
from patterndsl.show import bars
from patterndsl.show.palette import Tone

ROOT = Path(__file__).parents[1]
DIM, FEATURES, LAYER, LAYERS = 64, 256, 3, 24
CHECKED_AT = 2048
PACKAGES = ("triton", "fla-core", "flash-linear-attention", "performer-pytorch")
Run: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


def decay(heads: int) -> list[float]:
    """flash-linear-attention's, as its `chunk_lightning_attn` computes it."""
    return [math.exp(-(8 / heads * (1 - LAYER / LAYERS)) * head) for head in range(heads)]


def ours(phi: Elementwise, *, decays: bool = False, normalise: bool = False) -> Run:
    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        factors = decay(query.shape[1]) if decays else None
        options: dict[str, Any] = {"phi": phi, "decay": factors, "normalise": normalise}
        return kernel_attention(query, key, value, causal=True, **options)[0]

    return run


def favor(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    w = directions(FEATURES, DIM, orthogonal=True, seed=0).to(query.device)
    logs = [favor_exponents(x, w, False) for x in (query, key)]
    return kernel_attention(logs[0], logs[1], value, causal=True, is_log=True)[0]


def plain(run: Run) -> Run:
    """The same without kernels."""

    def changed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        kept = [vars(module)["takes"] for module in (fused, fused_logs)]
        for module in (fused, fused_logs):
            vars(module)["takes"] = lambda *_: False
        try:
            return run(query, key, value)
        finally:
            for module, takes in zip((fused, fused_logs), kept, strict=True):
                vars(module)["takes"] = takes

    return changed


def fla(kind: str) -> Run:
    linear = importlib.import_module("fla.ops.linear_attn").chunk_linear_attn
    lightning = importlib.import_module("fla.ops.lightning_attn").chunk_lightning_attn

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Of [B, H, T, D] as views of [B, T, H, D]: see `laid_out`."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if kind == "elu":
            out = linear(elu_of(query) + 1, elu_of(key) + 1, value, scale=1.0, normalize=True)[0]
        elif kind == "sums":
            out = linear(query, key, value, scale=1.0, normalize=False)[0]
        else:
            out = lightning(query, key, value, layer_idx=LAYER, num_layers=LAYERS, scale=1.0)[0]
        found: Tensor = out.transpose(1, 2)
        return found

    return run


def performer() -> Run:
    peer = importlib.import_module("performer_pytorch.performer_pytorch")

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        w = directions(FEATURES, DIM, orthogonal=True, seed=0).to(query.device)
        wide = [x.float() for x in (query, key, value)]
        phi = [
            peer.softmax_kernel(x, projection_matrix=w, is_query=is_query)
            for x, is_query in ((wide[0], True), (wide[1], False))
        ]
        out: Tensor = peer.causal_linear_attention_noncuda(*phi, wide[2])
        return out.to(value.dtype)

    return run


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True)


MADE: dict[str, Callable[[], Run]] = {
    "sums": lambda: ours("linear"),
    "sums, plain": lambda: plain(ours("linear")),
    "sums, fla": lambda: fla("sums"),
    "lightning": lambda: ours("linear", decays=True),
    "lightning, plain": lambda: plain(ours("linear", decays=True)),
    "lightning, fla": lambda: fla("lightning"),
    "elu": lambda: ours("elu", normalise=True),
    "elu, plain": lambda: plain(ours("elu", normalise=True)),
    "elu, fla": lambda: fla("elu"),
    "favor": lambda: favor,
    "favor, plain": lambda: plain(favor),
    "favor, performer": performer,
    "dense": lambda: dense,
}


def contestants(only: set[str] | None) -> dict[str, Run]:
    runs = {}
    for name, make in MADE.items():
        if only is not None and name.split(",")[0] not in only:
            continue
        try:
            runs[name] = make()
        except ImportError as missing:
            print(f"{name}: {missing}")
    return runs


def laid_out(name: str, n: int, heads: int, dtype: torch.dtype, backward: bool) -> tuple[Tensor, ...]:
    """Query, key, value and the output's gradient [1, H, N, D]; for fla in the order that it takes."""
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = [torch.randn(1, heads, n, DIM, generator=generator, device="cuda").to(dtype) for _ in range(4)]
    if name.endswith("fla"):
        tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    return (*(x.requires_grad_(backward) for x in tensors[:3]), tensors[3])


def with_gradients(run: Run, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    query, key, value, pull = tensors
    out = run(query, key, value)
    return [out, *torch.autograd.grad(out, (query, key, value), pull)]


def errors(runs: dict[str, Run], heads: int, dtype: torch.dtype) -> dict[str, float]:
    """The largest error of each contestant's output and gradients, of the largest number, against float64. Raises
    AssertionError where ours is more than twice the plain twin's and a hundredth, or fla's more than a tenth: then it
    computes something else. performer-pytorch does: it adds an epsilon after the largest exponent of all keys was taken
    off, which most weights are smaller than."""
    found: dict[str, float] = {}
    for name, run in runs.items():
        kind = name.split(",")[0]
        if kind == "dense":
            continue
        tensors = laid_out(name, CHECKED_AT, heads, dtype, True)
        wide = tuple(x.detach().double().requires_grad_() for x in tensors[:3])
        truth = with_gradients(MADE[kind](), (*wide, tensors[3].double()))
        mine = with_gradients(run, tensors)
        worst = max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(mine, truth, strict=True))
        found[name] = worst
        print(f"{name}: off by {worst:.1e} at {CHECKED_AT}", flush=True)
    for name, worst in found.items():
        if name.endswith("performer"):
            continue
        allowed = 0.1 if name.endswith("fla") else 2 * found.get(f"{name}, plain", 0.0) + 1e-2
        assert worst <= allowed, f"{name} is off by {worst}"
    return found


def milliseconds(
    runs: dict[str, Run], n: int, heads: int, dtype: torch.dtype, repeats: int, limit: int
) -> Iterator[Any]:
    """Name, mode, and the times of each contestant: rounds over all, so that none has the warm device for itself."""
    for mode in ("forward", "training"):
        steps: dict[str, Callable[[], object]] = {}
        for name, run in runs.items():
            held = 4 * heads * n * FEATURES * DIM if name.endswith("performer") and mode == "training" else 0
            if held > limit:
                print(f"{name} at N = {n} would hold {held / 2**30:.0f} GiB: left out")
                continue
            tensors = laid_out(name, n, heads, dtype, mode == "training")
            steps[name] = step_of(run, tensors, mode)
        for step in steps.values():
            step()
        torch.cuda.synchronize()
        rounds = step_seconds(list(steps.values()), torch.device("cuda"), repeats)
        for name, seconds in zip(steps, zip(*rounds, strict=True), strict=True):
            yield name, mode, [1e3 * x for x in seconds]


def step_of(run: Run, tensors: tuple[Tensor, ...], mode: str) -> Callable[[], object]:
    if mode == "training":
        return lambda: with_gradients(run, tensors)

    def forward() -> Tensor:
        with torch.no_grad():
            return run(*tensors[:3])

    return forward


def row_of(runs: dict[str, Run], n: int, heads: int, dtype: torch.dtype, repeats: int, limit: int) -> dict[str, Any]:
    row: dict[str, Any] = {"n": n}
    medians: dict[tuple[str, str], float] = {}
    for name, mode, times in milliseconds(runs, n, heads, dtype, repeats, limit):
        medians[name, mode] = statistics.median(times)
        row[f"{name} {mode} ms"] = medians[name, mode]
        row[f"{name} {mode} ms, least and most"] = [min(times), max(times)]
    for name, mode in medians:
        kind, _, peer = name.partition(", ")
        if peer and (kind, mode) in medians:
            row[f"{peer} to {kind}, {mode}"] = medians[name, mode] / medians[kind, mode]
        if not peer and kind != "dense" and ("dense", mode) in medians:
            row[f"dense to {kind}, {mode}"] = medians["dense", mode] / medians[name, mode]
    return row


@contextmanager
def changed(warps: dict[str, int], programs: int) -> Iterator[None]:
    kept = dict(fused.WARPS), fused.PROGRAMS
    fused.WARPS.update(warps)
    vars(fused)["PROGRAMS"] = programs
    try:
        yield
    finally:
        fused.WARPS.update(kept[0])
        vars(fused)["PROGRAMS"] = kept[1]


def tuned(n: int, heads: int, dtype: torch.dtype, repeats: int) -> None:
    """Prints what other warps and segments take, all kernels alike; then each kernel by itself."""
    runs = {name: MADE[name]() for name in ("sums", "lightning", "elu")}
    choices: list[dict[str, int]] = [dict.fromkeys(fused.WARPS, 4), dict.fromkeys(fused.WARPS, 8)]
    choices += [{name: 8} for name in fused.WARPS]
    for warps, programs in itertools.product(choices, (512, 1024, 2048, 4096)):
        with changed(warps, programs):
            found = {
                f"{name} {mode}": round(statistics.median(times), 3)
                for name, mode, times in milliseconds(runs, n, heads, dtype, repeats, 0)
            }
        print(programs, warps, found, flush=True)


# ---- the picture

DRAWN = {"sums": "linear, not normalised", "elu": "elu", "favor": "favor(256)"}
RIVALS: dict[str, tuple[Tone, str]] = {
    "fla": ("second", "flash-linear-attention"),
    "performer": ("mixed", "performer-pytorch"),
    "dense": ("both", "causal SDPA, which is another attention"),
}


def chart(data: dict[str, Any]) -> bars.Chart:
    """The ratios of the longest sequences, at which performer-pytorch may not fit."""
    row, panels = data["rows"][-1], []
    for measure, title in (("forward", "Forward"), ("training", "Forward and backward")):
        groups = []
        for kind, name in DRAWN.items():
            found = []
            for who, (tone, _) in RIVALS.items():
                theirs = row.get(f"{who} {measure} ms" if who == "dense" else f"{kind}, {who} {measure} ms")
                if theirs is not None:
                    found.append(bars.Bar(tone, theirs / row[f"{kind} {measure} ms"], f"{theirs:.3g} ms"))
            groups.append(bars.Group(name, f"patterndsl {row[f'{kind} {measure} ms']:.3g} ms", tuple(found)))
        panels.append(bars.Panel(title, tuple(groups)))
    sizes = f"N {row['n']:,}, {data['heads']} heads of {data['head_dim']}, {data['dtype']}; {data['device']}"
    lines = (sizes, f"PyTorch {data['versions']['torch']}, Triton {data['versions']['triton']}; medians in turns")
    legend = tuple((tone, label) for tone, label in RIVALS.values())
    return bars.Chart("Causal sums: how many times as long others take", lines, "patterndsl", legend, tuple(panels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, nargs="*", default=[16_384, 65_536])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--limit", type=int, default=24 << 30, help="bytes that performer-pytorch may hold for its sums"
    )
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--draw", action="store_true", help="measure nothing; draw what the file holds")
    parser.add_argument("--only", help="kinds, by commas: sums, lightning, elu, favor, dense")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "kernel_scores_cuda.json")
    arguments = parser.parse_args()
    picture = arguments.out.with_suffix(".svg")
    if arguments.draw:
        picture.write_bytes(bars.svg(chart(json.loads(arguments.out.read_text()))))
        return
    dtype = getattr(torch, arguments.dtype)
    if arguments.tune:
        tuned(arguments.n[-1], arguments.heads, dtype, arguments.repeats)
        return
    runs = contestants(set(arguments.only.split(",")) if arguments.only else None)
    checked = errors(runs, arguments.heads, dtype)
    print(checked, flush=True)
    rows = []
    for n in arguments.n:
        rows.append(row_of(runs, n, arguments.heads, dtype, arguments.repeats, arguments.limit))
        print(json.dumps(rows[-1], indent=2), flush=True)
    found = {
        "device": torch.cuda.get_device_name(),
        "versions": {"cuda": str(torch.version.cuda), **versions_of(*PACKAGES)},
        "heads": arguments.heads,
        "head_dim": DIM,
        "favor features": FEATURES,
        "dtype": arguments.dtype,
        "repeats": arguments.repeats,
        f"largest errors at {CHECKED_AT}": checked,
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    picture.write_bytes(bars.svg(chart(found)))


if __name__ == "__main__":
    main()
