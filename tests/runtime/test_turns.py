"""Calls are timed one by one and, on a GPU, from a CUDA graph; who waits for the device is no part of one."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakSet

import numpy as np
import pytest
import torch

from patterndsl.runtime import turns
from patterndsl.runtime.measure import captured, machine_name, timed, versions_of
from patterndsl.runtime.turns import calls_that_run, first_line, in_turns

on_cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CPU = torch.device("cpu")
Call = Callable[[], object]


def test_what_is_said_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Medians, and by how much the fastest peer is slower: eager ones to ours, and in either way to ours in a graph."""
    seconds = {"ours": [4e-3, 1e-3, 2e-3], "one": [8e-3, 8e-3, 8e-3], "other": [6e-3, 6e-3, 6e-3]}
    of_graph = {"ours": 5e-4, "one": 4e-3, "other": 7e-3}

    def stopped(call: Any, _: object, number: int = 0) -> tuple[float, int]:
        """A first call alone says how many follow each other in a round."""
        (name,) = call.args
        if not number:
            return 2e-3, 100
        assert number == 15
        return (of_graph[name] if call.func is replay else seconds[name].pop()), 100

    def replay(_: str) -> None: ...

    def is_called(_: str) -> None: ...

    monkeypatch.setattr(turns, "timed", stopped)
    monkeypatch.setattr(turns, "SECONDS", 0.0301)
    monkeypatch.setattr(turns, "captured", lambda call, _: partial(replay, *call.args))
    calls: dict[tuple[str, str], Call] = {(name, "forward"): partial(is_called, name) for name in seconds}
    row = in_turns(calls, torch.device("cuda"), 3)
    assert row["ours forward ms"] == pytest.approx(2.0)
    assert row["ours forward ms, least and most"] == pytest.approx([1.0, 4.0])
    assert row["ours forward captured ms"] == pytest.approx(0.5)
    assert row["ours forward bytes"] == 100
    assert row["best peer to ours forward, eager"] == pytest.approx(3.0)
    assert row["best peer to ours forward, captured"] == pytest.approx(8.0)


def test_on_a_cpu_there_are_no_graphs() -> None:
    row = in_turns({("ours", "forward"): lambda: torch.ones(8).sum()}, CPU, 2)
    assert set(row) == {"ours forward ms", "ours forward ms, least and most", "ours forward bytes"}


def test_who_cannot_be_captured_stands_with_its_eager_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def captured(call: Call, _: object) -> Call:
        if call is peer:
            raise RuntimeError("it waits\nfor the device")
        return call

    def ours() -> None: ...

    def peer() -> None: ...

    monkeypatch.setattr(turns, "captured", captured)
    monkeypatch.setattr(turns, "timed", lambda call, *_: (6e-3 if call is peer else 2e-3, None))
    row = in_turns({("ours", "forward"): ours, ("peer", "forward"): peer}, torch.device("cuda"), 1)
    assert row["peer forward captured"] == "RuntimeError: it waits"
    assert row["best peer to ours forward, captured"] == pytest.approx(3.0)


def test_calls_in_a_row_share_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """And none of them lives beside what the one before returned."""
    now, alive = [0.0], WeakSet[Any]()
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def call() -> torch.Tensor:
        assert not alive
        now[0] += 2.0
        found = torch.ones(1)
        alive.add(found)
        return found

    assert timed(call, CPU, 3)[0] == pytest.approx(2.0)


def test_an_error_without_words() -> None:
    assert first_line(RuntimeError()) == "RuntimeError: "


@pytest.mark.parametrize("where", [pytest.param("cuda", marks=on_cuda)])
def test_a_replay_runs_on_other_numbers(where: str) -> None:
    x, found = torch.zeros(8, device=where), torch.empty(8, device=where)
    again = captured(lambda: found.copy_(x + 1), torch.device(where))
    x.fill_(2.0)
    again()
    assert torch.equal(found, torch.full_like(found, 3.0))


@pytest.mark.parametrize("where", [pytest.param("cuda", marks=on_cuda)])
def test_what_waits_for_the_device_is_refused(where: str) -> None:
    """And leaves random numbers as they were."""
    x, device = torch.ones(8, device=where), torch.device(where)
    with pytest.raises(RuntimeError, match="synchronizing"):
        captured(lambda: x.sum().item(), device)
    assert torch.rand(8, device=where).isfinite().all()
    assert torch.cuda.get_sync_debug_mode() == 0


def test_those_that_cannot_run_say_why_and_the_others_are_called_once() -> None:
    called = list[str]()

    def fails() -> object:
        raise RuntimeError("no such kernel\nand more")

    def absent() -> dict[str, Callable[[], object]]:
        raise ImportError("no module")

    makers: dict[str, Callable[[], dict[str, Callable[[], object]]]] = {
        "ours": lambda: {"forward": lambda: called.append("forward"), "training": lambda: called.append("training")},
        "broken": lambda: {"forward": lambda: called.append("broken"), "training": fails},
        "absent": absent,
    }
    calls, failures = calls_that_run(makers)
    assert list(calls) == [("ours", "forward"), ("ours", "training")]
    assert called == ["forward", "training", "broken"]
    assert failures == {"broken": "RuntimeError: no such kernel", "absent": "ImportError: no module"}


def test_results_say_what_they_are_of() -> None:
    assert machine_name(CPU).endswith(f"{torch.get_num_threads()} threads")
    assert versions_of("numpy", "no-such-package") == {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "no-such-package": "not installed",
    }
