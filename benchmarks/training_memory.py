"""How much memory does training take on the CPU? Forward and backward of recent(512) at 65,536 tokens.

Each measurement runs in a process of its own and reads the peak resident size, so that what one leaves behind does not
count for the next. Writes benchmarks/results/training_memory.json.

    python benchmarks/training_memory.py
"""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

import patterndsl

CASES = [("recent(512)", 16_384), ("recent(512)", 65_536), ("causal & (recent(512) | first(4))", 65_536)]
HEADS, HEAD_DIM = 8, 64


def resident_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(text: str, n: int) -> dict[str, object]:
    """Times in seconds, memory in MB beyond inputs, their gradients and the output's gradient."""
    pattern = patterndsl.parse(text)
    small = torch.randn(1, 1, 256, HEAD_DIM, requires_grad=True)
    pattern.compile(256)(small, small, small).sum().backward()  # libraries loaded, threads started
    tensors = [torch.randn(1, HEADS, n, HEAD_DIM, requires_grad=True) for _ in range(3)]
    grad_out = torch.randn(1, HEADS, n, HEAD_DIM)
    gradients_mb = 3 * tensors[0].nbytes / 2**20
    before = resident_mb()
    start = time.perf_counter()
    out = pattern.compile(n, heads=HEADS)(*tensors)
    middle = time.perf_counter()
    out.backward(grad_out)
    stop = time.perf_counter()
    return {
        "pattern": text,
        "n": n,
        "heads": HEADS,
        "head_dim": HEAD_DIM,
        "dtype": "float32",
        "forward_s": middle - start,
        "backward_s": stop - middle,
        "mb_beyond_inputs_and_gradients": resident_mb() - before - gradients_mb,
        "mb_of_one_dense_score_matrix": HEADS * n * n * 4 / 2**20,
    }


def main() -> None:
    if len(sys.argv) == 3:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
        return
    rows = []
    for text, n in CASES:
        child = subprocess.run([sys.executable, __file__, text, str(n)], check=True, capture_output=True, text=True)
        rows.append(json.loads(child.stdout))
        print({key: round(value, 2) if isinstance(value, float) else value for key, value in rows[-1].items()})
    result = {
        "rows": rows,
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    target = Path(__file__).parent / "results" / "training_memory.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
