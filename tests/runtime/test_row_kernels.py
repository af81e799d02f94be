"""The kernels over rows against their plain twins, in Triton's interpreter: on CUDA `tests/runtime/test_cuda.py` runs
the same through plans."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("row_kernels_interpreted.py")


def test_in_the_interpreter() -> None:
    """In a process of its own: the interpreter is chosen when Triton is imported."""
    run = subprocess.run(
        [sys.executable, str(SCRIPT)],
        capture_output=True,
        text=True,
        check=False,
        env={"TRITON_INTERPRET": "1", "PATH": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])},
        cwd=SCRIPT.parents[2],
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("ok") == 16
