"""How much time does a planned call add to its kernels? Tiny tensors, so that nothing else is there to be measured.

    python benchmarks/overhead.py                     # CPU, N = 256, two heads of 8, float32

The operators that a call runs are recorded, and run again alone on the tensors that they got. What the call takes
beyond its attention kernels is added by plans: checks, views, merging; what it takes beyond all operators is Python.
Writes benchmarks/results/overhead.json with the median microseconds (of the processor, not of the clock) of
each over interleaved rounds, for inference and for training (forward + backward).
"""

from __future__ import annotations

import argparse
import cProfile
import json
import platform
import pstats
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import patterndsl

RESULTS = Path(__file__).parent / "results"
PATTERNS = {
    "causal": "causal",
    "all": "all",
    "recent": "recent(32)",
    "strided": "causal & (recent(16) | strided(16))",
    "longformer": "window(16) | global(4)",
    "heads": "head % 2 == 0 & causal & strided(16) | head % 2 == 1 & recent(32)",
}
KERNEL = "scaled_dot_product"


class Recorded(TorchDispatchMode):
    """The operators that run inside, with what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def again(calls: Sequence[tuple[Any, Any, Any]]) -> None:
    """Runs them alone."""
    with torch.no_grad():
        for func, args, kwargs in calls:
            func(*args, **kwargs)


def medians(runs: Sequence[Callable[[], object]], rounds: int, times: int = 20) -> list[float]:
    """Median microseconds of the processor, of each, measured in turns so that what disturbs one disturbs all."""
    found: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds + 3):
        for run, seconds in zip(runs, found, strict=True):
            start = time.process_time()
            for _ in range(times):
                run()
            if turn >= 3:
                seconds.append((time.process_time() - start) / times)
    return [statistics.median(seconds) * 1e6 for seconds in found]


def measured(
    program: patterndsl.Program, tensors: Sequence[torch.Tensor], rounds: int, train: bool
) -> dict[str, float]:
    """Microseconds of a call, of its kernels alone, and of what is between them, per pass."""
    query, key, value = (x.detach().requires_grad_(train) for x in tensors)
    grad = torch.randn_like(query)

    def call() -> object:
        out = program(query, key, value)
        return torch.autograd.grad(out, (query, key, value), grad) if train else out

    call()
    with Recorded() as recorded:
        call()

    kernels = [item for item in recorded.calls if KERNEL in item[0].name()]
    runs = (call, lambda: again(kernels), lambda: again(recorded.calls))
    whole, alone, all_operators = medians(runs, rounds)
    num_passes = len(program.ready.planned(train=train).passes)
    return {
        "passes": num_passes,
        "kernel_calls": len(kernels),
        "operators": len(recorded.calls),
        "call_us": whole,
        "kernels_us": alone,
        "operators_us": all_operators,
        "added_per_pass_us": (whole - alone) / num_passes,
        "python_per_pass_us": (whole - all_operators) / num_passes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=256)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--only", nargs="*", help="names of patterns")
    parser.add_argument("--profile", action="store_true", help="where the time goes, instead of a file")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shape = (1, arguments.heads, arguments.n, 8)
    tensors = [torch.randn(shape) for _ in range(3)]
    found = []
    for name, text in PATTERNS.items():
        if arguments.only and name not in arguments.only:
            continue
        program = patterndsl.parse(text).compile(arguments.n, heads=arguments.heads, backend="planned")
        if arguments.profile:
            profile = cProfile.Profile()
            program(*tensors)
            profile.enable()
            for _ in range(2000):
                program(*tensors)
            profile.disable()
            pstats.Stats(profile).sort_stats("tottime").print_stats(35)
            continue
        both = {
            key: measured(program, tensors, arguments.rounds, key == "training") for key in ("inference", "training")
        }
        found.append({"pattern": name, "text": text, **both})
        for key, figures in both.items():
            print(name, key, ", ".join(f"{what} {number:.1f}" for what, number in figures.items()), flush=True)
    if arguments.profile:
        return
    machine = f"{platform.machine()}, 1 thread"
    where = {"device": machine, "torch": torch.__version__, "n": arguments.n, "shape": shape}
    path = arguments.out or RESULTS / "overhead.json"
    path.write_text(json.dumps({**where, "patterns": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
