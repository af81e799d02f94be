"""Compiles kernels for a GPU where there is none: Triton's interpreter runs what its compiler would refuse.

Where this driver is active, a launch compiles its kernel down to the machine code of compute capability 9.0, asks
whether it fits into shared memory, and ends there. LLVM does not optimise what will never run; how much memory is
shared is decided before it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget

SHARED_BYTES = 232_448
"""What a block of threads can have on Hopper."""
UNOPTIMISED = dict.fromkeys(("DISABLE_LLVM_OPT", "TRITON_DISABLE_LINE_INFO"), "1")


class _Utilities:
    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, *_: object) -> tuple[None, None, int, int, int]:
        return None, None, 0, 0, 1024

    def unload_module(self, _: object) -> None:
        pass


class Compiler:
    """A driver that launches nothing. compiled: names of the kernels that a launch asked for."""

    utils = _Utilities()

    def __init__(self) -> None:
        self.compiled: list[str] = []

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return -1  # of which there is none, so that no other launch finds what was compiled here

    def get_current_stream(self, _: int) -> int:
        return 0

    def launcher_cls(self, _: object, metadata: Any) -> Any:
        return lambda *_: self.compiled.append(metadata.name)


@contextmanager
def compiling() -> Iterator[Compiler]:
    """Launches inside only compile; tensors may lie on the CPU, and what kernels would write stays as it is."""
    driver: Any = triton.runtime.driver
    former, compiler = driver._active, Compiler()
    driver.set_active(compiler)
    try:
        with mock.patch.dict(os.environ, UNOPTIMISED):
            yield compiler
    finally:
        driver._active = former
