"""Patterns of several terms: what each term attends by the positions of its keys, and that results meet as they should.

Positions are computed here by loops over windows, never through the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import patterndsl
from patterndsl import Proven, Refuted
from patterndsl.analysis.report import Report
from patterndsl.cli import main
from patterndsl.nn import Attention
from tests.strategies import many

DIM, HEADS = 8, 2


def pooled(n: int, size: int, stride: int, pad: str) -> list[list[int]]:
    """The tokens of each window."""
    match pad:
        case "none":
            starts = [s for s in range(0, n, stride) if s + size <= n]
        case "left":  # windows that end at the last token, and every stride before
            starts = sorted(end - size + 1 for end in range(n - 1, -1, -stride))
        case _:  # as few as cover everything
            starts, covered = [], 0
            while covered < n and len(starts) * stride < n:
                starts.append(len(starts) * stride)
                covered = starts[-1] + size
    return [[p for p in range(s, s + size) if 0 <= p < n] for s in starts]


@dataclass(frozen=True)
class Kind:
    """A source, and where its keys stand in a sequence of n tokens."""

    text: str
    positions: Callable[[int], list[int]]


@st.composite
def kinds(draw: Any) -> Kind:
    size, stride = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    match draw(st.sampled_from(["memory", "recall", "none", "left", "right", "cross", "sort"])):
        case "memory":
            return Kind(f"memory({size})", lambda n: list(range(-size, 0)))
        case "recall":
            return Kind(f"recall({size})", lambda n: list(range(-size, 0)))
        case "cross":
            return Kind("cross", lambda n: list(range(n)))
        case "sort":
            return Kind(f"sort({size}, 64)", lambda n: list(range(-(-n // size) * size)))
        case pad:
            text = f"pool({size}, stride = {stride}, pad = {pad})"
            return Kind(text, lambda n: [window[-1] for window in pooled(n, size, stride, pad)])


RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "all": lambda q, k: True,
    "causal": lambda q, k: k <= q,
    "k < q": lambda q, k: k < q,
    "recent(6)": lambda q, k: 0 <= q - k < 6,
    "causal - recent(3)": lambda q, k: q - k >= 3,
    "window(4) & (q + k) % 3 != 1": lambda q, k: abs(q - k) <= 4 and (q + k) % 3 != 1,
    "head == 0 & causal | k % 2 == 0": lambda q, k: k <= q or k % 2 == 0,
}
RELATIONS_OF_HEAD_1 = {"head == 0 & causal | k % 2 == 0": lambda q, k: k % 2 == 0}


@dataclass(frozen=True)
class Pattern:
    """Sources and what is attended of them; branches of (source, relation)."""

    sources: dict[str, Kind]
    branches: list[list[tuple[str, str]]]
    combine: str

    @property
    def text(self) -> str:
        lines = ["sources:", *(f"  {name}: {kind.text}" for name, kind in self.sources.items())]
        lines += ["branches:"] if len(self.branches) > 1 else ["attend:"]
        for at, terms in enumerate(self.branches):
            lines += [f"  branch{at}:"] if len(self.branches) > 1 else []
            indent = "    " if len(self.branches) > 1 else "  "
            lines += [f"{indent}{name}: {relation}" for name, relation in terms]
        return "\n".join([*lines, *([f"combine: {self.combine}"] if len(self.branches) > 1 else [])])

    def keep(self, name: str, relation: str, n: int) -> Tensor:
        """bool [heads, n, keys]."""
        positions = list(range(n)) if name == "self" else self.sources[name].positions(n)
        of_heads = [RELATIONS[relation], RELATIONS_OF_HEAD_1.get(relation, RELATIONS[relation])]
        kept = [[[holds(q, k) for k in positions] for q in range(n)] for holds in of_heads]
        return torch.tensor(kept, dtype=torch.bool).reshape(HEADS, n, len(positions))


@st.composite
def patterns(draw: Any) -> Pattern:
    sources = {f"s{at}": draw(kinds()) for at in range(draw(st.integers(1, 2)))}
    branches = [
        [(name, draw(st.sampled_from(sorted(RELATIONS)))) for name in draw(st.permutations(["self", *sources]))[:size]]
        for size in draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    ]
    return Pattern(sources, branches, draw(st.sampled_from(["sum", "mean", "gate"])))


def tensors(n: int, heads: int, width: int = 5) -> Tensor:
    return torch.randn(2, heads, n, width, dtype=torch.float64, requires_grad=True)


@given(patterns(), st.integers(0, 19))
def test_outputs_and_gradients(pattern: Pattern, n: int) -> None:
    torch.manual_seed(n)
    parsed = patterndsl.parse(pattern.text)
    assert patterndsl.parse(str(parsed)) == parsed
    program: Any = parsed.compile(n, heads=HEADS)
    query, key, value = (tensors(n, HEADS) for _ in range(3))
    sources = {}
    for name, kind in pattern.sources.items():
        num = len(kind.positions(n))
        sources[name] = (tensors(num, 1), tensors(num, 1))
    gates = {f"branch{at}": torch.rand(2, HEADS, n, dtype=torch.float64) for at in range(len(pattern.branches))}
    is_gated = len(pattern.branches) > 1 and pattern.combine == "gate"
    ours = program(query, key, value, sources=sources, gates=gates if is_gated else None)
    outputs = []
    for terms in pattern.branches:
        keys = [
            (key, value) if name == "self" else tuple(x.expand(2, HEADS, -1, -1) for x in sources[name])
            for name, _ in terms
        ]
        every_key, every_value = (torch.cat(part, 2) for part in zip(*keys, strict=True))
        keep = torch.cat([pattern.keep(name, relation, n) for name, relation in terms], -1)
        scores = (query @ every_key.transpose(-1, -2) / math.sqrt(5)).masked_fill(~keep, -1e300)
        weights = scores.softmax(-1).masked_fill(~keep, 0.0) if every_key.shape[2] else scores
        outputs.append(weights @ every_value)
    if is_gated:
        outputs = [out * gate[..., None] for out, gate in zip(outputs, gates.values(), strict=True)]
    expected = torch.stack(outputs).sum(0)
    expected = expected / len(outputs) if pattern.combine == "mean" else expected
    torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-9)
    leaves = [query, key, value, *(x for pair in sources.values() for x in pair)]
    weight = torch.randn_like(ours)
    options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
    gradients = (torch.autograd.grad((x * weight).sum(), leaves, **options) for x in (ours, expected))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-9)


@many(0.3)
@given(patterns(), st.integers(0, 19))
def test_masks_and_counts(pattern: Pattern, n: int) -> None:
    parsed: Any = patterndsl.parse(pattern.text)
    masks = parsed.compile(n, heads=HEADS).masks()
    report = parsed.report(n, heads=HEADS)
    total = 0
    for at, terms in enumerate(pattern.branches):
        for name, relation in terms:
            title = name if len(pattern.branches) == 1 else f"branch{at}.{name}"
            keep = pattern.keep(name, relation, n)
            assert torch.equal(masks[title].expand_as(keep), keep)
            assert report.terms[title].pairs.value == keep.sum()
            total += int(keep.sum())
    assert report.pairs.value == total


# ---- what is proven


SPECS: dict[str, tuple[str, bool]] = {
    "pool({size}, stride = {stride}, by = {by}, pad = {pad})": ("causal", True),
    "pool({size}, stride = {stride}, by = {by}, pad = {pad}, of = keys)": ("k <= q + 1", False),
    "memory(3)": ("all", True),
    "project(3, 32)": ("all", False),
    "sort(4, 32, sees = prefix)": ("block(4)", True),
    "sort(4, 32)": ("block(4)", False),
    "sort(4, 32, cut = 2)": ("all", False),
}


@pytest.mark.parametrize("source", SPECS)
def test_a_verdict_is_what_perturbation_shows(source: str) -> None:
    """Rows before a changed token stay as they are, bit for bit, exactly where the pattern is proven causal."""
    relation, is_causal = SPECS[source]
    for size, stride, by, pad in [(3, 2, "mean", "none"), (2, 3, "conv", "left"), (4, 2, "max", "right")]:
        text = f"sources: {{s: '{source.format(size=size, stride=stride, by=by, pad=pad)}'}}\n"
        pattern = patterndsl.parse(text + f"attend: {{self: causal, s: '{relation}'}}")
        verdict = pattern.prove("causal")
        assert isinstance(verdict, Proven if is_causal else Refuted), verdict
        torch.manual_seed(0)
        layer = Attention(pattern, DIM, HEADS).double().eval()
        x = torch.randn(1, 13, DIM, dtype=torch.float64)
        changed = []
        for t in range(13):
            other = x.clone()
            other[:, t] = 100 * torch.randn(DIM, dtype=torch.float64)
            changed.append(not torch.equal(layer(x)[:, :t], layer(other)[:, :t]))
        assert any(changed) != is_causal


@pytest.mark.parametrize(
    ("name", "params", "n", "pairs"),
    [
        ("memory-compressed", {"f": 3}, 64, 715),
        ("memory-compressed", {"f": 4}, 100, 1300),
        ("memory-compressed", {"f": 3}, 13, 35),
        ("memory-compressed-null", {"f": 3}, 64, 779),
        ("memory-compressed-null", {"f": 3}, 13, 48),
        ("memory-compressed-null", {"f": 3}, 12, 34),
        ("transformer-xl", {"m": 24}, 16, 520),
        ("transformer-xl-same-length", {"m": 24}, 16, 384),
        ("compressive", {"memory": 24, "compressed": 8}, 16, 648),
        ("linformer", {"low": 32}, 100, 3200),
        ("sinkhorn", {"b": 16}, 64, 2 * 64 * 16),
        ("sortcut", {"b": 16, "blocks": 2}, 64, 2 * 64 * 16),
    ],
)
def test_golden_counts(name: str, params: dict[str, int], n: int, pairs: int) -> None:
    pattern: Any = patterndsl.load(f"examples/sources/{name}.yaml").with_params(**params)
    report = pattern.report(n)
    assert report.pairs.value == pairs
    assert report.pairs.certainty == "Exact"


def test_the_compressed_branch_of_native_sparse() -> None:
    report: Any = patterndsl.load("examples/sources/native-sparse.yaml").report(256)
    assert report.terms["compressed.compressed"].pairs.value == 1695


def test_rows_that_only_terms_together_fill() -> None:
    """Neither has keys for all: the first block has no summary, and later queries none of their own."""
    text = "sources: {s: pool(4)}\nattend: {self: 'q < 4 & k == q', s: causal & q >= 3}"
    assert isinstance(patterndsl.parse(text).prove("rows_nonempty"), Proven)
    holes = patterndsl.parse(text.replace("q < 4", "q < 2")).prove("rows_nonempty")
    assert isinstance(holes, Refuted)
    assert holes.witness.q == 2


def test_what_starts_where() -> None:
    """`k.start` is the first token of a window."""
    for pad in ("none", "right"):
        text = f"sources: {{s: 'pool(4, stride = 3, pad = {pad})'}}\nattend: {{s: 'k.start % 2 == 0 & k.start <= q'}}"
        program: Any = patterndsl.parse(text).compile(14)
        windows = pooled(14, 4, 3, pad)
        expected = torch.tensor([[w[0] % 2 == 0 and w[0] <= q for w in windows] for q in range(14)])
        assert torch.equal(program.masks()["s"][0], expected)


def test_a_report_is_a_report() -> None:
    """Several specs side by side, with patterns of one relation among them; keys of a source are moved once."""
    found = patterndsl.parse("sources: {x: memory(16)}\nattend: {self: causal, x: all}").report(64, head_dim=8)
    assert isinstance(found, Report)
    report: Any = found
    assert report.memory.value == 4 * 8 * (2 * 64 + 2 * (64 + 16))  # query and output, keys and values
    assert report.flops.value == 4 * 8 * (64 * 65 // 2 + 64 * 16)
    assert report.density.value == (64 * 65 // 2 + 64 * 16) / (64 * 80)
    assert main(["report", "causal", "examples/sources/pooled-past.yaml", "-n", "512"]) == 0


def test_sums_look_at_no_pair() -> None:
    """Their work is that of the recurrence: a product to add a key, and one to read."""
    report: Any = patterndsl.parse("score: favor(32)\nattend: causal").report(64, heads=2, head_dim=8)
    assert report.pairs.value == 0
    assert report.flops.value == 2 * 2 * (64 + 64) * 32 * 9
    assert report.order == "Θ(N)"
    assert "pairs = 0, sums of features" in str(report)


def test_a_program_says_of_whom_tiles_are_asked() -> None:
    program: Any = patterndsl.parse("sources: {x: memory(16)}\nattend: {self: causal, x: all}").compile(64)
    with pytest.raises(AttributeError, match="ask a term"):
        program.block_mask()
    assert not hasattr(program, "frobnicate")
    assert program.program("x", 16).mask().shape == (1, 64, 16)


@pytest.mark.parametrize(
    "declared",
    ["params: {mem_size: 2}", "define: {mem_size: 2}", "inputs: {mem_size: 'int[N]'}", "grid: {mem_size: N}"],
)
def test_a_name_that_a_size_would_take(declared: str) -> None:
    text = f"{declared}\nsources: {{mem: memory(3)}}\nattend: {{self: causal, mem: all}}"
    used = text.replace("mem: all", "mem: k < mem_size") if "2" in declared else text.replace("all", "q.mem_size >= 0")
    for spec in (text, used):
        program: Any = patterndsl.parse(spec).compile(8)
        inputs = {"mem_size": torch.zeros(8, dtype=torch.int64)} if "inputs" in declared and spec == used else None
        assert program.masks(inputs)["mem"].shape == (1, 8, 3)


def test_a_definition_may_say_where_a_pooled_key_starts() -> None:
    """Of each source by itself, in a definition of a definition too."""
    head = "sources: {a: pool(4), b: 'pool(2, stride = 4)'}\n"
    define = "define: {begun(n): k.start + n <= q, old: begun(2)}\n"
    texts = (f"{head}attend: {{a: k.start + 2 <= q, b: k.start + 2 <= q}}", f"{head}{define}attend: {{a: old, b: old}}")
    programs: list[Any] = [patterndsl.parse(text).compile(16) for text in texts]
    masks = [program.masks() for program in programs]
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in ("a", "b"))
    with pytest.raises(patterndsl.PatternError, match="E202"):
        patterndsl.parse(f"{head}{define}attend: {{self: old, a: all}}")


@pytest.mark.parametrize("name", ["training", "forward", "told", "keys"])
def test_a_source_may_be_called_as_what_modules_have(name: str) -> None:
    text = f"sources: {{{name}: memory(3)}}\nattend: {{self: causal, {name}: all}}"
    layer = Attention(text, 8, 2).eval()
    x = torch.randn(1, 5, 8)
    torch.testing.assert_close(layer.train()(x), layer.eval()(x))
    assert not any(module.training for module in layer.modules())
    assert any(key.startswith(f"sources.{name}.") for key in layer.state_dict())


@pytest.mark.parametrize(
    ("name", "backend", "is_taken"),
    [
        ("alibi", "gathered", True),
        ("alibi", "oracle", False),
        ("performer", "gathered", False),
        ("window-and-sums", "oracle", True),
    ],
)
def test_a_backend_that_no_term_runs_by_is_refused(name: str, backend: str, is_taken: bool) -> None:
    pattern = patterndsl.load(Path(__file__).parents[2] / "examples" / "sources" / f"{name}.yaml")
    for call in (
        lambda: pattern.compile(64, heads=2, backend=backend),
        lambda: Attention(pattern, 16, 2, backend=backend)(torch.randn(1, 64, 16)),
    ):
        if is_taken:
            call()
            continue
        with pytest.raises(patterndsl.InputError, match=f"the {backend} backend does not take"):
            call()
