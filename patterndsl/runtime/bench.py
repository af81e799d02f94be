"""How does a pattern run here beside dense SDPA and FlexAttention? The contestants, their masks, and the machine.

The same work in the same run: see `runtime.contest`. Dense attention is causal where the pattern is; FlexAttention gets
the pattern's own predicate and its own best block size, and the time to build its mask is told apart.
"""

from __future__ import annotations

import datetime
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import scaled_dot_product_attention

from patterndsl.ir.index import K, Q
from patterndsl.ir.relation import EVERYTHING, Compare, Everything, Relation
from patterndsl.lower.tiles import OnEvent
from patterndsl.runtime import flex, oracle
from patterndsl.runtime.arguments import checked_scale
from patterndsl.runtime.bench_terms import flex_of_terms
from patterndsl.runtime.composed import CompositeProgram
from patterndsl.runtime.contest import Contest, Contestant, Limits, Variant, contest
from patterndsl.runtime.data import Inputs
from patterndsl.runtime.program import Program
from patterndsl.runtime.rival import expected_seconds, four_dimensional, looks_causal, own_dense, with_equal_heads
from patterndsl.runtime.tensors import Attend, Tensors
from patterndsl.runtime.trial import attend_of
from patterndsl.sema.bind import Bound, HeadGroup

FLEX_BLOCKS = (128, 64)
FLEX_SHARE = 6.0
"""FlexAttention takes up to so many times what dense attention takes for the pairs of its blocks."""
MASKED_SHARE = 3.0
"""The same of dense attention with a mask, for all pairs."""
MASK_PAIRS = {"cpu": 1 << 28, "cuda": 1 << 34}
"""Up to so many pairs create_block_mask is timed: on the CPU it holds 10 bytes of each, on CUDA it is compiled."""


@dataclass(frozen=True, slots=True)
class Preparation:
    """Seconds before a first call: FlexAttention's mask by create_block_mask (None, and why, where it was not timed),
    the same mask by `Program.block_mask` (None where there are several terms), and this program's plan or tiles."""

    create_block_mask: float | None
    skipped: str | None
    block_mask: float | None
    plan: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """The program first, then its rivals."""

    text: str
    backend: str
    contest: Contest
    preparation: Preparation


@dataclass(frozen=True, slots=True)
class Rivals:
    """Which are there, beside those that the caller brings."""

    dense: bool = True
    flex: bool = True
    masked_memory: bool = True


def compare(
    program: Program | CompositeProgram,
    tensors: Tensors,
    inputs: Inputs | None = None,
    *,
    backward: bool = False,
    rivals: Rivals | None = None,
    others: Sequence[Contestant] = (),
    limits: Limits | None = None,
    on_event: OnEvent | None = None,
) -> Comparison:
    """The program beside its rivals and others. Raises PatternError (E505) for a backend that cannot do it."""
    rivals, limits = rivals or Rivals(), limits or Limits()
    if isinstance(program, CompositeProgram):
        return _compare_terms(program, tensors, inputs, backward, rivals, others, limits, on_event)
    began = time.perf_counter()
    match program.choice.usual:
        case "planned":
            _ = program.plan
        case "told" | "slotted" | "ordered" | "chunked" | "routed":
            _ = program.ready.by_inputs
        case who if who != "oracle":
            program.tiles(inputs=inputs)
    planning = time.perf_counter() - began
    found = [Contestant("patterndsl", (Variant(program.backend, attend_of(program, inputs), program, inputs),))]
    if rivals.dense:
        found.append(dense(program, tensors, inputs, backward))
    preparation = Preparation(None, "not asked for", 0.0, planning)
    if rivals.flex:
        preparation = _preparation(program, inputs, planning, on_event)
        found.append(flex_attention(program, tensors, inputs))
    if rivals.masked_memory:
        found += masked(program, tensors, backward)
    result = contest((*found, *others), tensors, backward=backward, limits=limits, on_event=on_event)
    return Comparison(program.text, program.backend, result, preparation)


def _compare_terms(
    program: CompositeProgram,
    tensors: Tensors,
    inputs: Inputs | None,
    backward: bool,
    rivals: Rivals,
    others: Sequence[Contestant],
    limits: Limits,
    on_event: OnEvent | None,
) -> Comparison:
    """A pattern with several terms beside dense attention of its shape, and FlexAttention where that can say it."""
    began = time.perf_counter()
    attend_of(program, inputs)(tensors)
    planning = time.perf_counter() - began
    found = [Contestant("patterndsl", (Variant(program.backend, attend_of(program, inputs), program, inputs),))]
    if rivals.dense:
        found.append(_own_dense(program, tensors, backward))
    preparation = Preparation(None, "not asked for", None, planning)
    if rivals.flex:
        rival, building = flex_of_terms(program, tensors, inputs, limit=MASK_PAIRS.get(program.device.type, 0))
        found.append(rival)
        preparation = Preparation(building, rival.skipped, None, planning)
    result = contest((*found, *others), tensors, backward=backward, limits=limits, on_event=on_event)
    return Comparison(program.text, program.backend, result, preparation)


def _own_dense(program: CompositeProgram, tensors: Tensors, backward: bool) -> Contestant:
    """Dense attention to the sequence's own keys, causal where the pattern is; checked as what it is."""
    label, note, options = own_dense(program)
    causal = bool(options)
    truth = _truth(program, Compare("<=", K, Q) if causal else EVERYTHING)
    variants = _dense_variants(truth, partial(_attend_dense, causal=causal), tensors)
    share = 0.6 if causal else 1.0
    return Contestant(label, variants, note, share * expected_seconds(with_equal_heads(tensors), options, backward))


# ---- dense attention


def dense(program: Program, tensors: Tensors, inputs: Inputs | None, backward: bool) -> Contestant:
    """SDPA without the pattern: causal where that is, all pairs elsewhere. On CUDA the best of its kernels."""
    causal = _is_square(program) and looks_causal(program, inputs)
    relation: Relation = Compare("<=", K, Q) if causal else EVERYTHING
    truth = _truth(program, relation)
    variants = _dense_variants(truth, partial(_attend_dense, causal=causal), tensors)
    label = "dense SDPA, causal" if causal else "dense SDPA"
    options = {"is_causal": True} if causal else {}
    share = 0.6 if causal else 1.0  # of what the rule of three says, as the part it starts from is nearly square
    seconds = share * expected_seconds(with_equal_heads(tensors), options, backward)
    note = None if program.bound.relation == relation else "more pairs than the pattern has"
    return Contestant(label, variants, note, seconds)


def _dense_variants(truth: Program, attend: Attend, tensors: Tensors) -> tuple[Variant, ...]:
    """One for each kernel of CUDA."""
    if tensors.query.device.type != "cuda":
        return (Variant("", attend, truth, None, with_equal_heads),)
    kernels = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
        "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    return tuple(
        Variant(name, partial(_by_kernel, attend, kernel), truth, None, with_equal_heads)
        for name, kernel in kernels.items()
    )


def masked(program: Program, tensors: Tensors, backward: bool) -> list[Contestant]:
    """SDPA with the pattern as a mask, for its memory: empty where there is none, or it is out of reach."""
    sizes, bound = program.bound.sizes, program.bound
    if isinstance(bound.relation, Everything) or (bound.relation == Compare("<=", K, Q) and _is_square(program)):
        return []
    num_masks = bound.num_heads if len(bound.groups) > 1 else 1
    if bound.inputs or num_masks * sizes.q_len * sizes.kv_len > oracle.MAX_PAIRS:
        return []
    seconds = MASKED_SHARE * expected_seconds(with_equal_heads(tensors), {}, backward)
    kept: list[Tensor] = []

    def arranged(parts: Tensors) -> Tensors:
        kept.append(four_dimensional(program.mask()))
        return with_equal_heads(parts)

    def attend(parts: Tensors) -> Tensor:
        return scaled_dot_product_attention(parts.query, parts.key, parts.value, attn_mask=kept[0])

    variant = Variant("", attend, program, None, arranged)
    note = "called once, for its memory, with that of its mask"
    held = num_masks * sizes.q_len * sizes.kv_len
    return [Contestant("dense SDPA, masked", (variant,), note, seconds, memory_only=True, held_bytes=held)]


def _is_square(program: Program) -> bool:
    sizes = program.bound.sizes
    return sizes.q_start == 0 and sizes.q_len == sizes.kv_len


def _truth(program: Program | CompositeProgram, relation: Relation) -> Program:
    """Plain attention of the same sizes by another relation, by the oracle."""
    groups = (HeadGroup(relation, tuple(range(program.num_heads))),)
    bound = Bound(relation, groups, (), program.sizes, program.num_heads, 0)
    return Program(bound, program.text, program.device, "oracle")


def _attend_dense(tensors: Tensors, causal: bool) -> Tensor:
    return scaled_dot_product_attention(tensors.query, tensors.key, tensors.value, is_causal=causal)


def _by_kernel(attend: Attend, kernel: SDPBackend, tensors: Tensors) -> Tensor:
    with sdpa_kernel(kernel):
        return attend(tensors)


# ---- FlexAttention


def flex_attention(program: Program, tensors: Tensors, inputs: Inputs | None) -> Contestant:
    """FlexAttention on the pattern's predicate with blocks of each size; the CPU has no gradients of it."""
    if not program.bound.is_plain:
        return Contestant(
            "FlexAttention", (), skipped="it counts a key once, and the pattern has `merge` or `fallback`"
        )
    on_cuda = tensors.query.device.type == "cuda"
    masks = {block: program.block_mask(block, inputs) for block in FLEX_BLOCKS}
    share = min(_block_density(mask) for mask in masks.values())
    seconds = FLEX_SHARE * share * expected_seconds(with_equal_heads(tensors), {}, False)
    variants = tuple(
        Variant(
            f"blocks of {block}",
            _flex_of(mask, tensors.query.shape[-1]),
            program,
            inputs,
            trains=on_cuda and block >= 128,  # its backward kernel takes no smaller ones
        )
        for block, mask in masks.items()
    )
    note = None if on_cuda else "PyTorch has no gradients of it on the CPU"
    return Contestant("FlexAttention", variants, note, seconds)


def _flex_of(mask: BlockMask, head_dim: int) -> Attend:
    attend, scale = flex.compiled_flex(), checked_scale(None, head_dim)

    def run(tensors: Tensors) -> Tensor:
        return flex.flex(attend, tensors.query, tensors.key, tensors.value, mask, scale=scale, want_lse=False)[0]

    return run


def _block_density(mask: BlockMask) -> float:
    """Live blocks to all blocks."""
    full = mask.full_kv_num_blocks
    num_live = int(mask.kv_num_blocks.sum()) + (0 if full is None else int(full.sum()))
    num_rows = math.prod(mask.kv_num_blocks.shape)
    return num_live / max(1, num_rows * -(-mask.seq_lengths[1] // mask.BLOCK_SIZE[1]))


def _preparation(program: Program, inputs: Inputs | None, planning: float, on_event: OnEvent | None) -> Preparation:
    bound, device = program.bound, program.device
    if not bound.is_plain:
        return Preparation(None, "there is no mask of it", None, planning)
    began = time.perf_counter()
    mask = program.block_mask(FLEX_BLOCKS[0], inputs)
    ours = time.perf_counter() - began
    num_heads = bound.num_heads if len(bound.groups) > 1 else None
    pairs = (num_heads or 1) * bound.sizes.q_len * bound.sizes.kv_len
    limit = MASK_PAIRS.get(device.type, 0)
    if not pairs:
        return Preparation(None, "it takes no mask of no pairs", ours, planning)
    if pairs > limit:
        return Preparation(None, f"{pairs:,} pairs are more than the {limit:,} that it is timed for", ours, planning)
    if on_event:
        on_event("timing create_block_mask", 0, 1)
    build: Callable[..., BlockMask] = create_block_mask
    if device.type == "cuda":
        build = torch.compile(create_block_mask)
        build(mask.mask_mod, None, num_heads, bound.sizes.q_len, bound.sizes.kv_len, device=device.type)
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    build(mask.mask_mod, None, num_heads, bound.sizes.q_len, bound.sizes.kv_len, device=device.type)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Preparation(time.perf_counter() - began, None, ours, planning)


# ---- where it was measured


def surroundings(device: torch.device, packages: Sequence[str] = ()) -> dict[str, object]:
    """Machine, versions and date. packages: others whose versions matter."""
    machine: dict[str, object] = {"cpu": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("patterndsl", *packages):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"machine": machine, "versions": versions, "date": date}


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
