"""Kernels run on a GPU where there is one, and in Triton's interpreter elsewhere: a process of its own, as Triton asks
once for what it is to be."""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
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


def _hasten_the_interpreter() -> None:
    """Most of its time goes into what these tests do without: it checks each sum of integers for overflow, patches
    Triton's language anew whenever a kernel calls a function, though once a launch is enough, and sorts by the
    exclusive or of numbers that it takes one by one."""
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    languages = (interpreter.tl, interpreter.tl.core)
    patched: set[tuple[bool, ...]] = set()

    def patch_once(function: Any) -> Any:
        seen = tuple(any(x is language for x in function.__globals__.values()) for language in languages)
        if seen in patched:
            return None
        patched.add(seen)
        return patch(function)

    def launch_anew(*args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(*args, **kwargs)

    one_by_one = interpreter.ReduceOps.generic_reduce

    def reduce(self: Any, values: Any) -> Any:
        if self.combine_fn is not interpreter.tl.standard._xor_combine:
            return one_by_one(self, values)
        found = (np.bitwise_xor.reduce(x.handle.data, axis=self.axis, keepdims=self.keep_dims) for x in values)
        return [self.to_tensor(data, x.dtype) for data, x in zip(found, values, strict=True)]

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_anew
    interpreter.ReduceOps.generic_reduce = reduce
    _remember_types(interpreter)


def _remember_types(interpreter: Any) -> None:
    """Each value that it makes has a type and a shape of its own, with a name for the type; there are few of either."""
    core, numpy_type = interpreter.tl.core, interpreter._get_np_dtype
    numpy_types: dict[str, Any] = {}

    def known_type(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in numpy_types:
            numpy_types[name] = numpy_type(dtype)
        return numpy_types[name]

    def plain(shape: Any) -> tuple[int, ...]:
        return tuple(core._unwrap_if_constexpr(size) for size in shape)

    @cache
    def shape_of(sizes: tuple[int, ...]) -> tuple[Any, Any]:
        return core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(math.prod(sizes))

    def make_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shape_of(plain(type.shape) if type.is_block() else ())

    @cache
    def block_of(element: Any, sizes: tuple[int, ...]) -> Any:
        return core.block_type(element, list(sizes))

    def known_block(self: Any, element: Any, shape: Any) -> Any:
        return core.block_type(element, shape) if element.is_ptr() else block_of(element, plain(shape))

    interpreter._get_np_dtype, core.tensor.__init__ = known_type, make_tensor
    type(interpreter.interpreter_builder).get_block_ty = known_block


if IS_INTERPRETED:
    _hasten_the_interpreter()
