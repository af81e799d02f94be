"""What data does an analysis read? Arrays of the caller, one number for each position, checked against the spec."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from patterndsl.diagnostics import input_error
from patterndsl.lower.lookup import Lookup
from patterndsl.sema.bind import InputShape


def checked_inputs(shapes: Iterable[InputShape], inputs: Mapping[str, Any]) -> Lookup:
    """The inputs that are read, as int64. Raises InputError: E501 on a missing one, E502 on a wrong shape or dtype."""
    arrays = {}
    for shape in shapes:
        if shape.name not in inputs:
            help = f'pass inputs={{"{shape.name}": ...}}, one number for each position'
            raise input_error("E501", f"input `{shape.name}` is missing", help)
        values = np.asarray(inputs[shape.name])
        values = values[0] if values.ndim == 2 and len(values) == 1 else values
        if values.dtype.kind not in "iub":
            raise input_error("E502", f"input `{shape.name}` has dtype {values.dtype}", f"give {shape.dtype}")
        if values.ndim != 1 or (shape.length is not None and len(values) != shape.length):
            wanted = "one dimension" if shape.length is None else f"{shape.length:,} values in one dimension"
            raise input_error("E502", f"input `{shape.name}` has shape {list(values.shape)}", f"give {wanted}")
        arrays[shape.name] = values.astype(np.int64)
    return Lookup(arrays)
