"""The JSON Schema in grammar/ is the generated one, and agrees with the reader about every example."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml

import patterndsl
from patterndsl.syntax.grammar import grammar_text
from patterndsl.syntax.schema import schema, schema_text

ROOT = Path(__file__).parents[2]


def test_the_committed_schema_is_the_generated_one() -> None:
    assert grammar_text("patterndsl.schema.json") == schema_text()


def test_it_is_a_draft_07_schema() -> None:
    jsonschema.Draft7Validator.check_schema(schema())


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.yaml")), ids=lambda path: path.stem)
def test_accepts_the_examples(path: Path) -> None:
    jsonschema.validate(yaml.safe_load(path.read_text()), schema(), jsonschema.Draft7Validator)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.yaml")), ids=lambda path: path.stem)
def test_accepts_canonical_texts(path: Path) -> None:
    text = str(patterndsl.load(path))
    if "attend:" in text:
        jsonschema.validate(yaml.safe_load(text), schema(), jsonschema.Draft7Validator)


@pytest.mark.parametrize(
    "text",
    [
        "atend: causal",
        "attend: [causal]",
        "attend: causal\nparams: {w: {defalt: 3}}",
        "attend: causal\nparams: {w: 0.5}",
        'attend: causal\ninputs: {doc: "float[N]"}',
        "attend: causal\ngrid: [8, 8]",
        "params: {w: 3}",
    ],
)
def test_refuses_what_the_reader_refuses(text: str) -> None:
    assert not jsonschema.Draft7Validator(schema()).is_valid(yaml.safe_load(text))
    with pytest.raises(patterndsl.PatternError):
        patterndsl.parse(text)
