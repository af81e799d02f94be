"""`patterndsl show`: to the terminal, to files, as figures."""

import io
import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from patterndsl.cli import main

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


def test_a_small_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "causal & window(w)", "--set", "w=1", "-n", "4"]) == 0
    assert (
        capsys.readouterr().out
        == """\
causal & window(w), w = 1

  k  0
  q ┌┴───┐
  0 ┤█▄  │
    │ ▀█▄│
    └────┘

     █ kept
N 4 · 7 of 16 pairs kept (43.8 %)
"""
    )


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_fits_eighty_columns(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = {"packed-documents": ["doc=0*100,1*156"]}
    words = [word for value in inputs.get(path.stem, []) for word in ("--input-values", value)]
    code = main(["show", str(path), *words])
    out, err = capsys.readouterr()
    if code:  # it reads other inputs: then that is what is said
        assert "error[E501]" in err
        assert "--input-values" in err
        return
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 72


def test_colour_when_asked_for(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    main(["show", "causal"])
    assert "\x1b[38;5;33m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    main(["show", "causal"])
    assert "\x1b" not in capsys.readouterr().out


def test_heads_that_differ(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["show", "causal & recent(w[head])", "--set", "w=[2,9,2]", "-n", "16", "--heads", "3"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "heads 0, 2 of 3; 2 groups differ" in out
    assert out.endswith("other heads: --head 1\n")
    assert main([*words, "--head", "1"]) == 0
    assert "head 1 of 3" in capsys.readouterr().out
    assert main([*words, "--head", "3"]) == 2
    assert "there is no head 3 among 3" in capsys.readouterr().err


def test_layers(capsys: pytest.CaptureFixture[str]) -> None:
    main(["show", "causal & (layer % 2 == 1 | recent(1))", "-n", "8"])
    assert "8 of 64 pairs" in capsys.readouterr().out
    main(["show", "causal & (layer % 2 == 1 | recent(1))", "-n", "8", "--layer", "1"])
    out = capsys.readouterr().out
    assert "layer 1" in out
    assert "36 of 64 pairs" in out


@pytest.mark.parametrize("values", ["0,0,0,1,1", "0*3,1*2", "[0, 0, 0, 1, 1]"])
def test_input_values(values: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["show", "causal & same(doc)", "--declare", "doc=int[N]", "-n", "5", "--input-values", f"doc={values}"]
    assert main(words) == 0
    assert "9 of 25 pairs kept" in capsys.readouterr().out


def test_input_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "inputs.safetensors"
    save_file({"doc": np.array([0, 0, 0, 1, 1]), "other": np.zeros(3)}, path)
    words = ["show", "causal & same(doc)", "--declare", "doc=int[N]", "-n", "5", "--inputs"]
    assert main([*words, str(path)]) == 0
    assert "9 of 25 pairs kept" in capsys.readouterr().out
    save_file({"doc": np.zeros((2, 5), dtype=np.int64)}, path)
    assert main([*words, str(path)]) == 1
    assert "has 2 rows; a picture shows one" in capsys.readouterr().err
    path.write_bytes(b"no such thing")
    assert main([*words, str(path)]) == 1
    assert "E601" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "missing")]) == 1
    assert "E601" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "code", "said"),
    [
        (["dog=1*5"], 1, "did you mean `doc`?"),
        (["doc=0*4"], 1, "E502]: input `doc` has 4 values"),
        (["doc=a,b"], 2, "`a` is no value"),
        (["doc"], 2, "is not name=value"),
        (["doc=1*5", "doc=2*5"], 2, "given twice"),
        (["doc=99999999999999999999*5"], 1, "beyond 62 bits"),
    ],
)
def test_inputs_that_do_not_fit(values: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = [word for value in values for word in ("--input-values", value)]
    assert main(["show", "causal & same(doc)", "--declare", "doc=int[N]", "-n", "5", *options]) == code
    assert said in capsys.readouterr().err


def test_png_svg_html(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for suffix in ("png", "svg", "html"):
        path = tmp_path / f"x.{suffix}"
        assert main(["show", str(EXAMPLES / "longformer.yaml"), "-n", "128", "-o", str(path)]) == 0
        assert capsys.readouterr().out == f"{path}: N 128\n"
        data = path.read_bytes()
        match suffix:
            case "png":
                Image.open(io.BytesIO(data)).load()
            case "svg":
                ElementTree.fromstring(data)
            case "html":
                assert data.startswith(b"<!doctype html>")


def test_files_are_not_overwritten_unless_forced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.svg"
    path.write_text("mine")
    assert main(["show", "causal", "-o", str(path)]) == 1
    assert "error[E602]" in capsys.readouterr().err
    assert path.read_text() == "mine"
    assert main(["show", "causal", "-o", str(path), "--force"]) == 0
    assert path.read_text() != "mine"


def test_outputs_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "causal", "-o", "x.gif"]) == 2
    assert ".png, .svg, .html" in capsys.readouterr().err
    assert main(["show", "causal", "-o", str(tmp_path / "no" / "x.svg")]) == 1
    assert "there is no folder" in capsys.readouterr().err
    assert main(["show", "causal", "-n", "2^20", "--cell", "16", "-o", str(tmp_path / "x.png")]) == 2
    assert ".html" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "causal & recent(w[head])", "--set", "w=[1,4]", "--heads", "2", "-n", "100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["n"], found["cell"]) == (100, 2)
    assert [group["heads"] for group in found["groups"]] == [[0], [1]]
    # blocks of 2 with only the own token are half full; with four, the block before as well
    assert [group["num_live"] for group in found["groups"]] == [50, 50 + 49 + 48]
    assert main(["show", "causal", "-n", "1_000", "--cell", "7", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["groups"][0]["num_cells"] == 143**2


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (["--q-len", "3", "--kv-len", "8", "--q-start", "5"], "3 queries from 5 on · 8 keys"),
        (["-n", "8", "--q-start", "5"], "3 queries from 5 on · 8 keys"),
        (["-n", "2^20"], "N 1,048,576"),
        (["-n", "0"], "(no positions)"),
    ],
)
def test_sizes(sizes: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "causal", *sizes]) == 0
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("sizes", [["-n", "4", "--q-len", "5"], ["-n", "4", "--q-start", "9"]], ids=" ".join)
def test_sizes_that_cannot_be(sizes: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "causal", *sizes]) == 1
    assert "error[E406]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "drawn"),
    [
        ("inputs: {doc: 'int[N]'}\nattend: causal & same(doc)", "doc"),
        ("labels: {b: lsh(buckets = 4)}\nattend: causal & chunks(b, 8, 1)", "b"),
        (
            "select: {top: 'topk(2, of = blocks(8), per = blocks(8), among = k < q, always = k == q)'}\n"
            "attend: causal & top",
            "top",
        ),
    ],
)
def test_what_nobody_gives_is_drawn_where_the_spec_tells_how(
    text: str, drawn: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "drawn.yaml"
    spec.write_text(text)
    assert main(["show", str(spec), "-n", "64"]) == 0
    first = capsys.readouterr().out
    assert f"{drawn} at random" in first
    assert main(["show", str(spec), "-n", "64"]) == 0
    assert capsys.readouterr().out == first  # the same sample each time
    assert main(["show", str(spec), "-n", "64", "-o", str(tmp_path / "x.png")]) == 0


def test_a_mask_of_the_caller_is_not_guessed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "pad.yaml"
    spec.write_text("inputs: {there: 'bool[Nk]'}\nattend: window(8) & k.there")
    assert main(["show", str(spec), "-n", "64"]) == 1
    assert "--input-values there=0*32,1*32" in capsys.readouterr().err
