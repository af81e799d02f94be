"""A layer token by token against the same layer on all tokens at once."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import patterndsl
from patterndsl import PatternError
from patterndsl.nn import Attention

N = 40


def decoded(
    layer: Attention, x: Tensor, prompt: int, inputs: dict[str, Tensor] | None = None, **options: Any
) -> Tensor:
    """A prompt, single tokens, and a few at once."""
    state = layer.init_state(x.shape[0], **options)
    parts = []
    for start, stop in [(0, prompt), *((t, t + 1) for t in range(prompt, N - 5)), (N - 5, N)]:
        given = {name: values[..., start:stop] for name, values in (inputs or {}).items()}
        out, state = layer(x[:, start:stop], state, inputs=given)
        parts.append(out)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("prompt", [0, 1, 13])
@pytest.mark.parametrize(
    ("text", "kv_heads", "options"),
    [
        ("causal & (recent(7) | first(2))", 2, {}),
        ("causal & (recent(5) | strided(6))", 1, {"max_queries": 3}),
        ("head < 2 & recent(3) | head >= 2 & causal", 2, {}),
        ("share: query_key\nattend: recent(9)\n", 4, {}),
        ("params: {w: isqrt(N)}\nattend: recent(w)\n", 2, {"n": N}),
        ("recent(4 + layer)", 2, {}),
    ],
)
def test_equals_the_parallel_form(text: str, kv_heads: int, options: Any, prompt: int) -> None:
    torch.manual_seed(0)
    layer = Attention(patterndsl.parse(text), 32, 4, kv_heads=kv_heads, layer=3).double()
    x = torch.randn(3, N, 32, dtype=torch.float64)
    torch.testing.assert_close(decoded(layer, x, prompt, **options), layer(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"n": N}])
def test_inputs_come_with_their_tokens(options: Any) -> None:
    torch.manual_seed(0)
    layer = Attention(patterndsl.parse("recent(9) & same(doc)", inputs={"doc": "int[N]"}), 16, 2).double()
    x, doc = torch.randn(2, N, 16, dtype=torch.float64), torch.stack([torch.arange(N) // 7, torch.arange(N) // 15])
    found = decoded(layer, x, 11, {"doc": doc}, **options)
    torch.testing.assert_close(found, layer(x, inputs={"doc": doc}), rtol=0, atol=1e-9)


def test_a_state_belongs_to_its_layer() -> None:
    layer, other = Attention("recent(3)", 16, 2), Attention("recent(4)", 16, 2)
    x = torch.zeros(1, 1, 16)
    with pytest.raises(PatternError, match="another pattern"):
        layer(x, other.init_state(1))
    with pytest.raises(PatternError, match="E503"):
        layer(x, layer.init_state(2))
    with pytest.raises(PatternError, match="next tokens alone"):
        layer(x, layer.init_state(1), q_start=3)
    with pytest.raises(PatternError, match="attends key 1, a later one"):
        Attention("window(3)", 16, 2).init_state(1)


def test_a_state_is_of_one_layer_and_its_rows() -> None:
    pattern = patterndsl.parse("recent(2 + layer)")
    layer, next_one = Attention(pattern, 16, 2), Attention(pattern, 16, 2, layer=1)
    with pytest.raises(PatternError, match="of layer 0 with 2 heads over 2, and this is layer 1"):
        next_one(torch.zeros(1, 1, 16), layer.init_state(1))
    with pytest.raises(PatternError, match="of 1 batch rows, and x has 2"):
        layer(torch.zeros(2, 1, 16), layer.init_state(1))


@pytest.mark.parametrize("options", [{}, {"n": N}, {"max_queries": 4}])
@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"doc": torch.arange(N) // 7}, "E502"),  # of the whole sequence, with every call
        ({"doc": torch.tensor(0)}, "E502"),
        ({"doc": [0, 0, 0]}, "E502"),
        ({"doc": torch.zeros(3, dtype=torch.int64), "dog": 1}, "E501"),
        ([0, 0, 0], "E501"),
        (None, "E501"),
    ],
)
def test_inputs_are_those_of_the_next_tokens(options: Any, inputs: Any, said: str) -> None:
    layer = Attention(patterndsl.parse("recent(9) & same(doc)", inputs={"doc": "int[N]"}), 16, 2)
    state = layer.init_state(1, **options)
    with pytest.raises(PatternError, match=said):
        layer(torch.zeros(1, 3, 16), state, inputs=inputs)
    assert isinstance(state, patterndsl.Cache)
    assert state.lengths == (0,)


def test_tokens_that_do_not_fit_leave_the_state_as_it_was() -> None:
    layer = Attention(patterndsl.parse("params: {w: isqrt(N)}\nattend: recent(w)\n"), 16, 2)
    state = layer.init_state(1, n=10)
    layer(torch.zeros(1, 8, 16), state)
    with pytest.raises(PatternError, match="a sequence of 11 tokens, where 10 is the most"):
        layer(torch.zeros(1, 3, 16), state)
    assert isinstance(state, patterndsl.Cache)
    assert state.lengths == (8,)


def test_a_prompt_runs_by_the_layers_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    from patterndsl.nn import decoding

    asked: list[dict[str, Any]] = []

    def attention(*tensors: Any, **options: Any) -> Any:
        asked.append(options)
        return patterndsl.attention(*tensors, **options)

    monkeypatch.setattr(decoding, "attention", attention)
    for backend in ("oracle", "gathered", "auto"):
        layer = Attention("causal & recent(3)", 16, 2, backend=backend)
        layer(torch.randn(1, 9, 16), layer.init_state(1))
    assert [options["backend"] for options in asked] == ["oracle", "gathered", "auto"]


def copied(cache: patterndsl.Cache, how: str) -> patterndsl.Cache:
    if how in ("copy", "deepcopy"):
        return copy.copy(cache) if how == "copy" else copy.deepcopy(cache)
    if how == "pickle":
        return pickle.loads(pickle.dumps(cache))
    file = io.BytesIO()
    torch.save({"cache": cache}, file)
    file.seek(0)
    found: patterndsl.Cache = torch.load(file, weights_only=False)["cache"]
    return found


@pytest.mark.parametrize("how", ["copy", "deepcopy", "pickle", "torch.save"])
def test_a_copy_of_a_cache_goes_on_by_itself(how: str) -> None:
    torch.manual_seed(0)
    text = "causal & (recent(5) | k % 6 == 0 | first(2)) & same(doc)"
    pattern = patterndsl.parse(text, inputs={"doc": "int[N]"})
    cache = patterndsl.Cache(pattern, batch=2, heads=2, head_dim=4)
    key, doc = torch.randn(2, 2, 30, 4), torch.zeros(30, dtype=torch.int64)
    cache.append(key[:, :, :20], key[:, :, :20], inputs={"doc": doc[:20]})
    other = copied(cache, how)
    other.append(-key[:, :, 20:], key[:, :, 20:], inputs={"doc": doc[20:]})
    cache.append(key[:, :, 20:], key[:, :, 20:], inputs={"doc": doc[20:]})
    whole = patterndsl.attention(key, key, key, pattern, inputs={"doc": doc})
    torch.testing.assert_close(cache.attend(key[:, :, -1:]), whole[:, :, -1:])
    changed = torch.cat([key[:, :, :20], -key[:, :, 20:]], 2)
    whole = patterndsl.attention(key, changed, key, pattern, inputs={"doc": doc})
    torch.testing.assert_close(other.attend(key[:, :, -1:]), whole[:, :, -1:])
