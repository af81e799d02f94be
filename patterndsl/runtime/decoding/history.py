"""What did tokens bring with them? The inputs of a pattern, one value for each position of each batch row."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from patterndsl.diagnostics import input_error, nearest
from patterndsl.runtime.data import INTEGER_DTYPES, Inputs
from patterndsl.runtime.decoding.pages import Integers
from patterndsl.sema.bind import Bound, InputShape


class History:
    """values: int64 [batch, capacity] of each input; behind the last token they are anything."""

    def __init__(self, bound: Bound, batch: int, device: torch.device) -> None:
        self.shapes = {shape.name: shape for shape in bound.inputs}
        self.values = {name: torch.zeros(batch, 0, dtype=torch.int64, device=device) for name in self.shapes}
        self.batch, self.device = batch, device

    def checked(self, inputs: Inputs | None, num_tokens: int) -> dict[str, Tensor]:
        """The values of new tokens, int64 [batch, num_tokens]. Raises InputError (E501, E502)."""
        if inputs is not None and not isinstance(inputs, Mapping):
            raise input_error("E501", f"inputs is {type(inputs).__name__}, not a mapping", 'give inputs={"name": ...}')
        given = dict(inputs or {})
        for name in given:
            if name not in self.shapes:
                near = nearest(str(name), self.shapes)
                known = f"it reads {', '.join(self.shapes)}" if self.shapes else "it reads none"
                help = f"did you mean `{near}`?" if near else known
                raise input_error("E501", f"the pattern reads no input `{name}`", help)
        return {name: self._checked(shape, given.get(name), num_tokens) for name, shape in self.shapes.items()}

    def append(self, new: Mapping[str, Tensor], starts: Integers, counts: Integers) -> None:
        """new: as `checked` returns it; the first counts[row] tokens of each row come after the starts[row] earlier
        ones."""
        for name, given in new.items():
            held = self.values[name]
            length = int((starts + counts).max(initial=0))
            if length > held.shape[1]:
                wider = held.new_zeros(self.batch, max(length, 2 * held.shape[1]))
                wider[:, : held.shape[1]] = held
                self.values[name] = held = wider
            rows = np.repeat(np.arange(self.batch), counts)
            tokens = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
            where = torch.from_numpy(np.stack([rows, tokens, starts[rows] + tokens])).to(self.device)
            held[where[0], where[2]] = given[where[0], where[1]]

    def _checked(self, shape: InputShape, values: Tensor | None, num_tokens: int) -> Tensor:
        kind = {"int": "an integer", "bool": "a bool"}[shape.dtype]
        form = f"{kind} tensor [{num_tokens}] or [{self.batch}, {num_tokens}], one value for each new token"
        if values is None:
            help = f'append(key, value, inputs={{"{shape.name}": ...}}), {form}'
            raise input_error("E501", f"input `{shape.name}` is missing", help)
        found = f"{list(values.shape)}, {values.dtype}" if isinstance(values, Tensor) else type(values).__name__
        allowed = (torch.bool,) if shape.dtype == "bool" else INTEGER_DTYPES
        sizes = [(num_tokens,), (1, num_tokens), (self.batch, num_tokens)]
        if not isinstance(values, Tensor) or values.dtype not in allowed or tuple(values.shape) not in sizes:
            raise input_error("E502", f"input `{shape.name}` is {found}", f"give {form}")
        return values.to(self.device, torch.int64).expand(self.batch, num_tokens)
