"""What is done at once in Triton's interpreter is what it does itself: values, types and refusals."""

from __future__ import annotations

import operator
from collections.abc import Callable
from importlib import import_module
from itertools import chain, product
from typing import Any

import numpy as np
import pytest

from tests.interpreting import IS_INTERPRETED, assert_passes_in_the_interpreter

tl: Any = pytest.importorskip("triton.language")
semantic: Any = import_module("triton.language.semantic")

interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="of the interpreter")
OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    name: getattr(operator, f"{name}_" if name in ("and", "or") else name)
    for name in (
        *("add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or", "xor"),
        *("lt", "le", "gt", "ge", "eq", "ne"),
    )
}
ELEMENTS = ("int1", "int8", "int32", "int64", "uint32", "float16", "float32", "float64")
PAIRS = (("int32", "int32"), ("int64", "int32"), ("float32", "float32"))
SHAPES: tuple[tuple[int, ...], ...] = ((), (4,), (1,), (4, 1), (2, 4), (1, 4))
NUMBERS = (3, -2, 0, -0.0, 0.5, True, 1e300, 2**31 - 1, 2**31, -(2**31) - 1, 2**40, 2**63)


@pytest.fixture(scope="module")
def hastening() -> Any:
    """With the language patched, as in a launch."""
    module = import_module("tests.hastening")
    module.interpreter._patch_lang(lambda: tl)
    return module


def value(hastening: Any, element: str, sizes: tuple[int, ...], seed: int = 0) -> Any:
    dtype = getattr(tl, element)
    numpy_type = hastening.interpreter._get_np_dtype(dtype)
    data = np.random.default_rng(seed).integers(1, 60, sizes or (1,)) * (-1 if element == "float32" else 1)
    return hastening._value(
        (data % 2 == 0 if element == "int1" else data).astype(numpy_type),
        tl.core.block_type(dtype, list(sizes)) if sizes else dtype,
    )


def outcome(function: Callable[..., Any], *operands: Any) -> object:
    """Bits, shape, types; or what kind of refusal."""
    try:
        with np.errstate(all="ignore"):
            found = function(*operands)
    except (TypeError, ValueError, AssertionError, AttributeError, semantic.IncompatibleTypeErrorImpl) as error:
        return type(error)
    return found.handle.data.tolist(), found.handle.data.shape, found.handle.data.dtype, str(found.type), found.dtype


def assert_alike(hastening: Any, function: Callable[..., Any], *operands: Any) -> None:
    found = outcome(function, *operands)
    with hastening.operators_of_the_interpreter():
        expected = outcome(function, *operands)
    assert repr(found) == repr(expected)  # where a zero has a sign, and what is no number is itself


@interpreted
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_of_two_values(name: str, hastening: Any) -> None:
    of_elements = product(product(ELEMENTS, repeat=2), [((), (2, 4))])
    of_shapes = product(PAIRS, product(SHAPES, repeat=2))
    for (first, second), (mine, theirs) in chain(of_elements, of_shapes):
        x, y = value(hastening, first, mine), value(hastening, second, theirs, 1)
        assert_alike(hastening, OPERATORS[name], x, y)


@interpreted
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_of_a_value_and_a_number(name: str, hastening: Any) -> None:
    for element, sizes, number in product(ELEMENTS, ((), (2, 4)), NUMBERS):
        x, constant = value(hastening, element, sizes), tl.constexpr(number)
        assert_alike(hastening, OPERATORS[name], x, number)
        assert_alike(hastening, OPERATORS[name], number, x)
        assert_alike(hastening, OPERATORS[name], x, constant)


@interpreted
@pytest.mark.parametrize("element", ["int1", "int8", "int32", "float32", "float64"])
def test_pointers(element: str, hastening: Any) -> None:
    pointer = tl.pointer_type(getattr(tl, element))
    for mine in SHAPES:
        start = hastening._value(
            np.full(mine or (1,), 4096, np.uint64), tl.core.block_type(pointer, list(mine)) if mine else pointer
        )
        for offsets, theirs in product(("int8", "int32", "int64", "uint32", "float32"), SHAPES):
            offset = value(hastening, offsets, theirs)
            assert_alike(hastening, operator.add, start, offset)
            assert_alike(hastening, operator.add, offset, start)
        assert_alike(hastening, operator.add, start, 3)


@interpreted
@pytest.mark.parametrize("element", ELEMENTS)
def test_conversions_and_dimensions(element: str, hastening: Any) -> None:
    for sizes in SHAPES:
        x = value(hastening, element, sizes)
        for other in ELEMENTS:
            assert_alike(hastening, tl.core.tensor.to, x, getattr(tl, other))
            assert_alike(hastening, tl.core.tensor.to, x, getattr(tl, other), None, True)
        for key in (None, (None, slice(None)), (slice(None), None), (slice(None), None, slice(None)), (0,)):
            assert_alike(hastening, operator.getitem, x, key)


@interpreted
def test_choices(hastening: Any) -> None:
    """Where values are spread to one shape and no operator does it."""
    for condition, mine, theirs in product(SHAPES, repeat=3):
        chosen = value(hastening, "int1", condition)
        x, y = value(hastening, "float32", mine), value(hastening, "int32", theirs)
        assert_alike(hastening, tl.where, chosen, x, y)


@pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter runs here")
def test_in_the_interpreter() -> None:
    assert_passes_in_the_interpreter(__file__)
