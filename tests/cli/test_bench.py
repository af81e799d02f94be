"""`patterndsl bench`: who runs, is it checked before it is timed, and what is written?"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import patterndsl
from patterndsl.cli import main
from patterndsl.runtime import bench, contest, flex
from patterndsl.runtime.bench_chart import chart
from patterndsl.runtime.contest import Contestant, Limits, Variant
from patterndsl.runtime.measure import Usage, cores_of_others
from patterndsl.runtime.program import Program
from patterndsl.runtime.tensors import Shape, Tensors, random_tensors
from patterndsl.runtime.trial import attend_of, check
from patterndsl.show import bars

ROOT = Path(__file__).parents[2]
QUICK = ("--seconds", "0", "--heads", "2", "--head-dim", "8")


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention uncompiled, which takes no seconds to compile."""
    monkeypatch.setattr(flex, "compiled_flex", lambda: flex._attend)
    monkeypatch.setattr(contest, "SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(contest, "TRIES", 1)


def found(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["bench", *words, *QUICK, "--json"]) == 0
    data: dict[str, Any] = json.loads(capsys.readouterr().out)
    return data


def entries(pattern: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["label"]: entry for entry in pattern["contest"]["entries"]}


def test_the_inputs_of_all_patterns_are_asked_for_before_the_first_is_timed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "compare", lambda *_, **__: pytest.fail("timed"))
    assert main(["bench", "causal", "causal & k.there", "--declare", "there=bool[Nk]", "-n", "16", *QUICK]) == 1
    assert "input `there` is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spec", "rivals"),
    [
        ("causal & recent(9)", {"dense SDPA, causal", "FlexAttention", "dense SDPA, masked"}),
        ("window(9)", {"dense SDPA", "FlexAttention", "dense SDPA, masked"}),
        ("causal", {"dense SDPA, causal", "FlexAttention"}),
    ],
    ids=["causal", "both ways", "no mask is needed"],
)
def test_rivals_do_the_same_work(spec: str, rivals: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    data = found(capsys, spec, "-n", "65", "--backward")
    (pattern,) = data["patterns"]
    ran = entries(pattern)
    assert set(ran) == {"patterndsl", *rivals}
    assert {data["n"], data["heads"], data["head_dim"]} == {65, 2, 8}
    assert {"machine", "versions", "date"} <= set(data)
    for label, entry in ran.items():
        assert entry["skipped"] is None, label
        once = label == "dense SDPA, masked"
        assert (entry["check"] is None) == once
        assert entry["forward"]["num_rounds"] == (1 if once else contest.FEWEST_ROUNDS)
        assert (entry["training"] is None) == (label == "FlexAttention")
    assert ran["patterndsl"]["forward"]["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert ran["FlexAttention"]["forward"]["variant"] in {"blocks of 128", "blocks of 64"}
    assert pattern["preparation"]["create_block_mask"] > 0


def test_the_table_and_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for suffix, start in (("json", b"{"), ("svg", b"<svg"), ("png", b"\x89PNG")):
        path = tmp_path / f"found.{suffix}"
        words = ["bench", "recent(9)", "causal & strided(8)", "-n", "64", *QUICK, "--backward", "-o", str(path)]
        assert main(words) == 0
        out = capsys.readouterr().out
        assert path.read_bytes().startswith(start)
        assert out.endswith(f"{path}: {path.stat().st_size:,} bytes\n")
    for said in (
        "recent(9): N 64, 2 heads of 8, float32, cpu, planned",
        "with backward",
        "by create_block_mask",
        "MiB",
    ):
        assert said in out
    assert out.count("checked against float64 before timing, every row") == 2
    assert main(words) == 1
    assert "E602" in capsys.readouterr().err
    assert main(["bench", "causal", "-o", "x.pdf"]) == 2
    assert "E701" in capsys.readouterr().err


def test_inputs_and_groups_of_heads(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["causal & same(doc)", "--declare", "doc=int[N]", "--input-values", "doc=0*20,1*20", "-n", "40"]
    (pattern,) = found(capsys, *words, "--kv-heads", "1")["patterns"]
    assert pattern["backend"] == "masked"
    assert set(entries(pattern)) == {"patterndsl", "dense SDPA, causal", "FlexAttention"}
    assert main(["bench", "causal & k.there", "--declare", "there=bool[N]", "-n", "40", *QUICK]) == 1
    assert "E501" in capsys.readouterr().err


def test_what_takes_too_long_is_skipped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patterndsl.runtime.rival._PROBE", 16)
    assert main(["bench", "causal & recent(9)", "-n", "200", *QUICK, "--limit", "0"]) == 0
    out = capsys.readouterr().out
    assert "dense SDPA, causal was not run: a call would take about" in out
    assert "FlexAttention was not run" in out


def test_no_mask_is_built_that_would_not_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bench.MASK_PAIRS, "cpu", 1000)
    (pattern,) = found(capsys, "recent(9)", "-n", "64")["patterns"]
    assert pattern["preparation"]["create_block_mask"] is None
    assert "4,096 pairs" in pattern["preparation"]["skipped"]


def test_a_wrong_result_of_ours_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def half(program: Program, inputs: Any) -> Callable[[Tensors], torch.Tensor]:
        right = attend_of(program, inputs)
        return lambda tensors: right(tensors) / 2

    monkeypatch.setattr(bench, "attend_of", half)
    assert main(["bench", "recent(9)", "-n", "64", *QUICK]) == 1
    assert "patterndsl was not run: planned: computes something else" in capsys.readouterr().out


def small(text: str = "recent(9)") -> tuple[Program, Tensors]:
    program = patterndsl.parse(text).compile(64, heads=2)
    return program, random_tensors(program.sizes, Shape(1, 2, 2, 8, "float32", torch.device("cpu")), 0)


def test_a_wrong_variant_is_left_out_and_the_quicker_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    program, tensors = small()
    attend, calls = attend_of(program, None), 0

    def right(parts: Tensors) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return attend(parts)

    def slow(parts: Tensors) -> torch.Tensor:
        right(parts)
        return right(parts)

    def counted(steps: Sequence[Callable[[], object]], device: torch.device, repeats: int) -> list[list[float]]:
        """A second for each call, whatever else this machine does."""
        before = calls
        for step in steps:
            step()
        return [[float(calls - before)]] * repeats

    monkeypatch.setattr(contest, "step_seconds", counted)

    def fails(_: Tensors) -> torch.Tensor:
        raise RuntimeError("not on this machine\nat all")

    ways = {"slow": slow, "quick": right, "wrong": lambda parts: right(parts) + 1, "failing": fails}
    variants = tuple(Variant(name, attend, program) for name, attend in ways.items())
    result = contest.contest([Contestant("some", variants)], tensors, limits=Limits(rounds=0.0))
    (entry,) = result.entries
    assert entry.forward is not None and entry.forward.variant == "quick"
    assert [failure.split(":")[0] for failure in entry.failures] == ["wrong", "failing"]
    assert entry.failures[1] == "failing: not on this machine"


def test_ratios_are_those_of_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    program, tensors = small()
    clock = iter(range(1, 1000))
    # each call takes one more than the last one: in three rounds of two, whoever begins, ratios differ from 2 to 1/2
    monkeypatch.setattr(contest, "step_seconds", lambda steps, device, repeats: [[float(next(clock))] * len(steps)])
    two = [Contestant(name, (Variant("", attend_of(program, None), program),)) for name in ("a", "b")]
    first, second = contest.contest(two, tensors, limits=Limits(rounds=0.0)).entries
    assert first.forward is not None and second.forward is not None and second.forward.ratio is not None
    # tries take 1 and 2; then rounds of (3, 4), b first (6, 5), (7, 8)
    assert first.forward.seconds.median == 6.0
    assert second.forward.ratio.median == 8 / 7


def test_what_others_do_meanwhile() -> None:
    assert cores_of_others(Usage(0.0, 10.0, 2.0), Usage(10.0, 35.0, 17.0)) == 1.0
    assert cores_of_others(None, None) is None


# ---- benchmarks/peers.py


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("peers", ROOT / "benchmarks" / "peers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["peers"] = module  # where its dataclasses look for their names
    spec.loader.exec_module(module)
    return module


def test_patterns_of_the_benchmark_compile(peers: ModuleType) -> None:
    for case in peers.cases(1024).values():
        pattern = patterndsl.load(case.text) if case.text.endswith(".yaml") else patterndsl.parse(case.text)
        pattern.bind(1024, heads=peers.HEADS)


@pytest.mark.parametrize("name", ["local", "longformer", "bigbird"])
def test_libraries_compute_the_same(name: str, peers: ModuleType) -> None:
    n = 2048
    case = peers.cases(n)[name]
    pattern = patterndsl.load(case.text) if name == "bigbird" else patterndsl.parse(case.text)
    program = (pattern.with_params(b=64) if name == "bigbird" else pattern).compile(n, heads=peers.HEADS)
    rival = case.library(program)
    shape = Shape(1, peers.HEADS, peers.HEADS, peers.HEAD_DIM, "float32", torch.device("cpu"))
    tensors = random_tensors(program.sizes, shape, 0)
    checked = check(
        program, rival.variants[-1].arranged(tensors), sample_rows=16, backward=True, attend=rival.variants[-1].attend
    )
    contest._refuse_different(checked)


def test_the_readme_shows_what_the_file_holds(peers: ModuleType) -> None:
    data = json.loads((peers.RESULTS / "peers_cpu.json").read_text())
    assert peers.table(data) in (ROOT / "README.md").read_text()
    assert (peers.RESULTS / "peers_cpu.svg").read_bytes() == bars.svg(chart(data))


def test_documents_are_drawn_and_it_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "causal & same(doc)", "--declare", "doc=int[N]", "-n", "40", *QUICK]
    assert main(words) == 0
    assert ", doc at random\n" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["patterns"][0]["drawn"] == ["doc"]
