"""What does `check` take for right? Any order of the same sums, however exact dense attention is by chance, and no
fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import patterndsl
from patterndsl.nn.synthetic import synthetic
from patterndsl.runtime import trial
from patterndsl.runtime.composed import CompositeProgram
from patterndsl.runtime.program import Program
from patterndsl.runtime.tensors import Attend, Shape, Tensors, random_tensors

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXT, N = "window(32) | global(2)", 640
CPU = torch.device("cpu")


def random_case(dtype: str, text: str = TEXT, n: int = N) -> tuple[Program, Tensors]:
    program = patterndsl.parse(text).compile(n, heads=2)
    assert isinstance(program, Program)
    return program, random_tensors(program.sizes, Shape(1, 2, 2, 16, dtype, CPU), 0)


def of_roles(dtype: str, seed: int = 0) -> tuple[CompositeProgram, Tensors]:
    """Role g2g has a single pair."""
    pattern = patterndsl.load(EXAMPLES / "roles" / "etc-projections.yaml")
    program = pattern.compile(25, heads=2)
    assert isinstance(program, CompositeProgram)
    return program, synthetic(pattern, program.sizes, Shape(1, 2, 2, 16, dtype, CPU), None, layer=0, seed=seed)[0]


def test_chance_fails_nobody() -> None:
    """Dense attention is at about every third seed so exact in some gradient of a few pairs that twice its error is
    less than that of other orders of the same sums."""
    for seed in range(20):
        program, tensors = of_roles("float32", seed)
        found = trial.check(program, tensors, backward=True, seed=seed)
        assert found.passed, (seed, found.deviations)


def test_dense_attention_is_asked_where_it_is_not_exact() -> None:
    """Keys that are all the same, and values that are powers of two: dense attention has each of them exactly."""
    program, tensors = random_case("float32", "all", 64)
    ones = torch.ones_like(tensors.key)
    even = Tensors(tensors.query, ones, ones.cumsum(2).remainder(2) * 2)
    epsilon = torch.finfo(torch.float32).eps

    def off(by: float) -> Attend:
        return lambda _: torch.full_like(even.value, 1.0 + by)

    (near,), (far,) = (trial.check(program, even, attend=off(by)).deviations for by in (2 * epsilon, 32 * epsilon))
    assert near.error > near.rounding and near.passed and not far.passed


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        (
            "select: {chosen: 'topk(3, of = blocks(8), by = mean, among = k < q // 8, always = k == q // 8)'}\n"
            "attend: causal & chosen",
            "float32",
        ),
        ("causal & (head % 2 == 0 | recent(3))", "float16"),
    ],
)
def test_large_scores_are_rounded_as_by_dense_attention(text: str, dtype: str) -> None:
    """Their digits behind the point are few: gradients err by thousandths in float32, and by tenths in float16."""
    program = patterndsl.parse(text).compile(67, heads=2)
    assert isinstance(program, Program)
    for seed in range(12):
        drawn = random_tensors(program.sizes, Shape(1, 2, 2, 300, dtype, CPU), seed)
        tensors = Tensors(drawn.query * 32, drawn.key * 8, drawn.value * 8)
        inputs = trial.with_found(program, tensors, None)
        found = trial.check(program, tensors, inputs, backward=True, seed=seed)
        assert found.passed, (seed, found.deviations)


# ---- faults


def by_mask(change: Callable[[Tensor], None]) -> Callable[[Program], Attend]:
    """Dense attention by a mask [rows, keys] in which something is wrong."""

    def made(program: Program) -> Attend:
        keep = program.mask()[0].clone()
        change(keep)
        return lambda x: scaled_dot_product_attention(x.query, x.key, x.value, attn_mask=keep)

    return made


def _swap_tiles(keep: Tensor) -> None:
    keep[64:96, 32:64], keep[64:96, 128:160] = keep[64:96, 128:160].clone(), keep[64:96, 32:64].clone()


def _lose_pair(keep: Tensor) -> None:
    keep[320, 320] = False


def without_pass(program: Program) -> Attend:
    plan = program.ready.planned(train=True)
    assert len(plan.passes) > 1
    plan.passes = plan.passes[:-1]
    return trial.attend_of(program, None)


def with_scaled_head(program: Program) -> Attend:
    def attend(tensors: Tensors) -> Tensor:
        out = trial.attend_of(program, None)(tensors)
        return out * torch.tensor([1.0, 1 + 16 * torch.finfo(out.dtype).eps])[:, None, None].to(out.dtype)

    return attend


def with_scaled_gradient(program: Program) -> Attend:
    """Of the keys of one head."""

    def attend(tensors: Tensors) -> Tensor:
        factors = torch.tensor([1.0, 1 + 16 * torch.finfo(tensors.key.dtype).eps])[:, None, None]
        tensors.key.register_hook(lambda grad: grad * factors.to(grad.dtype))
        return trial.attend_of(program, None)(tensors)

    return attend


def without_delta(program: Program) -> Attend:
    """The gradient of a softmax is that of its weights less their mean, which is left out."""
    keep = program.mask()

    def attend(tensors: Tensors) -> Tensor:
        scores = tensors.query @ tensors.key.mT * tensors.query.shape[-1] ** -0.5
        scores = scores.masked_fill(~keep, -torch.inf)
        return (scores - scores.detach().logsumexp(-1, keepdim=True)).exp() @ tensors.value

    return attend


FAULTS = {
    "tiles swapped": by_mask(_swap_tiles),
    "a pair lost": by_mask(_lose_pair),
    "a pass lost": without_pass,
    "a head scaled": with_scaled_head,
    "a gradient scaled": with_scaled_gradient,
    "no delta": without_delta,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_right_passes(dtype: str) -> None:
    """The program and the tensors that the faults below are in."""
    program, tensors = random_case(dtype)
    assert trial.check(program, tensors, backward=True).passed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_no_fault_passes(fault: str, dtype: str) -> None:
    program, tensors = random_case(dtype)
    found = trial.check(program, tensors, backward=True, attend=FAULTS[fault](program))
    assert not found.passed, found.deviations


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_fault_of_a_whole_passes(dtype: str) -> None:
    """A role's keys are those of another, or have no gradient."""
    program, tensors = of_roles(dtype)
    right = trial.attend_of(program, None)

    def exchanged(given: Tensors) -> Tensor:
        g2g, l2g = ("role", "g2g", "key"), ("role", "l2g", "key")
        more = {**given.more, g2g: given.more[l2g], l2g: given.more[g2g]}
        return right(Tensors(given.query, given.key, given.value, more))

    def detached(given: Tensors) -> Tensor:
        more = {path: x.detach() if path[1] == "g2g" else x for path, x in given.more.items()}
        return right(Tensors(given.query, given.key, given.value, more))

    for attend in (exchanged, detached):
        assert not trial.check(program, tensors, backward=True, attend=attend).passed


@pytest.mark.parametrize("which", ["key", "value"])
def test_nan_in_either_tensor_of_a_role_fails(which: str) -> None:
    """Both are one line of the report."""
    program, tensors = of_roles("float32")

    def attend(given: Tensors) -> Tensor:
        given.more["role", "g2g", which].register_hook(lambda grad: grad * torch.nan)
        return trial.attend_of(program, None)(given)

    found = trial.check(program, tensors, backward=True, attend=attend)
    assert [item.what for item in found.deviations if not item.passed] == ["role g2g gradient"]
