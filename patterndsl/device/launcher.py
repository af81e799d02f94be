"""How is a kernel launched once more? As Triton found it for arguments of the same form, without being asked again.

In each launch Triton binds all arguments, derives what each of them is, and makes a key of that: 10 to 20 us of the
host, more than a small kernel takes a GPU. What that depends on is a part of what we know of a launch anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import triton
from torch import Tensor

MOST = 256
"""Forms that are remembered of a kernel; with more, all are found anew."""
NOTHING: Mapping[str, Any] = {}


class Asked(Protocol):
    """What a kernel asks of pairs: the constants and the tables of a predicate."""

    @property
    def numbers(self) -> tuple[int, ...]: ...

    @property
    def tables(self) -> tuple[Tensor, ...]: ...


class Launcher:
    """A kernel to be launched. Its arguments are tensors, what is asked of pairs, integers, a scale, and constants."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._is_compiled = isinstance(kernel, triton.JITFunction)  # and not run by the interpreter
        self._compiled = dict[tuple[object, ...], Any]()

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: Sequence[Any],
        integers: Sequence[int],
        constants: Mapping[str, Any],
        options: Mapping[str, Any] = NOTHING,
        *,
        asked: Asked | None = None,
        scale: float | None = None,
    ) -> None:
        """Launches it. tensors: or descriptors, which say themselves of what `form` they are. constants: by name, in
        the kernel's order; options: of the compiler."""
        arguments = (*tensors, *integers) if asked is None else (*tensors, asked.numbers, asked.tables, *integers)
        if scale is not None:
            arguments = (*arguments, float(scale))
        known = (
            *integers,
            *[(x.dtype, x.data_ptr() % 16) if isinstance(x, Tensor) else x.form for x in tensors],
            *(() if asked is None else (*asked.numbers, *[(x.dtype, x.data_ptr() % 16) for x in asked.tables])),
        )
        self._launch(grid, arguments, known, constants, options)

    def of(
        self,
        grid: tuple[int, int, int],
        arguments: Sequence[Any],
        constants: Mapping[str, Any],
        options: Mapping[str, Any] = NOTHING,
    ) -> None:
        """The same of tensors, integers and tuples of these in any order; it looks at each of them."""
        self._launch(grid, arguments, tuple(map(_form, arguments)), constants, options)

    def _launch(
        self,
        grid: tuple[int, int, int],
        arguments: Sequence[Any],
        known: tuple[object, ...],
        constants: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> None:
        """known: all that Triton asks of the arguments: for tensors the type, and whether they start at a multiple of
        16 bytes."""
        if not self._is_compiled:
            self.kernel[grid](*arguments, **constants, **options)
            return
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        known = device, *known, *constants.values(), *options.values()
        compiled = self._compiled.get(known)
        if compiled is not None:
            compiled[grid](*arguments, *constants.values(), stream=driver.get_current_stream(device))
            return
        compiled = self.kernel[grid](*arguments, **constants, **options)
        # compilers for AMD look at the size of tensors, too
        if compiled is not None and driver.get_current_target().backend == "cuda":
            assert list(constants) == self.kernel.arg_names[len(arguments) :], "constants are passed on by their order"
            if len(self._compiled) >= MOST:
                self._compiled.clear()
            self._compiled[known] = compiled


def _form(argument: Any) -> object:
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16
    return tuple(map(_form, argument)) if isinstance(argument, tuple) else argument
