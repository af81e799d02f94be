"""Kernel attention against loops over rows and keys: outputs, gradients, states, and what a row must not notice."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from patterndsl.diagnostics import InputError
from patterndsl.score.causal import CHUNK
from patterndsl.score.features import directions, elu_features, favor_exponents, relu_features
from patterndsl.score.linear import State, empty_state, kernel_attention, merge_states, read, step
from tests.peers import imported

DTYPE = torch.float64
KINDS = ("elu", "relu", "log", "wild")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def features(kind: str, x: Tensor) -> Tensor:
    """log: FAVOR+. wild: FAVOR+ of vectors whose norms span three decades, so that exponents go below -10000."""
    match kind:
        case "elu":
            return elu_features(x)
        case "relu":
            return relu_features(x)
        case "wild":
            x = x * torch.logspace(-1, 2, x.shape[2], dtype=DTYPE)[torch.arange(x.shape[2]) * 7 % x.shape[2], None]
    return favor_exponents(x, directions(6, x.shape[-1], orthogonal=True, seed=1, dtype=DTYPE), False)


def case(kind: str, q_len: int, kv_len: int, heads: int = 2, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Leaves: query and key features and value."""
    q = features(kind, normal(2, heads, q_len, 4, seed=1)).detach().requires_grad_()
    k = features(kind, normal(2, kv_heads, kv_len, 4, seed=2)).detach().requires_grad_()
    return q, k, normal(2, kv_heads, kv_len, 3, seed=3).requires_grad_()


def looped(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, keep: Tensor | None = None, is_log: bool = False
) -> Tensor:
    """Row by row, head by head: the weights of the keys that it sees."""
    group = q.shape[1] // k.shape[1]
    rows = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                present = torch.ones(k.shape[2], dtype=torch.bool) if keep is None else keep.expand(len(k), -1)[b]
                if causal:
                    present = present & (torch.arange(k.shape[2]) <= t)
                keys, values = k[b, h // group][present], v[b, h // group][present]
                if not len(keys):
                    rows.append((q[b, h, t, 0] * 0).expand(v.shape[-1]))
                elif is_log:
                    rows.append((q[b, h, t] + keys).logsumexp(-1).softmax(0) @ values)
                else:
                    weights = keys @ q[b, h, t]
                    rows.append(weights @ values / weights.sum())
    return torch.stack(rows).reshape(*q.shape[:3], v.shape[-1])


def check(found: Tensor, expected: Tensor, leaves: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    pull = normal(*found.shape, seed=9)
    have = torch.autograd.grad((found * pull).sum(), leaves)
    want = torch.autograd.grad((expected * pull).sum(), leaves, materialize_grads=True)
    for one, other in zip(have, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def is_log(kind: str) -> bool:
    return kind in ("log", "wild")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 130])
def test_causal_is_the_loop(kind: str, length: int) -> None:
    leaves = case(kind, length, length)
    found, _ = kernel_attention(*leaves, causal=True, is_log=is_log(kind))
    check(found, looped(*leaves, causal=True, is_log=is_log(kind)), leaves)
    with torch.no_grad():
        assert torch.equal(kernel_attention(*leaves, causal=True, is_log=is_log(kind))[0], found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 9), (7, 1), (5, 70), (70, 5)])
def test_non_causal_is_the_loop(kind: str, q_len: int, kv_len: int) -> None:
    leaves = case(kind, q_len, kv_len)
    found, state = kernel_attention(*leaves, causal=False, is_log=is_log(kind))
    check(found, looped(*leaves, causal=False, is_log=is_log(kind)), leaves)
    torch.testing.assert_close(read(leaves[0], state, is_log(kind)), found, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["elu", "wild"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_key_heads_are_shared(kind: str, causal: bool, kv_heads: int) -> None:
    leaves = case(kind, 67, 67, heads=4, kv_heads=kv_heads)
    found, _ = kernel_attention(*leaves, causal=causal, is_log=is_log(kind))
    check(found, looped(*leaves, causal=causal, is_log=is_log(kind)), leaves)


@pytest.mark.parametrize("kind", ["elu", "wild"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("by_row", [False, True])
def test_dropped_keys_take_no_part_whatever_they_hold(kind: str, causal: bool, by_row: bool) -> None:
    q, k, v = case(kind, 66, 66)
    keep = torch.rand(2, 66, generator=torch.Generator().manual_seed(4)) < 0.6
    keep[:, :3] = False  # the first causal rows see no key
    keep[1] = keep[1] & by_row  # and no row of the second sequence, if sequences differ
    keep = keep if by_row else keep[0]
    expected = looped(q, k, v, causal=causal, keep=keep, is_log=is_log(kind))
    found, _ = kernel_attention(q, k, v, causal=causal, keep=keep, is_log=is_log(kind))
    check(found, expected, (q, k, v))
    poison = ~keep.expand(2, 66)[:, None, :, None]
    key, value = (part.detach().masked_fill(poison, torch.nan).requires_grad_() for part in (k, v))
    again, state = kernel_attention(q, key, value, causal=causal, keep=keep, is_log=is_log(kind))
    assert torch.equal(again, found) and state.numerator.isfinite().all()
    for part in torch.autograd.grad(again.sum(), (q, key, value)):
        assert part.isfinite().all()


@pytest.mark.parametrize("logs", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_rows_without_keys_are_zero(logs: bool, causal: bool) -> None:
    leaves = case("log" if logs else "elu", 5, 5)
    found, state = kernel_attention(*leaves, causal=causal, keep=torch.zeros(5, dtype=torch.bool), is_log=logs)
    assert not found.any()
    for part in torch.autograd.grad(found.sum(), leaves):
        assert not part.any()
    assert not read(leaves[0], state, logs).any()


@pytest.mark.parametrize("logs", [False, True])
def test_no_tokens(logs: bool) -> None:
    q, _, _ = case("log" if logs else "elu", 3, 3)
    none = q[:, :, :0]
    found, state = kernel_attention(q, none, normal(2, 2, 0, 3), causal=False, is_log=logs)
    assert found.shape == (2, 2, 3, 3) and not found.any()
    assert not torch.autograd.grad(found.sum(), q)[0].any()
    found, after = kernel_attention(none, none, normal(2, 2, 0, 3), causal=True, state=state, is_log=logs)
    assert found.shape == (2, 2, 0, 3) and torch.equal(after.shift, state.shift)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [False, True])
def test_segments_are_the_whole(kind: str, causal: bool) -> None:
    leaves = q, k, v = case(kind, 70, 70)
    cuts = [0, 3, 67, 68, 70]
    state, outputs = None, []
    for start, stop in itertools.pairwise(cuts):
        part = slice(start, stop)
        output, state = kernel_attention(
            q[:, :, part], k[:, :, part], v[:, :, part], causal=causal, state=state, is_log=is_log(kind)
        )
        outputs.append(output)
    if causal:
        return check(torch.cat(outputs, dim=2), looped(*leaves, causal=True, is_log=is_log(kind)), leaves)
    return check(outputs[-1], looped(q[:, :, -2:], k, v, causal=False, is_log=is_log(kind)), leaves)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_the_loop(kind: str) -> None:
    leaves = q, k, v = case(kind, CHUNK + 2, CHUNK + 2, heads=4)
    state, outputs = empty_state(2, 2, k.shape[-1], 3, dtype=DTYPE), []
    for t in range(CHUNK + 2):
        at = slice(t, t + 1)
        output, state = step(q[:, :, at], k[:, :, at], v[:, :, at], state, is_log(kind))
        outputs.append(output)
    check(torch.cat(outputs, dim=2), looped(*leaves, causal=True, is_log=is_log(kind)), leaves)


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_a_commutative_monoid(kind: str) -> None:
    _, k, v = case(kind, 1, 30)
    parts = [
        kernel_attention(k[:, :, :1], k[:, :, at], v[:, :, at], causal=False, is_log=is_log(kind))[1]
        for at in (slice(0, 11), slice(11, 12), slice(12, 30))
    ]
    a, b, c = parts
    unit = empty_state(2, 2, k.shape[-1], 3, dtype=DTYPE)
    same(merge_states(a, b), merge_states(b, a), 0)
    same(merge_states(a, unit), a, 0)
    same(merge_states(unit, unit), unit, 0)
    same(merge_states(merge_states(a, b), c), merge_states(a, merge_states(b, c)), 1e-12)


def same(one: State, other: State, rtol: float) -> None:
    torch.testing.assert_close(one.numerator, other.numerator, rtol=rtol, atol=rtol)
    torch.testing.assert_close(one.denominator, other.denominator, rtol=rtol, atol=rtol)
    torch.testing.assert_close(one.shift, other.shift, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("logs", [False, True])
@pytest.mark.parametrize("cut", [1, 5, 63, 64, 100])
def test_later_keys_change_no_bit(dtype: torch.dtype, logs: bool, cut: int) -> None:
    """Output and gradient of rows before the cut, with later keys whose exponents are near 4000, or features 1e30."""
    q, k, v = (part.detach().to(dtype) for part in case("log" if logs else "elu", 130, 130))
    huge = k.clone()
    huge[:, :, cut:] = 4000 * normal(*k[:, :, cut:].shape).to(dtype) if logs else 1e30
    value = v.clone()
    value[:, :, cut:] *= 1e6
    seen = []
    for key, values in ((k, v), (huge, value)):
        leaves = tuple(part.clone().requires_grad_() for part in (q, key, values))
        found = kernel_attention(*leaves, causal=True, is_log=logs)[0][:, :, :cut]
        assert found.dtype == dtype and found.isfinite().all()
        grads = torch.autograd.grad(found.square().sum(), leaves)
        assert all(not part[:, :, cut:].any() for part in grads)
        seen.append((found, *(part[:, :, :cut] for part in grads)))
    assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["elu", "log"])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype, kind: str) -> None:
    """600 equal keys: their weights sum up to more than bfloat16 can count to, under autocast as well."""
    q, k, v = (part.detach()[:, :, :1].expand(-1, -1, 600, -1) for part in case(kind, 1, 1))
    found, state = kernel_attention(q.to(dtype), k.to(dtype), v.to(dtype), causal=True, is_log=is_log(kind))
    assert state.denominator.dtype == torch.float32
    torch.testing.assert_close(found, v.to(dtype), rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        again, _ = kernel_attention(q.float(), k.float(), v.float(), causal=True, is_log=is_log(kind))
    torch.testing.assert_close(again, v.float(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("logs", [False, True])
def test_no_state_is_stored_for_each_row(logs: bool) -> None:
    """What the backward pass keeps grows by far less than M Dv for each token."""
    num_features, value_dim, stored = 32, 32, []
    for length in (1024, 2048):
        q, k, v = (normal(1, 1, length, num_features, seed=seed).abs().requires_grad_() for seed in range(3))
        sizes: dict[int, int] = {}

        def pack(part: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes() // 8
            return part

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda part: part):
            kernel_attention(q, k, v, causal=True, is_log=logs)
        stored.append(sum(sizes.values()))
    assert (stored[1] - stored[0]) / 1024 < num_features * value_dim / 2


@pytest.mark.parametrize("logs", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(logs: bool, causal: bool) -> None:
    leaves = tuple(part[:1, :1, :5].detach().requires_grad_() for part in case("log" if logs else "elu", 5, 5))
    assert torch.autograd.gradcheck(lambda *parts: kernel_attention(*parts, causal=causal, is_log=logs)[0], leaves)
    assert torch.autograd.gradgradcheck(
        lambda *parts: kernel_attention(*parts, causal=causal, is_log=logs)[0], leaves, fast_mode=True
    )


def test_favor_approaches_softmax_attention() -> None:
    x = normal(3, 1, 2, 40, 8, seed=7) / 1.5
    expected = torch.nn.functional.scaled_dot_product_attention(x[0], x[1], x[2], is_causal=True)
    errors = []
    for num in (64, 1024):
        w = directions(num, 8, orthogonal=True, seed=2, dtype=DTYPE)
        q, k = favor_exponents(x[0], w, True), favor_exponents(x[1], w, True)
        found, _ = kernel_attention(q, k, x[2], causal=True, is_log=True)
        errors.append((found - expected).square().mean().sqrt().item())
    assert errors[1] < errors[0] / 2 and errors[1] < 0.05


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("E503", {"causal": True}),
        ("E503", {"value": torch.zeros(2, 2, 5, 3)}),
        ("E503", {"key_features": torch.zeros(2, 3, 6, 4), "value": torch.zeros(2, 3, 6, 3)}),
        ("E503", {"state": empty_state(2, 2, 5, 3)}),
        ("E502", {"value": torch.zeros(2, 6, 3)}),
        ("E502", {"keep": torch.ones(5, dtype=torch.bool)}),
        ("E502", {"keep": torch.ones(6)}),
    ],
)
def test_what_does_not_fit_is_refused(code: str, change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {
        "query_features": torch.ones(2, 2, 4, 4),
        "key_features": torch.ones(2, 2, 6, 4),
        "value": torch.ones(2, 2, 6, 3),
        "causal": False,
    }
    kernel_attention(**arguments)
    with pytest.raises(InputError, match=code):
        kernel_attention(**arguments | change)


def test_a_step_is_one_token_and_a_read_fits() -> None:
    state = empty_state(2, 2, 4, 3)
    with pytest.raises(InputError, match="E503"):
        step(torch.ones(2, 2, 2, 4), torch.ones(2, 2, 2, 4), torch.ones(2, 2, 2, 3), state)
    with pytest.raises(InputError, match="E503"):
        read(torch.ones(2, 3, 2, 4), state)


def test_performer_pytorch_computes_the_same() -> None:
    """Both of its linear attentions with our features, and its features of our directions, without its epsilons."""
    peer = imported("performer_pytorch.performer_pytorch")
    x, v = normal(2, 2, 2, 33, 4, seed=6), normal(2, 2, 33, 3, seed=8)
    q, k = elu_features(x)
    found, _ = kernel_attention(q, k, v, causal=False)
    torch.testing.assert_close(found, peer.linear_attention(q, k, v), rtol=1e-9, atol=1e-9)
    causal, _ = kernel_attention(q, k, v, causal=True)
    expected = peer.causal_linear_attention_noncuda(q, k, v, chunk_size=3, eps=0)
    torch.testing.assert_close(causal, expected, rtol=1e-9, atol=1e-9)
    w = directions(64, 4, orthogonal=True, seed=1, dtype=DTYPE)
    phi_q = peer.softmax_kernel(x[0], projection_matrix=w, is_query=True, eps=0)
    phi_k = peer.softmax_kernel(x[1], projection_matrix=w, is_query=False, eps=0)
    logs = [favor_exponents(part, w, False) for part in x]
    found, _ = kernel_attention(logs[0], logs[1], v, causal=False, is_log=True)
    torch.testing.assert_close(found, peer.linear_attention(phi_q, phi_k, v), rtol=1e-9, atol=1e-9)
