"""A program that is copied or pickled, and inputs that are written to between forward and backward."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import patterndsl
from patterndsl import InputError
from patterndsl.runtime.documents import Documents
from patterndsl.runtime.planned import Planned
from patterndsl.runtime.sdpa import DensePass

N = 200
DOC = torch.arange(N) // 60
PATTERNS = {
    "a plan": ("causal & (recent(20) | strided(9))", "auto"),
    "tiles": ("recent(20) | global(2)", "gathered"),
    "draws": ("blocks(16, window(1) | random(2, seed = 3))", "auto"),
    "inputs": ("within(doc, recent(20))", "auto"),
}


def results(program: patterndsl.Program, tensors: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = program(*leaves, inputs={"doc": DOC} if program.bound.inputs else None)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def program_of(text: str, backend: str) -> patterndsl.Program:
    inputs = {"doc": "int[N]"} if "doc" in text else None
    return patterndsl.parse(text, inputs=inputs).compile(N, heads=2, backend=backend)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", PATTERNS)
def test_a_copy_gives_the_same(name: str, how: str) -> None:
    """Also of a program that ran; and graphs of torch.compile know it by another address."""
    torch.manual_seed(0)
    tensors = [torch.randn(1, 2, N, 8) for _ in range(3)]
    program = program_of(*PATTERNS[name])
    truth = results(program, tensors)
    other = copy.deepcopy(program) if how == "deepcopy" else pickle.loads(pickle.dumps(program))
    assert other.backend == program.backend and other._address != program._address
    for found, wanted in zip(results(other, tensors), truth, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_a_program_of_several_terms(how: str) -> None:
    torch.manual_seed(0)
    program = patterndsl.load("examples/sources/gemma-2.yaml").compile(64, heads=2)
    tensors = [torch.randn(1, 2, 64, 8) for _ in range(3)]
    truth = program(*tensors)
    other = copy.deepcopy(program) if how == "deepcopy" else pickle.loads(pickle.dumps(program))
    assert torch.equal(other(*tensors), truth) and repr(other) == repr(program)


@pytest.mark.parametrize("text", ["causal & q.doc <= k.doc", "within(doc, recent(20))", "recent(9) & same(doc)"])
@pytest.mark.parametrize("backend", ["auto", "gathered"])
def test_inputs_that_are_written_to_before_backward_are_refused(text: str, backend: str) -> None:
    """Gradients would be those of another pattern."""
    program, doc = program_of(text, backend), DOC.clone()
    query = torch.randn(1, 2, N, 8, requires_grad=True)
    out = program(query, query, query, inputs={"doc": doc})
    doc.zero_()
    with pytest.raises(InputError, match="input `doc` was written to before its backward pass"):
        out.sum().backward()
    program(query, query, query, inputs={"doc": doc}).sum().backward()
    assert query.grad is not None


class Forgetful(dict[Any, Any]):
    """What another thread clears at once."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def test_lengths_that_another_thread_forgets_are_in_hand() -> None:
    (hull,) = patterndsl.load("examples/packed-sinks-strided.yaml").compile(4096, heads=1).hulls or ()
    assert hull.inside is not None
    ready = Documents(hull.inside, torch.device("cpu"))
    ready._ready = Forgetful()
    assert isinstance(ready.of(30), Planned) and not ready.lengths


@pytest.mark.parametrize("text", ["causal & (recent(20) | strided(9))", "all"])
def test_forms_that_another_thread_forgets_are_in_hand(text: str) -> None:
    """Of tensors that a plan has seen."""
    torch.manual_seed(0)
    tensors = [torch.randn(1, 2, N, 8) for _ in range(3)]
    program = program_of(text, "planned")
    truth = results(program, tensors)
    for train in (False, True):
        planned = program.ready.planned(train=train)
        planned._turns = Forgetful()
        for item in planned.passes:
            assert isinstance(item.kernel, DensePass)
            object.__setattr__(item, "_parts", Forgetful())
            item.kernel._parts = Forgetful()
            for launch in item.kernel.launches:
                launch.queries._adopted = Forgetful()
    for found, wanted in zip(results(program, tensors), truth, strict=True):
        assert torch.equal(found, wanted)
