"""FlexAttention as a backend: equal to the oracle where it can run, refused where it cannot."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

import patterndsl
from patterndsl import InputError, Pattern
from patterndsl.runtime import flex

N = 300
PATTERNS = {
    "band and sinks": patterndsl.parse("causal & (recent(100) | first(4))"),
    "random blocks per head": patterndsl.parse("blocks(32, random(2, seed = head) | window(1))"),
    "dilation per head": patterndsl.parse("causal & dilated(8, d[head])", params={"d": [1, 2]}),
    "documents per row": patterndsl.parse("causal & within(doc, recent(50))", inputs={"doc": "int[N]"}),
    "empty rows": patterndsl.parse("q >= 200 & k < 20"),
}


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_equals_the_oracle(pattern: Pattern) -> None:
    query, key = torch.randn(2, 2, N, 16), torch.randn(2, 1, N, 16)
    doc = torch.stack([torch.arange(N) // 30, torch.arange(N) // 77])
    inputs = {"doc": doc} if pattern.resolved.inputs else None
    ours = pattern.compile(N, heads=2, backend="flex")(query, key, key, inputs=inputs)
    oracle = pattern.compile(N, heads=2, backend="oracle")(query, key, key, inputs=inputs)
    torch.testing.assert_close(ours, oracle, atol=5e-6, rtol=0)


def test_each_program_compiles_its_own_code() -> None:
    """torch.compile counts recompilations per code object; shared code would run dense after eight patterns."""
    first, second = (cast("Any", flex.compiled_flex()).__wrapped__.__code__ for _ in range(2))
    assert first is not second


def run(**kinds: object) -> None:
    dtype, grad, lse = kinds.get("dtype", torch.float32), bool(kinds.get("grad")), bool(kinds.get("lse"))
    assert isinstance(dtype, torch.dtype)
    x = torch.randn(1, 1, 64, 16, dtype=dtype, requires_grad=grad)
    patterndsl.parse("causal").compile(64, backend="flex")(x, x, x, return_lse=lse)


@pytest.mark.parametrize(
    "kinds",
    [{"grad": True}, {"lse": True}, {"dtype": torch.float64}],
    ids=["gradients", "lse", "float64"],
)
def test_refuses_what_it_cannot_do_on_the_cpu(kinds: dict[str, object]) -> None:
    with pytest.raises(InputError, match="E505"):
        run(**kinds)


def test_a_batch_without_rows_has_no_block_mask() -> None:
    pattern = patterndsl.parse("inputs: {doc: 'int[N]'}\nattend: causal & same(doc)")
    program, inputs = pattern.compile(32, backend="flex"), {"doc": torch.zeros(0, 32, dtype=torch.int64)}
    empty = torch.zeros(0, 1, 32, 8)
    with pytest.raises(InputError, match="E505"):
        program.block_mask(16, inputs)
    with pytest.raises(InputError, match="E505"):
        program(empty, empty, empty, inputs=inputs)


@pytest.mark.slow
def test_parameters_without_gradients_run_on_the_cpu() -> None:
    pattern, query = patterndsl.parse("causal & recent(4)"), torch.nn.Parameter(torch.randn(1, 1, 33, 8))
    with torch.no_grad():
        out = pattern.compile(33, backend="flex")(query, query, query)
        torch.testing.assert_close(out, pattern.compile(33, backend="oracle")(query, query, query))
