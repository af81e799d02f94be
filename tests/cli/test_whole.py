"""Commands that run, explain, race and compare take a pattern with sources, scores, branches or roles as a whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

import patterndsl
from patterndsl.cli import main
from patterndsl.runtime import bench, contest, flex, rival, trial

EXAMPLES = Path(__file__).parents[2] / "examples"
SPECS = [spec for folder in ("sources", "roles", "selected", "learned") for spec in (EXAMPLES / folder).glob("*.yaml")]
N = 25
SMALL = {
    **dict.fromkeys(("longest", "length"), 32),
    **dict.fromkeys(("b", "f", "page", "features", "w"), 8),
    **dict.fromkeys(("memory", "compressed", "m", "low", "budget"), 5),
    **dict.fromkeys(("l", "n", "r", "top", "clusters", "blocks"), 3),
    "d": 2,
}
"""Parameters of the examples for a short sequence."""
GIVEN = {
    "hashed-documents": "doc=0*10,1*15",
    "selected-documents": "doc=0*10,1*15",
    "topics-and-strides": "topic=0*5,1*5,2*15",
    "bigbird-plan": "plan=0,1,2,1,2,3,2,3,0,3,0,1",
}
"""What only a caller knows."""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rival, "TIMING_SECONDS", 0.0)
    monkeypatch.setattr(flex, "compiled_flex", lambda: flex._attend)
    monkeypatch.setattr(bench, "create_block_mask", lambda *_, **__: None)  # timed only
    monkeypatch.setattr(contest, "SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(contest, "TRIES", 1)
    monkeypatch.setattr(contest, "FEWEST_ROUNDS", 1)
    monkeypatch.setattr(bench, "FLEX_BLOCKS", (128,))


Said = Callable[..., Any]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    def run(command: str, *words: object, code: int = 0) -> Any:
        assert main([command, *map(str, words), "--json"]) == code
        return json.loads(capsys.readouterr().out)

    return run


def spec(path: Path) -> list[str]:
    names = {param.name for param in patterndsl.load(path).resolved.params}
    return [str(path), *(word for name in SMALL if name in names for word in ("--set", f"{name}={SMALL[name]}"))]


def inputs(path: Path) -> list[str]:
    return ["--input-values", GIVEN[path.stem]] if path.stem in GIVEN else []


SIZES = ("-n", N, "--heads", 2, "--head-dim", 16)
each = pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)


@each
def test_run(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*spec(path), *inputs(path), *map(str, SIZES), "--backward", "--json"]
    code, text = main(["run", *words]), capsys.readouterr().out
    assert code == 0, text
    found = json.loads(text)
    check = found["check"]
    assert check["passed"] and check["every_row"] and 0 < check["num_pairs"] <= check["num_all"]
    assert {"output", "query gradient", "value gradient"} <= {item["what"] for item in check["deviations"]}
    assert found["program"]["forward"]["seconds"] > 0 and found["dense"]["forward"] is not None


@each
def test_explain(path: Path, said: Said) -> None:
    found = said("explain", *spec(path), "-n", N, "--heads", 2)
    assert found["forward_s"] >= 0
    for name, term in found.get("terms", {}).items():
        assert (term["expected"] is None) <= (name in found["unknown"])


@each
def test_bench(path: Path, said: Said) -> None:
    found = said("bench", *spec(path), *inputs(path), *SIZES, "--seconds", 0)
    (pattern,) = found["patterns"]
    entries = {entry["label"]: entry for entry in pattern["contest"]["entries"]}
    assert entries["patterndsl"]["forward"]["seconds"]["median"] > 0
    assert all(entry["forward"] for label, entry in entries.items() if label.startswith("dense"))
    why = entries["FlexAttention"]["skipped"]
    assert UNSAID[path.stem] in why if path.stem in UNSAID else why is None


UNSAID = {
    **dict.fromkeys(("linear-transformer", "performer", "lightning", "window-and-sums"), "no sums of features"),
    **dict.fromkeys(("synthesizer-dense", "synthesizer-factored", "synthesizer-random"), "made up"),
    **dict.fromkeys(("transformer-xl", "transformer-xl-same-length", "compressive"), "neither query nor key"),
    **dict.fromkeys(("etc-projections", "longformer-projections"), "roles"),
    **dict.fromkeys(("reformer", "routing-transformer"), "counts a key once"),
}
"""Why FlexAttention has no part."""


@each
def test_diff(path: Path, said: Said) -> None:
    found = said("diff", path, path, "-n", 100, *(["--input-values", AT_100[path.stem]] if path.stem in AT_100 else []))
    terms = found.get("terms", {"": found})
    assert {term["equals"]["verdict"] for term in terms.values()} == {"Proven"}
    assert not any(term["only_first"] or term["only_second"] for term in terms.values()) and not found["besides"]


AT_100 = {
    "hashed-documents": "doc=0*50,1*50",
    "selected-documents": "doc=0*50,1*50",
    "bigbird-plan": "plan=0,1,0,0,1,1",
    "topics-and-strides": "topic=0*50,1*50",
}


# ---- what is found of a whole is what its parts have


PARTS = "sources: {past: pool(4), rows: memory(3)}\nattend: {self: recent(6), past: causal - recent(6), rows: all}"


def test_the_whole_is_the_sum_of_its_steps() -> None:
    found: Any = patterndsl.parse(PARTS).explain(64, heads=2)
    steps = (*found.terms, *found.merges)
    assert [step.name for step in steps] == ["self", "past", "rows", "merge"]
    assert found.cost.forward == pytest.approx(sum(step.cost.forward for step in steps))
    program: Any = patterndsl.parse(PARTS).compile(64, heads=2)
    assert program.explain().to_dict() == found.to_dict()


def test_what_a_call_decides_is_not_predicted() -> None:
    text = "inputs: {doc: 'int[N]'}\nattend: causal & same(doc)\nbias: k - q"
    found: Any = patterndsl.parse(text).explain(64)
    assert found.unknown == ("self",) and found.terms[0].cost is None
    assert "all of it, but what is not known of self: " in str(found)


def test_pairs_are_those_of_the_masks(said: Said) -> None:
    program: Any = patterndsl.parse(PARTS).compile(N, heads=2)
    expected = 2 * sum(int(mask.sum()) for mask in program.masks().values())
    check = said("run", PARTS, *SIZES)["check"]
    assert (check["num_pairs"], check["num_all"]) == (expected, 2 * N * (N + 6 + 3))


def test_a_wrong_result_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = trial._output
    monkeypatch.setattr(trial, "_output", lambda *call: right(*call) * 1.001)
    assert main(["run", PARTS, *map(str, SIZES)]) == 1
    assert "FAILED" in capsys.readouterr().out
    assert main(["bench", PARTS, *map(str, SIZES), "--seconds", "0"]) == 1


def test_a_bias_that_is_no_number_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "attend: causal\nbias: log(q - k - 1)\n", *map(str, SIZES)]) == 1
    assert "FAILED, float64 too has NaN" in capsys.readouterr().out


@pytest.mark.parametrize("sizes", [("-n", 0), ("--q-len", 3, "--kv-len", 0), ("--q-len", 0, "--kv-len", 3)])
def test_scores_of_nothing_have_gradients(sizes: tuple[object, ...], said: Said) -> None:
    assert said("run", "attend: all\nbias: k - q\n", *sizes, "--heads", 2, "--backward")["check"]["passed"]


def test_rows_are_sampled_where_there_are_many(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "ALL_ROWS_PAIRS", 100)
    monkeypatch.setattr(trial, "PAIRS_AT_ONCE", 500)
    check = said("run", PARTS, *SIZES, "--sample-rows", 9, "--backward", "--batch", 2)["check"]
    assert check["passed"] and 0 < check["num_rows"] <= 9 and not check["every_row"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["native-sparse", "alibi", "performer", "transformer-xl"])
def test_half_precision(name: str, dtype: str, said: Said) -> None:
    (path,) = (EXAMPLES / "sources").glob(f"{name}.yaml")
    words = spec(path)
    assert said("run", *words, *SIZES, "--kv-heads", 1, "--dtype", dtype, "--backward")["check"]["passed"]


def test_queries_that_continue_a_sequence(said: Said) -> None:
    text = "sources: {rows: memory(3)}\nattend: {self: causal, rows: all}\nbias: k - q"
    sizes = ("--q-len", 7, "--kv-len", N, "--q-start", N - 7, "--heads", 2, "--head-dim", 16)
    found = said("run", text, *sizes, "--backward")
    assert found["check"]["passed"] and found["query"][2] == 7 and found["key"][2] == N


def test_layers_have_the_branches_that_take_part(said: Said) -> None:
    path = EXAMPLES / "sources" / "lightning.yaml"
    backends = [said("run", path, *SIZES, "--layer", layer)["backend"] for layer in (0, 7)]
    assert backends == ["summed", "planned"]


def test_given_tensors_are_taken_where_a_layer_makes_tables_alone(said: Said, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "qkv.safetensors"
    save_file({name: torch.randn(1, 2, N, 8) for name in ("query", "key", "value")}, path)
    found = said("run", EXAMPLES / "sources" / "t5.yaml", "--input", path)
    assert found["check"]["passed"] and found["query"] == [1, 2, N, 8]


def test_a_difference_names_what_only_one_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", PARTS, str(EXAMPLES / "sources" / "pooled-past.yaml"), "-n", "40"]) == 1
    out = capsys.readouterr().out
    assert "of past: 10 keys in the first and 2 in the second" in out and "differ in their sources" in out
    assert main(["diff", str(EXAMPLES / "sources" / "alibi.yaml"), "causal", "-n", "9"]) == 1
    out = capsys.readouterr().out
    assert "the two are equal: Proven" in out and "beside pairs they differ in their scores" in out


def test_the_one_relation_of_a_pattern_is_compared_with_that_of_the_sequence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["diff", PARTS, "recent(6)", "-n", "20"]) == 1
    out = capsys.readouterr().out
    assert "of self\nthe two are equal: Proven" in out and "of rows: only the first has it" in out
    assert main(["diff", "causal", str(EXAMPLES / "sources" / "native-sparse.yaml"), "-n", "20"]) == 1
    assert "of self: only the first has it" in capsys.readouterr().out


def test_a_term_is_compared_with_the_same_term(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["diff", *[str(EXAMPLES / "sources" / "sinkhorn.yaml")] * 2, "-n", "70", "-o", str(tmp_path / "x.png")]
    assert main(words) == 2
    assert "add --term self" in capsys.readouterr().err
    assert main([*words, "--term", "self"]) == 0 and (tmp_path / "x.png").exists()


@pytest.mark.parametrize("words", [("causal", "-n", 0), (str(EXAMPLES / "sources" / "native-sparse.yaml"), "-n", 1)])
def test_what_has_no_pairs_is_raced(words: tuple[object, ...], said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "create_block_mask", create_block_mask)
    (pattern,) = said("bench", *words, "--backward", "--seconds", 0)["patterns"]
    assert "no pairs" in pattern["preparation"]["skipped"]


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (
            "run examples/sources/linformer.yaml --input {path}",
            2,
            "a layer makes source `mixtures`",
        ),
        ("run examples/sources/linformer.yaml -n 5000", 1, "5,000 tokens, and the projection is learned for 4,096"),
        ("run examples/learned/topics-and-strides.yaml -n 9", 1, "input `topic` is missing"),
        ("diff examples/learned/topics-and-strides.yaml causal", 1, "input `topic` is missing"),
        ("bench examples/sources/alibi.yaml -n 9 --term slf", 2, "there is no term `slf`"),
        ("explain examples/sources/native-sparse.yaml", 2, "no length is given"),
        ("bench examples/sources/alibi.yaml -n 9 -o {path.parent}/none/x.svg", 1, "there is no folder"),
    ],
)
def test_what_cannot_be_asked(
    line: str, code: int, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "qkv.safetensors"
    save_file({name: torch.randn(1, 2, N, 8) for name in ("query", "key", "value")}, path)
    assert main(line.format(path=path).split()) == code
    error = capsys.readouterr().err
    assert said in error and "= help: " in error


def test_programs_of_one_and_of_several_terms_refuse_alike() -> None:
    """What belongs to the other kind is a mistake with a cure, and no bare error of Python."""
    x = torch.randn(1, 1, 8, 4)
    plain: Any = patterndsl.parse("causal").compile(8)
    with pytest.raises(patterndsl.InputError, match="the pattern has no roles"):
        plain(x, x, x, roles={"globals": {"query": x}})
    with pytest.raises(patterndsl.InputError, match="did you mean `inputs`"):
        plain(x, x, x, input={})
    whole: Any = patterndsl.parse(PARTS).compile(8)
    with pytest.raises(AttributeError, match=r"E505.*\n.*program.program\('self', num_keys\)\.block_mask"):
        _ = whole.block_mask
    assert not hasattr(whole, "tiles") and hasattr(whole, "explain")


def test_labels_of_a_whole_are_returned() -> None:
    text = "labels: {bucket: 'lsh(buckets = 4)'}\nsources: {rows: memory(2)}\nattend: {self: same(bucket), rows: all}"
    program: Any = patterndsl.parse(text).compile(12, heads=2)
    query, key, value = (torch.randn(1, 2, 12, 4) for _ in range(3))
    sources = {"rows": (torch.randn(1, 2, 2, 4), torch.randn(1, 2, 2, 4))}
    out, labels = program(query, key, value, sources=sources, return_labels=True)
    assert labels["bucket"].shape == (1, 2, 12)
    again = program(query, key, value, sources=sources, inputs={"bucket": labels["bucket"] * 0})
    assert torch.equal(out, program(query, key, value, sources=sources)) and not torch.equal(out, again)


def test_flex_attention_says_what_a_bias_says(said: Said) -> None:
    """All functions of real numbers, of positions and of constants, of two sources; a cap beside them."""
    text = (
        "tables: {near: scalars(9)}\nsources: {rows: memory(3)}\nsoftcap: 3.0\nattend: {self: causal, rows: all}\n"
        "bias: near[min(abs(q - k), 8)] + exp(-abs(q - k) / 8) - log(max(q - k + 9, 2, sqrt(2))) / 2 ** (head + 1)"
        " + floor(sqrt(abs(k - q + 0.5))) * 0.1 + min(0.5, exp(1), q / 7)"
    )
    (pattern,) = said("bench", text, *SIZES, "--seconds", 0)["patterns"]
    (found,) = (entry for entry in pattern["contest"]["entries"] if entry["label"] == "FlexAttention")
    assert found["skipped"] is None and found["check"]["deviations"][0]["error"] < 1e-5
