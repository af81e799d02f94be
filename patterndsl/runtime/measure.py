"""How long does a call take here, and how much memory? Clocks and peaks of the CPU and of CUDA; and what `here` is.

It knows nothing of attention, and takes no medians: what was measured is returned.
"""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise

import torch

CACHE_BYTES = 1 << 28
"""What is written between two calls on CUDA, so that none finds its tensors in the device's cache."""
WARM_UPS = 3
"""Calls before one is captured in a graph."""


def machine_name(device: torch.device) -> str:
    """What results are of: a GPU by its name, or a kind of processor and how many of its threads PyTorch takes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def versions_of(*packages: str) -> dict[str, str]:
    """The version of each package, of PyTorch too; or that it is not installed."""
    found = {"torch": str(torch.__version__)}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def timed(call: Callable[[], object], device: torch.device, number: int = 1) -> tuple[float, int | None]:
    """Seconds of one of so many calls in a row, by the host's clock, and peak memory in bytes beyond what was held: on
    CUDA the allocator's, on Linux the process's own, None where the system does not say."""
    held, result = _reset_peak(device), None
    began = time.perf_counter()
    for _ in range(number):
        result = None  # no call has to live beside what another returned
        result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = (time.perf_counter() - began) / number
    peak = _peak(device)
    del result
    return seconds, None if held is None or peak is None else max(0, peak - held)


def step_seconds(steps: Sequence[Callable[[], object]], device: torch.device, repeats: int) -> list[list[float]]:
    """Seconds of each step, for each of so many rounds over all steps: by events on CUDA, else by the host's clock."""
    return _device_seconds(steps, device, repeats) if device.type == "cuda" else _host_seconds(steps, repeats)


def captured(call: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """A call in a CUDA graph: what is returned runs it again, on what its tensors hold then, and asks the host for one
    launch. It is called before, on a stream of its own, as PyTorch wants it.

    Raises RuntimeError where a call waits for the device, as no graph can: that is asked of one outside of a graph, as
    a capture that breaks leaves PyTorch's generator of random numbers unfit for more.
    """
    stream: Callable[..., torch.cuda.Stream] = torch.cuda.Stream  # which PyTorch leaves untyped
    now, aside = torch.cuda.current_stream(device), stream(device)
    aside.wait_stream(now)
    with torch.cuda.stream(aside):
        for _ in range(WARM_UPS):
            call()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    now.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    finally:
        torch.cuda.set_stream(now)  # which a capture that breaks does not
    replay: Callable[[], None] = graph.replay
    return replay


def _host_seconds(steps: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    rounds = []
    for _ in range(repeats):
        stamps = [time.perf_counter()]
        for step in steps:
            step()
            stamps.append(time.perf_counter())
        rounds.append([after - before for before, after in pairwise(stamps)])
    return rounds


def _device_seconds(steps: Sequence[Callable[[], object]], device: torch.device, repeats: int) -> list[list[float]]:
    """The device is kept busy by clearing its cache while the host gets ahead, so launches do not count twice."""
    cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device)
    event: Callable[..., torch.cuda.Event] = torch.cuda.Event  # which PyTorch leaves untyped
    stamps = [[event(enable_timing=True) for _ in range(len(steps) + 1)] for _ in range(repeats)]
    for events in stamps:
        cache.zero_()
        events[0].record()
        for step, done in zip(steps, events[1:], strict=True):
            step()
            done.record()
    torch.cuda.synchronize(device)
    return [[before.elapsed_time(after) / 1e3 for before, after in pairwise(events)] for events in stamps]


def _reset_peak(device: torch.device) -> int | None:
    """Starts a new peak; what is held now."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what the heap keeps back would hide what the call takes
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # Linux: the peak of the resident set becomes what it is now
    except (OSError, AttributeError, TypeError):
        return None
    return _status_bytes("VmRSS")


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status_bytes("VmHWM")


def _status_bytes(name: str) -> int | None:
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            line = next(line for line in file if line.startswith(f"{name}:"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) * 1024


# ---- who else is at work


@dataclass(frozen=True, slots=True)
class Usage:
    """Seconds so far: by the wall's clock, of all cores at work, of this process at work."""

    wall: float
    busy: float
    own: float


def usage() -> Usage | None:
    """Now; None where the system does not say."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            fields = [int(field) for field in file.readline().split()[1:9]]
        ticks = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return None
    user, nice, system, _, _, irq, softirq, steal = fields
    times = os.times()
    return Usage(time.perf_counter(), (user + nice + system + irq + softirq + steal) / ticks, times.user + times.system)


def cores_of_others(before: Usage | None, after: Usage | None) -> float | None:
    """Cores that other processes kept busy, on average."""
    if before is None or after is None or after.wall <= before.wall:
        return None
    others = (after.busy - before.busy) - (after.own - before.own)
    return max(0.0, others / (after.wall - before.wall))
