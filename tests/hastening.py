"""Triton's interpreter without most of its cost, which lies around each call of NumPy and not in it.

What these tests do without is left out: the check of each sum of integers for overflow. What it does anew each time is
remembered: types and their shapes, and that its language is patched. What it decides anew each time is done at once
where nothing is to be decided, by the operators at the end; all else goes the interpreter's own way.
test_hastening.py compares the two.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

Function = Callable[..., Any]

interpreter: Any = importlib.import_module("triton.runtime.interpreter")
core: Any = interpreter.tl.core
SEMANTIC = interpreter.interpreter_semantic


def hasten() -> None:
    """For the rest of the process, which compiles no kernel."""
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    _remember_types()
    _patch_once()
    _reduce_by_exclusive_or_at_once()
    _operate_at_once()


_at_once = True


@contextmanager
def operators_of_the_interpreter() -> Iterator[None]:
    """Inside, every operator goes the interpreter's own way."""
    global _at_once
    _at_once = False
    try:
        yield
    finally:
        _at_once = True


# ---- what is remembered


def _remember_types() -> None:
    """Each value has a type and a shape of its own, with a name for the type; there are few of either."""
    numpy_type, make_block, unwrap_any = (
        interpreter._get_np_dtype,
        core.block_type.__init__,
        core._unwrap_if_constexpr,
    )
    plain = {int, float, bool, str, type(None), core.tensor, core.dtype}
    numpy_types: dict[str, Any] = {}

    def known_numpy_type(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in numpy_types:
            numpy_types[name] = numpy_type(dtype)
        return numpy_types[name]

    def unwrap(value: Any) -> Any:
        kind = value.__class__
        if kind is core.constexpr:
            return value.value
        return value if kind in plain else unwrap_any(value)

    def known_block(kind: Any, element: Any, shape: Any) -> Any:
        """The blocks of an element are kept with the element."""
        sizes = tuple([unwrap(size) for size in unwrap(shape)])
        known = element.__dict__.setdefault("blocks", {})
        if sizes not in known:
            block = object.__new__(kind)
            make_block(block, element, list(sizes))
            block.sizes, known[sizes] = sizes, block
        return known[sizes]

    @cache
    def shape_of(sizes: tuple[int, ...]) -> tuple[Any, Any]:
        return core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(math.prod(sizes))

    def make_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shape_of(_sizes(type))

    interpreter._get_np_dtype, core._unwrap_if_constexpr = known_numpy_type, unwrap
    core.block_type.__new__, core.block_type.__init__ = known_block, lambda *_: None
    core.tensor.__init__ = make_tensor
    type(interpreter.interpreter_builder).get_block_ty = lambda _, element, shape: core.block_type(element, shape)


def _patch_once() -> None:
    """The interpreter patches its language for each launch, and again whenever a kernel calls a function."""
    patch, nothing_to_restore = interpreter._patch_lang, interpreter._LangPatchScope()
    patched: set[tuple[bool, ...]] = set()

    @cache
    def seen_by(function: Any) -> tuple[bool, ...]:
        return tuple(any(x is module for x in function.__globals__.values()) for module in (interpreter.tl, core))

    def patch_once(function: Any) -> Any:
        seen = seen_by(function)
        if seen not in patched:
            patched.add(seen)
            patch(function)
        return nothing_to_restore

    def patch_builtin(owner: Any, name: str, member: Any, _: object, scope: Any) -> None:
        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = SEMANTIC
            return member(*args, **kwargs)

        scope.set_attr(owner, name, call)

    interpreter._patch_lang, interpreter._patch_attr = patch_once, patch_builtin


def _reduce_by_exclusive_or_at_once() -> None:
    """As sorting does; the interpreter would take the numbers one by one."""
    one_by_one = interpreter.ReduceOps.generic_reduce

    def reduce(self: Any, values: Any) -> Any:
        if self.combine_fn is not interpreter.tl.standard._xor_combine:
            return one_by_one(self, values)
        found = (np.bitwise_xor.reduce(x.handle.data, axis=self.axis, keepdims=self.keep_dims) for x in values)
        return [self.to_tensor(data, x.dtype) for data, x in zip(found, values, strict=True)]

    interpreter.ReduceOps.generic_reduce = reduce


# ---- what is done at once


INTEGERS, FLOATS = ("int32", "int64"), ("fp32", "fp64")
ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
DIVISIONS: dict[str, Function] = {"floordiv": lambda x, y: (x - np.fmod(x, y)) // y, "mod": np.fmod}
QUOTIENTS = {"truediv": np.divide}
BITS = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
COMPARISONS = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}


def _operate_at_once() -> None:
    for functions, elements in (
        (ARITHMETIC, (*INTEGERS, *FLOATS)),
        (DIVISIONS, INTEGERS),
        (QUOTIENTS, FLOATS),
        (BITS, ("int1", *INTEGERS)),
    ):
        for name, function in functions.items():
            _replace_operator(f"__{name}__", function, elements)
            _replace_operator(f"__r{name}__", lambda x, y, of=function: of(y, x), elements)
    for name, function in COMPARISONS.items():
        _replace_operator(f"__{name}__", function, (*INTEGERS, *FLOATS), compares=True)
    _replace_sum_of_pointer_and_offset()
    _replace_conversion()
    _replace_spreading()
    _replace_new_dimensions()


def _sizes(type: Any) -> tuple[int, ...]:
    """() of a scalar."""
    sizes: tuple[int, ...] = type.sizes if type.__class__ is core.block_type else ()
    return sizes


def _value(data: Any, type: Any) -> Any:
    """data: [1] for a scalar, or the shape of the type."""
    handle, value = object.__new__(interpreter.TensorHandle), object.__new__(core.tensor)
    handle.data, handle.dtype, handle.attr = data, type.scalar, {}
    value.__init__(handle, type)
    return value


def _with_element(type: Any, element: Any) -> Any:
    return core.block_type(element, type.sizes) if type.__class__ is core.block_type else element


def _joined(type: Any, other: Any) -> Any:
    """The type with its element that both are spread to; None where the interpreter is to say what it is."""
    mine, theirs = _sizes(type), _sizes(other)
    if mine == theirs or not theirs:
        return type
    sizes = _spread(mine, theirs)
    return None if sizes is None else core.block_type(type.scalar, sizes)


@cache
def _spread(mine: tuple[int, ...], theirs: tuple[int, ...]) -> tuple[int, ...] | None:
    if not mine:
        return theirs
    pairs = list(zip(mine, theirs, strict=False))
    fits = len(mine) == len(theirs) and all(1 in pair or pair[0] == pair[1] for pair in pairs)
    return tuple(map(max, pairs)) if fits else None


def _operand(value: Any, other: Any) -> tuple[Any, Any] | None:
    """The other's data, and the type of both when spread; None where more is to be decided than that."""
    element = value.dtype
    if other.__class__ is core.tensor:
        type = value.type if other.type is value.type else _joined(value.type, other.type)
        if other.dtype is element:
            return None if type is None else (other.handle.data, type)
        if type is None or element.name not in INTEGERS or other.dtype.name not in INTEGERS:
            return None
        return other.handle.data, _with_element(type, core.int64)
    if other.__class__ is int:
        fits = element.name in FLOATS or (element.name in INTEGERS and -(2**31) <= other < 2**31)
    else:
        fits = other.__class__ is float and element.name in FLOATS
    return (np.array([other], interpreter._get_np_dtype(element)), value.type) if fits else None


def _replace_operator(name: str, function: Function, elements: tuple[str, ...], compares: bool = False) -> None:
    own = getattr(core.tensor, name)

    def operate(self: Any, other: Any) -> Any:
        if other.__class__ is core.constexpr:
            other = other.value
        found = _operand(self, other) if _at_once and self.dtype.name in elements else None
        if found is None:
            return own(self, other, _semantic=SEMANTIC)
        data, type = found
        return _value(function(self.handle.data, data), _with_element(type, core.int1) if compares else type)

    setattr(core.tensor, name, operate)


def _replace_sum_of_pointer_and_offset() -> None:
    own = core.tensor.__add__

    def add(self: Any, other: Any) -> Any:
        is_offset = other.__class__ is core.tensor and other.dtype.name in INTEGERS
        if not (_at_once and is_offset and self.dtype.__class__ is core.pointer_type):
            return own(self, other)
        type = _joined(self.type, other.type)
        if type is None:
            return own(self, other)
        width = max(1, self.dtype.element_ty.primitive_bitwidth // 8)
        return _value(self.handle.data + width * other.handle.data.astype(np.uint64), type)

    core.tensor.__add__ = add


def _replace_conversion() -> None:
    own, elements = core.tensor.to, (*INTEGERS, *FLOATS)

    def to(self: Any, dtype: Any, *how: Any, **options: Any) -> Any:
        if dtype.__class__ is core.constexpr:
            dtype = dtype.value
        if not _at_once or how or options or dtype.name not in elements or self.dtype.name not in ("int1", *elements):
            return own(self, dtype, *how, **options, _semantic=SEMANTIC)
        if self.dtype.name == dtype.name:
            return self
        return _value(self.handle.data.astype(interpreter._get_np_dtype(dtype)), _with_element(self.type, dtype))

    core.tensor.to = to


def _replace_spreading() -> None:
    """Of two values to one shape, where operators go the interpreter's own way, and for masks."""
    own = SEMANTIC.broadcast_impl_value

    def spread(value: Any, sizes: tuple[int, ...]) -> Any:
        if _sizes(value.type) == sizes:
            return value
        return _value(np.broadcast_to(value.handle.data, sizes), core.block_type(value.dtype, sizes))

    def both(first: Any, second: Any) -> Any:
        mine, theirs = _sizes(first.type), _sizes(second.type)
        if mine == theirs:
            return first, second
        sizes = (_spread(mine, theirs) if theirs else mine) if _at_once else None
        return own(first, second) if sizes is None else (spread(first, sizes), spread(second, sizes))

    SEMANTIC.broadcast_impl_value = both


def _replace_new_dimensions() -> None:
    """x[:, None] and its like."""
    own, all_of_it = core.tensor.__getitem__, slice(None)

    def take(self: Any, key: Any) -> Any:
        kept = [item is not None for item in key] if key.__class__ is tuple else []
        sizes = _sizes(self.type)
        if not _at_once or not sizes or sum(kept) != len(sizes) or any(x is not None and x != all_of_it for x in key):
            return own(self, key, _semantic=SEMANTIC)
        rest = iter(sizes)
        return _value(self.handle.data[key], core.block_type(self.dtype, [next(rest) if x else 1 for x in kept]))

    core.tensor.__getitem__ = take
