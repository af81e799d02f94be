"""How does generated source become a function that kernels call? Compiled once for each text, and kept."""

from __future__ import annotations

import linecache
from functools import lru_cache
from hashlib import sha256
from typing import Any

import triton
import triton.language as tl

from patterndsl.runtime.kernels import functions, told_functions

_NAMES = {
    "triton": triton,
    "tl": tl,
    **{
        name: getattr(functions, name)
        for name in (
            *("floor_div", "floor_mod", "inside", "integer_root", "integer_log2", "read", "drawn", "listed"),
            "is_first",
        )
    },
    **{name: getattr(told_functions, name) for name in ("bounds_between", "lists_block", "num_listed")},
}


@lru_cache(maxsize=1024)
def function_of(text: str, name: str = "keep") -> Any:
    """The function of this name of a source text. Triton reads functions from their files, so it is put where files
    are looked up; and it knows them by name, so that where a kernel calls two of them each has a name of its own."""
    digest = sha256(text.encode()).hexdigest()[:16]
    text, name = text.replace(f"def {name}(", f"def {name}_{digest}(", 1), f"{name}_{digest}"
    file = f"<patterndsl {name}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    space: dict[str, Any] = {**_NAMES, "__name__": __name__}
    exec(compile(text, file, "exec"), space)
    return space[name]
