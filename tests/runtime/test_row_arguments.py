"""Which integers may say which row: those of any library, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import patterndsl
from patterndsl.diagnostics import InputError

PROGRAM = patterndsl.parse("causal & recent(3)").compile(10, heads=2)


@pytest.mark.parametrize("q", [5, np.int64(5), np.int32(5), torch.tensor(5)], ids=lambda q: type(q).__name__)
def test_integers_of_any_library(q: int) -> None:
    assert PROGRAM.row(q, head=q // 5).tolist() == [3, 4, 5]


@pytest.mark.parametrize("q", [True, 5.0, np.float64(5), torch.tensor(5.0), "5", None, -1, 10])
def test_what_is_no_query(q: Any) -> None:
    with pytest.raises(InputError, match="there is no query"):
        PROGRAM.row(q)
