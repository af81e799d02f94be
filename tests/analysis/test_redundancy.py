"""What changes nothing is found, with its place; what changes something is not."""

import pytest

import patterndsl
from patterndsl.cli import main


@pytest.mark.parametrize(
    ("text", "dead"),
    [
        ("causal & (recent(8) | window(4))", ["window(4)"]),
        ("causal & (recent(8) | window(8))", ["recent(8)"]),
        ("window(3) | window(3)", ["window(3)"]),
        ("causal - (q < k)", ["q < k"]),
        ("causal - block(4)", []),
        ("window(3) | global(2)", []),
        ("blocks(4, window(1) | causal | block(2))", ["block(2)"]),
        ("strided(6) | strided(2) & strided(3)", ["strided(2) & strided(3)"]),
        ("strided(6) | strided(4)", []),
        ("~(causal | q < 0)", ["q < 0"]),
        ("window(w) | recent(w)", ["recent(w)"]),
        ("window(q - 1) | causal", []),
    ],
)
def test_dead_terms(text: str, dead: list[str]) -> None:
    params = {"w": 4} if "(w)" in text else None
    assert [item.text for item in patterndsl.parse(text, params=params).dead_terms()] == dead


def test_a_dead_term_in_a_definition_has_its_place() -> None:
    spec = "define: {near: window(4) | recent(3)}\nattend: near & causal\n"
    (found,) = patterndsl.parse(spec).dead_terms()
    assert found.text == "recent(3)"
    assert found.place.source.line_and_column(found.place.start) == (1, 28)


def test_the_command_line_says_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prove", "window(4) | block(2)", "dead-terms"]) == 1
    said = "<expression>:1:13: `block(2)` is covered by the other terms, for all N\n"
    assert capsys.readouterr().out == said
    assert main(["prove", "window(4)", "dead-terms"]) == 0
    assert capsys.readouterr().out == "no term is dead\n"


def test_nothing_of_a_multiset_is_dead() -> None:
    assert patterndsl.parse("causal & (recent(4) | recent(2))").dead_terms()
    assert not patterndsl.parse("merge: multiset\nattend: causal & (recent(4) | recent(2))").dead_terms()
