"""Examples with selections: what each attends, by loops over positions, and that each runs as its comments say."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import patterndsl
from patterndsl.cli import main

FOLDER = Path(__file__).parents[2] / "examples" / "selected"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def of_blocks(chosen: Iterable[int], q: int, b: int) -> set[int]:
    """The keys up to q of some blocks."""
    blocks = set(chosen)
    return {k for k in range(q + 1) if k // b in blocks}


def moba(n: int, q: int, head: int, given: Mapping[str, Any], *, b: int, top: int) -> Iterable[int]:
    return of_blocks((block for block in given["chosen"][q] if block <= q // b), q, b)


def selected_and_recent(
    n: int, q: int, head: int, given: Mapping[str, Any], *, b: int, top: int, w: int
) -> Iterable[int]:
    return of_blocks(given["chosen"][q], q, b) | set(range(max(0, q - w + 1), q + 1))


def quest(n: int, q: int, head: int, given: Mapping[str, Any], *, page: int, budget: int) -> Iterable[int]:
    return of_blocks((block for block in given["pages"][q] if block <= q // page), q, page)


def indexed(n: int, q: int, head: int, given: Mapping[str, Any], *, top: int) -> Iterable[int]:
    return {k for k in given["tokens"][q] if 0 <= k <= q}


def routing_transformer(n: int, q: int, head: int, given: Mapping[str, Any], *, w: int, clusters: int) -> Iterable[int]:
    if head % 2 == 0:
        return range(max(0, q - w + 1), q + 1)
    return {k for members in given["routed"] if q in members for k in members if 0 <= k <= q}


def bigbird_plan(n: int, q: int, head: int, given: Mapping[str, Any], *, b: int, r: int) -> Iterable[int]:
    plan = given["plan"][q // b]
    near = (k for k in range(n) if abs(q // b - k // b) <= 1 or q // b == 0 or k // b == 0)
    return {*near, *(k for k in range(n) if k // b in plan)}


def selected_documents(
    n: int, q: int, head: int, given: Mapping[str, Any], *, b: int, top: int, w: int, s: int
) -> Iterable[int]:
    doc = given["doc"]
    far = range(q, -1, -s) if head % 4 == 3 else of_blocks((x for x in given["chosen"][q] if x < q // b), q, b)
    return {k for k in {*range(max(0, q - w + 1), q + 1), *far} if doc[k] == doc[q]}


CASES: dict[str, tuple[Callable[..., Iterable[int]], dict[str, int]]] = {
    "moba": (moba, {"b": 6, "top": 3}),
    "selected-and-recent": (selected_and_recent, {"b": 4, "top": 5, "w": 7}),
    "quest": (quest, {"page": 3, "budget": 12}),
    "indexed": (indexed, {"top": 7}),
    "routing-transformer": (routing_transformer, {"w": 9, "clusters": 4}),
    "bigbird-plan": (bigbird_plan, {"b": 5, "r": 2}),
    "selected-documents": (selected_documents, {"b": 6, "top": 2, "w": 4, "s": 9}),
}
N, HEADS = 48, 4


def test_the_examples_are_these() -> None:
    assert set(NAMES) == set(CASES)


def inputs_of(program: patterndsl.Program) -> dict[str, Tensor]:
    """Lists as selectors could make them: the program's own where it chooses in a call, else any."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, HEADS, N, 8, generator=generator) for _ in range(2))
    found = program.selections(query, key)
    for shape in program.bound.inputs:
        if shape.selection is None:
            found[shape.name] = torch.arange(N) // 19
        elif shape.name not in found:
            blocks = shape.selection.num_blocks
            found[shape.name] = torch.rand(1, HEADS, *(size or 0 for size in shape.inner[:1]), blocks).topk(
                shape.selection.width
            )[1]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_what_it_attends(name: str) -> None:
    attends, params = CASES[name]
    program = patterndsl.load(FOLDER / f"{name}.yaml").with_params(**params).compile(N, heads=HEADS)
    inputs = inputs_of(program)
    keep = program.mask(inputs).expand(-1, HEADS, N, N)[0]
    for head in range(HEADS):
        given = {name: (x[0, head % x.shape[1]] if x.dim() > 1 else x).tolist() for name, x in inputs.items()}
        for q in range(N):
            assert keep[head, q].nonzero()[:, 0].tolist() == sorted(attends(N, q, head, given, **params)), (head, q)


@pytest.mark.parametrize("name", NAMES)
def test_it_equals_the_oracle(name: str) -> None:
    pattern = patterndsl.load(FOLDER / f"{name}.yaml").with_params(**CASES[name][1])
    program, oracle = (pattern.compile(N, heads=HEADS, backend=backend) for backend in ("auto", "oracle"))
    inputs = inputs_of(program)
    tensors = [torch.randn(1, HEADS, N, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    out, truth = (each(*tensors, inputs=inputs) for each in (program, oracle))
    torch.testing.assert_close(out, truth, rtol=0, atol=1e-9)
    for mine, theirs in zip(
        torch.autograd.grad(out.sin().sum(), tensors), torch.autograd.grad(truth.sin().sum(), tensors), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_as_a_layer(name: str) -> None:
    torch.manual_seed(0)
    layer = patterndsl.nn.Attention(patterndsl.load(FOLDER / f"{name}.yaml").with_params(**CASES[name][1]), 32, 4)
    inputs = {"doc": torch.arange(N) // 20, "plan": torch.arange(10)[:, None].roll(2, 0).expand(10, 2)}
    read = {shape.name for shape in layer.pattern.bind(N, heads=4).inputs}
    out = layer(torch.randn(2, N, 32), inputs={key: values for key, values in inputs.items() if key in read})
    torch.stack([out.square().sum(), *layer.losses.values()]).sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in layer.parameters())


COMMANDS = [
    line.split("patterndsl ", 1)[1].strip()
    for name in NAMES
    for line in (FOLDER / f"{name}.yaml").read_text().splitlines()
    if re.match(r"# .*\bpatterndsl (show|run|report|prove|explain) ", line)
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_in_comments_run(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(FOLDER.parents[1])
    assert main(command.split()) == int("routing" in command)  # whose choice sees all tokens
    assert capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_canonical_text_parses_back(name: str) -> None:
    pattern = patterndsl.load(FOLDER / f"{name}.yaml")
    assert patterndsl.parse(str(pattern)) == pattern
    assert all((pattern.spec.name == name, pattern.spec.doc, pattern.spec.cite))
    assert any(f"examples/selected/{name}.yaml" in command for command in COMMANDS)


# ---- counts by the closed forms of the systems


@pytest.mark.parametrize(("n", "top"), [(1, 1), (17, 5), (48, 48), (40, 7)])
def test_pairs_of_the_best_keys(n: int, top: int) -> None:
    """N k - k (k - 1) / 2 for k <= N."""
    program = patterndsl.parse(f"select: {{t: 'topk({top}, among = causal)'}}\nattend: t\n").compile(n)
    query, key = torch.randn(1, 1, n, 8), torch.randn(1, 1, n, 8)
    assert program.mask(program.selections(query, key)).sum() == n * top - math.comb(top, 2)


@pytest.mark.parametrize(("blocks", "b", "top"), [(1, 4, 1), (6, 4, 3), (5, 8, 5), (7, 3, 1)])
def test_pairs_of_moba(blocks: int, b: int, top: int) -> None:
    """n B (B + 1) / 2 + B^2 (n p - p (p + 1) / 2) with N = n B and p = top - 1 <= n - 1."""
    n, p = blocks * b, top - 1
    program = patterndsl.load(FOLDER / "moba.yaml").with_params(b=b, top=top).compile(n)
    query, key = torch.randn(1, 1, n, 8), torch.randn(1, 1, n, 8)
    expected = blocks * math.comb(b + 1, 2) + b * b * (blocks * p - math.comb(p + 1, 2))
    assert program.mask(program.selections(query, key)).sum() == expected
