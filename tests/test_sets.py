"""`patterndsl.sets`: blocks of the Set Transformer against loops over elements, and what must hold of sets."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import patterndsl
from patterndsl.sets import ISAB, MAB, PMA, SAB

DIM, HEADS = 12, 3
Block = SAB | ISAB | PMA
MAKERS: dict[str, Callable[..., Block]] = {
    "SAB": lambda **options: SAB(DIM, HEADS, **options),
    "ISAB": lambda **options: ISAB(DIM, HEADS, 4, **options),
    "PMA": lambda **options: PMA(DIM, HEADS, 2, **options),
}
OPTIONS: dict[str, dict[str, int]] = {
    "paper": {},
    "hidden": {"hidden": 7},
    "without-norms": {"norm": False},
    "released": {"released": True},
    "released-with-norms": {"released": True, "norm": True},
}


def randomised(block: nn.Module) -> nn.Module:
    """In float64, every parameter moved from where it starts, norms and biases too."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in block.double().parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return block


def made(name: str, **options: object) -> Block:
    block = randomised(MAKERS[name](**options))
    assert isinstance(block, Block)
    return block


def elements(length: int, batch: int = 2, seed: int = 0) -> Tensor:
    torch.manual_seed(100 * length + seed)
    return torch.randn(batch, length, DIM, dtype=torch.float64, requires_grad=True)


# ---- the definition as loops: one element [DIM] at a time ---------------------------------------------------


def linear(module: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(module, nn.Linear)
    return module.weight @ x + module.bias


def normed(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, nn.Identity):
        return x
    assert isinstance(module, nn.LayerNorm)
    middle = x.sum() / DIM
    spread = ((x - middle) ** 2).sum() / DIM
    return (x - middle) / (spread + 1e-5).sqrt() * module.weight + module.bias


def fed(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, nn.Identity):
        return x
    assert isinstance(module, nn.Sequential)
    inner = linear(module[0], x)
    inner = torch.where(inner > 0, inner, torch.zeros_like(inner))
    return linear(module[2], inner) if len(module) == 3 else inner


def mab(block: MAB, x: list[Tensor], context: list[Tensor]) -> list[Tensor]:
    """Of one set: those of context that are padding are not in the list."""
    size = DIM // HEADS
    scale = math.sqrt(DIM if block.released else size)
    found = []
    for element in x:
        query, parts = linear(block.query_projection, element), []
        for head in range(HEADS):
            own = slice(head * size, (head + 1) * size)
            scores = [(query[own] * linear(block.key_projection, y)[own]).sum() / scale for y in context]
            weights = [score.exp() for score in scores]
            total = sum(weights, torch.zeros((), dtype=x[0].dtype))
            part = torch.zeros(size, dtype=x[0].dtype)
            for weight, y in zip(weights, context, strict=True):
                part = part + weight / total * linear(block.value_projection, y)[own]
            parts.append(part)
        attended = torch.cat(parts)
        if block.released:
            mixed = query + attended
        else:
            mixed = element + linear(block.output_projection, attended)
        mixed = normed(block.attention_norm, mixed)
        found.append(normed(block.output_norm, mixed + fed(block.feed, mixed)))
    return found


def by_loops(block: Block, x: list[Tensor], real: list[Tensor]) -> list[Tensor]:
    """x: the elements of one set, real: those that are no padding."""
    match block:
        case SAB():
            return mab(block.block, x, real)
        case ISAB():
            return mab(block.spread, x, mab(block.gather, list(block.inducing[0]), real))
        case PMA():
            return mab(block.block, list(block.seeds[0]), [fed(block.feed, y) for y in real])


def assert_same(ours: Tensor, loops: Tensor, leaves: list[Tensor]) -> None:
    """Outputs, and the gradient of every leaf."""
    torch.testing.assert_close(ours, loops, atol=1e-9, rtol=1e-9)
    torch.manual_seed(1)
    weight = torch.randn_like(ours)
    for mine, theirs in zip(
        torch.autograd.grad((ours * weight).sum(), leaves),
        torch.autograd.grad((loops * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", MAKERS)
def test_equals_loops(name: str, options: str) -> None:
    block, x = made(name, **OPTIONS[options]), elements(7)
    loops = torch.stack([torch.stack(by_loops(block, list(row), list(row))) for row in x])
    assert_same(block(x), loops, [x, *block.parameters()])


@pytest.mark.parametrize("options", ["paper", "released"])
@pytest.mark.parametrize("name", MAKERS)
def test_equals_loops_with_padding(name: str, options: str) -> None:
    """Padding in the middle, at the end, everywhere but at one, and nowhere."""
    block, x = made(name, **OPTIONS[options]), elements(5, batch=4)
    present = torch.tensor([[1, 0, 1, 0, 1], [1, 1, 1, 0, 0], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    rows = []
    for row, there in zip(x, present.tolist(), strict=True):
        rows.append(
            torch.stack(by_loops(block, list(row), [y for y, is_real in zip(row, there, strict=True) if is_real]))
        )
    assert_same(block(x, present=present), torch.stack(rows), [x, *block.parameters()])


@pytest.mark.parametrize("released", [False, True], ids=["paper", "released"])
def test_one_set_attends_another(released: bool) -> None:
    block, x, context = MAB(DIM, HEADS, released=released), elements(3), elements(6)
    randomised(block)
    loops = torch.stack([torch.stack(mab(block, list(a), list(b))) for a, b in zip(x, context, strict=True)])
    assert_same(block(x, context), loops, [x, context, *block.parameters()])


# ---- what must hold of sets ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["paper", "released"])
@pytest.mark.parametrize("name", ["SAB", "ISAB"])
def test_permutes_as_its_set_does(name: str, options: str) -> None:
    block, x = made(name, **OPTIONS[options]), elements(65)
    order = torch.randperm(65)
    present = torch.rand(2, 65) < 0.7
    torch.testing.assert_close(block(x[:, order]), block(x)[:, order], atol=1e-10, rtol=0)
    permuted = block(x[:, order], present=present[:, order])
    torch.testing.assert_close(permuted, block(x, present=present)[:, order], atol=1e-10, rtol=0)


@pytest.mark.parametrize("options", ["paper", "released"])
def test_pooling_knows_no_order(options: str) -> None:
    block, x = made("PMA", **OPTIONS[options]), elements(65)
    order = torch.randperm(65)
    torch.testing.assert_close(block(x[:, order]), block(x), atol=1e-10, rtol=0)
    assert not torch.allclose(block(x), block(elements(65, seed=1)), atol=1e-3)


@pytest.mark.parametrize("padding", [1, 63])
@pytest.mark.parametrize("name", MAKERS)
def test_padding_changes_nothing(name: str, padding: int) -> None:
    """Neither what is real nor a gradient of it, whatever stands at the padding."""
    block, x = made(name), elements(9)
    filled = torch.cat([x, 100 * elements(padding)], 1)
    present = patterndsl.present(torch.tensor([9, 9]), 9 + padding)
    kept = slice(None) if name == "PMA" else slice(9)
    assert_same(block(filled, present=present)[:, kept], block(x), [x, *block.parameters()])


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_real_is_not_left_out(name: str) -> None:
    """Each real element matters to the others, so that invariance is not for want of attention."""
    block, x = made(name), elements(9)
    present = patterndsl.present(torch.tensor([9, 6]), 9)
    out = block(x, present=present)
    for at in range(9):
        moved = x.detach().clone()
        moved[:, at] += 1
        others = slice(None) if name == "PMA" else [place for place in range(6) if place != at]
        differs = (block(moved, present=present) - out)[:, others].abs().amax((1, 2))
        assert differs[0] > 1e-6
        assert differs[1] > 1e-6 if at < 6 else differs[1] == 0


@pytest.mark.parametrize("as_padding", [False, True], ids=["no-elements", "all-padding"])
def test_an_empty_set_is_pooled_to_what_the_seeds_are_alone(as_padding: bool) -> None:
    block = made("PMA")
    assert isinstance(block, PMA)
    x = elements(5) if as_padding else elements(0)
    out = block(x, present=torch.zeros(2, x.shape[1], dtype=torch.bool))
    alone = torch.stack(mab(block.block, list(block.seeds[0]), []))
    assert_same(out, alone.expand(2, -1, -1), [block.seeds, *block.block.feed.parameters()])
    if not as_padding:
        torch.testing.assert_close(block(x), out)


@pytest.mark.parametrize("name", ["SAB", "ISAB"])
def test_an_empty_set_stays_empty(name: str) -> None:
    assert made(name)(elements(0)).shape == (2, 0, DIM)
    assert made(name)(elements(5), present=torch.zeros(2, 5, dtype=torch.bool)).isfinite().all()


def test_empty_and_full_sets_share_a_batch() -> None:
    block, x = made("ISAB"), elements(5)
    out = block(x, present=torch.tensor([[False] * 5, [True] * 5]))
    torch.testing.assert_close(out[1:], block(x[1:]))
    assert out.isfinite().all()


# ---- cost, learned vectors, refusals ------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "pairs"), [("SAB", 33 * 33), ("ISAB", 2 * 33 * 4), ("PMA", 2 * 33)])
def test_pairs_are_those_of_the_paper(name: str, pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by the programs that a call runs: N² for SAB, 2 N m for ISAB, k N for PMA."""
    counted = []

    def counting(query: Tensor, key: Tensor, value: Tensor, pattern: patterndsl.Pattern, **options: Any) -> Tensor:
        program = pattern.compile(q_len=query.shape[2], kv_len=key.shape[2])
        counted.append(sum(item.piece.num_computed for item in program.plan.passes))
        return cast("Tensor", patterndsl.attention(query, key, value, pattern, **options))

    monkeypatch.setattr("patterndsl.sets.attention", counting)
    made(name)(elements(33))
    assert sum(counted) == pairs


def test_learned_vectors_are_drawn_as_the_released_code_draws_them() -> None:
    """Xavier's bound for [1, m, dim]: m * dim in, dim out."""
    inducing = ISAB(64, 4, 32).inducing
    bound = math.sqrt(6 / (33 * 64))
    assert inducing.shape == (1, 32, 64)
    assert 0.95 * bound < inducing.abs().max().item() <= bound


def test_every_parameter_trains() -> None:
    model = nn.ModuleList([SAB(DIM, HEADS), ISAB(DIM, HEADS, 4), PMA(DIM, HEADS, 2)])
    x = torch.randn(2, 9, DIM)
    for block in model:
        x = block(x)
    x.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize("heads", [5, 0, 24])
def test_refuses_heads_that_do_not_divide(heads: int) -> None:
    with pytest.raises(patterndsl.InputError, match=r"E503|E406"):
        MAB(DIM, heads)


def test_refuses_what_the_released_code_has_not() -> None:
    with pytest.raises(patterndsl.InputError, match=r"E503.*hidden is 7"):
        PMA(DIM, HEADS, 2, hidden=7, released=True)


@pytest.mark.parametrize("count", [0, -1])
def test_refuses_no_learned_vectors(count: int) -> None:
    with pytest.raises(patterndsl.InputError, match="num_inducing"):
        ISAB(DIM, HEADS, count)


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.zeros(2, 5, DIM + 1), r"x is \[2, 5, 13\]"),
        (torch.zeros(5, DIM), r"x is \[5, 12\]"),
        (torch.zeros(2, 5, DIM, dtype=torch.float64), "x is torch.float64"),
        (torch.zeros(2, 5, DIM, dtype=torch.int64), "x is torch.int64"),
        ("a set", "x is str"),
    ],
)
@pytest.mark.parametrize("name", MAKERS)
def test_refuses_what_is_no_set(name: str, x: object, says: str) -> None:
    with pytest.raises(patterndsl.InputError, match=f"E503.*{says}"):
        MAKERS[name]()(x)


@pytest.mark.parametrize(
    "present", [torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 5), torch.ones(3, 5, dtype=torch.bool)]
)
def test_refuses_a_mask_that_does_not_fit(present: Tensor) -> None:
    with pytest.raises(patterndsl.InputError, match=r"E502.*`present`"):
        SAB(DIM, HEADS)(torch.randn(2, 5, DIM), present=present)


def test_there_is_no_causal_form() -> None:
    make: Any = SAB
    with pytest.raises(TypeError, match="causal"):
        make(DIM, HEADS, causal=True)
