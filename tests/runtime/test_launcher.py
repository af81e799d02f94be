"""Is a kernel that is launched once more the one that Triton would launch, with the same arguments?"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
from triton.tools.tensor_descriptor import TensorDescriptor

import patterndsl
from patterndsl.lower import hulls
from patterndsl.runtime import chosen
from patterndsl.runtime import program as program_module
from patterndsl.runtime.kernels import launch, own
from patterndsl.runtime.kernels.hashing import hashed
from tests.compiling import Compiler

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")


class Recorder(Compiler):
    """launched: which kernel, and its grid and arguments, with tensors by where they lie."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[tuple[Any, ...]] = []

    def launcher_cls(self, _: object, metadata: Any) -> Any:
        def record(*args: Any) -> None:
            grid, given = args[:3], args[9:]  # between them: a stream, a function and hooks
            named = [x.data_ptr() if isinstance(x, Tensor) else x for x in given]
            self.launched.append((metadata.hash, metadata.name, grid, named))

        return record


@contextmanager
def recording() -> Iterator[Recorder]:
    driver: Any = triton.runtime.driver
    former, recorder = driver._active, Recorder()
    driver.set_active(recorder)
    try:
        yield recorder
    finally:
        driver._active = former


def tensors(dtype: torch.dtype = torch.bfloat16, *, offset: int = 0, width: int = 16, length: int = 70) -> list[Tensor]:
    """Query, key, value, output and lse. offset: of elements, by which their starts are off."""
    shape = (1, 2, length, width)
    rows = [torch.zeros(offset + 2 * length * width, dtype=dtype)[offset:].view(shape) for _ in range(4)]
    return [*rows, torch.zeros(shape[:3])]


FORMS: dict[str, tuple[list[Tensor], float]] = {
    "bfloat16": (tensors(), 1.0),
    "another scale": (tensors(), 0.5),
    "float32": (tensors(torch.float32), 1.0),
    "starts between": (tensors(offset=1), 1.0),
    "one channel": (tensors(width=1), 1.0),
    "another length": (tensors(length=71), 1.0),
    "heads inside": ([*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors()[:4]), tensors()[4]], 1.0),
}


def launches(recorder: Recorder, call: Callable[[], object]) -> list[tuple[Any, ...]]:
    recorder.launched.clear()
    call()
    return list(recorder.launched)


def test_what_is_launched_is_what_triton_launches() -> None:
    """Form after form, each anew and each once more. What is allocated in a call has another address each time."""

    def call(form: tuple[list[Tensor], float]) -> Callable[[], object]:
        (query, key, value, out, lse), scale = form
        return lambda: own.attend_own(query, key, value, out, lse, scale)

    def comparable(found: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        ((hash, name, grid, given),) = found
        return [(hash, name, grid, *given[:5], *given[6:])]

    with recording() as recorder:
        own._attend._compiled.clear()
        by_triton = {}
        for name, form in FORMS.items():
            own._attend._compiled.clear()
            by_triton[name] = comparable(launches(recorder, call(form)))
        own._attend._compiled.clear()
        for turn in range(2):
            for name, form in FORMS.items():
                assert comparable(launches(recorder, call(form))) == by_triton[name], (name, turn)
        assert len(own._attend._compiled) == len(FORMS) - 1  # all scales are one form
    assert len({found[0][0] for found in by_triton.values()}) >= 4  # kernels of their own


def test_forms_that_are_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patterndsl.device.launcher.MOST", 3)
    with recording():
        for length in range(2, 9):
            query, key, value, out, lse = tensors(length=length)
            own.attend_own(query, key, value, out, lse, 1.0)
            assert len(own._attend._compiled) <= 3


def test_triton_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    key = torch.zeros(1, 2, 70, 16)
    with recording() as recorder:
        hashed(key, buckets=6, rounds=2, seed=0)
        hashed(key, buckets=6, rounds=2, seed=torch.tensor(0))
        monkeypatch.setattr(triton.JITFunction, "run", None)
        assert [name for _, name, *_ in launches(recorder, lambda: hashed(key, buckets=6, rounds=2, seed=0))] == [
            "hash_kernel"
        ]
        seed = torch.tensor(0)
        assert [name for _, name, *_ in launches(recorder, lambda: hashed(key, buckets=6, rounds=2, seed=seed))] == [
            "draw_kernel",
            "hash_kernel",
        ]


HASHED = "labels: {b: 'lsh(buckets = 8)'}\nfallback: q == k\nattend: causal & chunks(b, 64, 1) & q != k"
CALLS = {
    "hashed labels": (
        HASHED,
        "auto",
        ["hash_kernel", "count_kernel", "begin_kernel", "place_kernel", "attend_kernel", "attend_own_kernel"],
        ["query_kernel", "key_kernel", "own_gradients_kernel"],
    ),
    "described tensors": ("recent(40)", "triton", ["attend_kernel"], ["query_kernel", "key_kernel"]),
}


@pytest.mark.parametrize(("text", "backend", "forward", "backward"), CALLS.values(), ids=CALLS)
def test_a_call_is_few_launches(
    text: str, backend: str, forward: list[str], backward: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them compile, and Triton is asked for none of them twice, wherever tensors then lie."""
    monkeypatch.setattr(launch, "is_interpreted", lambda: True)  # so that tensors of the CPU get there
    for module in (program_module, chosen):
        monkeypatch.setattr(module, "has_kernels", lambda _: True)
    monkeypatch.setattr(hulls, "BLOCK", 16)
    with recording() as recorder:
        program, found = patterndsl.parse(text).compile(512, heads=2, backend=backend), list[Any]()
        for _ in range(2):
            tensors = [torch.randn(1, 2, 512, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
            found.append(launches(recorder, lambda: program(*tensors).sum().backward()))  # noqa: B023 - called at once
            assert [name for _, name, *_ in found[-1]] == forward + backward
            monkeypatch.setattr(triton.JITFunction, "run", None)
    first, second = ([hash for hash, *_ in launched] for launched in found)
    assert first == second
    descriptors = [x for _, name, _, given in found[1] for x in given if isinstance(x, TensorDescriptor)]
    assert bool(descriptors) == (backend == "triton")
    assert all(any(x.base.data_ptr() == tensor.data_ptr() for tensor in tensors) for x in descriptors[:3])
