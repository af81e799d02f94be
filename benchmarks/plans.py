"""Every plan of some patterns, measured: does the cost model put them in the order in which they are?

    python benchmarks/plans.py                         # two CPU cores, float32, N = 16,384, 4 heads
    python benchmarks/plans.py --device cuda           # bfloat16, N = 65,536, 16 heads

Writes benchmarks/results/plans_<device>.json: for each pattern the plans with predicted and measured seconds, forward
and backward, the medians of rounds in which all have their turns, and how far each output is from the first plan's;
what runs unasked (`chosen`: one plan in inference, maybe another in training); on a GPU FlexAttention on our tiles, for
`dense` SDPA's kernels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import patterndsl
from patterndsl.runtime.measure import machine_name
from patterndsl.runtime.program import Program

RESULTS = Path(__file__).parent / "results"
Clock: TypeAlias = Callable[[Callable[[], object]], float]


def patterns(n: int) -> dict[str, str]:
    side = int(n**0.5)
    small = n < 65_536
    stride = 128 if small else 256
    return {
        "strided": f"causal & (recent({stride}) | strided({stride}))",
        "fixed": "causal & (block(256) | columns(256, 8))",
        "axial": f"grid: {{row: {side}, col: {side}}}\nattend: q.row == k.row | q.col == k.col\n",
        "dilated": f"causal & dilated({255 if small else 511}, 4)",
        "longformer": "window(256) | global(64)",
        "recent": f"recent({256 if small else 512})",
        "sinks": f"recent({256 if small else 512}) | causal & first(4)",
        "bigbird": "blocks(64, window(1) | global(1) | random(3))",
        "heads": f"causal & (head % 2 == 0 & recent({stride}) | head % 2 == 1 & strided({stride}))",
        "dense": "causal",
        "windows-2d": (
            f"grid: {{row: {side}, col: {side}}}\nattend: q.row // 8 == k.row // 8 & q.col // 8 == k.col // 8\n"
        ),
    }


def clock_of(device: torch.device) -> Clock:
    """Seconds of a call: on a CPU of this one, on a GPU the median of some."""

    def on_host(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def on_device(run: Callable[[], object]) -> float:
        from triton.testing import do_bench

        return float(do_bench(run, warmup=5, rep=20, return_mode="median")) / 1e3

    return on_device if device.type == "cuda" else on_host


def in_turns(
    programs: dict[str, Program], tensors: list[torch.Tensor], clock: Clock, rounds: int, train: bool = True
) -> dict[str, dict[str, float]]:
    """Seconds of each program, forward and backward, the medians of rounds in which each has its turn."""
    calls = dict[tuple[str, str], Callable[[], object]]()
    for name, program in programs.items():
        calls[name, "forward_s"] = torch.no_grad()(partial(program, *tensors))
        if train:
            trained = [x.detach().requires_grad_() for x in tensors]
            out = program(*trained)
            calls[name, "backward_s"] = partial(
                torch.autograd.grad, out, trained, torch.ones_like(out), retain_graph=True
            )
    seconds = dict[tuple[str, str], list[float]]()
    for turn in range(rounds + 1):
        for which, run in calls.items():
            found = clock(run)
            if turn:  # the first warms up
                seconds.setdefault(which, []).append(found)
    return {
        name: {what: statistics.median(times) for (of, what), times in seconds.items() if of == name}
        for name in programs
    }


def flex_alone(
    pattern: patterndsl.Pattern,
    n: int,
    heads: int,
    tensors: list[torch.Tensor],
    clock: Clock,
    rounds: int,
) -> dict:
    """FlexAttention on the whole pattern, by blocks of 128 and 64."""
    found = {}
    for block in (128, 64):  # its backward takes no blocks of 64
        program = pattern.compile(n, heads=heads, device=tensors[0].device, backend="flex")
        program.block_mask = partial(program.block_mask, block)  # type: ignore[method-assign]
        found[str(block)] = in_turns({"flex": program}, tensors, clock, rounds, train=block == 128)["flex"]
        print(
            f"  flex {block}: " + ", ".join(f"{key} {value * 1e3:.2f} ms" for key, value in found[str(block)].items())
        )
    return found


def dense_alone(tensors: list[torch.Tensor], clock: Clock) -> dict:
    """Causal SDPA by each of its kernels."""
    found = {}
    for name, kernel in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        with sdpa_kernel(kernel):
            trained = [x.detach().requires_grad_() for x in tensors]
            out = scaled_dot_product_attention(*trained, is_causal=True)
            backward = partial(torch.autograd.grad, out, trained, torch.ones_like(out), retain_graph=True)
            forward = partial(scaled_dot_product_attention, *tensors, is_causal=True)
            found[name] = {"forward_s": clock(forward), "backward_s": clock(backward)}
        print(f"  {name}: " + ", ".join(f"{key} {value * 1e3:.2f} ms" for key, value in found[name].items()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("-n", type=int)
    parser.add_argument("--heads", type=int)
    parser.add_argument("--most", type=int, default=4, help="plans of each pattern")
    parser.add_argument("--only", nargs="*", help="names of patterns")
    parser.add_argument("--no-peers", action="store_true", help="leave FlexAttention and SDPA out")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    n, heads = arguments.n or (65_536 if on_gpu else 16_384), arguments.heads or (16 if on_gpu else 4)
    torch.manual_seed(0)
    shape, dtype = (1, heads, n, 64), torch.bfloat16 if on_gpu else torch.float32
    tensors = [torch.randn(shape, device=device, dtype=dtype) for _ in range(3)]
    clock = clock_of(device)
    found = []
    for name, text in patterns(n).items():
        if arguments.only and name not in arguments.only:
            continue
        pattern = patterndsl.parse(text)
        start = time.perf_counter()
        plan = pattern.compile(n, heads=heads, device=device, backend="planned").plan
        planning = time.perf_counter() - start
        peers = {}
        if on_gpu and not arguments.no_peers:
            peers = (
                dense_alone(tensors, clock)
                if name == "dense"
                else flex_alone(pattern, n, heads, tensors, clock, arguments.repeats)
            )
        programs, outputs = {"as chosen": pattern.compile(n, heads=heads, device=device)}, dict[str, torch.Tensor]()
        for choice in range(min(plan.num_choices, arguments.most)):
            program = pattern.compile(n, heads=heads, device=device, backend="planned", plan=choice)
            try:
                outputs[str(choice)] = program(*tensors)
            except Exception as failed:  # noqa: BLE001 - the others are still of interest
                print(f"{name} {choice}: {type(failed).__name__} {str(failed)[:300]}")
                continue
            programs[str(choice)] = program
        figures = in_turns(programs, tensors, clock, arguments.repeats)
        chosen, plans = figures.pop("as chosen"), []
        print(f"{name} as chosen: " + ", ".join(f"{key} {seconds * 1e3:.2f} ms" for key, seconds in chosen.items()))
        first = next(iter(outputs.values()))
        for choice, seconds in figures.items():
            predicted, away = programs[choice].plan.cost, outputs[choice] - first
            passes = [f"{item.kernel}: {item.text}" for item in programs[choice].plan.passes]
            times = {"predicted_forward_s": predicted.forward, "predicted_backward_s": predicted.backward, **seconds}
            plans.append({"passes": passes, **times, "away": (away.float().norm() / first.float().norm()).item()})
            shown = ", ".join(f"{key.removesuffix('_s')} {seconds * 1e3:.2f}" for key, seconds in times.items())
            print(f"{name} {choice}: {shown} ms, {passes}", flush=True)
        found.append(
            {"pattern": name, "text": text, "planning_s": planning, "peers": peers, "chosen": chosen, "plans": plans}
        )
    where = {
        "device": machine_name(device),
        "torch": torch.__version__,
        "n": n,
        "heads": heads,
        "head_dim": 64,
        "dtype": str(dtype),
    }
    path = arguments.out or RESULTS / f"plans_{device.type}.json"
    path.write_text(json.dumps({**where, "patterns": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
