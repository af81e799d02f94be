"""How fast is a device at what plans are made of? Each constant of `lower.costs.Machine`, measured by its own kernel,
and on a GPU the blocks on which generated kernels are fastest (`kernels.tuning`).

A kernel runs a piece that shows one constant, and the cost model is solved for it; what the model says of the rest of
that piece is taken off. Rates are of heads of 64, calls are of a pass in a plan. Nothing is stored here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor

from patterndsl.ir.index import Const, K, Q, arithmetic
from patterndsl.ir.relation import EVERYTHING, Compare, Relation, conjunction
from patterndsl.lower.blocks import Tuned
from patterndsl.lower.costs import BACKWARD, NO_COST, kernel_of
from patterndsl.lower.devices import Machine, built_in
from patterndsl.lower.geometry import Axis, Geometry, Side
from patterndsl.lower.lookup import Lookup
from patterndsl.lower.machine import Calibration, torch_version
from patterndsl.lower.plan import Pass
from patterndsl.lower.shapes import Band, Full, Piece, Sparse
from patterndsl.lower.tiles import OnEvent, find_tiles
from patterndsl.runtime.constants import device_name
from patterndsl.runtime.fused import merge_into
from patterndsl.runtime.kernels.passes import WholePass
from patterndsl.runtime.measure import step_seconds
from patterndsl.runtime.merge import Merged
from patterndsl.runtime.planned import Kernel, Planned
from patterndsl.sema.parameters import Sizes

HEAD_DIM = 64
SCALE = HEAD_DIM**-0.5
BUDGET = 1.0
"""Seconds that one constant's repeats take, when they are not fewer than MIN_REPEATS."""
MIN_REPEATS, MAX_REPEATS = 5, 300
MANY_PASSES = 6


@dataclass(frozen=True, slots=True)
class Setting:
    """Sizes that a device is busy with: heads, the side of a dense square, rows of what is long, of what is short (0
    where tiles are computed whole), few keys, and rows of what takes next to no time."""

    heads: int
    dtype: torch.dtype
    square: int
    long: int
    short: int
    few: int
    tiny: int


SETTINGS = {
    "cpu": Setting(4, torch.float32, 2048, 8192, 16, 64, 16),
    "cuda": Setting(16, torch.bfloat16, 8192, 65_536, 0, 128, 256),
}
WINDOW, TILE = 256, 64


def calibrate(device: torch.device, *, on_event: OnEvent | None = None) -> Calibration:
    """The constants of a device, what its kernels were tuned to, and what was measured with. Takes some seconds, on
    CUDA, where kernels are compiled, some minutes; other work on the device is measured too, so let there be none.
    """
    device_type = "cuda" if device.type == "cuda" else "cpu"
    found = _Measurement(device, built_in(device_type), SETTINGS[device_type])
    steps: tuple[tuple[str, Callable[[], None]], ...] = (
        ("dense", found.dense),
        ("short groups", found.short),
        ("few keys", found.few),
        ("masked", found.masked),
        ("merging", found.merging),
        ("calls", found.calls),
        ("block-sparse", found.sparse),
    )
    with torch.no_grad():
        for at, (name, step) in enumerate(steps):
            if on_event is not None:
                on_event(f"measuring: {name}", at, len(steps))
            step()
    if on_event is not None:
        on_event("measuring", len(steps), len(steps))
    tuned = _tuned(device, on_event)
    name = device_name(device)
    machine = replace(found.machine, name=name)
    torch_is = torch_version() or torch.__version__
    return Calibration(machine, device_type, name, torch_is, torch.get_num_threads(), tuned)


def _tuned(device: torch.device, on_event: OnEvent | None) -> tuple[Tuned, ...]:
    """Blocks of generated kernels, where there are some."""
    if device.type != "cuda" or find_spec("triton") is None:
        return ()
    from patterndsl.runtime.kernels.tuning import tune

    return tune(device, on_event=on_event)


@dataclass
class _Measurement:
    """The machine so far: each step replaces constants of the built-in one, from those before it."""

    device: torch.device
    machine: Machine
    setting: Setting

    def dense(self) -> None:
        """The rate of a square, and how much slower the products of its backward pass are."""
        size = self.setting.square
        piece = Piece(Geometry((), _side(size), _side(size)), Full())
        forward, backward = self.seconds(piece, size), self.backward_seconds(piece, size)
        work = self.flops(piece.num_computed)
        self.machine = replace(
            self.machine, dense_rate=_rounded(work / forward), backward_rate=_rounded(BACKWARD * forward / backward)
        )
        if self.device.type == "cuda":
            units = torch.cuda.get_device_properties(self.device).multi_processor_count
            self.machine = replace(self.machine, units=units)

    def short(self) -> None:
        """Rows of a group below which a kernel loses speed: rate x rows / (rows + short), where a few attend all keys.
        On CUDA such rows alone would leave most of the device idle, and tiles are computed whole: see `few`."""
        if not self.setting.short:
            self.machine = replace(self.machine, short=0)
            return
        rows, length = self.setting.short, self.setting.long
        piece = Piece(Geometry((), _side(rows), _side(length)), Full())
        self.machine = replace(self.machine, short=self.lost(piece, length, rows))

    def few(self) -> None:
        """The same for keys: all rows attend a few, or on CUDA, each group of a tile's rows its own."""
        keys, length = self.setting.few, self.setting.long
        geometry = Geometry((), _side(length), _side(keys))
        if self.device.type == "cuda":
            side = Side(0, (Axis(keys, 1),))
            geometry = Geometry((Axis(length // keys, keys),), side, side)
        self.machine = replace(self.machine, few=self.lost(Piece(geometry, Full()), length, keys))

    def lost(self, piece: Piece, length: int, number: int) -> int:
        """So many rows or keys as it takes for the speed to be half, from how fast `number` of them are."""
        rate = self.flops(piece.num_computed) / self.seconds(piece, length)
        return round(min(max(number * (self.machine.dense_rate / rate - 1), 1.0), 16.0 * number))

    def masked(self) -> None:
        """The rate of a band in overlapping tiles, whole as pieces count them, though they go forward in halves; as for
        a square where masks are not welcome."""
        if not self.machine.bands:
            self.machine = replace(self.machine, band_rate=self.machine.dense_rate)
            return
        width = WINDOW + TILE
        rows = (self.setting.long - WINDOW) // TILE * TILE
        q, k = torch.arange(TILE)[:, None], torch.arange(width)
        mask = ((k >= q + 1) & (k <= q + WINDOW)).numpy()
        geometry = Geometry((), Side(WINDOW, (Axis(rows, 1),)), _side(rows + WINDOW))
        piece = Piece(geometry, Band(TILE, mask))
        rate = self.flops(piece.num_computed) / self.seconds(piece, self.setting.long)
        lost = (1 + self.machine.short / TILE) * (1 + self.machine.few / width)
        self.machine = replace(self.machine, band_rate=_rounded(rate * lost))

    def merging(self) -> None:
        """Bytes of a merge: two results are read, one is written."""
        out, part, _ = self.tensors(self.setting.long)
        lse, part_lse = (torch.zeros(out.shape[:3], device=self.device) for _ in range(2))
        seconds = self.clocked(lambda: merge_into(out, lse, part, part_lse, 1))
        self.machine = replace(self.machine, bandwidth=_rounded(3 * out.numel() * out.element_size() / seconds))

    def calls(self) -> None:
        """What a pass takes that has next to nothing to do, dense and block-sparse."""
        length = self.setting.tiny
        dense = Piece(Geometry((), _side(length), _side(length)), Full())
        sparse = _tiled(EVERYTHING, length, self.machine.blocks[0])
        dense_call, sparse_call = (_rounded(self.call_seconds(piece)) for piece in (dense, sparse))
        self.machine = replace(self.machine, dense_call=dense_call, sparse_call=sparse_call)

    def sparse(self) -> None:
        """The rate of full tiles, and how much more work a masked one is. Each block of queries has keys of its own."""
        length, (q_block, kv_block) = self.setting.long, self.machine.blocks[0]
        back = arithmetic("-", arithmetic("//", Q, Const(q_block)), arithmetic("//", K, Const(q_block)))
        near = conjunction((Compare("<=", Const(0), back), Compare("<", back, Const(8))))
        whole = _tiled(near, length, (q_block, kv_block))
        odd = arithmetic("%", arithmetic("+", Q, K), Const(2))
        masked = _tiled(conjunction((near, Compare("==", odd, Const(0)))), length, (q_block, kv_block))
        of_whole, of_masked = (self.seconds(piece, length) for piece in (whole, masked))
        moved = 3 * self.setting.heads * HEAD_DIM * self.machine.itemsize * length / self.machine.bandwidth
        taken_off = self.machine.sparse_call + (moved if self.machine.sparse_kernel == "gathered" else 0.0)
        # what is taken off was measured too, and may be too much where little is left
        of_whole, of_masked = (max(seconds - taken_off, seconds / 2) for seconds in (of_whole, of_masked))
        rate = self.flops(whole.num_computed) / of_whole
        partial = of_masked * rate / self.flops(masked.num_computed)
        partial = _rounded(min(max(partial, 1.0), 4.0))
        self.machine = replace(self.machine, sparse_rate=_rounded(rate), partial=partial)

    # ---- how

    def flops(self, num_pairs: int) -> float:
        return 4.0 * HEAD_DIM * num_pairs * self.setting.heads

    def tensors(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key, value [1, heads, length, 64], the same each time."""
        generator = torch.Generator().manual_seed(0)
        shape = (3, 1, self.setting.heads, length, HEAD_DIM)
        query, key, value = torch.randn(shape, generator=generator).to(self.device, self.setting.dtype)
        return query, key, value

    def as_pass(self, piece: Piece) -> Pass:
        return Pass(tuple(range(self.setting.heads)), piece, kernel_of(piece, self.machine), NO_COST)

    def kernel(self, piece: Piece) -> Kernel:
        """The piece made ready."""
        (ready,) = Planned([self.as_pass(piece)], self.device).passes
        assert not isinstance(ready.kernel, WholePass), "whole sequences are not asked for"
        return ready.kernel

    def seconds(self, piece: Piece, length: int) -> float:
        """Of the forward pass of a piece, without merging."""
        tensors, kernel = self.tensors(length), self.kernel(piece)
        return self.clocked(lambda: [kernel.forward(launch, *tensors, SCALE, False) for launch in kernel.launches])

    def backward_seconds(self, piece: Piece, length: int) -> float:
        """Of the backward pass of a piece of all positions."""
        query, key, value = self.tensors(length)
        kernel = self.kernel(piece)
        (launch,) = kernel.launches  # a full square is one call
        out, lse, saved = kernel.forward(launch, query, key, value, SCALE, True)
        merged = Merged(out.reshape(query.shape), lse.reshape(query.shape[:3]), torch.ones_like(query))
        return self.clocked(lambda: kernel.backward(launch, query, key, value, merged, SCALE, saved))

    def call_seconds(self, piece: Piece) -> float:
        """What a pass more takes in a plan."""
        query, key, value = self.tensors(self.setting.tiny)
        plan = Planned([self.as_pass(piece)], self.device)
        (one,) = plan.passes
        more = replace(one, is_first=(False,) * len(one.is_first))  # others merge
        seconds = []
        for number in (2, 2 + MANY_PASSES):
            plan.passes = (one, *(more,) * (number - 1))
            seconds.append(self.clocked(lambda: plan(query, key, value, SCALE)))
        return max(1e-7, (seconds[1] - seconds[0]) / MANY_PASSES)

    def clocked(self, call: Callable[[], object]) -> float:
        """The least seconds of a call that was made before: what else the device does only adds to them."""
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        began = time.perf_counter()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        once = max(1e-6, time.perf_counter() - began)
        repeats = round(min(max(BUDGET / once, MIN_REPEATS), MAX_REPEATS))
        return min(taken for (taken,) in step_seconds([call], self.device, repeats))


def _side(length: int) -> Side:
    return Side(0, (Axis(length, 1),))


def _tiled(relation: Relation, length: int, block: Sequence[int]) -> Piece:
    """A relation of so many positions as block-sparse."""
    tiles = find_tiles(relation, Sizes(length, length, 0, length), Lookup(), block[0], block[1])
    return Piece(Geometry((), _side(length), _side(length)), Sparse(tiles, relation))


def _rounded(value: float) -> float:
    """Three digits: more are noise, and they would be another plan each time."""
    return float(f"{value:.3g}")
