"""`patterndsl reach`: what it prints, and what it says to what cannot be asked."""

import json
import time
from pathlib import Path

import pytest

from patterndsl.cli import main

EXAMPLES = Path(__file__).parents[2] / "examples"
LONGFORMER = str(EXAMPLES / "longformer.yaml")


def test_a_long_sequence_takes_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    assert main(["reach", LONGFORMER, "-n", "65536"]) == 0
    assert time.monotonic() - began < 3
    out = capsys.readouterr().out
    assert "connected after 2 layers: every pair (Exact, composed as formulas)" in out
    assert "(UpperBound, followed blocks of 64)" in out


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reach", "causal & recent(4)", "-n", "9"]) == 0
    assert capsys.readouterr().out == (
        "causal & recent(4) at N = 9, 8 heads united\n"
        "  positions that reach a query  least  mean  most  (Exact, followed every position)\n"
        "    after 1 layer                   1   3.3     4\n"
        "    after 2 layers                  1   4.7     7\n"
        "    after 3 layers                  1     5     9\n"
        "  connected after 3 layers: every pair with k <= q (Exact, composed as formulas)\n"
    )


def test_what_is_never_connected(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reach", "causal & block(4)", "-n", "10"]) == 0
    out = capsys.readouterr().out
    assert "connected after 1 layer: all that ever will be, not every pair (Exact" in out
    assert "at every N: after 1 layer, all that ever will be, not every pair" in out
    assert "never connected: 32 pairs with k <= q, such as q = 4, k = 0" in out
    assert "positions nothing else reaches: 2 (4, 8)" in out
    assert "positions that reach nothing else: 2 (3, 7)" in out
    assert "islands between which nothing flows: 3" in out


def test_a_query_and_a_path(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reach", "window(2) | k < 1", "-n", "20", "--query", "10", "--path", "10", "3"]) == 0
    out = capsys.readouterr().out
    assert "after 1 layer 6 positions reach q = 10: 0, 8..13" in out
    assert "after 2 layers 12 positions reach q = 10: 0..3, 6..15" in out
    assert "from k = 3 to q = 10 in 3 layers: 3 -> 1 -> 0 -> 10" in out
    assert main(["reach", "block(4)", "-n", "8", "--path", "4", "3"]) == 0
    assert "nothing of k = 3 ever reaches q = 4" in capsys.readouterr().out


def test_layers_that_differ(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["reach", "causal & (recent(2) | layer % 3 == 2)", "-n", "64", "--path", "60", "0"]
    assert main([*words, "--layers", "6"]) == 0
    out = capsys.readouterr().out
    assert "connected after 3 layers: every pair with k <= q" in out
    assert "in 3 layers: 0 -> 0 -> 0 -> 60" in out
    assert main([*words, "--layers", "2"]) == 0
    assert "connected after 63 layers: every pair with k <= q" in capsys.readouterr().out


def test_as_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reach", "block(4)", "-n", "8", "--query", "5", "--path", "5", "4", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["layers_to_connect"]["value"] == 1
    assert data["at_every_length"] == {"layers": 1, "closure": "part"}
    assert data["unreachable"] == {
        "value": 32,
        "certainty": "Exact",
        "unit": "pairs",
        "how": "followed every position",
    }
    assert data["query"] == {"q": 5, "fields": [{"layers": 1, "positions": 4, "runs": [[4, 8]]}]}
    assert data["path"]["hops"] == [{"layer": 0, "position": 4}, {"layer": 1, "position": 5}]


def test_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["reach", str(EXAMPLES / "packed-documents.yaml"), "-n", "256"]
    assert main([*words, "--input-values", "doc=0*100,1*156"]) == 0
    assert "islands between which nothing flows: 2" in capsys.readouterr().out
    assert main(words) == 1
    assert "error[E501]: input `doc` is missing, and `reach` draws none at random" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["causal"], 2, "error[E701]: no length is given\n  = help: add -n 4096"),
        (
            ["causal", "-n", "8", "--query", "8"],
            1,
            "error[E406]: there is no position 8\n  = help: the positions are 0 to 7",
        ),
        (["causal", "-n", "8", "--path", "1", "9"], 1, "error[E406]: there is no position 9"),
        (["causal", "-n", "8", "--path", "1"], 2, "error[E701]: --path: expected 2 arguments"),
        (["causal", "-n", "8", "--layers", "0"], 2, "--layers: 0 is too small"),
        (["cuasal", "-n", "8"], 1, "did you mean `causal`?"),
    ],
)
def test_mistakes(words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reach", *words]) == code
    assert said in capsys.readouterr().err
