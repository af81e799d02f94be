"""Counters of the last program: whose are they, and what becomes of them?"""

from __future__ import annotations

import pytest
import torch

from patterndsl.runtime.kernels import tickets as module
from patterndsl.runtime.kernels.tickets import ALIGNED, tickets

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_of_streams", {})
    monkeypatch.setattr(module, "_spare", {})


def test_launches_in_turn_have_the_same() -> None:
    assert tickets(CPU, 3).data_ptr() == tickets(CPU, ALIGNED).data_ptr()


def test_more_are_zero_again() -> None:
    tickets(CPU, 3)
    found = tickets(CPU, ALIGNED + 1)
    assert found.dtype == torch.int32
    assert found.tolist() == [0] * (ALIGNED + 1)


@pytest.mark.parametrize("ran_before", [False, True])
def test_what_is_captured_has_its_own(ran_before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that were cleared before, as long as there are some; the others are cleared by the graph itself."""
    if ran_before:
        monkeypatch.setattr(module, "_spare", {CPU: (torch.zeros(2 * ALIGNED, dtype=torch.int32), 0)})
    found = [module._captured(CPU, count) for count in (1, 5, ALIGNED)]
    starts = [x.data_ptr() // 4 for x in found]
    assert len({start // ALIGNED for start in starts}) == 3 or not ran_before
    assert [x.numel() for x in found] == [1, 5, ALIGNED]
    assert not any(x.any() for x in found)
    if ran_before:
        spare = module._spare[CPU][0].data_ptr() // 4
        assert [start - spare for start in starts[:2]] == [0, ALIGNED]
        assert not 0 <= starts[2] - spare < 2 * ALIGNED


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there are no streams")
@pytest.mark.cuda
def test_streams_have_their_own() -> None:
    device = torch.device("cuda", 0)
    here = tickets(device, 4)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert tickets(device, 4).data_ptr() != here.data_ptr()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = tickets(device, 4)
        other = tickets(device, 4)
    assert len({x.data_ptr() for x in (here, captured, other)}) == 3
