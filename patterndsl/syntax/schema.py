"""What is the shape of a spec file? The keys, once, for the reader and for editors (JSON Schema draft-07)."""

from __future__ import annotations

import json
from typing import get_args

from patterndsl.syntax.tree import Combine, Merge, Projection, Share

MERGES: tuple[Merge, ...] = get_args(Merge)
SHARES: tuple[Share, ...] = get_args(Share)
COMBINES: tuple[Combine, ...] = get_args(Combine)
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)

_INTEGER: dict[str, object] = {
    "type": ["integer", "string"],
    "description": "an integer, or an expression such as 2 * w or isqrt(N)",
}
_TEXT: dict[str, object] = {"type": "string"}
_NAME = "^[A-Za-z_][A-Za-z0-9_]*$"


def _map(pattern: str, values: dict[str, object], description: str) -> dict[str, object]:
    return {
        "type": "object",
        "description": description,
        "patternProperties": {pattern: values},
        "additionalProperties": False,
    }


_VALUES: list[dict[str, object]] = [_INTEGER, {"type": "array", "items": _INTEGER, "minItems": 1}]
"""What a parameter may be."""
PARAM_KEYS: dict[str, dict[str, object]] = {
    "default": {"anyOf": _VALUES},
    "min": _INTEGER,
    "doc": _TEXT,
}

ROLE_KEYS: dict[str, dict[str, object]] = {
    "at": {"type": "string", "description": "which pairs: q < g, q.chosen, q < g & k >= g"},
    "own": {
        "description": "what of them is projected apart, query, key and value where nothing is said",
        "anyOf": [
            {"enum": list(PROJECTIONS)},
            {"type": "array", "items": {"enum": list(PROJECTIONS)}, "minItems": 1, "uniqueItems": True},
        ],
    },
}
_ATTENDED: dict[str, object] = {"type": ["string"]}
_SCORED: dict[str, dict[str, object]] = {
    "score": {
        "type": "string",
        "description": "how a query and a key are scored: softmax (the default), elu, relu, favor(256), "
        "synthesize(dense, length = 4096)",
    },
    "bias": {
        "type": ["string", "number"],
        "description": "a real number that is added to a score: -(q - k) / 2 ** (head + 1), near[q - k]",
    },
    "softcap": {"type": ["string", "number"], "description": "what a score is kept below, by a tanh"},
}
SCORED = tuple(_SCORED)
"""What a branch says of its scores."""
_TERMS = _map(_NAME, {"type": "string"}, "what of each source is attended; `self` are the sequence's own keys")

KEYS: dict[str, dict[str, object]] = {
    "name": {**_TEXT, "description": "what the pattern is called"},
    "doc": {**_TEXT, "description": "what it does, in a sentence or two"},
    "cite": {**_TEXT, "description": "where it was published"},
    "params": _map(
        _NAME,
        {
            "anyOf": [
                *_VALUES,
                {"type": "object", "properties": PARAM_KEYS, "additionalProperties": False},
            ]
        },
        "integers, or lists indexed by head or layer, that --set and with_params override",
    ),
    "grid": _map(
        _NAME,
        {"anyOf": [_INTEGER, {"type": "array", "items": {"type": "string"}, "minItems": 1}]},
        "axes and sizes, row-major, the last runs fastest; [a, b] composes an axis of other axes",
    ),
    "inputs": _map(
        _NAME,
        {"type": "string", "pattern": r"^\s*(int|bool)\s*\[.*\]\s*$"},
        "tensors that the caller brings: int[N], bool[Nk], int[] for a table of any length",
    ),
    "labels": _map(
        _NAME,
        {"type": "string"},
        "integers of each position and head that a learner finds: lsh(buckets = 64), kmeans(clusters = 16), given",
    ),
    "select": _map(
        _NAME,
        {"type": "string"},
        "keys that a selector lists in each call: topk(16, of = blocks(64)), given(8), members(label, top = w)",
    ),
    "sources": _map(
        _NAME,
        {"type": "string"},
        "keys that are no tokens of the sequence: memory(16), recall(128), pool(3, by = conv), project(128, length = "
        "4096), sort(64, length = 4096), compress(past, 3, size = 64), cross",
    ),
    "import": _map(
        _NAME,
        {"anyOf": [{"type": "string"}, {"$ref": "#"}]},
        "other specs (a path beside this file, or a spec in place), used as definitions",
    ),
    "define": {
        "description": "`name` or `name(parameters)` to an expression, or a text of `name(a, b) = ...` lines",
        "anyOf": [
            {"type": "object", "additionalProperties": {"type": ["string", "integer"]}},
            {"type": "string"},
        ],
    },
    "merge": {
        "enum": list(MERGES),
        "description": "whether a key that several terms of the union have counts once (the default) or for each, or "
        "the terms are attended one by one and averaged",
    },
    "fallback": {"type": "string", "description": "what a query attends that would otherwise attend nothing"},
    "share": {"enum": list(SHARES), "description": "projections of a layer that are one, as in Reformer"},
    "keys": {**_INTEGER, "description": "how many keys there are, where they are no sequence of N"},
    "attend": {"anyOf": [_ATTENDED, _TERMS], "description": "the predicate: which query q attends to which key k"},
    **_SCORED,
    "tables": _map(
        _NAME, {"type": "string"}, "what a layer learns for a bias to look up: scalars(32), vectors(9), sinusoids"
    ),
    "roles": _map(
        _NAME,
        {
            "anyOf": [
                ROLE_KEYS["at"],
                {"type": "object", "properties": ROLE_KEYS, "required": ["at"], "additionalProperties": False},
            ]
        },
        "pairs whose query, key or value is made by a projection of their own; where several roles have one, the first",
    ),
    "branches": _map(
        _NAME,
        {
            "anyOf": [
                _ATTENDED,
                {
                    "type": "object",
                    "properties": {"attend": {"anyOf": [_ATTENDED, _TERMS]}, **_SCORED},
                    "required": ["attend"],
                    "additionalProperties": False,
                },
                _TERMS,
            ]
        },
        "parts that are normalised each by itself, then combined",
    ),
    "combine": {
        "enum": list(COMBINES),
        "description": "how branches become one output: added (the default), averaged, or weighted by learned gates",
    },
}

REQUIRED = (("attend", "branches"),)
"""Of each of these keys one is there."""


def schema() -> dict[str, object]:
    """The JSON Schema (draft-07) of a spec file."""
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "patterndsl attention pattern",
        "type": "object",
        "properties": KEYS,
        "anyOf": [{"required": [key]} for keys in REQUIRED for key in keys],
        "additionalProperties": False,
    }


def schema_text() -> str:
    """The schema as the text of its file in `grammar/`."""
    return json.dumps(schema(), indent=2) + "\n"
