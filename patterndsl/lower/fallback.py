"""Which backend is usual, and which calls does it not take? A table of rules, which `lower.choice` decides by."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

Backend: TypeAlias = Literal["planned", "masked", "gathered", "flex", "triton", "oracle"]

BACKENDS: tuple[str, ...] = ("auto", *get_args(Backend))
"""What may be asked for."""
FALLBACK: Backend = "gathered"
"""Plain PyTorch, in any dtype and shape on any device."""


@dataclass(frozen=True, slots=True)
class Call:
    """What the tensors of a call are. is_empty: a dimension of one of them is 0; by_head: inputs differ from head to
    head."""

    dtype: str
    head_dim: int
    value_dim: int
    is_empty: bool
    by_head: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """A call that these backends leave to another one on these kinds of devices. when: which, in words."""

    backends: tuple[Backend, ...]
    device_types: tuple[str, ...]
    when: str
    holds: Callable[[Call], bool] = field(compare=False)
    to: Backend = FALLBACK


EVERYWHERE = ("cpu", "cuda")
FLASH_DTYPES = ("float16", "bfloat16")
RULES = (
    Rule(("flex", "planned", "masked"), EVERYWHERE, "a tensor without elements", lambda call: call.is_empty),
    Rule(("flex", "planned", "masked"), ("cuda",), "float64", lambda call: call.dtype == "float64"),
    Rule(("triton",), EVERYWHERE, "a tensor without elements", lambda call: call.is_empty),
    Rule(("triton",), EVERYWHERE, "float64", lambda call: call.dtype == "float64"),
    Rule(("triton",), EVERYWHERE, "heads wider than 256", lambda call: max(call.head_dim, call.value_dim) > 256),
    Rule(("flex",), ("cpu",), "float64", lambda call: call.dtype == "float64"),
    Rule(
        ("planned",),
        EVERYWHERE,
        "values of another width than the keys",
        lambda call: call.head_dim != call.value_dim,
    ),
    Rule(
        ("masked",),
        ("cpu",),
        "values of another width than the keys",
        lambda call: call.head_dim != call.value_dim,
    ),
    Rule(
        ("planned",),
        ("cuda",),
        "float32: flash and cuDNN take float16 and bfloat16",
        lambda call: call.dtype not in FLASH_DTYPES,
        to="flex",
    ),
    Rule(
        ("planned",),
        ("cuda",),
        "a head_dim that is no multiple of 8, or above 256",
        lambda call: call.head_dim % 8 != 0 or call.head_dim > 256,
        to="flex",
    ),
)
NOT_FINITE = "tensors with NaN or infinity, where a pass masks some: 0 x NaN is NaN"
"""The one rule that must look at the numbers; it is of planned and masked on the CPU. On CUDA a look would wait for
the device: there keys and values must be finite, as for flash and FlexAttention themselves."""


MANY_GROUPS = 8
"""Head groups that each have passes of their own; with more, a GPU waits for the host that launches them."""


def usual_backend(device_type: str, has_inputs: bool, num_groups: int, has_hulls: bool) -> Backend:
    """What `auto` means. Plans are made once, so they are for patterns without inputs; and on CUDA for a few kinds of
    heads, where generated kernels take any number at once. has_hulls: see `lower.hulls`."""
    if has_inputs and has_hulls:
        return "masked"
    if device_type == "cuda":
        return "flex" if has_inputs else "triton" if num_groups > MANY_GROUPS else "planned"
    return "gathered" if has_inputs else "planned"


def rules_of(backend: str, device_type: str) -> Iterable[Rule]:
    """Those that a backend chosen by `auto` has on this kind of device."""
    return (rule for rule in RULES if backend in rule.backends and device_type in rule.device_types)


def leaves(backend: str, device_type: str, call: Call) -> Rule | None:
    """The first rule by which the backend leaves this call to another one."""
    return next((rule for rule in rules_of(backend, device_type) if rule.holds(call)), None)
