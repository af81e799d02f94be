"""How fast does a count grow? Its order and its leading terms where 1 <= every parameter <= N.

Each digit is taken for its size: N // l for N / l, and N % l for l at most, so that its factor is not known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import isqrt

from patterndsl.analysis.digits import Affine, resolved
from patterndsl.analysis.polynomial import Monomial, Polynomial
from patterndsl.analysis.radix import Named, plain_name

LOG = "log N"


@dataclass(frozen=True, slots=True)
class _Size:
    """factor * (the symbols to these powers), to leading order; the factor is None where only the order is known."""

    powers: Mapping[str, Fraction]
    factor: Fraction | None = Fraction(1)


def order(value: Polynomial, affine: Affine, growth: Mapping[str, Fraction] | None = None) -> str:
    """Θ(...) of the formula for long sequences: its largest terms.

    growth: what power of N a parameter grows as; with it the order is a power of N.
    """
    powers = [item.powers for item in _terms(value, affine)]
    if growth is not None:
        powers = [_in_n(item, growth) for item in powers]
    kept = _largest(powers)
    names = sorted({name for item in kept for name in item if name != "N"})
    unique = {tuple(sorted(item.items())) for item in kept}
    written = sorted((_monomial(dict(item), names) for item in unique), key=lambda text: (len(text), text))
    return f"Θ({' + '.join(written) or '1'})"


def leading(value: Polynomial, affine: Affine) -> str | None:
    """The largest terms with their factors, `2·N·w`; None where a factor is not known."""
    terms = _terms(value, affine)
    kept = _largest([item.powers for item in terms])
    factors: dict[tuple[tuple[str, Fraction], ...], Fraction] = {}
    for item in terms:
        if item.powers in kept:
            if item.factor is None:
                return None
            key = tuple(sorted(item.powers.items()))
            factors[key] = factors.get(key, Fraction(0)) + item.factor
    names = sorted({name for key in factors for name, _ in key if name != "N"})
    written = [(_monomial(dict(key), names, abs(factor)), factor < 0) for key, factor in factors.items() if factor]
    if not written:
        return None
    (first, is_negative), *others = sorted(written, key=lambda item: (item[1], len(item[0]), item[0]))
    return "-" * is_negative + first + "".join(f" {'-' if minus else '+'} {text}" for text, minus in others)


def _largest(powers: Sequence[Mapping[str, Fraction]]) -> list[Mapping[str, Fraction]]:
    """Those that no other exceeds."""
    return [item for item in powers if not any(_below(item, other) for other in powers if other is not item)]


def _in_n(powers: Mapping[str, Fraction], growth: Mapping[str, Fraction]) -> dict[str, Fraction]:
    """The parameters as the powers of N that they grow as; the others are constant."""
    rates = {"N": Fraction(1), **growth}
    total_power = sum((power * rates.get(name, 0) for name, power in powers.items()), Fraction(0))
    found = {"N": total_power, LOG: powers.get(LOG, Fraction(0))}
    return {name: power for name, power in found.items() if power}


def _terms(value: Polynomial, affine: Affine) -> list[_Size]:
    """The size of every term."""
    sizes: dict[str, _Size] = {}

    def size(name: str) -> _Size:
        return sizes.get(name, _Size({plain_name(name): Fraction(1)}))

    def of(monomial: Monomial, factor: Fraction) -> _Size:
        return _times(_Size({}, factor), *map(size, monomial))

    def largest(polynomial: Polynomial) -> _Size:
        terms = [(monomial, Fraction(factor)) for monomial, factor in polynomial.terms.items() if monomial]
        if not terms:
            return _Size({}, Fraction(polynomial.constant))
        found = of(*terms[0])
        return found if len(terms) == 1 else _Size(found.powers, None)

    lengths = {"N"}
    for item in resolved(affine):
        if isinstance(item, Named):
            sizes[item.name] = _named(item, largest(item.value))
            continue
        radix = largest(item.radix)
        inverse = {name: -power for name, power in radix.powers.items()}
        sizes[item.quotient] = _times(size(item.name), _Size(inverse, None if not radix.factor else 1 / radix.factor))
        if item.name in lengths:
            lengths |= {item.quotient, item.remainder or item.quotient}
        if item.remainder is not None:
            sizes[item.remainder] = _Size((radix if item.name in lengths else size(item.name)).powers, None)
    return [of(monomial, Fraction(factor)) for monomial, factor in value.terms.items()]


def _named(item: Named, inside: _Size) -> _Size:
    match item.operation:
        case "isqrt":
            root = None if inside.factor is None else _root(inside.factor)
            return _Size({name: power / 2 for name, power in inside.powers.items()}, root)
        case "log2":
            return _Size({LOG: Fraction(1)})
        case "floor":
            return _Size(inside.powers, None if inside.factor is None else inside.factor / item.divisor)
        case _:
            return inside


def _root(factor: Fraction) -> Fraction | None:
    root = Fraction(isqrt(abs(factor.numerator)), isqrt(factor.denominator))
    return root if root * root == factor else None


def _times(*sizes: _Size) -> _Size:
    powers: dict[str, Fraction] = {}
    factor: Fraction | None = Fraction(1)
    for item in sizes:
        for name, power in item.powers.items():
            powers[name] = powers.get(name, Fraction(0)) + power
        factor = None if factor is None or item.factor is None else factor * item.factor
    return _Size({name: power for name, power in powers.items() if power}, factor)


def _below(item: Mapping[str, Fraction], other: Mapping[str, Fraction]) -> bool:
    """item <= other wherever 1 <= every parameter <= N, and not the same."""
    if item == other:
        return False
    more = {name: item.get(name, Fraction(0)) - other.get(name, Fraction(0)) for name in item.keys() | other.keys()}
    # each parameter lies between N^0 and N^1, and the worst of these is what counts
    return more.pop("N", Fraction(0)) + sum(max(power, Fraction(0)) for power in more.values()) <= 0


def _monomial(powers: Mapping[str, Fraction], names: Sequence[str], factor: Fraction | None = None) -> str:
    """The powers as they are written, with a factor in front where it is given."""
    above = [_raised(name, powers[name]) for name in ("N", *names) if powers.get(name, 0) > 0]
    below = [_raised(name, -powers[name]) for name in ("N", *names) if powers.get(name, 0) < 0]
    if factor is not None:
        above = [str(factor.numerator)] * (factor.numerator > 1) + above
        below = [str(factor.denominator)] * (factor.denominator > 1) + below
    text, divisor = "·".join(above) or "1", "·".join(below)
    divisor = f"({divisor})" if factor is not None and len(below) > 1 else divisor
    return f"{text}/{divisor}" if below else text


SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def _raised(name: str, power: Fraction) -> str:
    """name², √name, name√name."""
    whole, part = divmod(power, 1)
    if part not in (0, Fraction(1, 2)):
        return f"{name}^({power})"
    plain = {0: "", 1: name}.get(int(whole), f"{name}{str(whole).translate(SUPERSCRIPTS)}")
    return plain + (f"√{name}" if part else "")
