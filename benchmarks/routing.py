"""Members of centroids beside the library that does nothing else: Routing Transformer's attention.

    python benchmarks/routing.py                                     # two CPU cores, float32, 4 heads of 64
    python benchmarks/routing.py --device cuda --dtype bfloat16      # 16 heads of 64

Each call scores all tokens by centroids of its heads, takes the w nearest of each of N / w, and attends causally among
them with shared queries and keys; a token's result is the mean over its routes. The commitment loss is part of it, the
step of the centroids is not. Forward, and forward and backward, in turns in one run, with peak memory; on a GPU called
some times in a row and captured in a CUDA graph, the library by what is faster. Three do it:

- ours: `causal & route`, as in the paper, where a token attends itself as well;
- ours, itself last: as the library has it, where a token attends itself in a route only if it has nothing else there;
- routing-transformer: KmeansAttention, where installed.

The last two are compared first, on the same routes: in float32 and float64 they must agree, in other types be finite.
Writes benchmarks/results/routing_<device>.json, row by row.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

import patterndsl
from patterndsl.learn.kmeans import KMeans
from patterndsl.learn.unit import unit
from patterndsl.runtime.measure import cores_of_others, machine_name, usage, versions_of
from patterndsl.runtime.turns import calls_that_run, in_turns

ROOT = Path(__file__).parents[1]
DIM, COMMITMENT = 64, 1e-4
TOLERANCE = 1e-4
LABELS = "labels: {{c: kmeans(clusters = {clusters})}}\nshare: query_key\nmerge: mean\n"
OURS = LABELS + 'select: {{route: "members(c, top = {window})"}}\nattend: causal & route'
ITSELF_LAST = (
    LABELS
    + 'select: {{route: "members(c, top = {window})", first: "members(c, top = 1)"}}\n'
    + "attend: causal & route & q != k | first"
)
Run: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Output and commitment loss of shared queries and keys, as they are, and values."""


@dataclass(frozen=True, slots=True)
class Sizes:
    n: int
    window: int
    heads: int
    device: torch.device
    dtype: torch.dtype

    @property
    def clusters(self) -> int:
        return self.n // self.window

    def program(self, text: str) -> patterndsl.Program:
        pattern = patterndsl.parse(text.format(clusters=self.clusters, window=self.window))
        return pattern.compile(self.n, heads=self.heads, device=self.device)

    def learner(self) -> KMeans:
        return KMeans(self.heads, DIM, self.clusters).to(self.device)


def ours(sizes: Sizes) -> Run:
    program, learner = sizes.program(OURS), sizes.learner()

    def run(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        key = unit(query)
        labels, members = learner.assigned(key, (sizes.window,))
        out = program(query, key, value, inputs={"route": members[sizes.window]})
        return out, COMMITMENT * learner.commitment(key, labels)

    return run


def itself_last(sizes: Sizes) -> Run:
    program, learner = sizes.program(ITSELF_LAST), sizes.learner()

    def run(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        key = unit(query)
        labels, members = learner.assigned(key, (sizes.window,))
        lists = members[sizes.window]
        out = program(query, key, value, inputs={"route": lists, "first": lists[..., :1]})
        return out, COMMITMENT * learner.commitment(key, labels)

    return run


def library(sizes: Sizes) -> Any:
    from routing_transformer import KmeansAttention

    layer = KmeansAttention(sizes.clusters, sizes.window, sizes.heads, DIM, causal=True, shared_qk=True)
    layer.kmeans.means.copy_(sizes.learner().centroids.cpu())
    layer.kmeans.initted.fill_(True)
    return layer.to(sizes.device, sizes.dtype).eval()


def routing_transformer(sizes: Sizes) -> Run:
    layer = library(sizes)
    return lambda query, value: layer(query, query, value)


CONTESTANTS = {"ours": ours, "ours, itself last": itself_last, "routing-transformer": routing_transformer}


def largest_difference(sizes: Sizes, query: Tensor, value: Tensor) -> float | None:
    """Between the library and us on its own routes, whose mean is divided by count + 1e-5; None where the type is too
    coarse to tell. Raises AssertionError where it is too large."""
    from routing_transformer.routing_transformer import distribution

    layer = library(sizes)
    with torch.no_grad():
        expected, _ = layer(query, query, value)
        lists = distribution(layer.kmeans(query)[0], sizes.window).view(*query.shape[:2], sizes.clusters, -1)
        inputs = {"route": lists, "first": lists.amin(-1, keepdim=True)}
        out = sizes.program(ITSELF_LAST)(query, unit(query), value, inputs=inputs)
    assert out.isfinite().all()
    if query.dtype not in (torch.float32, torch.float64):
        return None
    count = torch.zeros_like(query[..., 0]).scatter_add_(
        2, lists.flatten(2), torch.ones_like(lists.flatten(2), dtype=query.dtype)
    )
    found = float((out * (count / (count + 1e-5))[..., None] - expected).abs().max())
    assert found < TOLERANCE, f"they differ by {found}"
    return found


MODES = {"forward": False, "training": True}


def call_of(run: Run, tensors: Sequence[Tensor], backward: bool) -> Callable[[], object]:
    def call() -> object:
        if not backward:
            with torch.no_grad():
                return run(*tensors)
        leaves = [x.detach().requires_grad_() for x in tensors]
        out, loss = run(*leaves)
        return torch.autograd.grad((out, loss), leaves, (torch.ones_like(out), torch.ones_like(loss)))

    return call


def measured_row(sizes: Sizes, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    shape = (1, sizes.heads, sizes.n, DIM)
    tensors = (
        torch.randn(shape, device=sizes.device, dtype=sizes.dtype),
        torch.randn(shape, device=sizes.device, dtype=sizes.dtype),
    )
    row: dict[str, Any] = {"n": sizes.n, "window": sizes.window, "clusters": sizes.clusters}
    before = usage()

    def calls_of(name: str) -> dict[str, Callable[[], object]]:
        if name == "routing-transformer":
            row["largest difference"] = largest_difference(sizes, *tensors)
        run = CONTESTANTS[name](sizes)
        return {mode: call_of(run, tensors, backward) for mode, backward in MODES.items()}

    calls, failures = calls_that_run({name: partial(calls_of, name) for name in CONTESTANTS})
    row |= failures | in_turns(calls, sizes.device, repeats)
    if "routing-transformer" not in row:
        for name in ("ours", "ours, itself last"):
            for what in (f"{mode} {unit}" for mode in MODES for unit in ("ms", "bytes")):
                mine, theirs = row.get(f"{name} {what}"), row.get(f"routing-transformer {what}")
                row[f"{name}, {what} to theirs"] = mine / theirs if mine is not None and theirs else None
    row["cores of others"] = cores_of_others(before, usage())
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("-n", type=int, nargs="*", default=[16_384, 65_536])
    parser.add_argument("--window", type=int, nargs="*", default=[128, 256], help="tokens of a centroid")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    heads = 16 if device.type == "cuda" else 4
    rows = list[dict[str, Any]]()
    found = {
        "device": machine_name(device),
        "versions": versions_of("routing-transformer"),
        "heads": heads,
        "head_dim": DIM,
        "dtype": arguments.dtype,
        "repeats": arguments.repeats,
        "rows": rows,
    }
    path = arguments.out or ROOT / "benchmarks" / "results" / f"routing_{device.type}.json"
    for n in arguments.n:
        for window in arguments.window:
            rows.append(measured_row(Sizes(n, window, heads, device, dtype), arguments.repeats))
            print(rows[-1], flush=True)
            path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
