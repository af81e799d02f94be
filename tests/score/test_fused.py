"""The kernels of sums against their plain twin: in Triton's interpreter, and on CUDA against float64."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from patterndsl.score.features import Elementwise, directions, favor_exponents
from patterndsl.score.linear import kernel_attention, step

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("sums_interpreted.py")


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    """In a process of its own: the interpreter is chosen when Triton is imported."""
    run = subprocess.run(
        [sys.executable, str(SCRIPT)],
        capture_output=True,
        text=True,
        check=False,
        env={"TRITON_INTERPRET": "1", "PATH": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])},
        cwd=SCRIPT.parents[2],
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("ok") == 19


on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Of the largest number: see tests/runtime/test_triton.py. Halves are rounded on the way as there, and float16 is
multiplied in TF32, of as many digits."""
KINDS: tuple[tuple[Elementwise, bool, bool], ...] = (
    ("linear", False, False),
    ("linear", True, False),
    ("elu", False, True),
    ("elu", True, True),
    ("relu", False, True),
)
"""Features, whether they decay, and whether weights are normalised."""


def leaves(length: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(length)
    shapes = ((2, heads, length, dim), (2, kv_heads, length, dim), (2, kv_heads, length, dim))
    return tuple(torch.randn(shape, device="cuda").to(dtype).requires_grad_() for shape in shapes)


def with_gradients(
    given: tuple[Tensor, ...], options: dict[str, Any], wide: bool, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Output, the state's sums and the gradients; wide: of the twin in float64. dtype: of the output's gradient."""
    tensors = tuple(x.detach().double().requires_grad_() for x in given) if wide else given
    out, after = kernel_attention(*tensors, causal=True, **options)
    torch.manual_seed(1)
    pull = torch.randn(out.shape, device="cuda").to(dtype or given[0].dtype).to(out.dtype)
    return [out, after.numerator, *torch.autograd.grad(out, tensors, pull)]


@on_cuda
@pytest.mark.cuda
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("phi", "decays", "normalise"), KINDS)
@pytest.mark.parametrize(("length", "heads", "kv_heads", "dim"), [(1000, 4, 2, 64), (77, 2, 2, 128), (4099, 2, 1, 40)])
def test_is_the_twin(
    dtype: torch.dtype,
    phi: Elementwise,
    decays: bool,
    normalise: bool,
    length: int,
    heads: int,
    kv_heads: int,
    dim: int,
) -> None:
    given = leaves(length, heads, kv_heads, dim, dtype)
    decay = [1 - 2.0 ** (-2 - 6 * head) for head in range(kv_heads)] if decays else None
    options = {"phi": phi, "decay": decay, "normalise": normalise}
    found, expected = (with_gradients(given, options, wide) for wide in (False, True))
    for mine, other in zip(found, expected, strict=True):
        assert mine.isfinite().all()
        assert (mine.double() - other).abs().max() <= TOLERANCE[dtype] * other.abs().max()
    for mine, again in zip(found, with_gradients(given, options, False), strict=True):
        assert torch.equal(mine, again)


@on_cuda
@pytest.mark.cuda
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("length", "heads", "kv_heads", "num_features"), [(1000, 4, 2, 256), (77, 2, 2, 40)])
def test_logarithms(dtype: torch.dtype, length: int, heads: int, kv_heads: int, num_features: int) -> None:
    query, key, value = leaves(length, heads, kv_heads, 64, dtype)
    w = directions(num_features, 64, orthogonal=True, seed=0).cuda()
    logs = [favor_exponents(x.detach(), w, False).requires_grad_() for x in (query, key)]
    options = {"is_log": True}
    given = (logs[0], logs[1], value)
    found, expected = (with_gradients(given, options, wide, value.dtype) for wide in (False, True))
    for mine, other in zip(found, expected, strict=True):
        assert mine.isfinite().all()
        assert (mine.double() - other).abs().max() <= TOLERANCE[dtype] * other.abs().max()
    for mine, again in zip(found, with_gradients(given, options, False, value.dtype), strict=True):
        assert torch.equal(mine, again)


@on_cuda
@pytest.mark.cuda
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("is_log", [False, True])
def test_no_later_key_changes_a_row(dtype: torch.dtype, is_log: bool) -> None:
    query, key, value = (x.detach() for x in leaves(3000, 2, 2, 64, dtype))
    options: dict[str, Any] = {"is_log": True} if is_log else {"phi": "elu"}
    query, key = (x.float() for x in (query, key)) if is_log else (query, key)
    before = kernel_attention(query, key, value, causal=True, **options)[0]
    key[:, :, 1717:] = 30
    value[:, :, 1717:] = -1e4
    after = kernel_attention(query, key, value, causal=True, **options)[0]
    assert torch.equal(before[:, :, :1717], after[:, :, :1717])
    assert not torch.equal(before, after)


@on_cuda
@pytest.mark.cuda
def test_dropped_keys_segments_and_steps() -> None:
    query, key, value = (x.detach() for x in leaves(1100, 2, 2, 64, torch.float32))
    keep = torch.rand(1100, device="cuda") < 0.7
    keep[1099] = True
    key[:, :, ~keep], value[:, :, ~keep] = torch.nan, torch.nan
    options: dict[str, Any] = {"phi": "elu", "decay": (0.9, 0.999)}
    whole, _ = kernel_attention(query, key, value, causal=True, keep=keep, **options)
    state, outputs = None, []
    for start, stop in ((0, 700), (700, 1099)):
        part = slice(start, stop)
        tensors = (query[:, :, part], key[:, :, part], value[:, :, part])
        out, state = kernel_attention(*tensors, causal=True, keep=keep[part], state=state, **options)
        outputs.append(out)
    assert whole.isfinite().all() and state is not None
    outputs.append(step(query[:, :, 1099:], key[:, :, 1099:], value[:, :, 1099:], state, **options)[0])
    torch.testing.assert_close(torch.cat(outputs, 2), whole, rtol=1e-4, atol=1e-5)


@on_cuda
@pytest.mark.cuda
def test_lengths_do_not_compile_again() -> None:
    from patterndsl.score.sum_kernels import row_kernel

    def compiled_for(length: int) -> int:
        kernel_attention(*leaves(length, 2, 2, 64, torch.bfloat16), causal=True, phi="elu")
        return len(row_kernel.device_caches[torch.cuda.current_device()][0])

    known = compiled_for(500)
    assert [compiled_for(length) for length in (1000, 1001, 5000, 9999, 20_000)] == [known] * 5


@on_cuda
@pytest.mark.cuda
@pytest.mark.slow
def test_a_long_sequence() -> None:
    """Sums over 65,536 keys: float16 neither overflows nor loses its small weights."""
    for dtype in (torch.bfloat16, torch.float16):
        given = leaves(65_536, 2, 2, 64, dtype)
        found = kernel_attention(*given, causal=True, phi="elu")[0]
        expected = kernel_attention(*(x.detach().double() for x in given), causal=True, phi="elu")[0]
        assert (found.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()
