"""Do formulas equal counting, on random patterns with free parameters? Every pattern is written twice, side by side: as
a text of the language, and as NumPy on all positions at once, which shares nothing with the package."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch

import patterndsl
from patterndsl.analysis.pairs import NoFormula, most_pairs, pairs, symbolic
from tests.analysis.test_closed_forms import value_of

Env: TypeAlias = Mapping[str, int]
"""N and the parameters."""
Meaning: TypeAlias = Callable[[Any, Any, Env], Any]
"""Positions of queries and keys, arrays that broadcast, to truth values or numbers."""

CHUNK = 30
MINIMUMS = {"w": 0, "g": 0, "s": 1, "m": 1}


@dataclass(frozen=True)
class Term:
    """A text of the language and what it means."""

    text: str
    meaning: Meaning


@dataclass(frozen=True)
class Amount:
    """A number that does not depend on positions: a constant or a parameter."""

    text: str

    def __call__(self, env: Env) -> int:
        return env[self.text] if self.text in env else int(self.text)


class Generator:
    """Random patterns of comparisons, of the built-in names, of logic and of replaced positions."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def pattern(self) -> Term:
        return self.predicate(self.random.choice((1, 1, 2)))

    def amount(self) -> Amount:
        return Amount(self.random.choice(("w", "g", "w", "0", "1", "2", "5")))

    def divisor(self) -> Amount:
        return Amount(self.random.choice(("s", "s", "m", "2", "3", "4")))

    def predicate(self, depth: int) -> Term:
        if depth == 0:
            return self.random.choice((self.built_in, self.built_in, self.comparison))()
        shape = self.random.choice(("&", "&", "|", "|", "~", "-", "at", "leaf"))
        left = self.predicate(depth - 1)
        if shape == "leaf":
            return left
        if shape == "~":
            return Term(f"~({left.text})", lambda q, k, env: ~left.meaning(q, k, env))
        if shape == "at":
            return self.moved(left)
        right = self.predicate(depth - 1)
        text = f"({left.text}) {shape} ({right.text})"
        if shape == "&":
            return Term(text, lambda q, k, env: left.meaning(q, k, env) & right.meaning(q, k, env))
        if shape == "|":
            return Term(text, lambda q, k, env: left.meaning(q, k, env) | right.meaning(q, k, env))
        return Term(text, lambda q, k, env: left.meaning(q, k, env) & ~right.meaning(q, k, env))

    def moved(self, inner: Term) -> Term:
        """The pattern with its positions replaced."""
        size, step = self.divisor(), self.amount()
        return self.random.choice(
            (
                Term(f"transpose({inner.text})", lambda q, k, env: inner.meaning(k, q, env)),
                Term(f"({inner.text}) at (q, k + {step.text})", lambda q, k, env: inner.meaning(q, k + step(env), env)),
                Term(
                    f"({inner.text}) at (q // {size.text}, k // {size.text})",
                    lambda q, k, env: inner.meaning(q // size(env), k // size(env), env),
                ),
                Term(
                    f"blocks({size.text}, {inner.text})",
                    lambda q, k, env: inner.meaning(
                        q // size(env), k // size(env), {**env, "N": -(-env["N"] // size(env))}
                    ),
                ),
                Term(
                    f"({inner.text}) at (q % {size.text}, k % {size.text})",
                    lambda q, k, env: inner.meaning(q % size(env), k % size(env), env),
                ),
            )
        )

    def built_in(self) -> Term:
        a, b, d = self.amount(), self.amount(), self.divisor()
        return self.random.choice(
            (
                Term("causal", lambda q, k, env: k <= q),
                Term(f"window({a.text})", lambda q, k, env: abs(q - k) <= a(env)),
                Term(f"window({a.text}, {b.text})", lambda q, k, env: (q - k <= a(env)) & (k - q <= b(env))),
                Term(f"recent({a.text})", lambda q, k, env: (k <= q) & (q - k < a(env))),
                Term(f"block({d.text})", lambda q, k, env: q // d(env) == k // d(env)),
                Term(f"strided({d.text})", lambda q, k, env: (q - k) % d(env) == 0),
                Term(
                    f"dilated({a.text}, {d.text})",
                    lambda q, k, env: ((q - k) % d(env) == 0) & (abs(q - k) <= a(env) * d(env)),
                ),
                Term(f"columns({d.text}, {a.text})", lambda q, k, env: (q >= 0) & (k % d(env) >= d(env) - a(env))),
                Term(f"first({a.text})", lambda q, k, env: (q >= 0) & (k < a(env))),
                Term(f"global({a.text})", lambda q, k, env: (q < a(env)) | (k < a(env))),
            )
        )

    def comparison(self) -> Term:
        left, right = self.number(), self.number()
        op, compare = self.random.choice(
            (
                ("<=", np.less_equal),
                ("<", np.less),
                (">", np.greater),
                (">=", np.greater_equal),
                ("==", np.equal),
                ("!=", np.not_equal),
            )
        )
        return Term(
            f"{left.text} {op} {right.text}",
            lambda q, k, env: compare(left.meaning(q, k, env), right.meaning(q, k, env)) & (q == q) & (k == k),
        )

    def number(self) -> Term:
        """A number that may depend on the positions."""
        a, d, factor = self.amount(), self.divisor(), self.random.choice((1, 1, 1, 2, 3))
        return self.random.choice(
            (
                Term("q", lambda q, k, env: q),
                Term("k", lambda q, k, env: k),
                Term(f"q - {a.text}", lambda q, k, env: q - a(env)),
                Term(f"{factor} * k + {a.text}", lambda q, k, env: factor * k + a(env)),
                Term("q + k", lambda q, k, env: q + k),
                Term("N - k", lambda q, k, env: env["N"] - k),
                Term("N // 2", lambda q, k, env: env["N"] // 2),
                Term(f"q // {d.text}", lambda q, k, env: q // d(env)),
                Term(f"k % {d.text}", lambda q, k, env: k % d(env)),
                Term(f"abs(q - k) - {a.text}", lambda q, k, env: abs(q - k) - a(env)),
                Term(f"max(k, {a.text})", lambda q, k, env: np.maximum(k, a(env))),
                Term(f"min(q - k, {a.text})", lambda q, k, env: np.minimum(q - k, a(env))),
                Term(a.text, lambda q, k, env: a(env)),
            )
        )

    def values(self, text: str) -> dict[str, int]:
        """A length, and a value for every parameter of the text."""
        n = self.random.choice((0, 1, 2, self.random.randint(3, 12), self.random.randint(12, 40)))
        most = self.random.choice((3, 8, 45))
        used = {name: least for name, least in MINIMUMS.items() if name in words(text)}
        return {"N": n} | {name: self.random.randint(least, most) for name, least in used.items()}

    def data(self, name: str, n: int) -> torch.Tensor:
        """Values of an input."""
        values = [self.random.randint(0, 3) for _ in range(n)]
        return torch.tensor(values) > 1 if name == "chosen" else torch.tensor(sorted(values))


def words(text: str) -> set[str]:
    return set("".join(char if char.isalnum() else " " for char in text).split())


def parsed(text: str, inputs: str = "") -> patterndsl.Pattern:
    used = {name: least for name, least in MINIMUMS.items() if name in words(text)}
    names = [f"  {name}: {{default: {least + 1}, min: {least}}}" for name, least in used.items()]
    params = "params:\n" + "\n".join(names) + "\n" if names else ""
    return patterndsl.parse(f'{params}{inputs}attend: "{text}"\n')


def counted(term: Term, values: Env) -> int:
    every = np.arange(values["N"])
    return int(term.meaning(every[:, None], every[None], values).sum())


def holds(assumption: str, values: Env) -> bool:
    """Whether what a formula assumes, as its text says it, is so."""
    return bool(eval(assumption, {}, {name: Fraction(value) for name, value in values.items()}))


@pytest.mark.parametrize("chunk", range(11))
def test_formulas_are_counts(chunk: int) -> None:
    """Inside the domain the value is the count, outside there is none, and most patterns have a formula. Of the
    conditions as they are shown exactly one holds."""
    without = []
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        generator = Generator(seed)
        term = generator.pattern()
        formula = pairs(symbolic(parsed(term.text).resolved))
        if isinstance(formula, NoFormula):
            without.append((term.text, formula.reason))
            continue
        conditions = [formula.condition(cell) for cell in formula.cells]
        for _ in range(8):
            values = generator.values(term.text)
            found = formula.at(values)
            inside = values["N"] == 0 or all(holds(item, values) for item in formula.assumes)
            assert (found is not None) == inside, (seed, term.text, values, formula.assumes)
            assert found in (None, counted(term, values)), (seed, term.text, values)
            if inside and values["N"]:
                assert sum(bool(value_of(text, values)) for text in conditions) == 1, (seed, term.text, values)
    assert len(without) <= 0.3 * CHUNK, without


DATA = (
    ("doc", "inputs:\n  doc: int[N]\n", "same(doc)"),
    ("doc", "inputs:\n  doc: int[N]\n", "q.doc <= k.doc"),
    ("chosen", "inputs:\n  chosen: bool[N]\n", "k.chosen"),
    ("", "", "random(3, seed = 5)"),
    ("", "", "random(w, seed = 1, avoid = recent(g))"),
    ("", "", "random(s)"),
    ("", "", "blocks(s, random(2, avoid = window(1)))"),
    ("", "", "blocks(4, random(w))"),
)


@pytest.mark.parametrize("chunk", range(3))
def test_upper_bounds_are_never_exceeded(chunk: int) -> None:
    """Patterns with inputs or draws have no exact formula, and a bound that holds whatever the data are."""
    without = []
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        generator = Generator(seed)
        name, inputs, atom = DATA[seed % len(DATA)]
        term = generator.pattern()
        text = f"({term.text}) {generator.random.choice('&|-')} ({atom})"
        pattern = parsed(text, inputs)
        side = symbolic(pattern.resolved)
        assert isinstance(pairs(side), NoFormula) or not pattern.bind(12).inputs, text
        bound = most_pairs(side)
        if isinstance(bound, NoFormula):
            without.append((text, bound.reason))
            continue
        for _ in range(3):
            values = generator.values(text)
            if values["N"] == 0:
                continue
            params = {key: value for key, value in values.items() if key != "N"}
            data = {name: generator.data(name, values["N"])} if name else {}
            kept = int(pattern.with_params(**params).compile(values["N"]).mask(inputs=data).sum())
            found = bound.at(values)
            assert (found is not None) == all(holds(item, values) for item in bound.assumes), (seed, text, values)
            assert found is None or kept <= found, (seed, text, values, found, kept)
    assert len(without) <= 0.3 * CHUNK, without
