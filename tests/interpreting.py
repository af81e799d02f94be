"""Kernels run on a GPU where there is one, and in Triton's interpreter elsewhere: a process of its own, as Triton asks
once for what it is to be."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_CUDA = torch.cuda.is_available() and not IS_INTERPRETED
runs = pytest.mark.skipif(not HAS_CUDA and not IS_INTERPRETED, reason="needs a CUDA device, or the interpreter")
compiles = pytest.mark.skipif(HAS_CUDA or IS_INTERPRETED, reason="kernels run here")


def assert_passes_in_the_interpreter(file: str, only: str | None = None) -> None:
    """All tests of a file, or those whose names `only` selects, as pytest's -k does."""
    chosen = [] if only is None else ["-k", only]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, file],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""},
        cwd=Path(__file__).parents[1],
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


if IS_INTERPRETED:
    importlib.import_module("tests.hastening").hasten()
