"""How does a condition read? Inequalities of the language, in which each digit is what it is a digit of.

What a reader knows anyway, that no length, parameter or digit is negative, is left out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from patterndsl.analysis.digits import Affine, resolved
from patterndsl.analysis.polynomial import Polynomial, constant, symbol, total
from patterndsl.analysis.radix import Named, Split, divided, plain_name
from patterndsl.analysis.sets import Constraint, Floor, coalesced, constraints, floors

if TYPE_CHECKING:
    import islpy


def condition(points: islpy.Set, shown: Mapping[str, str], subject: Collection[str] = ()) -> str:
    """A set as inequalities of the language, each digit as it is shown; those of the subject alone on the left."""
    parts = []
    for basic in coalesced(points).compute_divs().get_basic_sets():
        known = floors(basic)
        names = dict(shown)
        for at, floor in enumerate(known):
            names[f"e{at}"] = f"{_whole(_written(_inside(floor), names))} // {floor.divisor}"
        told = (item for item in constraints(basic) if not _goes_without_saying(item, known))
        parts.append(" and ".join(_comparison(item, names, known, subject) for item in told) or "always")
    if not parts:
        return "never"
    if "always" in parts:
        return "always"
    return " or ".join(f"({part})" if " and " in part and len(parts) > 1 else part for part in parts)


def assumptions(affine: Affine) -> tuple[str, ...]:
    """The divisions that leave no remainder by assumption, as texts. Of several in a row the last says it all."""
    shown = shown_names(affine)
    exact = {item.quotient: _whole_of(item, affine) for item in affine.assumed}
    ends = [item for item in affine.assumed if not any(other.name == item.quotient for other in affine.assumed)]
    found = []
    for name, radix in (exact[item.quotient] for item in ends):
        found.append(f"{_whole(shown[name])} % {_factor(_written(_folded(radix, exact), shown))} == 0")
    return tuple(found)


def shown_names(affine: Affine, of: str = "") -> dict[str, str]:
    """How each digit of the lengths and parameters, and of the position `of`, is written: `N // l`, `N % l`."""
    shown: dict[str, str] = {}
    exact: dict[str, tuple[str, Polynomial]] = {}
    for item in resolved(affine, of):
        if isinstance(item, Named):
            inner = _written(item.value, shown)
            inner = inner if item.least is None else f"max({item.least}, {inner})"
            shown[item.name] = {
                "floor": f"{_whole(inner)} // {item.divisor}",
                "product": inner,
                "constant": inner,
            }.get(item.operation, f"{item.operation}({inner})")
        elif item.remainder is None:
            name, radix = exact[item.quotient] = _whole_of(item, affine)
            shown[item.quotient] = (
                f"{_whole(shown.get(name, name))} / {_factor(_written(_folded(radix, exact), shown))}"
            )
        else:
            whole, divisor = _whole(shown.get(item.name, item.name)), _factor(_written(item.radix, shown))
            shown[item.quotient], shown[item.remainder] = f"{whole} // {divisor}", f"{whole} % {divisor}"
    return {name: shown.get(name, plain_name(name)) for name in (*affine.values, *shown, *affine.params)}


def _whole_of(item: Split, affine: Affine) -> tuple[str, Polynomial]:
    """What an exact quotient is divided from, by all that was divided out of it without a rest."""
    name, radix = item.name, item.radix
    while (outer := next((other for other in affine.assumed if other.quotient == name), None)) is not None:
        name, radix = outer.name, radix * outer.radix
    return name, radix


def _folded(value: Polynomial, exact: Mapping[str, tuple[str, Polynomial]]) -> Polynomial:
    """The value with exact quotients multiplied back where all of their divisor is there: 4 * (w / 4) is w."""
    for quotient, (name, radix) in exact.items():
        high, low = divided(value, symbol(quotient) * radix)
        if high.terms and not low.terms:
            value = high * symbol(name)
    return value


# ---- one comparison


def _inside(floor: Floor) -> Polynomial:
    return total([constant(floor.constant), *(symbol(name) * by for name, by in floor.factors)])


def _goes_without_saying(item: Constraint, known: Sequence[Floor]) -> bool:
    """Whether it says that a sum of what is never negative is not, or no more than what a floor is."""
    if item.is_equality:
        return False
    quotients = {f"e{at}" for at in range(len(known))}
    if item.constant >= 0 and all(by > 0 and name not in quotients for name, by in item.factors):
        return True
    for at, floor in enumerate(known):
        rest = _inside(floor) - symbol(f"e{at}") * floor.divisor
        value = _side(item)
        if value in (rest, -rest + floor.divisor - 1):
            return True
    return False


def _side(item: Constraint) -> Polynomial:
    return total([constant(item.constant), *(symbol(name) * by for name, by in item.factors)])


def _comparison(
    item: Constraint, shown: Mapping[str, str], known: Sequence[Floor] = (), subject: Collection[str] = ()
) -> str:
    """factors + constant >= 0 solved for the subject, or with every term on the side where it is positive."""
    for at, floor in enumerate(known):
        rest = _inside(floor) - symbol(f"e{at}") * floor.divisor
        for sign in (1, -1):
            beyond = _side(item) - rest * sign
            if beyond.is_constant:
                return _of_remainder(item.is_equality, floor, sign, int(beyond.constant), shown)
    named = [(name, factor) for name, factor in item.factors if name in subject and abs(factor) == 1]
    if len(named) == 1:
        return _solved(item, shown, *named[0])
    sides: tuple[list[str], list[str]] = ([], [])
    for name, factor in item.factors:
        text = _factor(shown.get(name, name)) if abs(factor) > 1 else shown.get(name, name)
        sides[factor < 0].append(text if abs(factor) == 1 else f"{abs(factor)}·{text}")
    strict = item.constant == -1 and not item.is_equality and bool(sides[1])
    if item.constant and not strict:
        sides[item.constant < 0].append(str(abs(item.constant)))
    left, right = (" + ".join(side) or "0" for side in sides)
    if left.isdigit() and not item.is_equality:  # N ≤ 7 and not 7 ≥ N
        return f"{right} ≤ {left}"
    return f"{left} {'=' if item.is_equality else '>' if strict else '≥'} {right}"


def _of_remainder(is_equality: bool, floor: Floor, sign: int, beyond: int, shown: Mapping[str, str]) -> str:
    """`N % 3 = 2`, `N % 3 ≥ 1`: sign * remainder + beyond is 0, or at least 0."""
    if is_equality:  # of the symbols alone
        plain = _written(_inside(floor) - floor.constant, shown)
        return f"{_whole(plain)} % {floor.divisor} = {(-sign * beyond - floor.constant) % floor.divisor}"
    text = f"{_whole(_written(_inside(floor), shown))} % {floor.divisor}"
    return f"{text} ≥ {-beyond}" if sign > 0 else f"{text} ≤ {beyond}"


def _solved(item: Constraint, shown: Mapping[str, str], name: str, sign: int) -> str:
    """`k > t - w`: what the constraint says of one symbol, whose factor is 1 or -1."""
    others = [symbol(other) * by for other, by in item.factors if other != name]
    rest = total([constant(item.constant), *others]) * -sign
    relation = "=" if item.is_equality else "≥" if sign > 0 else "≤"
    if not item.is_equality and rest.constant == sign and not rest.is_constant:  # k >= x + 1, k <= x - 1
        relation, rest = ">" if sign > 0 else "<", rest - sign
    return f"{shown.get(name, name)} {relation} {_written(rest, shown).replace(' * ', '·')}"


# ---- one expression


def _written(value: Polynomial, shown: Mapping[str, str]) -> str:
    """A polynomial as an expression of the language."""
    parts: list[str] = []
    for monomial, factor in sorted(value.terms.items(), key=lambda item: (item[1] < 0, -len(item[0]), item[0])):
        names = [shown.get(name, plain_name(name)) for name in monomial]
        size = abs(factor)
        factors = ([str(size)] if size != 1 or not names else []) + names
        text = " * ".join(map(_factor, factors)) if len(factors) > 1 or _is_sum(factors[0]) else factors[0]
        parts.append(("- " if factor < 0 else "+ ") + text)
    joined = " ".join(parts) or "0"
    return joined.removeprefix("+ ").replace("- ", "-", 1) if joined.startswith("-") else joined.removeprefix("+ ")


def _is_sum(text: str) -> bool:
    return " + " in text or " - " in text


def _whole(text: str) -> str:
    """What is divided: quotients and products need no parentheses there."""
    return f"({text})" if _is_sum(text) else text


def _factor(text: str) -> str:
    return f"({text})" if " " in text else text
