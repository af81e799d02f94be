"""How does a count read? Piecewise polynomials in digits, back in N and the parameters: text, LaTeX, value.

The one owner of sympy, which arranges the terms. A formula states its domain: a case per cell, and what it assumes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import isqrt, lcm
from typing import TYPE_CHECKING, Any

from patterndsl.analysis.cells import joined
from patterndsl.analysis.conditions import assumptions, condition, shown_names
from patterndsl.analysis.count import Cell
from patterndsl.analysis.digits import Affine, resolved
from patterndsl.analysis.latex import Shown, words
from patterndsl.analysis.order import SUPERSCRIPTS
from patterndsl.analysis.polynomial import Polynomial
from patterndsl.analysis.radix import Named, plain_name, safe_name
from patterndsl.analysis.sets import coalesced, dim_names

if TYPE_CHECKING:
    import islpy


@dataclass(frozen=True, slots=True, eq=False)
class Formula(Shown):
    """An exact function of N and the parameters. `cells` are disjoint and cover the domain; the first is the one that
    holds for long sequences, of which `typical` has the digits of some.

    fixed: parameters of which it knows one value.
    """

    cells: tuple[Cell, ...]
    affine: Affine
    context: islpy.Set
    typical: tuple[Mapping[str, int], ...] = ()
    fixed: Mapping[str, int] = field(default_factory=dict)

    def at(self, values: Mapping[str, int]) -> int | None:
        """The value; None outside the domain (where something assumed to divide does not)."""
        if any(values.get(name, number) != number for name, number in self.fixed.items()):
            return None
        if values["N"] == 0:
            return 0  # the cells are those of patterns with a position
        digits = digits_at(self.affine, values)
        if digits is None:
            return None
        for cell in self.cells:
            if _contains(cell.domain, digits):
                value = cell.value.at(digits)
                assert value.denominator == 1, f"{value} pairs"
                return int(value)
        return None

    @property
    def assumes(self) -> tuple[str, ...]:
        """What the domain demands beyond the declared minimums, such as `w % 4 == 0`."""
        return assumptions(self.affine)

    def cases(self, most: int | None = None) -> list[tuple[str, str]]:
        """(formula, condition) for every cell or at most so many, the one for long sequences first."""
        return [(self.text(cell), self.condition(cell)) for cell in self.cells[:most]]

    def shown(self, most: int) -> list[tuple[str, str]]:
        """The same for a reader, who is spared a long list of conditions."""
        return [(self.text(cell), self.stated(cell)) for cell in self.cells[:most]]

    def text(self, cell: Cell | None = None) -> str:
        """The formula of a cell, of the first where none is given."""
        return _pretty(str(self.expression(cell)))

    def latex(self, cell: Cell | None = None) -> str:
        """The formula in LaTeX."""
        import sympy

        return str(sympy.latex(self.expression(cell)))

    def latex_cases(self, lead: str = "", most: int = 4) -> str:
        """The formula in LaTeX with its cases and where each holds, the first so many of them. lead: `P = `."""
        rows = [
            rf"{self.latex(cell)} & {words(self.where(cell).strip())}" if len(self.cells) > 1 else self.latex(cell)
            for cell in self.cells[:most]
        ]
        if len(self.cells) == 1:
            return lead + rows[0] + (rf"\quad{words(self.where())}" if self.where() else "")
        if len(self.cells) > most:
            rows.append(rf"\ldots & {words(f'in {len(self.cells) - most} more cases')}")
        return lead + r"\begin{cases} " + r" \\ ".join(rows) + r" \end{cases}"

    def __str__(self) -> str:
        return self.text() + self.where()

    def _repr_latex_(self) -> str:
        return f"$${self.latex_cases()}$$"

    def python(self, cell: Cell | None = None) -> str:
        """The formula as an expression of Python's integers, for machines: `(N * N + N) // 2`."""
        return _integral((cell or self.cells[0]).value, self.affine)

    def expression(self, cell: Cell | None = None) -> Any:
        """The formula as a sympy expression in N and the parameters."""
        value = (cell or self.cells[0]).value
        return _arranged(_sympy(value, self.affine))

    def condition(self, cell: Cell) -> str:
        """Where the cell holds, beyond what holds of all cells."""
        return condition(cell.domain.gist(self.context), shown_names(self.affine))

    def where(self, cell: Cell | None = None) -> str:
        """Where a cell holds, the first where none is given, with what is assumed: ` for N ≥ 4`, or nothing."""
        stated, assumed = self.stated(cell), list(self.assumes)
        known = ", ".join(f"{name} = {value:,}" for name, value in self.fixed.items())
        at = f" at {known}" if known else ""
        if stated == "always":
            return at + (f" for {' and '.join(assumed)}" if assumed else "")
        text = f"({stated})" if assumed and " or " in stated else stated
        return f"{at} for {' and '.join([*assumed, text])}"

    def stated(self, cell: Cell | None = None) -> str:
        """The condition of a cell, of the first where none is given. Of a long list the part that typical sequences are
        in, and how many more there are."""
        cell = cell or self.cells[0]
        whole = self.condition(cell)
        if len(whole) <= MAX_CONDITION:
            return whole
        domain = coalesced(cell.domain.gist(self.context))
        parts = [basic.to_set() for basic in domain.get_basic_sets()]
        main = max(parts, key=lambda part: sum(_contains(part, digits) for digits in self.typical))
        others = f", and {len(parts) - 1:,} more such conditions" if len(parts) > 1 else ""
        return condition(main, shown_names(self.affine)) + others


MAX_CONDITION = 120
"""Characters; of a longer condition a part is shown."""


def formula(cells: Sequence[Cell], affine: Affine, context: islpy.Set, typical: Sequence[Mapping[str, int]]) -> Formula:
    """The formula of these cells, joined where they can be; that of typical long sequences comes first."""
    points = [digits for digits in (digits_at(affine, values) for values in typical) if digits is not None]
    ordered = sorted(cells, key=lambda cell: [not _contains(cell.domain, digits) for digits in points])
    return Formula(tuple(joined(ordered, context)), affine, context, tuple(points))


def usual_first(found: Formula) -> Formula:
    """The same, where its first case holds for one of the typical sequences only, with the case of most of them first:
    no one asks about N % 4 = 3 before N % 4 = 0."""

    def num_held(cell: Cell) -> int:
        return sum(_contains(cell.domain, digits) for digits in found.typical)

    if len(found.cells) < 2 or num_held(found.cells[0]) > 1:
        return found
    main = max(found.cells, key=num_held)
    return replace(found, cells=(main, *(cell for cell in found.cells if cell is not main)))


def digits_at(affine: Affine, values: Mapping[str, Any], *, of: str = "") -> dict[str, Any] | None:
    """The digits and named values at given lengths and parameters; None where an assumed division leaves a rest.

    of: "q" or "k" where the digits of that position are wanted too; its value may be an array.
    """
    digits = {safe_name(name): value for name, value in values.items()}
    for item in resolved(affine, of):
        if isinstance(item, Named):
            value = int(item.value.at(digits))
            value = value if item.least is None else max(item.least, value)
            match item.operation:
                case "floor":
                    digits[item.name] = value // item.divisor
                case "isqrt":
                    digits[item.name] = isqrt(value)
                case "log2":
                    digits[item.name] = value.bit_length() - 1
                case _:
                    digits[item.name] = value
            continue
        radix = int(item.radix.at(digits))
        if radix < 1 or (item.remainder is None and digits[item.name] % radix):
            return None
        digits[item.quotient] = digits[item.name] // radix
        if item.remainder is not None:
            digits[item.remainder] = digits[item.name] % radix
    return digits


def _contains(domain: islpy.Set, digits: Mapping[str, int]) -> bool:
    import islpy

    kind = islpy.dim_type.param
    for at, name in enumerate(dim_names(domain, kind)):
        domain = domain.fix_val(kind, at, islpy.Val(digits[name], context=domain.get_ctx()))
    return not domain.is_empty()


# ---- text


def _sympy(value: Polynomial, affine: Affine) -> Any:
    import sympy

    symbols: dict[str, Any] = {}

    def expressed(polynomial: Polynomial) -> Any:
        return sympy.Add(
            *(
                sympy.Rational(factor.numerator, factor.denominator) * sympy.Mul(*(made(name) for name in monomial))
                for monomial, factor in ((m, Fraction(f)) for m, f in polynomial.terms.items())
            )
        )

    def made(name: str) -> Any:
        if name not in symbols:
            symbols[name] = sympy.Symbol(plain_name(name), integer=True, nonnegative=True)
        return symbols[name]

    for item in resolved(affine):
        if isinstance(item, Named):
            inner = expressed(item.value)
            inner = inner if item.least is None else sympy.Max(item.least, inner)
            match item.operation:
                case "floor":
                    symbols[item.name] = sympy.floor(inner / item.divisor)
                case "isqrt":
                    symbols[item.name] = sympy.floor(sympy.sqrt(inner))
                case "log2":
                    symbols[item.name] = sympy.floor(sympy.log(inner, 2))
                case _:
                    symbols[item.name] = inner
            continue
        whole, radix = made(item.name), expressed(item.radix)
        if item.remainder is None:
            symbols[item.quotient] = whole / radix
        else:
            symbols[item.quotient] = sympy.floor(whole / radix)
            symbols[item.remainder] = whole - radix * symbols[item.quotient]
    return expressed(value)


def _integral(value: Polynomial, affine: Affine) -> str:
    """The polynomial over its common denominator, each digit as what it is of N and the parameters."""
    names: dict[str, str] = {}

    def written(polynomial: Polynomial, whole: int = 1) -> str:
        terms = []
        for monomial, factor in polynomial.terms.items():
            by = int(factor * whole)
            factors = [str(abs(by))] if abs(by) != 1 or not monomial else []
            terms.append((by < 0, " * ".join([*factors, *(names.get(name, plain_name(name)) for name in monomial)])))
        terms.sort(key=lambda term: term[0])
        joined = "".join(f" {'-' if is_negative else '+'} {text}" for is_negative, text in terms) or " + 0"
        return joined.removeprefix(" + ").replace(" - ", "-", 1) if joined.startswith(" - ") else joined[3:]

    def bracketed(text: str) -> str:
        return text if text.isalnum() else f"({text})"

    for item in resolved(affine):
        if isinstance(item, Named):
            inside = written(item.value)
            inside = inside if item.least is None else f"max({item.least}, {inside})"
            names[item.name] = {
                "floor": f"({bracketed(inside)} // {item.divisor})",
                "isqrt": f"isqrt({inside})",
                "log2": f"(({inside}).bit_length() - 1)",
            }.get(item.operation, bracketed(inside))
        else:
            digit, radix = names.get(item.name, plain_name(item.name)), bracketed(written(item.radix))
            names[item.quotient] = f"({digit} // {radix})"
            if item.remainder is not None:
                names[item.remainder] = f"({digit} % {radix})"
    whole = lcm(*(Fraction(factor).denominator for factor in value.terms.values()))
    return written(value) if whole == 1 else f"({written(value, whole)}) // {whole}"


def _arranged(expression: Any) -> Any:
    """The shortest of a few arrangements of the terms."""
    import sympy

    expanded = sympy.expand(expression)
    n = sympy.Symbol("N", integer=True, nonnegative=True)
    options = [expanded, sympy.collect(expanded, n), sympy.factor_terms(expanded)]
    if len(expanded.args) <= 12:
        options.append(_rising(sympy.factor(expanded), n))
    return min(options, key=lambda option: len(str(option)))


def _rising(product: Any, n: Any) -> Any:
    """The same product, the sums in it written so that N has a plus: (N - g)², not (g - N)²."""
    import sympy

    sign, factors = 1, []
    for factor in sympy.Mul.make_args(product):
        base, power = factor.as_base_exp()
        if base.is_Add and base.expand().coeff(n).is_negative:
            base, sign = -base, sign * (-1) ** power
        factors.append(base**power)
    return sympy.Mul(sign, *factors)


def _pretty(text: str) -> str:
    """Multiplication as a dot, small powers raised, floors in brackets."""
    import re

    text = re.sub(r"\*\*(\d+)", lambda match: match[1].translate(SUPERSCRIPTS), text)
    text = text.replace("*", "·").replace("Max(", "max(")
    while "floor(" in text:
        at = text.index("floor(")
        depth, end = 1, at + 6
        while depth:
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        text = f"{text[:at]}⌊{text[at + 6 : end - 1]}⌋{text[end:]}"
    return text
