"""What may a caller give a program? Devices, blocks, positions, tensors and scales, checked before any computation.

Inputs of the pattern are checked where they are stored, in `runtime.data`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real

import torch
from torch import Tensor

from patterndsl.diagnostics import input_error, nearest
from patterndsl.lower.fallback import BACKENDS
from patterndsl.runtime.data import INTEGER_DTYPES
from patterndsl.runtime.merge import wide
from patterndsl.sema.bind import Bound, Sizes
from patterndsl.sema.parameters import MAX_SIZE, integer, integers, shown_integer

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_backend(backend: object) -> None:
    """Raises InputError (E505) where there is no such backend."""
    if backend not in BACKENDS:
        raise input_error("E505", f"there is no backend {backend!r}", f"the backends are {', '.join(BACKENDS)}")


def checked_device(device: str | torch.device) -> torch.device:
    """The device, with its number. Raises InputError (E505) where there is none."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise input_error("E505", f"there is no device {device!r}", "use 'cpu' or 'cuda'") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise input_error("E505", "there is no CUDA device on this machine", "compile for device='cpu'")
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, ImportError) as failed:
        # PyTorch's ways to say that a device cannot be used: it has no operators, was built without it, or lacks a part
        why = str(failed).strip().partition("\n")[0]
        help = "use 'cpu', or a build of PyTorch for it"
        raise input_error("E505", f"PyTorch cannot use the device {found} here: {why}", help) from None
    if found.type != "cuda":
        return found
    return torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)


def checked_positions(given: Tensor | Sequence[int], sizes: Sizes) -> Tensor:
    """The query positions as int64 [n]. Raises InputError (E502)."""
    fits = isinstance(given, Tensor) and given.dim() == 1 and given.dtype in INTEGER_DTYPES
    listed = (given.tolist() if fits else None) if isinstance(given, Tensor) else integers(given)
    if listed is None:
        shown = f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        help = "give a list, or a tensor of one dimension, of integers"
        raise input_error("E502", f"positions are {shown}", help)
    start, stop = sizes.q_start, sizes.q_start + sizes.q_len
    outside = next((place for place in listed if not start <= place < stop), None)
    if outside is not None:
        help = f"give positions from {start} to {stop - 1}" if start < stop else "give none: the program has no query"
        raise input_error("E502", f"there is no query at position {shown_integer(outside)}", help)
    return torch.tensor(listed, dtype=torch.int64)


def checked_block(size: int) -> int:
    """Positions per block. Raises InputError (E406)."""
    found = integer(size)
    if found is not None and 1 <= found <= MAX_SIZE:
        return found
    shown = f"a block is an integer, not {type(size).__name__}"
    shown = shown if found is None else f"a block of {shown_integer(found)} positions"
    raise input_error("E406", shown, "give an integer from 1 to 2^40, such as 128")


def check_tensors(query: Tensor, key: Tensor, value: Tensor, bound: Bound, device: torch.device) -> None:
    """Raises InputError (E503, E505) where the tensors do not fit each other or the program."""
    named = {"query": query, "key": key, "value": value}
    for name, tensor in named.items():
        if isinstance(tensor, Tensor) and (tensor.is_nested or tensor.layout != torch.strided):
            layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
            raise input_error("E503", f"{name} is a {layout} tensor", "give dense tensors; lengths of rows are inputs")
        if not isinstance(tensor, Tensor) or tensor.dim() != 4:
            shape = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise input_error("E503", f"{name} is {shape}", "give query [B, Hq, Tq, D], key and value [B, Hkv, Tk, D]")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            message = f"{name} is {tensor.dtype} on {tensor.device}, query {query.dtype} on {query.device}"
            raise input_error("E503", message, "give all three in one dtype, on one device")
    if query.dtype not in DTYPES:
        raise input_error("E505", f"attention in {query.dtype}", "use float32, bfloat16, float16 or float64")
    if query.device != device:
        raise input_error(
            "E503",
            f"the tensors are on {query.device}, the program on {device}",
            "compile for their device",
        )
    problem = _misfit(query.shape, key.shape, value.shape, bound)
    if problem is not None:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in named.items())
        raise input_error("E503", problem[0].format(shapes), problem[1])


def _misfit(query: torch.Size, key: torch.Size, value: torch.Size, bound: Bound) -> tuple[str, str] | None:
    """What does not fit, with a place for the shapes, and what does."""
    if not query[0] == key[0] == value[0]:
        return "batch sizes differ: {}", "give one batch size"
    if key[:3] != value[:3] or key[3] != query[3]:
        return "shapes do not fit: {}", "key and value share B, Hkv, Tk; query and key share D"
    if key[1] == 0 or query[1] % key[1]:
        return "heads do not divide: {}", "query heads are a multiple of key heads"
    want = (bound.num_heads, bound.sizes.q_len, bound.sizes.kv_len)
    if (query[1], query[2], key[2]) != want:
        message = f"the program is for {want[0]} heads, {want[1]} queries and {want[2]} keys, got {{}}"
        return message, "compile for these sizes, or call patterndsl.attention, which does"
    return None


def checked_scale(scale: object, head_dim: int) -> float:
    """The scale of the scores. Raises InputError (E503) where it is not one finite number."""
    if scale is None:
        return float(max(1, head_dim) ** -0.5)  # without a head dimension scores are 0, whatever their scale
    help = "give a number; the default is D ** -0.5"
    if isinstance(scale, Tensor):
        if scale.requires_grad:
            raise input_error("E503", "the scale has no gradient here", "multiply the query instead")
        scale = scale.item() if scale.numel() == 1 else scale
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise input_error("E503", f"the scale is {type(scale).__name__}", help)
    try:
        number = float(scale)
    except OverflowError:  # an integer beyond all floats
        number = math.inf
    if not math.isfinite(number):
        raise input_error("E503", "the scale is not finite", help)
    return number


def with_positive_scale(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """A query and a scale above 0 with the same scores. PyTorch's kernels mask before they scale, and then a scale of 0
    makes -inf NaN, and one below 0 makes it inf."""
    if scale < 0:
        query, scale = -query, -scale
    tiny = torch.finfo(wide(query.dtype)).tiny  # where kernels calculate
    return (query, scale) if scale >= tiny else (query * scale, 1.0)


_AUTOCAST_KINDS = tuple(kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind))
"""Asked once, as PyTorch 2.11 cannot trace the question."""


def is_autocast_on(kind: str) -> bool:
    """Whether autocast is on for a kind of device."""
    return kind in _AUTOCAST_KINDS and torch.is_autocast_enabled(kind)


def as_autocast(tensor: Tensor) -> Tensor:
    """In autocast's dtype where autocast is on, except float64: what it does to scaled_dot_product_attention."""
    if not isinstance(tensor, Tensor):
        return tensor
    kind = tensor.device.type
    if not is_autocast_on(kind):
        return tensor
    casts = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(torch.get_autocast_dtype(kind)) if casts else tensor


OF_SEVERAL_TERMS = {"sources": "sources", "gates": "branches", "scores": "scores", "tables": "tables", "roles": "roles"}
"""What calls of patterns with several terms have, and the key of a spec that declares it."""


def check_no_others(given: Mapping[str, object]) -> None:
    """Raises InputError (E501) where something is given that the pattern, one relation, does not declare."""
    for name, value in given.items():
        declared = OF_SEVERAL_TERMS.get(name)
        if declared is None:
            near = nearest(name, ("inputs", "scale", "return_lse", "return_labels"))
            help = f"did you mean `{near}`?" if near else "a program takes inputs, scale, return_lse and return_labels"
            raise input_error("E501", f"a program takes no `{name}`", help)
        if value:
            raise input_error("E501", f"the pattern has no {declared}", "declare them in its spec")
