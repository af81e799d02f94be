"""Formulas equal enumeration at random sizes and parameters, and the known ones of the literature."""

import random
from math import isqrt
from pathlib import Path

import numpy as np
import pytest

import patterndsl
from patterndsl.analysis.formula import Formula
from patterndsl.analysis.order import order
from patterndsl.analysis.pairs import NoFormula, pairs, row_lengths, symbolic
from patterndsl.ir.meaning import Point, member
from patterndsl.lower.lookup import Lookup

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
DATA_DEPENDENT = {"bigbird", "packed-documents", "packed-sinks-strided"}
TEXTS = [
    "window(w) | global(g)",
    "causal & (strided(g) | window(w))",
    "causal & (strided(g) | window(20))",
    "causal & dilated(w, g)",
    "causal & dilated(w, 4)",
    "blocks(6, window(w) | global(1))",
    "blocks(g, window(w)) - causal",
    "k <= q & k + q < N",
    "k <= 2 * q & 3 * k >= q",
    "causal & (strided(3) | strided(2))",
    "transpose(causal & recent(w)) | shifted(block(g), 1)",
    "q % g == k % g & abs(q - k) > w",
    "max(q - w, g) <= k < min(q + 2, N)",
]


def rows_of(pattern: patterndsl.Pattern, n: int) -> np.ndarray:
    every = np.arange(n)
    relation = pattern.bind(n).groups[0].relation
    return np.broadcast_to(member(relation, Point(every[:, None], every[None], 0, Lookup())), (n, n)).sum(axis=1)


def check(pattern: patterndsl.Pattern, times: int) -> int:
    """Compares at random sizes; how many of them lay in the formula's domain."""
    draw = random.Random(str(pattern))
    side = symbolic(pattern.resolved, head=0, layer=0)
    formula = pairs(side)
    assert isinstance(formula, Formula), formula
    rows = row_lengths(formula.affine)
    inside = 0
    for _ in range(times):
        values = {item.name: draw.randint(1, 7) for item in pattern.resolved.params}
        values.pop("dilation", None)  # a list
        n = draw.randint(0, 60)
        if "cols" in values:
            values["cols"] *= values.get("m", 1)
            n = values["cols"] * values.get("m", 1) * draw.randint(1, 4)
        if "w % 4 == 0" in formula.assumes:  # longnet: its segments hold whole steps
            values["w"] *= 4
            n = 4 * values["w"] * draw.randint(0, 2)
        if "across" in values:
            values |= {name: draw.randint(1, 3) for name in ("across", "th", "tw")}
            n = values["across"] * values["th"] * values["tw"] * draw.randint(1, 4)
        expected = rows_of(pattern.with_params(**values), n)
        found = formula.at({"N": n, **values})
        if found is not None:
            inside += 1
            assert found == expected.sum(), (n, values)
            lengths = None if rows is None else rows.at({"N": n, **values})
            assert lengths is None or (lengths == expected).all(), (n, values)
    return inside


@pytest.mark.parametrize("path", [path for path in EXAMPLES if path.stem not in DATA_DEPENDENT], ids=lambda p: p.stem)
def test_examples(path: Path) -> None:
    assert check(patterndsl.load(path), 50) >= 10


@pytest.mark.parametrize("text", TEXTS)
def test_expressions(text: str) -> None:
    known = {name: 3 for name in ("w", "g") if f"{name}" in text.replace("window", "").replace("global", "")}
    pattern = patterndsl.parse(text, params=known)
    if isinstance(pairs(symbolic(pattern.resolved, head=0, layer=0)), NoFormula):
        assert text == "k <= 2 * q & 3 * k >= q"  # factors of positions against each other: no digits fit both
        return
    assert check(pattern, 25) == 25


@pytest.mark.parametrize("n", [17, 64, 1000])
def test_longformer(n: int) -> None:
    formula = pairs(symbolic(patterndsl.parse("window(w) | global(g)", params={"w": 4, "g": 2}).resolved))
    assert isinstance(formula, Formula)
    for w, g in ((4, 2), (0, 3), (7, 8)):
        assert formula.at({"N": n, "w": w, "g": g}) == 2 * g * n - g * g + (n - g) * (2 * w + 1) - w * (w + 1)
    assert order(formula.cells[0].value, formula.affine) == "Θ(N·g + N·w)"


@pytest.mark.parametrize(("n", "pairs_kept"), [(64, 708), (70, 804)])
def test_sparse_transformer_strided(n: int, pairs_kept: int) -> None:
    text = "causal & (recent(l) | strided(l))"
    formula = pairs(symbolic(patterndsl.parse(text, params={"l": 8}).resolved))
    assert isinstance(formula, Formula)
    assert formula.at({"N": n, "l": 8}) == pairs_kept
    blocks, rest = divmod(n, 8)
    assert pairs_kept == n * 8 - 28 + 8 * blocks * (blocks - 1) // 2 + blocks * rest


def test_what_depends_on_data_says_so() -> None:
    pattern = patterndsl.parse("causal & same(doc)", inputs={"doc": "int[N]"})
    assert pairs(symbolic(pattern.resolved)) == NoFormula("it depends on an input or on draws")


@pytest.mark.parametrize(
    "text",
    [
        "k <= 2 * q & 3 * k >= q",
        "causal & k >= q // 2",
        "3 * k <= 2 * q",
        "causal & 2 * k + 1 >= q",
        "(q + 2 * k) % 3 == 1",
    ],
)
def test_cases_by_residues(text: str) -> None:
    pattern = patterndsl.parse(text)
    (group,) = pattern.report().groups
    assert isinstance(group.formula, Formula), text
    for n in range(40):
        assert group.formula.at({"N": n}) == int(pattern.compile(n).mask().sum()), (text, n)


@pytest.mark.parametrize(
    "text",
    [
        "causal & (recent(w) | strided(w))",
        "q // w // 3 == k // w // 3 & q >= k",
        "blocks(w, causal)",
        "causal & recent(isqrt(N))",
        "causal & recent(log2(N + 1))",
        "none",
    ],
)
def test_a_formula_as_an_expression_of_python(text: str) -> None:
    pattern = patterndsl.parse(text, params={"w": 4})
    (group,) = pattern.report().groups
    assert isinstance(group.formula, Formula)
    for n in (1, 5, 64, 100):
        values = {"N": n, "w": 4}
        found = [eval(group.formula.python(cell), {"isqrt": isqrt}, values) for cell in group.formula.cells]
        assert group.formula.at(values) in found
        if len(found) == 1:
            assert found == [group.formula.at(values)]


def test_the_first_case_is_of_usual_lengths() -> None:
    pattern = patterndsl.parse("causal & (recent(3) | blocks(4, window(1))) & ~(dilated(4, 2) | first(2)) | q == k")
    formula = pairs(symbolic(pattern.resolved))
    assert isinstance(formula, Formula)
    assert (formula.text(), formula.stated()) == ("16·⌊N/4⌋ - 15", "N % 4 = 0 and N // 4 ≥ 2")


@pytest.mark.parametrize(
    "name", ["mod", "exists", "rat", "u0", "e0", "e0_", "flag0", "floor1", "N_0h", "q_1l", "x_m3", "mod_"]
)
def test_parameters_may_be_called_as_isl_or_a_digit_is(name: str) -> None:
    pattern = patterndsl.parse(f"causal & (q // {name} == k // {name} | k < {name})", params={name: 4})
    (group,) = pattern.report().groups
    assert isinstance(group.formula, Formula)
    assert f"{name}_" not in group.formula.text() + str(group.formula.cases())
    for n, value in ((1, 1), (7, 3), (20, 4), (30, 50)):
        assert group.formula.at({"N": n, name: value}) == int(
            pattern.with_params(**{name: value}).compile(n).mask().sum()
        )
    assert type(pattern.prove("causal")).__name__ == "Proven"
    assert f"{name} = 0" in str(patterndsl.parse(f"recent({name})", params={name: 4}).prove("rows_nonempty"))
    assert (
        str(patterndsl.parse(f"recent({name})", params={name: 4}).cache_policy())
        == f"bounded({name}); keep k > t - {name}"
    )


@pytest.mark.parametrize(
    ("name", "assumed"),
    [
        ("longnet", ("w % 4 == 0", "N % (4 * w) == 0")),
        ("swin", ("cols % m == 0", "N % (cols * m) == 0")),
        ("image-transformer-2d", ("N % (across * th * tw) == 0",)),
    ],
)
def test_assumptions_are_said_once(name: str, assumed: tuple[str, ...]) -> None:
    path = next(path for path in EXAMPLES if path.stem == name)
    formula = pairs(symbolic(patterndsl.load(path).resolved, head=0, layer=0))
    assert isinstance(formula, Formula)
    assert formula.assumes == assumed


@pytest.mark.parametrize(
    ("text", "conditions"),
    [
        ("causal & 2 * k + 1 >= q", ["N % 2 = 1", "N % 2 = 0"]),
        ("q // 2 <= N - k", ["N % 2 = 1 and N // 2 ≥ 1", "N % 2 = 1 and N // 2 = 0", "N % 2 = 0"]),
        ("k * w <= q", ["always"]),
        ("causal & q - k < 4", ["N ≥ 4", "N ≤ 3"]),
        ("k <= w // 2 + N % 3", ["3·(N // 3) ≥ w // 2 + 2", "w // 2 + 1 ≥ 3·(N // 3)"]),
    ],
)
def test_conditions_name_what_the_user_knows(text: str, conditions: list[str]) -> None:
    pattern = patterndsl.parse(f"params: {{w: {{default: 3, min: 1}}}}\nattend: {text}\n")
    formula = pairs(symbolic(pattern.resolved))
    assert isinstance(formula, Formula)
    assert [condition for _, condition in formula.cases()] == conditions
