"""`patterndsl report`, `prove` and `diff`: what patterns cost, what holds of them, how two differ."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image, ImageColor

import patterndsl
from patterndsl.analysis.difference import CELLS, difference
from patterndsl.cli import main
from patterndsl.show.palette import LIGHT

EXAMPLES = Path(__file__).parents[2] / "examples"
LONGFORMER = str(EXAMPLES / "longformer.yaml")


def test_a_report_has_formulas_and_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", LONGFORMER, "-n", "4096", "--set", "w=256", "--set", "g=2"]) == 0
    out = capsys.readouterr().out
    w, g, n = 256, 2, 4096
    pairs = 2 * g * n - g * g + (n - g) * (2 * w + 1) - w * (w + 1)
    assert "pairs = 2·N·g + 2·N·w + N - g² - 2·g·w - g - w² - w  (Exact for N > g + w)" in out
    assert f"{pairs:,} pairs (Exact)" in out
    assert "order Θ(N·g + N·w); Θ(N) at the defaults" in out
    assert re.search(r"forward, h200 +\S+ \S+ \(Expected\)", out)


def test_a_report_without_a_length_has_formulas_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(EXAMPLES / "sparse-transformer-strided.yaml")]) == 0
    out = capsys.readouterr().out
    assert "order Θ(N·l + N²/l); Θ(N√N) at the defaults" in out
    assert "figures: give a length" in out


def test_a_report_as_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", LONGFORMER, "-n", "1000", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    mask = patterndsl.load(LONGFORMER).compile(n=1000).mask()
    assert data["pairs"] == {"value": int(mask.sum()), "certainty": "Exact", "unit": "pairs", "how": "formula"}
    rows = mask[0].sum(dim=1)
    assert data["groups"][0]["least_row"]["value"] == int(rows.min())
    assert data["groups"][0]["greatest_row"]["value"] == int(rows.max())
    assert data["flops"]["value"] == 4 * 64 * int(mask.sum())


def test_a_report_in_latex(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(EXAMPLES / "axial.yaml"), "--latex"]) == 0
    assert r"\left\lfloor{\frac{N}{cols}}\right\rfloor" in capsys.readouterr().out


def test_several_reports_are_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(EXAMPLES / f"{name}.yaml") for name in ("axial", "mistral", "packed-documents")]
    assert main(["report", *paths, "-n", "1024"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["pattern", "order"]
    assert [row.split()[0] for row in rows] == ["axial", "mistral", "packed-documents"]
    assert "needs inputs" in rows[2]


def test_a_table_of_formulas_says_where_they_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sinks.yaml").write_text("params: {w: 4, d: 3, g: 2}\nattend: causal & (dilated(w, d) | first(g))\n")
    assert main(["report", str(tmp_path / "sinks.yaml"), LONGFORMER]) == 0
    _, first, second = capsys.readouterr().out.splitlines()
    assert re.search(r"  in the first of \d+ cases$", first)
    assert second.endswith("2·N·g + 2·N·w + N - g² - 2·g·w - g - w² - w  for N > g + w")


def test_one_wrong_spec_does_not_hide_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("attend: causl\n")
    assert main(["report", LONGFORMER, str(wrong), "-n", "1024"]) == 1
    seen = capsys.readouterr()
    assert seen.out.splitlines()[1].startswith("longformer ") and "did you mean `causal`?" in seen.err
    assert main(["report", LONGFORMER, str(wrong), "--json"]) == 1
    first, second = json.loads(capsys.readouterr().out)
    assert first["name"] == "longformer" and second["errors"][0]["code"] == "E201"


def test_a_report_takes_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["report", str(EXAMPLES / "packed-documents.yaml"), "-n", "256"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "no figures: they depend on the input `doc`, and a report draws none at random" in said
    assert "; give --input-values doc=0*100,1*156" in said
    assert main([*words, "--input-values", "doc=0*100,1*156"]) == 0
    assert f"{100 * 101 // 2 + 156 * 157 // 2:,} pairs (Exact)" in capsys.readouterr().out
    assert main([*words[:2], "--input-values", "doc=0*100,1*156"]) == 2


@pytest.mark.parametrize(("text", "n"), [("10^12", 10**12), ("1e6", 10**6), ("2^20", 2**20), ("1,000", 1000)])
def test_lengths_as_people_write_them(text: str, n: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "causal & recent(4)", "-n", text]) == 0
    assert f"at N = {n:,}; 1 head of 64" in capsys.readouterr().out


def test_an_expression_heads_its_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "causal & recent(w)", "window(w)", "--set", "w=3"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("causal & recent(w)  ")
    assert main(["reach", "q.row == k.row", "--grid", "row=N // 8,col=8", "-n", "64"]) == 0
    assert capsys.readouterr().out.startswith("q.row == k.row at N = 64")


def test_draws_and_inputs_are_bounded_and_say_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(EXAMPLES / "bigbird.yaml")]) == 0
    out = capsys.readouterr().out
    assert "no formula, it depends on an input or on draws" in out
    assert "UpperBound, Θ(N·b·r + N·b·w + b²·w²)" in out


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["causal & window(w)", "causal", "--set", "w=3"], 0, "Proven: causal, for all N, with w = 3"),
        (["window(3, 1)", "causal"], 1, "Refuted: causal; the query attends a later key: q = 0, k = 1 at N = 2"),
        (["recent(100)", "equals", "window(99, 0)"], 0, "Proven: equals, for all N"),
        (["recent(8)", "equals", "window(8, 0)"], 1, "only the second has the pair: q = 8, k = 0 at N = 9"),
        (["causal & q != k", "rows-nonempty"], 1, "the query attends no key: q = 0 at N = 1"),
        (["strided(q * k + 1)", "symmetric", "-n", "3000"], 3, "Unknown: symmetric; "),
        (["causal", "causal", "-n", "100"], 0, "Proven: causal, for N = 100"),
        (["causal & recent(3)", "value-causal"], 0, "Proven: value-causal, for all N"),
        (["window(3)", "pattern-causal"], 0, "Proven: pattern-causal, for all N"),
    ],
)
def test_verdicts(words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prove", *words]) == code
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("claim", ["rows-nonempty", "rows_nonempty", "dead-terms", "dead_terms"])
def test_claims_as_either_spells_them(claim: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prove", "causal & global(1)", claim]) == 0
    assert not capsys.readouterr().err
    pattern = patterndsl.parse("causal & global(1)")
    if claim.startswith("rows"):
        assert str(pattern.prove(claim)) == "Proven: rows nonempty, for all N"
        return
    with pytest.raises(patterndsl.PatternError, match="dead_terms\\(\\)"):
        pattern.prove(claim)


def test_a_verdict_as_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prove", LONGFORMER, "causal", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "Refuted"
    assert (found["witness"]["q"], found["witness"]["k"], found["witness"]["n"]) == (0, 1, 2)


def test_what_later_tokens_choose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "hashed.yaml"
    spec.write_text('labels: {bucket: "lsh(buckets = 2)"}\nattend: causal & chunks(bucket, 2, 1)\n')
    assert main(["prove", str(spec), "value-causal"]) == 0
    assert main(["prove", str(spec), "causal"]) == 1
    assert "but the selection is not: `bucket.rank` sees the whole sequence" in capsys.readouterr().out
    assert main(["prove", str(spec), "pattern_causal", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], found["claim"]) == ("Refuted", "pattern-causal")
    witness = found["witness"]
    first, second, q = witness["inputs"]["bucket"], witness["changed"]["bucket"], witness["q"]
    assert first[: q + 1] == second[: q + 1] and first != second


def test_what_cannot_be_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prove", "causal", "within"]) == 1
    assert "error[E506]: `within` needs another pattern" in capsys.readouterr().err
    assert main(["prove", "causal", "sparse"]) == 2
    assert "choose from causal, value-causal, pattern-causal, rows-nonempty" in capsys.readouterr().err
    assert main(["prove", "window(w)", "causal", "--set", "w=N"]) == 2
    assert "a proof takes whole numbers" in capsys.readouterr().err


def test_a_difference_is_counted_and_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", "recent(3)", "window(3, 0)", "-n", "6"]) == 1
    out = capsys.readouterr().out
    assert "at N = 6: 15 pairs in both, 0 only in the first, 3 only in the second" in out
    assert "the two are equal: Refuted; only the second has the pair: q = 3, k = 0 at N = 4\n" in out
    assert "the first is within the second: Proven, for all N\n" in out
    assert "only in the second: q = 3, k = 0" in out
    picture = [line for line in out.splitlines() if re.fullmatch(r"[█·12X]{6}", line)]
    assert picture == ["█·····", "██····", "███···", "2███··", "·2███·", "··2███"]


def test_a_difference_as_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "difference.png"
    words = ["diff", "recent(3)", "window(3, 0) & k % 7 > 0", "-n", "20", "-o", str(path)]
    assert main(words) == 1
    assert f"drawn to {path}" in capsys.readouterr().out
    image = Image.open(path).convert("RGB")
    seen = {color for _, color in image.getcolors(1 << 24) or ()}
    for tone in ("first", "second", "both"):
        assert ImageColor.getrgb(LIGHT[tone]) in seen, tone
    main(words)
    assert "error[E602]" in capsys.readouterr().err  # it is there already
    main([*words, "--force"])
    main([*words[:-1], str(tmp_path / "difference.svg")])
    assert not capsys.readouterr().err
    main([*words[:-1], str(tmp_path / "difference.gif")])
    assert "end it with .png, .svg" in capsys.readouterr().err


@pytest.mark.parametrize("n", [0, 1, 5, 64, 100])
@pytest.mark.parametrize("cell", [1, 3, 64])
def test_squares_of_a_difference(n: int, cell: int) -> None:
    first, second = patterndsl.parse("causal & strided(3)"), patterndsl.parse("window(2)")
    found = difference(first.bind(n), second.bind(n))
    squares = found.cells(cell)
    for row in range(squares.shape[0]):
        for column in range(squares.shape[1]):
            a, b = (mask[row * cell :][:cell, column * cell :][:, :cell] for mask in found.masks)
            only = ((a & ~b).any(), (b & ~a).any())
            name = {(True, True): "mixed", (True, False): "first", (False, True): "second"}.get(only)
            assert CELLS[squares[row, column]] == (name or ("both" if (a & b).any() else "none"))


def test_no_difference(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", "strided(6)", "strided(2) & strided(3)", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["equals"]["verdict"] == "Proven"
    assert (found["only_first"], found["only_second"]) == (0, 0)


def test_the_library_says_the_same() -> None:
    pattern = patterndsl.parse("causal & recent(w)", params={"w": 4})
    assert str(pattern.prove("rows-nonempty", params={"w": 4})) == "Proven: rows nonempty, for all N, with w = 4"
    assert type(pattern.prove("rows_nonempty")).__name__ == "Refuted"  # w = 0 keeps nothing
    report = pattern.report(n=100)
    assert report.pairs is not None
    assert (report.pairs.value, report.pairs.certainty) == (394, "Exact")
    bundle = report._repr_mimebundle_()
    assert bundle["text/latex"].startswith("$$")


def test_a_claim_about_one_relation_names_the_option_that_asks_a_term(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "two.yaml"
    spec.write_text("branches:\n  near: recent(4)\n  far: {attend: causal, score: elu}\n")
    assert main(["prove", str(spec), "symmetric"]) == 1
    assert "--term near.self" in capsys.readouterr().err
    assert main(["prove", str(spec), "symmetric", "--term", "near.self"]) != 2
    assert "Refuted: symmetric" in capsys.readouterr().out


def test_heads_are_by_default_those_that_a_list_has_items_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "heads.yaml"
    spec.write_text("params: {d: [1, 2, 4]}\nattend: causal & dilated(8, d[head])\n")
    assert main(["report", str(spec), "-n", "256", "--json"]) == 0
    assert [group["heads"] for group in json.loads(capsys.readouterr().out)["groups"]] == [[0], [1], [2]]
    assert main(["reach", str(spec), "-n", "256"]) == 0
    assert "3 heads united" in capsys.readouterr().out
    assert main(["show", str(spec), "-n", "64", "--json"]) == 0
    assert [group["heads"] for group in json.loads(capsys.readouterr().out)["groups"]] == [[0], [1], [2]]
    assert main(["explain", str(spec), "-n", "256"]) == 0
    assert "3 heads" in capsys.readouterr().out
    assert any("in head" in item.message for item in patterndsl.load(spec).lint())  # counted for the three
