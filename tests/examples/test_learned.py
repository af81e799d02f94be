"""Examples with labels: what each attends, by loops over positions, and that each runs as its comments say."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import patterndsl
from patterndsl.cli import main

FOLDER = Path(__file__).parents[2] / "examples" / "learned"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def near_in_order(label: list[int], q: int, k: int, m: int, back: int) -> bool:
    """Whether k is in the chunk of q, or in one of those before, in the stable order by label."""
    order = sorted(range(len(label)), key=lambda at: (label[at], at))
    return 0 <= order.index(q) // m - order.index(k) // m <= back


def reformer(n: int, q: int, head: int, given: Mapping[str, Any], *, m: int, rounds: int) -> Iterable[int]:
    labels = given["bucket"]
    found = [k for k in range(q) if any(near_in_order(labels[at], q, k, m, 1) for at in range(rounds))]
    return found or [q]


def clusters_and_windows(n: int, q: int, head: int, given: Mapping[str, Any], *, m: int, w: int) -> Iterable[int]:
    if head % 2 == 0:
        return range(max(0, q - w + 1), q + 1)
    label = given["cluster"]
    return [k for k in range(q + 1) if label[k] == label[q] and near_in_order(label, q, k, m, 1)]


def hashed_documents(n: int, q: int, head: int, given: Mapping[str, Any], *, m: int, w: int, s: int) -> Iterable[int]:
    label, doc = given["bucket"], given["doc"]
    seen = [k for k in range(q + 1) if q - k < w or k < s or (head % 2 and near_in_order(label, q, k, m, 1))]
    return [k for k in seen if doc[k] == doc[q]]


def hashed_encoder(n: int, q: int, head: int, given: Mapping[str, Any], *, m: int, w: int, g: int) -> Iterable[int]:
    label = given["bucket"]
    return [k for k in range(n) if q < g or k < g or abs(q - k) <= w or (head % 4 and near_in_order(label, q, k, m, 1))]


def topics_and_strides(
    n: int, q: int, head: int, given: Mapping[str, Any], *, m: int, w: int, step: int
) -> Iterable[int]:
    label = given["topic"]
    hashed = [k for k in range(q + 1) if head % 2 == 0 and near_in_order(label, q, k, m, 0)]
    return {*hashed, *range(max(0, q - w + 1), q + 1), *range(q, -1, -step)}


def image_and_hash(n: int, q: int, head: int, given: Mapping[str, Any], *, cols: int, m: int) -> Iterable[int]:
    label = given["bucket"]
    return [k for k in range(q + 1) if k // cols == q // cols or (head % 2 and near_in_order(label, q, k, m, 0))]


CASES: dict[str, tuple[Callable[..., Iterable[int]], dict[str, int]]] = {
    "reformer": (reformer, {"m": 5, "rounds": 2}),
    "clusters-and-windows": (clusters_and_windows, {"m": 5, "w": 7}),
    "hashed-documents": (hashed_documents, {"m": 6, "w": 5, "s": 2}),
    "hashed-encoder": (hashed_encoder, {"m": 4, "w": 3, "g": 2}),
    "topics-and-strides": (topics_and_strides, {"m": 6, "w": 4, "step": 9}),
    "image-and-hash": (image_and_hash, {"cols": 8, "m": 6}),
}
N, HEADS = 48, 4


def test_the_examples_are_these() -> None:
    assert set(NAMES) == set(CASES)


@pytest.mark.parametrize("name", NAMES)
def test_what_it_attends(name: str) -> None:
    attends, params = CASES[name]
    program = patterndsl.load(FOLDER / f"{name}.yaml").with_params(**params).compile(N, heads=HEADS)
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, Tensor] = {}
    for shape in program.bound.inputs:
        size = (1, HEADS, shape.rounds, N) if shape.rounds > 1 else (1, HEADS, N)
        if shape.learner is None:
            inputs[shape.name] = torch.arange(N) // 19
        else:
            inputs[shape.name] = torch.randint(0, 4, size, generator=generator)
    keep = program.mask(inputs).expand(-1, HEADS, N, N)[0]
    for head in range(HEADS):
        given = {name: (x[0, head] if x.dim() > 1 else x).tolist() for name, x in inputs.items()}
        for q in range(N):
            assert keep[head, q].nonzero()[:, 0].tolist() == sorted(attends(N, q, head, given, **params)), (head, q)


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_as_a_layer(name: str) -> None:
    torch.manual_seed(0)
    layer = patterndsl.nn.Attention(patterndsl.load(FOLDER / f"{name}.yaml"), 32, 4)
    x = torch.randn(2, 256, 32)
    inputs = {"doc": torch.arange(256) // 100, "topic": torch.arange(256) % 7}
    read = {shape.name for shape in layer.pattern.bind(256, heads=4).inputs}
    out = layer(x, inputs={key: values for key, values in inputs.items() if key in read})
    torch.stack([out.square().sum(), *layer.losses.values()]).sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in layer.parameters())


COMMANDS = [
    line.split("patterndsl ", 1)[1].strip()
    for name in NAMES
    for line in (FOLDER / f"{name}.yaml").read_text().splitlines()
    if re.match(r"# .*\bpatterndsl (show|run|report|prove) ", line)
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_in_comments_run(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(FOLDER.parents[1])
    assert main(command.split()) == int(command.startswith("prove"))  # whether it is causal: not in its choice
    assert capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_canonical_text_parses_back(name: str) -> None:
    pattern = patterndsl.load(FOLDER / f"{name}.yaml")
    assert patterndsl.parse(str(pattern)) == pattern
    assert all((pattern.spec.name == name, pattern.spec.doc, pattern.spec.cite))
    assert any(f"examples/learned/{name}.yaml" in command for command in COMMANDS)
