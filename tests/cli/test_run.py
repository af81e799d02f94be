"""`patterndsl run` and `compile`: checked, timed, from tensors and plans."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import patterndsl
from patterndsl.cli import main
from patterndsl.runtime import flex, rival, trial

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rival, "TIMING_SECONDS", 0.0)


def test_says_that_it_passed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "causal & window(9)", "-n", "65", "--heads", "2", "--head-dim", "8"]) == 0
    out = capsys.readouterr().out
    assert "N 65, 2 heads of 8, float32, cpu, planned" in out
    assert "checked against float64, every row: passed" in out
    assert "dense SDPA, masked" in out
    assert "gradient" not in out


def data(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["run", *words, "--head-dim", "8", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gradients_groups_of_heads_and_batches(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["causal & recent(w[head])", "--set", "w=[1,5,9,40]", "--heads", "4", "--kv-heads", "2", "--batch", "2"]
    found = data(capsys, *words, "-n", "33", "--dtype", dtype, "--backward")
    assert (found["query"], found["key"], found["dtype"]) == ([2, 4, 33, 8], [2, 2, 33, 8], dtype)
    check = found["check"]
    assert (check["passed"], check["every_row"]) == (True, True)
    assert [d["what"] for d in check["deviations"]] == [
        "output",
        "query gradient",
        "key gradient",
        "value gradient",
    ]
    assert all(0 < d["dense_error"] < 0.1 for d in check["deviations"])


def test_rows_are_sampled_where_there_are_many(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "ALL_ROWS_PAIRS", 100)
    monkeypatch.setattr(trial, "PAIRS_AT_ONCE", 1000)
    found = data(capsys, "causal & recent(30)", "-n", "200", "--heads", "2", "--sample-rows", "20", "--backward")
    assert found["check"]["passed"]
    assert found["check"]["num_rows"] <= 20
    assert not found["check"]["every_row"]


def test_rows_without_keys(capsys: pytest.CaptureFixture[str]) -> None:
    found = data(capsys, "k < q & q > 3", "-n", "40", "--heads", "2", "--backward")
    assert found["check"]["passed"]


@pytest.mark.parametrize(
    ("spec", "label"), [("causal", "dense SDPA, causal"), ("all", "dense SDPA"), ("window(2)", "dense SDPA, masked")]
)
def test_dense_attention_is_the_patterns_own(spec: str, label: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert data(capsys, spec, "-n", "20", "--heads", "1")["dense"]["label"] == label


def test_dense_attention_without_a_mask_that_would_not_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patterndsl.runtime.oracle.MAX_PAIRS", 1000)
    found = data(capsys, "causal & recent(3)", "-n", "64", "--heads", "1", "--sample-rows", "8")["dense"]
    assert (found["label"], "would not fit" in found["note"]) == ("dense SDPA, causal", True)
    found = data(capsys, "window(3)", "-n", "64", "--heads", "1")["dense"]
    assert found["label"] == "dense SDPA, all pairs"


def test_dense_attention_that_takes_too_long_is_skipped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rival, "_PROBE", 16)
    assert main(["run", "causal & recent(9)", "-n", "200", "--heads", "1", "--dense-limit", "0"]) == 0
    out = capsys.readouterr().out
    assert "dense SDPA, masked was not run: a call would take about" in out
    assert "beyond the limit of 0 s" in out


def test_a_wrong_result_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = trial._output

    def wrong(*arguments: Any) -> torch.Tensor:
        output = right(*arguments).clone()
        output[0, 0, 3, 0] = torch.nan
        return output

    monkeypatch.setattr(trial, "_output", wrong)
    assert main(["run", "causal", "-n", "16", "--heads", "1"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["causal & same(doc) & k.pad", "--declare", "doc=int[N]", "--declare", "pad=bool[N]", "-n", "30"]
    values = ["--input-values", "doc=0*10,1*20", "--input-values", "pad=true*25,false*5"]
    assert data(capsys, *words, *values, "--heads", "2")["check"]["passed"]
    assert main(["run", *words]) == 1
    assert "E501" in capsys.readouterr().err


def test_given_tensors_bring_the_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "qkv.safetensors"
    tensors = {"query": torch.randn(1, 4, 20, 16), "key": torch.randn(1, 2, 50, 16), "value": torch.randn(1, 2, 50, 8)}
    save_file(tensors, path)
    assert main(["run", "causal", "--input", str(path), "--q-start", "30", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["query"], found["key"]) == ([1, 4, 20, 16], [1, 2, 50, 16])
    save_file({"query": tensors["query"]}, path)
    assert main(["run", "causal", "--input", str(path)]) == 1
    assert "has no key, value; it holds query" in capsys.readouterr().err
    save_file({name: tensor[0] for name, tensor in tensors.items()}, path)
    assert main(["run", "causal", "--input", str(path)]) == 1
    assert "[B, H, T, D]" in capsys.readouterr().err


def test_compile_then_run_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.safetensors"
    words = ["compile", str(EXAMPLES / "longformer.yaml"), "-n", "100", "--heads", "2", "-o", str(plan)]
    assert main(words) == 0
    assert capsys.readouterr().out == f"{plan}: {plan.stat().st_size:,} bytes, 2 heads\n"
    assert patterndsl.load_program(plan).bound.sizes.total == 100
    first = plan.read_bytes()
    assert main(words) == 1
    assert "E602" in capsys.readouterr().err
    assert main([*words, "--force"]) == 0
    assert plan.read_bytes() == first
    assert main(["run", str(plan), "--head-dim", "8"]) == 0
    assert "N 100, 2 heads" in capsys.readouterr().out
    assert main(["show", str(plan)]) == 1
    assert "holds tensors" in capsys.readouterr().err
    plan.write_bytes(first[:-4])
    assert main(["run", str(plan)]) == 1
    assert "E603" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--device", "warp"], "E505"),
        (["--heads", "3", "--kv-heads", "2"], "E503"),
        (["-n", "2^34"], "E504"),
    ],
    ids=["device", "heads", "memory"],
)
def test_what_cannot_run(words: list[str], code: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "causal", "-n", "16", *words]) == 1
    assert f"error[{code}]" in capsys.readouterr().err


def test_backends_that_cannot_do_it_say_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "compiled_flex", lambda: flex._attend)  # what comes before gradients is timed only
    assert main(["run", "causal", "-n", "16", "--backend", "flex", "--backward"]) == 1
    assert "error[E505]" in capsys.readouterr().err


def test_documents_are_drawn_where_no_option_gives_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "packed.yaml"
    spec.write_text("inputs: {doc: 'int[N]'}\nattend: causal & same(doc)")
    assert main(["run", str(spec), "-n", "64", "--heads", "1"]) == 0
    assert "with doc at random, in runs like packed documents" in capsys.readouterr().out
    assert main(["run", str(spec), "-n", "64", "--heads", "1", "--json", "--input-values", "doc=0*64"]) == 0
    assert json.loads(capsys.readouterr().out)["drawn"] == []
