"""How long do calls take, and how long when a CUDA graph holds them? In turns, so that a slow moment slows all alike.

On a GPU some calls follow each other, as those of a model do, so that the host asks for one while the device is at
another. Then what takes longer counts: small kernels take as long as the host needs to ask for them; from a graph they
take as long as the device needs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch

from patterndsl.runtime.measure import captured, timed

SECONDS, MOST_CALLS = 0.03, 20
"""Of one contestant in one round on a GPU."""
Calls: TypeAlias = Mapping[tuple[str, str], Callable[[], object]]
"""By who is called and for what: ("ours", "forward")."""


def calls_that_run(
    makers: Mapping[str, Callable[[], Mapping[str, Callable[[], object]]]],
) -> tuple[Calls, dict[str, str]]:
    """The calls of who can be made and run, each called once; and of the others why not, by name.

    makers: by who is called, what makes the calls by what they are for. Other errors than ImportError and RuntimeError
    are raised.
    """
    calls, failures = dict[tuple[str, str], Callable[[], object]](), dict[str, str]()
    for who, make in makers.items():
        try:
            found = {(who, what): call for what, call in make().items()}
            for call in found.values():
                call()
        except (ImportError, RuntimeError) as failed:
            failures[who] = first_line(failed)
        else:
            calls |= found
    return calls, failures


def in_turns(calls: Calls, device: torch.device, repeats: int) -> dict[str, Any]:
    """What is measured of them, each called once before, by names such as "ours forward ms": medians of the host's
    clock, the least and the most, and the peak memory; on CUDA also "captured ms", or why there is none.

    Peers are compared with those whose names begin with "ours": the fastest as they are called, "eager", and the
    fastest in either way with ours from a graph, "captured".
    """
    replays, row = dict[tuple[str, str], Callable[[], object]](), dict[str, Any]()
    eager = _in_turns(calls, device, repeats)
    for of, call in calls.items() if device.type == "cuda" else ():
        try:
            replays[of] = captured(call, device)
        except RuntimeError as failed:
            row[f"{' '.join(of)} captured"] = first_line(failed.__context__ or failed)  # which broke the capture
    by_graph = _in_turns(replays, device, repeats)
    for of, found in eager.items():
        name = " ".join(of)
        seconds, peaks = zip(*found, strict=True)
        row[f"{name} ms"] = 1e3 * statistics.median(seconds)
        row[f"{name} ms, least and most"] = [1e3 * min(seconds), 1e3 * max(seconds)]
        if of in by_graph:
            row[f"{name} captured ms"] = 1e3 * statistics.median(seconds for seconds, _ in by_graph[of])
        row[f"{name} bytes"] = None if None in peaks else statistics.median(peaks)
    for who, what in calls:
        if who.startswith("ours"):
            peers = [f"{peer} {item}" for peer, item in calls if item == what and not peer.startswith("ours")]
            row |= _compared(row, f"{who} {what}", peers)
    return row


def _in_turns(
    calls: Calls, device: torch.device, repeats: int
) -> dict[tuple[str, str], list[tuple[float, int | None]]]:
    """Seconds and peak bytes of each call, in each round over all."""
    found: dict[tuple[str, str], list[tuple[float, int | None]]] = {of: [] for of in calls}
    numbers = {of: _in_a_row(call, device) for of, call in calls.items()}
    for _ in range(repeats):
        for of, call in calls.items():
            found[of].append(timed(call, device, numbers[of]))
    return found


def _in_a_row(call: Callable[[], object], device: torch.device) -> int:
    """How many calls of a kind follow each other in a round."""
    return max(1, min(MOST_CALLS, int(SECONDS / timed(call, device)[0]))) if device.type == "cuda" else 1


def _compared(row: Mapping[str, Any], ours: str, peers: list[str]) -> dict[str, float]:
    """How many times as long the fastest of the peers takes."""
    eager = [row[f"{peer} ms"] for peer in peers]
    either = eager + [row[f"{peer} captured ms"] for peer in peers if f"{peer} captured ms" in row]
    found = dict[str, float]()
    if eager:
        found[f"best peer to {ours}, eager"] = min(eager) / row[f"{ours} ms"]
    if either and f"{ours} captured ms" in row:
        found[f"best peer to {ours}, captured"] = min(either) / row[f"{ours} captured ms"]
    return found


def first_line(failed: BaseException) -> str:
    """Of an error, with its kind."""
    return f"{type(failed).__name__}: {(str(failed).splitlines() or [''])[0][:200]}"
