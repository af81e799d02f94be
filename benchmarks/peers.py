"""How fast are patterns beside what one would use otherwise? Dense SDPA, FlexAttention, and libraries of the same work.

    python benchmarks/peers.py                   # two CPU cores, float32, B = 1, 4 heads of 64, N = 16,384
    python benchmarks/peers.py --only strided    # one pattern; the others stay as they are in the file
    python benchmarks/peers.py --draw            # only draws the file's picture and prints its table again

All contestants of a pattern run in turns in one process, each checked against float64 first. A round counts where other
processes left the cores alone; quiet moments are waited for, and where there are too few, the quietest rounds count and
the file says how busy others were. Writes benchmarks/results/peers_cpu.json and peers_cpu.svg.

The libraries come with the dev extras; what is not there is said and left out:

    pip install local-attention transformers
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import patterndsl
from patterndsl.runtime.bench import compare, surroundings
from patterndsl.runtime.bench_chart import chart
from patterndsl.runtime.contest import Contestant, Limits, Variant
from patterndsl.runtime.program import Program
from patterndsl.runtime.tensors import Shape, Tensors, random_tensors
from patterndsl.show import bars

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
HEADS, HEAD_DIM = 4, 64
QUIET = 0.1
"""Cores that others may keep busy."""
PACKAGES = ("local-attention", "transformers")


class Missing(Exception):
    """A library that is not installed."""


# ---- libraries


def local_attention(program: Program, window: int) -> Contestant:
    """lucidrains' local-attention, causal and exact: a query and the `window` keys before it."""
    library = _library("local_attention")
    variants = []
    for size in (window, window // 2, window // 4):
        module = library.LocalAttention(
            window_size=size,
            causal=True,
            look_backward=window // size,
            exact_windowsize=True,
            use_rotary_pos_emb=False,
        )
        variants.append(Variant(f"windows of {size}", partial(_by_local_attention, module), program))
    return Contestant("local-attention", tuple(variants))


def _by_local_attention(module: Any, tensors: Tensors) -> Tensor:
    found: Tensor = module(tensors.query, tensors.key, tensors.value)
    return found


def longformer(program: Program, window: int, num_global: int) -> Contestant:
    """Longformer's self-attention in transformers, without its projections: they return what they are given."""
    library = _library("transformers.models.longformer.modeling_longformer")
    config = _library("transformers").LongformerConfig(
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        attention_window=[2 * window],
        attention_probs_dropout_prob=0.0,
        num_hidden_layers=1,
    )
    module = library.LongformerSelfAttention(config, 0)
    length = program.bound.sizes.q_len
    is_global = (torch.arange(length) < num_global)[None]

    def attend(tensors: Tensors) -> Tensor:
        query, key, value = (_as_hidden(x) for x in (tensors.query, tensors.key, tensors.value))
        given = {
            "query": query.clone(),  # it is divided in place
            "key": key,
            "value": value,
            "query_global": query[:num_global].clone(),
            "key_global": key,
            "value_global": value,
        }
        for name, tensor in given.items():
            setattr(module, name, _Given(tensor))
        (found,) = module(
            query.transpose(0, 1),
            attention_mask=is_global * 10_000.0,
            is_index_masked=torch.zeros_like(is_global),
            is_index_global_attn=is_global,
            is_global_attn=True,
        )
        return _of_hidden(found.transpose(0, 1))

    return Contestant("Longformer of transformers", (Variant("", attend, program, None, _laid_out_as_hidden),))


class _Given(torch.nn.Module):
    """In the place of a projection."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor

    def forward(self, _: Tensor) -> Tensor:
        return self.tensor


def _as_hidden(x: Tensor) -> Tensor:
    """[1, H, N, D] as [N, 1, H * D]: a view where it lies in memory so."""
    return x.permute(2, 0, 1, 3).reshape(x.shape[2], 1, -1)


def _of_hidden(x: Tensor) -> Tensor:
    return x.view(x.shape[0], 1, HEADS, HEAD_DIM).permute(1, 2, 0, 3)


def _laid_out_as_hidden(tensors: Tensors) -> Tensors:
    parts = (tensors.query, tensors.key, tensors.value)
    return Tensors(*(_of_hidden(_as_hidden(x).contiguous()) for x in parts))


def bigbird(program: Program, block: int, num_random: int) -> Contestant:
    """BigBird's block-sparse attention in transformers, on the blocks that our pattern draws."""
    library = _library("transformers.models.big_bird.modeling_big_bird")
    length = program.bound.sizes.q_len
    config = _library("transformers").BigBirdConfig(
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        block_size=block,
        num_random_blocks=num_random,
        max_position_embeddings=length,
    )
    module = library.BigBirdBlockSparseAttention(config)
    drawn = _drawn_blocks(program, block, num_random)
    module._bigbird_block_rand_mask_with_head = lambda **_: list(drawn)
    per_head = iter(())

    def one_head(*_: Any, **__: Any) -> Any:
        nonlocal per_head
        found = next(per_head, None)
        if found is None:
            per_head = iter(drawn)
            found = next(per_head)
        return found

    module._bigbird_block_rand_mask = one_head  # at the lengths of the paper
    ones = torch.ones(1, length)
    blocked = ones.view(1, length // block, block)
    around = torch.cat([blocked[:, 1:-3], blocked[:, 2:-2], blocked[:, 3:-1]], dim=2)
    band = torch.einsum("blq,blk->blqk", blocked[:, 2:-2], around)[:, None]

    def attend(tensors: Tensors) -> Tensor:
        found, _ = module.bigbird_block_sparse_attention(
            tensors.query,
            tensors.key,
            tensors.value,
            band,
            ones.view(1, 1, length, 1),
            ones.view(1, 1, 1, length),
            blocked,
            blocked,
            HEADS,
            num_random,
            HEAD_DIM,
            block,
            block,
            1,
            length,
            length,
            seed=0,
            plan_from_length=None,
            plan_num_rand_blocks=None,
        )
        return found.transpose(1, 2)

    note = "it also fills a dense matrix of weights"
    return Contestant("BigBird of transformers", (Variant("", attend, program),), note)


def _drawn_blocks(program: Program, block: int, num_random: int) -> Any:
    """int [heads, blocks - 2, num_random]: key blocks beyond neighbours and ends, for all query blocks but the ends."""
    import numpy as np

    groups = program.tiles(block)[0]
    of_head = {head: tiles for group, tiles in zip(program.bound.groups, groups, strict=True) for head in group.heads}
    num_blocks = groups[0].num_q_blocks
    drawn = np.empty((HEADS, num_blocks - 2, num_random), dtype=np.int64)
    for head in range(HEADS):
        tiles = of_head[head]
        for q_blk in range(1, num_blocks - 1):
            keys = set(tiles.kv_blks[tiles.q_blks == q_blk].tolist())
            drawn[head, q_blk - 1] = sorted(keys - {0, q_blk - 1, q_blk, q_blk + 1, num_blocks - 1})
    return drawn


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as failed:
        raise Missing(f"{name.split('.')[0]} is not here: {failed}") from None


# ---- patterns


@dataclass(frozen=True)
class Case:
    """A pattern, the library that does the same work, and the least ratios that the issue asks for."""

    text: str
    shown: str
    library: Callable[[Program], Contestant] | None = None
    targets: dict[str, float] = field(default_factory=dict)


def cases(n: int) -> dict[str, Case]:
    side = int(n**0.5)
    axial = f"grid: {{row: {side}, col: {side}}}\nattend: q.row == k.row | q.col == k.col\n"
    flex, dense, trained = "FlexAttention forward", "dense SDPA forward", "dense SDPA training"
    return {
        "strided": Case(
            "causal & (recent(128) | strided(128))",
            "causal & (recent(128) | strided(128))",
            targets={flex: 30, dense: 8, trained: 8},
        ),
        "axial": Case(axial, f"q.row == k.row | q.col == k.col, {side} x {side}", targets={flex: 35, trained: 8}),
        "recent": Case("recent(256)", "recent(256)", targets={flex: 1.6, trained: 8}),
        "local": Case("recent(257)", "recent(257)", partial(local_attention, window=256)),
        "dilated": Case("causal & dilated(255, 4)", "causal & dilated(255, 4)", targets={flex: 3}),
        "longformer": Case(
            "window(256) | global(64)",
            "window(256) | global(64)",
            partial(longformer, window=256, num_global=64),
            {trained: 8},
        ),
        "fixed": Case("causal & (block(256) | columns(256, 8))", "causal & (block(256) | columns(256, 8))"),
        "sinks": Case("recent(256) | causal & first(4)", "recent(256) | causal & first(4)"),
        "bigbird": Case(
            str(ROOT / "examples" / "bigbird.yaml"),
            "bigbird.yaml, blocks of 64",
            partial(bigbird, block=64, num_random=3),
        ),
    }


# ---- runs


def measured(name: str, case: Case, n: int, arguments: argparse.Namespace) -> dict[str, Any]:
    is_file = case.text.endswith(".yaml")
    pattern = patterndsl.load(case.text) if is_file else patterndsl.parse(case.text)
    program = pattern.compile(n, heads=HEADS)
    others = []
    if case.library is not None:
        try:
            others.append(case.library(program))
        except Missing as missing:
            print(f"{name}: {missing}; see the head of this script")
    tensors = random_tensors(program.sizes, Shape(1, HEADS, HEADS, HEAD_DIM, "float32", torch.device("cpu")), 0)
    load, date = os.getloadavg()[0], datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    limits = Limits(arguments.seconds, 300.0, QUIET, arguments.patience)
    began = time.monotonic()
    found = compare(program, tensors, backward=True, others=others, limits=limits)
    print(
        f"{name}: others kept {_shown(found.contest.cores_of_others)} cores busy; {time.monotonic() - began:.0f} s",
        flush=True,
    )
    passes = [f"{item.kernel}: {item.text}" for item in program.plan.passes] if program.backend == "planned" else []
    return {"name": case.shown, "spec": name, "passes": passes, "load": load, "date": date, **asdict(found)}


# ---- words


def _disturbed(pattern: dict[str, Any]) -> float:
    return float(pattern["contest"]["cores_of_others"] or 0.0)


def ratio_of(pattern: dict[str, Any], rival: str, measure: str) -> float | None:
    """A rival's median ratio; rivals are named by how their labels start."""
    for entry in pattern["contest"]["entries"][1:]:
        timing = entry[measure]
        if entry["label"].startswith(rival) and timing and timing["ratio"]:
            return float(timing["ratio"]["median"])
    return None


def memory_share(pattern: dict[str, Any], measure: str) -> float | None:
    """Our peak to that of masked SDPA, its mask included."""
    entries = {entry["label"]: entry for entry in pattern["contest"]["entries"]}
    ours, masked = entries["patterndsl"], entries.get("dense SDPA, masked")
    if masked is None or not masked[f"{measure}_bytes"] or ours[f"{measure}_bytes"] is None:
        return None
    return float(ours[f"{measure}_bytes"] / masked[f"{measure}_bytes"])


def table(data: dict[str, Any]) -> str:
    """Markdown: milliseconds of ours, and ratios of the others."""
    head = (
        "pattern",
        "forward, ms",
        "FlexAttention",
        "dense SDPA",
        "library",
        "forward + backward, ms",
        "dense SDPA",
        "library",
        "memory to masked SDPA's",
    )
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for pattern in data["patterns"]:
        ours = pattern["contest"]["entries"][0]
        cells = [f"`{pattern['name']}`".replace("|", "\\|")]
        for measure, rivals in (("forward", ("FlexAttention", "dense SDPA")), ("training", ("dense SDPA",))):
            cells.append(_milliseconds(ours[measure]))
            cells += [_times(ratio_of(pattern, rival, measure)) for rival in rivals]
            cells.append(_times(_library_ratio(pattern, measure)))
        share = memory_share(pattern, "training")
        cells.append("" if share is None else f"{share:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _library_ratio(pattern: dict[str, Any], measure: str) -> float | None:
    others = [entry for entry in pattern["contest"]["entries"][1:] if not _is_torch(entry["label"])]
    return ratio_of(pattern, others[0]["label"], measure) if others else None


def _is_torch(label: str) -> bool:
    return label.startswith("dense SDPA") or label == "FlexAttention"


def _milliseconds(timing: dict[str, Any] | None) -> str:
    return "" if timing is None else f"{timing['seconds']['median'] * 1e3:.0f}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.0f}x" if ratio >= 9.95 else f"{ratio:.1f}x"


def _shown(cores: float | None) -> str:
    return "an unknown number of" if cores is None else f"{cores:.2f}"


def targets(data: dict[str, Any]) -> list[str]:
    """What the issue asks for, beside what was measured."""
    asked = cases(data["n"])
    lines = []
    for pattern in data["patterns"]:
        for words, least in asked[pattern["spec"]].targets.items():
            rival, measure = words.rsplit(" ", 1)
            ratio = ratio_of(pattern, rival, measure)
            word = "not measured" if ratio is None else "reached" if ratio >= least else "MISSED"
            lines.append(f"{pattern['spec']:>12}  {words:<24} at least {least:>4g}x  {_times(ratio):>6}  {word}")
        for measure in ("forward", "training"):
            share = memory_share(pattern, measure)
            if share is not None:
                word = "reached" if share <= 0.1 else "MISSED"
                lines.append(f"{pattern['spec']:>12}  {'memory, ' + measure:<24} at most   0.1   {share:>6.3f}  {word}")
    return lines


def write(data: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n")
    path.with_suffix(".svg").write_bytes(bars.svg(chart(data)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=16_384)
    parser.add_argument("--only", nargs="*", help="names of patterns")
    parser.add_argument("--seconds", type=float, default=15.0, help="of rounds for each pattern")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds to wait for quiet moments, a pattern")
    parser.add_argument("--quieter", action="store_true", help="a pattern stays as it is in the file if it was quieter")
    parser.add_argument("--draw", action="store_true", help="measure nothing; draw and print what the file holds")
    parser.add_argument("--out", type=Path, default=RESULTS / "peers_cpu.json")
    arguments = parser.parse_args()
    sizes = {"n": arguments.n, "batch": 1, "heads": HEADS, "head_dim": HEAD_DIM, "dtype": "float32", "device": "cpu"}
    data: dict[str, Any] = {**surroundings(torch.device("cpu"), PACKAGES), **sizes, "patterns": []}
    held = json.loads(arguments.out.read_text()) if arguments.out.exists() else data
    if arguments.draw:
        data = held
    else:
        is_part = arguments.only or arguments.quieter
        kept = {pattern["spec"]: pattern for pattern in held["patterns"]} if is_part else {}
        for name, case in cases(arguments.n).items():
            if not arguments.only or name in arguments.only:
                found = measured(name, case, arguments.n, arguments)
                if not arguments.quieter or name not in kept or _disturbed(found) <= _disturbed(kept[name]):
                    kept[name] = found
            data["patterns"] = [kept[other] for other in cases(arguments.n) if other in kept]
            write(data, arguments.out)
    write(data, arguments.out)
    print(table(data))
    print("\n".join(targets(data)))


if __name__ == "__main__":
    main()
