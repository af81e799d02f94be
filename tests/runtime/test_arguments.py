"""Ordinary wrong arguments are mistakes with a code and a cure, and integers may come from any library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import patterndsl as p
from patterndsl import InputError, PatternError
from patterndsl.nn import Attention

Q = torch.zeros(1, 2, 8, 4)
X = torch.zeros(1, 4, 64)
WINDOW: Any = p.parse("window(w)", {"w": 3})
PER_HEAD: Any = p.parse("window(w[head])", {"w": [1, 2]})
PROGRAM: Any = WINDOW.compile(8, heads=2)
CAUSAL: Any = p.parse("causal")
NAMES = {"p": p, "np": np, "torch": torch, "Q": Q, "X": X, "Attention": Attention}
NAMES |= {"WINDOW": WINDOW, "PER_HEAD": PER_HEAD, "PROGRAM": PROGRAM, "CAUSAL": CAUSAL}

WRONG = """
E304 p.parse(None)
E304 p.parse(3)
E304 p.parse("window(w)", ["w"])
E304 p.parse("window(w)", {1: 3})
E304 p.parse("causal", grid=[8, 8])
E304 p.parse("causal", inputs=["doc"])
E304 p.parse("causal", inputs={"doc": None})
E304 p.parse("causal", inputs={3: "int[N]"})
E402 p.parse("window(w)", {"w": None})
E402 p.parse("window(w)", {"w": np.bool_(True)})
E402 p.parse("window(w)", {"w": np.float64(3)})
E402 p.parse("causal", grid={"a": None, "b": 2.5})
E407 p.parse("causal", grid={"a": 10**5000})
E407 p.parse("window(w)", {"w": 10**5000})
E407 WINDOW.with_params(w=10**5000)
E402 WINDOW.with_params(w=None)
E402 WINDOW.with_params(w=3.0)
E402 WINDOW.with_params(w={3})
E402 WINDOW.with_params(w=torch.tensor(3.0))
E402 WINDOW.with_params(w=np.array([[1, 2]]))
E402 PER_HEAD.with_params(w=[])
E402 PER_HEAD.with_params(w=np.array([1.5, 2]))
E402 PER_HEAD.with_params(w=np.array([True, False]))
E601 p.parse("t1.yaml")
E601 p.parse("specs/t1.yml ")
E601 p.load("causal & window(3)")
E601 p.load("q.row == k.row")
E601 p.load(None)
E601 p.load(3)
E601 p.load("a\\0b")
E601 p.load("x" * 5000)
E601 p.load_program(None)
E601 p.load_program("a\\0b")
E602 CAUSAL.compile(8).save(None)
E304 p.attention(Q, Q, Q, None)
E304 p.attention(Q, Q, Q, 3)
E304 p.attention(Q, Q, Q, PROGRAM)
E601 p.attention(Q, Q, Q, "t1.yaml")
E503 p.attention(None, Q, Q, "causal")
E503 p.parse("causal").compile(Q.shape[2], heads=Q.shape[1])(Q.to_sparse(), Q, Q)
E503 p.attention(Q, Q, Q, "causal", scale="a")
E503 p.attention(Q, Q, Q, "causal", scale=True)
E503 p.attention(Q, Q, Q, "causal", scale=float("nan"))
E503 p.attention(Q, Q, Q, "causal", scale=10**400)
E503 p.attention(Q, Q, Q, "causal", scale=torch.ones(2))
E503 p.attention(Q, Q, Q, "causal", scale=torch.ones(1, requires_grad=True))
E406 p.attention(Q, Q, Q, "causal", n=8.0)
E406 p.attention(Q, Q, Q, "causal", n=[8])
E406 p.attention(Q, Q, Q, "causal", layer=[8])
E406 p.attention(Q, Q, Q, "causal", q_start="a")
E505 p.attention(Q, Q, Q, "causal", backend=[])
E501 p.attention(Q, Q, Q, "causal", inputs=3)
E501 PROGRAM(Q, Q, Q, inputs=Q)
E501 PROGRAM(Q, Q, Q, inputs=[Q])
E501 PROGRAM(Q, Q, Q, inputs={3: Q})
E501 PROGRAM.mask(inputs=Q)
E406 PROGRAM.block_mask(64.0)
E406 PROGRAM.block_mask("a")
E406 PROGRAM.block_mask(None)
E406 PROGRAM.tiles(kv_block=0)
E406 CAUSAL.compile(10**5000)
E406 CAUSAL.compile(8, heads=2**16 + 1)
E406 CAUSAL.compile(8, layer=2**20 + 1)
E406 CAUSAL.compile(8, q_start=9)
E406 CAUSAL.compile(np.float64(8))
E406 CAUSAL.compile()
E406 CAUSAL.compile(8, q_len=4, q_start=6)
E406 CAUSAL.compile(torch.tensor(True))
E505 CAUSAL.compile(8, device=None)
E304 Attention(None, 64, 8)
E304 Attention(PROGRAM, 64, 8)
E601 Attention("t1.yaml", 64, 8)
E406 Attention("causal", 64.0, 8)
E406 Attention("causal", -64, 8)
E406 Attention("causal", 64, "8")
E406 Attention("causal", 64, 8, kv_heads=2.0)
E406 Attention("causal", 64, 8, head_dim=-1)
E406 Attention("causal", 64, 8, layer=-1)
E505 Attention("causal", 64, 8, backend="foo")
E503 Attention("causal", 64, 8)(torch.zeros(1, 4, 32))
E503 Attention("causal", 64, 8)(torch.zeros(4, 64))
E503 Attention("causal", 64, 8)(torch.zeros(1, 1, 4, 64))
E503 Attention("causal", 64, 8)(X.int())
E503 Attention("causal", 64, 8)(X.double())
E503 Attention("causal", 64, 8)(np.zeros((1, 4, 64)))
E503 Attention("causal", 64, 8)(X, torch.zeros(2, 4, 64))
E503 Attention("causal", 64, 8)(X, torch.zeros(1, 4, 32))
E406 Attention("causal", 64, 8)(X, q_start=-1)
"""


@pytest.mark.parametrize("line", WRONG.strip().splitlines())
def test_wrong_arguments_have_a_code_and_a_cure(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, call = line.split(" ", 1)
    kind = InputError if code == "E406" else PatternError  # a wrong size is a ValueError, whichever it is
    with pytest.raises(kind, match=rf"(?s)error\[{code}\].*= help: "):
        eval(call, NAMES)


SAME = """
CAUSAL.compile(np.int64(64), heads=np.int32(2), layer=np.int8(1)).bound == CAUSAL.compile(64, heads=2, layer=1).bound
CAUSAL.bind(q_len=torch.tensor(3), kv_len=np.uint8(5)) == CAUSAL.bind(q_len=3, kv_len=5)
WINDOW.with_params(w=np.int64(4)) == WINDOW.with_params(w=4)
p.parse("window(w)", {"w": torch.tensor(3)}) == WINDOW
PER_HEAD.with_params(w=np.array([1, 2, 3, 4])) == PER_HEAD.with_params(w=[1, 2, 3, 4])
PER_HEAD.with_params(w=range(1, 4)) == PER_HEAD.with_params(w=[1, 2, 3])
p.parse("window(w[head])", {"w": (np.int64(1), 2)}) == PER_HEAD
p.parse("q.a == k.a", grid={"a": np.int64(8), "b": 8}) == p.parse("q.a == k.a", grid={"a": 8, "b": 8})
Attention("causal", np.int64(64), np.int64(8))(X).shape == X.shape
p.attention(Q, Q, Q, "causal", scale=np.float32(0.5)).equal(p.attention(Q, Q, Q, "causal", scale=torch.tensor(0.5)))
CAUSAL.compile(8).block_mask(np.int64(4)).shape == CAUSAL.compile(8).block_mask(4).shape
"""


@pytest.mark.parametrize("line", SAME.strip().splitlines())
def test_integers_of_any_library(line: str) -> None:
    assert eval(line, NAMES)


def test_dir_lists_what_is_imported_later() -> None:
    assert {name for name in dir(p) if not name.startswith("__")} == set(p.__all__)
    assert "__version__" in dir(p)


@pytest.mark.parametrize(
    ("path", "cure"),
    [
        ("causal & window(3)", "parse"),
        ("causal", "parse"),
        ("local", "did you mean local.yaml"),
        ("nowhere", "check the path"),
    ],
)
def test_a_path_that_is_none(path: str, cure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("local.yaml").write_text("attend: causal")
    with pytest.raises(PatternError, match=f"E601(?s:.*)help: .*{cure}"):
        p.load(path)


HAS_XPU = pytest.mark.skipif(torch.xpu.is_available(), reason="there is one")


@pytest.mark.parametrize("device", ["vulkan", "hpu", pytest.param("xpu", marks=HAS_XPU)])
def test_a_device_that_cannot_be_used_is_said(device: str) -> None:
    """PyTorch has no operators for it, was built without it, or lacks the module for it."""
    with pytest.raises(PatternError, match=rf"PyTorch cannot use the device {device} here: .+"):
        CAUSAL.compile(8, device=device)


def test_a_backend_that_was_asked_for_says_what_it_does_not_take() -> None:
    x, narrow = torch.zeros(1, 2, 8, 4), torch.zeros(1, 2, 8, 3)
    given = {"doc": torch.zeros(8, dtype=torch.int64)}
    masked = p.parse("same(doc)", inputs={"doc": "int[N]"}).compile(8, heads=2, backend="masked")
    planned = CAUSAL.compile(8, heads=2, backend="planned")
    for call in (lambda: planned(x, x, narrow), lambda: masked(x, x, narrow, inputs=given)):
        with pytest.raises(PatternError, match=r"E505(?s:.*)another width(?s:.*)help: use backend='gathered'"):
            call()
    with pytest.raises(PatternError, match=r"E505(?s:.*)without elements"):
        planned(x[:0], x[:0], x[:0])
