"""Every mistake has its message: bad specs and bad calls beside the full text that the user sees.

specs/CODE-name.yaml is loaded, and bound where a `# n:` (and `# heads:`, `# layer:`) comment says so; each line of
expressions/CODE.pat is an expression; calls are a table below. The expected texts lie beside them as .txt;
`--update-golden` rewrites them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import patterndsl
from patterndsl import PatternError
from patterndsl.cli import main
from patterndsl.diagnostics import CODES, MAX_ERRORS
from patterndsl.nn import Attention

HERE = Path(__file__).parent
SPECS = sorted((HERE / "specs").glob("*.yaml"))
EXPRESSIONS = sorted((HERE / "expressions").glob("*.pat"))


def message(call: Callable[[], object]) -> str:
    with pytest.raises(PatternError) as caught:
        call()
    return str(caught.value) + "\n"


def compare(found: str, expected: Path, update: bool) -> None:
    if update:
        expected.parent.mkdir(exist_ok=True)
        expected.write_text(found)
    assert found == expected.read_text()


def bind(pattern: patterndsl.Pattern, text: str) -> None:
    sizes = {name: int(size) for name, size in re.findall(r"# (n|heads|layer): (\d+)$", text, re.MULTILINE)}
    if sizes:
        pattern.bind(**sizes)


def load_and_bind(path: Path) -> None:
    bind(patterndsl.load(path.name), path.read_text())


def parse_and_bind(text: str) -> None:
    bind(patterndsl.parse(text), text)


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_a_bad_spec(path: Path, monkeypatch: pytest.MonkeyPatch, update_golden: bool) -> None:
    monkeypatch.chdir(path.parent)  # so that messages name the file and not this machine
    found = message(lambda: load_and_bind(path))
    code = path.stem.split("-")[0]
    if code in CODES:
        assert set(re.findall(r"error\[(E\d+)\]", found)) == {code}
    compare(found, path.with_suffix(".txt"), update_golden)


@pytest.mark.parametrize("path", EXPRESSIONS, ids=lambda path: path.stem)
def test_bad_expressions(path: Path, update_golden: bool) -> None:
    messages = [message(partial(parse_and_bind, text)) for text in path.read_text().splitlines()]
    assert [re.findall(r"error\[(E\d+)\]", found)[0] for found in messages] == [path.stem] * len(messages)
    compare("\n".join(messages), path.with_suffix(".txt"), update_golden)


X = torch.zeros(1, 2, 10, 4)
LIBRARY: Any = patterndsl  # Any, here and below: called as no type checker would let it be
CAUSAL: Any = patterndsl.parse("causal")
DOCUMENTS: Any = patterndsl.parse("causal & same(doc)", inputs={"doc": "int[N]"})


def attend(query: torch.Tensor = X, key: torch.Tensor = X, value: torch.Tensor = X, **kinds: object) -> object:
    program = (DOCUMENTS if "inputs" in kinds else CAUSAL).compile(10, heads=2)
    return program(query, key, value, **kinds)


def cache(pattern: Any, **options: Any) -> patterndsl.Cache:
    pattern = patterndsl.parse(pattern) if isinstance(pattern, str) else pattern
    return patterndsl.Cache(pattern, batch=1, heads=2, head_dim=4, **options)


def scored(text: str, **learned: Any) -> object:
    query = torch.zeros(1, 2, 6, 4)
    program: Any = patterndsl.parse(text).compile(6, heads=2)
    return program(query, query, query, **learned)


SCALARS = "tables: {near: scalars(6)}\nattend: causal\nbias: near[q - k]"
VECTORS = "tables: {near: vectors(6)}\nattend: causal\nbias: near[q - k]"
SINUSOIDS = "tables: {r: sinusoids}\nattend: causal\nbias: r[q - k]"
MADE = "score: synthesize(dense, length = 8)\nattend: causal"
GATED = "branches: {a: causal, b: recent(2)}\ncombine: gate"


CALLS: dict[str, Callable[[], object]] = {
    "E502-a-table-of-another-size": lambda: scored(SCALARS, tables={"near": torch.zeros(2, 5)}),
    "E502-a-table-of-another-kind": lambda: scored(SCALARS, tables={"near": torch.zeros(2, 6, 4)}),
    "E502-a-table-of-integers": lambda: scored(SCALARS, tables={"near": torch.zeros(2, 6, dtype=torch.int64)}),
    "E502-a-table-of-short-vectors": lambda: scored(VECTORS, tables={"near": torch.zeros(2, 6, 3)}),
    "E502-a-table-of-numbers": lambda: scored(VECTORS, tables={"near": [1.0, 2.0]}),
    "E502-sinusoids-without-biases": lambda: scored(SINUSOIDS, tables={"r": torch.zeros(2, 4, 8)}),
    "E502-made-scores-without-heads": lambda: scored(MADE, scores={"": torch.zeros(1, 6, 6)}),
    "E502-made-scores-of-few-keys": lambda: scored(MADE, scores={"": torch.zeros(1, 2, 6, 5)}),
    "E502-made-scores-of-numbers": lambda: scored(MADE, scores={"": 3.0}),
    "E502-a-gate-of-another-length": lambda: scored(
        GATED, gates={"a": torch.zeros(1, 2, 5), "b": torch.zeros(1, 2, 6)}
    ),
    "E502-a-gate-of-truth-values": lambda: scored(GATED, gates={"a": torch.ones(6) > 0, "b": torch.zeros(6)}),
    "E502-a-gate-of-a-number": lambda: scored(GATED, gates={"a": 0.5, "b": 0.5}),
    "E401-parameter-of-load": lambda: LIBRARY.load("examples/longformer.yaml", w=32),
    "E401-parameters-of-load": lambda: LIBRARY.load("examples/longformer.yaml", params={"w": 32, "g": 1}),
    "E401-unknown-parameter": lambda: patterndsl.parse("window(w)", params={"w": 4}).with_params(v=8),
    "E402-list-for-an-integer": lambda: patterndsl.parse("window(w)", params={"w": 4}).with_params(w=[1, 2]),
    "E304-mapping-without-names": lambda: patterndsl.parse("window(w)", params={"w": 4}).with_params({"w": 3}),
    "E304-number-for-parameters": lambda: CAUSAL.prove("causal", params=3),
    "E402-fixed-below-the-minimum": lambda: patterndsl.parse(
        "params: {w: {default: 3, min: 1}}\nattend: recent(w)"
    ).prove("causal", params={"w": 0}),
    "E403-divisor-of-no-length": lambda: patterndsl.parse("block(b)", params={"b": 0}).report(),
    "E406-negative-layer-of-advice": lambda: CAUSAL.lint(layer=-1),
    "E406-negative-head-of-a-cache": lambda: CAUSAL.cache_policy(head=-1),
    "E406-text-for-a-layer": lambda: CAUSAL.cache_policy(layer="x"),
    "E406-text-on-a-path": lambda: CAUSAL.reach(16).path("a", 3),
    "E506-dead-terms": lambda: CAUSAL.prove("dead-terms"),
    "E406-negative-length": lambda: CAUSAL.compile(-1),
    "E406-no-length": lambda: CAUSAL.compile(),
    "E406-queries-outside": lambda: CAUSAL.compile(10, q_len=8, q_start=4),
    "E406-no-heads": lambda: CAUSAL.compile(10, heads=0),
    "E406-block-of-nothing": lambda: CAUSAL.compile(10).gather_indices(q_block=0),
    "E406-block-of-a-fraction": lambda: CAUSAL.compile(10).block_mask(64.0),
    "E406-text-for-a-length": lambda: CAUSAL.compile("10"),
    "E406-negative-start": lambda: CAUSAL.compile(10, q_start=-1),
    "E406-start-behind-the-end": lambda: CAUSAL.compile(10, q_start=20),
    "E406-too-long": lambda: CAUSAL.compile(10**5000),
    "E406-too-many-heads": lambda: CAUSAL.compile(10, heads=10**6),
    "E406-layer-too-large": lambda: CAUSAL.compile(10, layer=2**20 + 1),
    "E501-missing-input": lambda: attend(inputs={}),
    "E501-unknown-input": lambda: attend(inputs={"dok": torch.zeros(10, dtype=torch.int64)}),
    "E502-float-input": lambda: attend(inputs={"doc": torch.zeros(10)}),
    "E502-short-input": lambda: attend(inputs={"doc": torch.zeros(9, dtype=torch.int64)}),
    "E502-input-of-another-batch": lambda: attend(inputs={"doc": torch.zeros(3, 10, dtype=torch.int64)}),
    "E502-row-behind-the-last": lambda: CAUSAL.compile(10).rows([0, 10]),
    "E502-rows-of-fractions": lambda: CAUSAL.compile(10).rows(torch.zeros(2)),
    "E502-list-for-a-tensor": lambda: attend(inputs={"doc": [0] * 10}),
    "E503-another-length": lambda: attend(X[:, :, :5], X[:, :, :5], X[:, :, :5]),
    "E503-value-of-another-length": lambda: attend(value=X[:, :, :5]),
    "E503-heads-that-do-not-divide": lambda: attend(torch.zeros(1, 3, 10, 4)),
    "E503-mixed-dtypes": lambda: attend(key=X.double()),
    "E503-three-dimensions": lambda: attend(X[0]),
    "E503-another-device": lambda: attend(X.to("meta"), X.to("meta"), X.to("meta")),
    "E504-dense-mask-too-large": lambda: CAUSAL.compile(100_000).mask(),
    "E504-gather-indices-too-many": lambda: CAUSAL.compile(1_000_000).gather_indices(),
    "E504-rows-too-many": lambda: CAUSAL.compile(2**30).rows([0]),
    "E506-unknown-claim": lambda: CAUSAL.prove("casual"),
    "E506-no-other-pattern": lambda: CAUSAL.prove("within"),
    "E506-one-pattern-too-many": lambda: CAUSAL.prove("causal", CAUSAL),
    "E505-cache-of-what-looks-ahead": lambda: cache("window(3)"),
    "E505-cache-of-a-multiset": lambda: cache("merge: multiset\nattend: causal"),
    "E505-cache-of-labels": lambda: cache("labels: {b: lsh(buckets = 4)}\nattend: causal & same(b)"),
    "E505-cache-of-a-table": lambda: cache("inputs: {s: 'int[]'}\nattend: causal & k < s[q]"),
    "E505-cache-of-ranks": lambda: cache("inputs: {doc: 'int[N]'}\nattend: causal & q.doc.rank < 4"),
    "E505-cache-of-several-branches": lambda: cache("score: elu\nattend: causal"),
    "E505-unknown-decoding-backend": lambda: cache("causal", backend="flex"),
    "E406-cache-of-an-unknown-length": lambda: cache("recent(isqrt(N))"),
    "E406-cache-of-odd-pages": lambda: cache("causal", page=48),
    "E406-cache-that-is-full": lambda: cache("causal", n=9).append(X, X),
    "E406-counts-beyond-the-tokens": lambda: cache("causal").append(X, X, counts=[11]),
    "E406-reset-of-no-row": lambda: cache("causal").reset([1]),
    "E501-no-input-with-a-token": lambda: cache(DOCUMENTS).append(X, X),
    "E502-input-of-another-token": lambda: cache(DOCUMENTS).append(X, X, inputs={"doc": torch.arange(9)}),
    "E503-cache-of-another-dtype": lambda: cache("causal").append(X.double(), X),
    "E503-more-queries-than-a-cache-takes": lambda: cache("causal").attend(X),
    "E505-unknown-backend": lambda: CAUSAL.compile(10, backend="fast"),
    "E505-unknown-device": lambda: CAUSAL.compile(10, device="tpu3"),
    "E505-integers": lambda: attend(X.int(), X.int(), X.int()),
    "E601-missing-file": lambda: patterndsl.load("none.yaml"),
    "E601-folder": lambda: patterndsl.load("."),
    "E601-missing-plan": lambda: patterndsl.load_program("none.safetensors"),
    "E602-missing-folder": lambda: CAUSAL.compile(10).save("none/plan.safetensors"),
    "E602-existing-file": lambda: CAUSAL.compile(10).save("here.safetensors"),
    "E603-not-a-plan": lambda: patterndsl.load_program("here.safetensors"),
    "E604-no-constants": lambda: CAUSAL.compile(10, machine="here.safetensors"),
    "E601-no-constants": lambda: CAUSAL.compile(10, machine="none.json"),
    "E505-unknown-machine": lambda: CAUSAL.compile(10, machine="h10"),
    "E505-machine-of-another-kind": lambda: CAUSAL.compile(10, machine="h100"),
    "E505-number-for-a-machine": lambda: CAUSAL.compile(10, machine=3),
    "E406-no-channels": lambda: CAUSAL.explain(10, head_dim=0),
    "E505-device-to-explain": lambda: CAUSAL.explain(10, device="cuba"),
    "E304-program-for-a-pattern": lambda: patterndsl.attention(X, X, X, CAUSAL.compile(10)),
    "E304-nothing-for-a-pattern": lambda: LIBRARY.attention(X, X, X, None),
    "E304-nothing-for-a-text": lambda: LIBRARY.parse(None),
    "E304-input-of-no-type": lambda: LIBRARY.parse("same(doc) & q.doc < 3", inputs={"doc": "float[N]"}),
    "E406-plan-behind-the-last": lambda: CAUSAL.compile(10, heads=2, plan=1)(X, X, X),
    "E304-list-for-parameters": lambda: LIBRARY.parse("window(w)", ["w"]),
    "E407-parameter-beyond-62-bits": lambda: patterndsl.parse("window(w)", {"w": 2**62}),
    "E501-tensor-for-inputs": lambda: attend(inputs=X),
    "E502-input-on-another-device": lambda: attend(inputs={"doc": torch.zeros(10, dtype=torch.int64, device="meta")}),
    "E503-text-for-a-scale": lambda: attend(scale="a"),
    "E503-layer-of-another-width": lambda: Attention("causal", 8, 2)(X[0]),
    "E503-layer-of-another-dtype": lambda: Attention("causal", 4, 2)(X[0].double()),
    "E601-path-for-a-text": lambda: patterndsl.parse("t1.yaml"),
    "E601-text-for-a-path": lambda: patterndsl.load("causal & window(3)"),
    "E307-import-without-a-file": lambda: patterndsl.parse("import: {a: longformer.yaml}\nattend: a"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_bad_call(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, update_golden: bool) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here.safetensors").write_text("not a plan")
    found = message(CALLS[name]).replace(str(tmp_path), "FOLDER")
    assert f"error[{name.split('-')[0]}]" in found
    compare(found, HERE / "calls" / f"{name}.txt", update_golden)
    assert [path.name for path in tmp_path.iterdir()] == ["here.safetensors"]
    assert Path("here.safetensors").read_text() == "not a plan"


def test_a_bad_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chek", "causal"]) == 2
    assert "E701" in capsys.readouterr().err


def test_every_code_has_an_example() -> None:
    shown = {path.stem.split("-")[0] for path in SPECS} | {name.split("-")[0] for name in CALLS} | {"E701"}
    assert shown >= {code for code in CODES if code.startswith("E")}  # those of warnings are in tests/lint


@pytest.mark.parametrize(
    "text",
    [
        "(" * 10_000 + "q" + ")" * 10_000,
        "~" * 10_000 + "causal",
        "q" + " - k" * 10_000 + " < 3",
        "attend: " + "[" * 10_000,
        "attend: causal # " + "x" * 10_000_000,
        "\n".join(["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40)), "attend: causal"]),
        "params: {" + ", ".join(f"p{n}: {n}" for n in range(30_000)) + "}\nattend: causal",
        "define:\n"
        + "".join(f"  d{n}(x): d{n + 1}(x) | d{n + 1}(x + 1)\n" for n in range(40))
        + "  d40(x): recent(x)\n"
        "attend: d0(3)",
        "define:\n" + "".join(f"  d{n}(R): d{n + 1}(R) - d{n + 1}(R)\n" for n in range(40)) + "  d40(R): R\n"
        "attend: d0(causal)",
    ],
    ids=[
        "brackets",
        "negations",
        "differences",
        "yaml lists",
        "ten megabytes",
        "aliases",
        "entries",
        "doubling numbers",
        "doubling predicates",
    ],
)
def test_a_huge_spec_is_refused_quickly(text: str) -> None:
    start = time.process_time()
    with pytest.raises(PatternError):
        patterndsl.parse(text)
    assert time.process_time() - start < 3  # a second on an idle machine


def test_a_self_containing_alias_is_refused() -> None:
    with pytest.raises(PatternError):
        patterndsl.parse("attend: causal\ndefine: &a {x: *a}")


def test_at_most_so_many_errors_at_once() -> None:
    text = "define:\n" + "\n".join(f"  d{n}: unknown{n}" for n in range(50)) + "\nattend: causal"
    with pytest.raises(PatternError) as caught:
        patterndsl.parse(text)
    assert len(caught.value.diagnostics) == MAX_ERRORS


def test_input_errors_are_value_errors() -> None:
    with pytest.raises(ValueError, match="E503"):
        attend(X[0])
