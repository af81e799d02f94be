"""`program.rows`: rows of the mask at positions that are checked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import patterndsl
from patterndsl import InputError

PROGRAM = patterndsl.parse("causal & window(3)").compile(10, q_len=6, q_start=4)

POSITIONS: dict[str, Any] = {
    "list": [4, 9],
    "tuple": (4, 9),
    "range": range(4, 10, 5),
    "tensor": torch.tensor([4, 9]),
    "int8": torch.tensor([4, 9], dtype=torch.int8),
    "array": np.array([4, 9]),
    "NumPy's integers": [np.int64(4), np.int32(9)],
}


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
def test_are_rows_of_the_mask(positions: Any) -> None:
    assert torch.equal(PROGRAM.rows(positions), PROGRAM.mask()[:, [0, 5]])


@pytest.mark.parametrize("none", [[], torch.zeros(0, dtype=torch.int64)], ids=["list", "tensor"])
def test_no_position(none: Any) -> None:
    assert PROGRAM.rows(none).shape == (1, 0, 10)


WRONG: dict[str, Any] = {
    "before the first": [3],
    "behind the last": [10],
    "huge": [10**30],
    "negative": torch.tensor([-1]),
    "floats": [4.0],
    "float tensor": torch.tensor([4.0]),
    "truth values": torch.tensor([True]),
    "two dimensions": torch.tensor([[4]]),
    "scalar tensor": torch.tensor(4),
    "integer": 4,
    "text": "45",
    "nothing": None,
}


@pytest.mark.parametrize("positions", WRONG.values(), ids=WRONG)
def test_wrong_positions(positions: Any) -> None:
    with pytest.raises(InputError, match=r"(?s)E502.*= help"):
        PROGRAM.rows(positions)


def test_too_many_pairs() -> None:
    with pytest.raises(InputError, match="E504"):
        patterndsl.parse("causal").compile(2**40).rows([0])
