"""Which name means what? Scopes, overloads, parameters, imports and definitions, where they are easy to get wrong.

Each row is a spec and an expression over Python's q and k that says what it should keep.
"""

from __future__ import annotations

import pytest

import patterndsl
from patterndsl import PatternError
from tests import brute

N = 12


def kept(text: str, heads: int = 1, layer: int = 0) -> list[set[tuple[int, int]]]:
    """The pairs of each head."""
    mask = patterndsl.parse(text).compile(N, heads=heads, layer=layer).mask()
    return [{(q, k) for q, k in mask[min(head, len(mask) - 1)].nonzero().tolist()} for head in range(heads)]


def pairs(python: str) -> set[tuple[int, int]]:
    return {(q, k) for q in range(N) for k in range(N) if eval(python, {"q": q, "k": k, "N": N})}


MEANINGS = {
    "a definition before its use": ("define: {a: q < k, b: ~a}\nattend: b", "q >= k"),
    "a definition behind its use": ("define: {b: ~a, a: q < k}\nattend: b", "q >= k"),
    "a parameter of a definition hides a parameter of the spec": (
        'params: {w: 1}\ndefine: {"f(w)": window(w)}\nattend: f(3)',
        "abs(q - k) <= 3",
    ),
    "an argument is read where it is written": (
        'params: {w: 1}\ndefine: {"f(w)": window(w)}\nattend: f(w + 1)',
        "abs(q - k) <= 2",
    ),
    "an argument of the same name as another parameter": (
        'define: {"f(a, b)": "a <= q - k < b", "g(b, a)": "f(b, a)"}\nattend: g(0, 3)',
        "0 <= q - k < 3",
    ),
    "own definition instead of the prelude's": ('define: {"window(w)": q == k + w}\nattend: window(2)', "q == k + 2"),
    "the prelude keeps its own": (
        'define: {"window(w)": none}\nattend: dilated(2, 1)',
        "abs(q - k) <= 2",
    ),
    "an overload by the number of arguments": (
        'define: {"f": q == k, "f(a)": q == k + a, "f(a, b)": q == k + a * b}\nattend: f | f(1) | f(2, 3)',
        "q - k in (0, 1, 6)",
    ),
    "arguments by name in any order": ("attend: window(right = 1, left = 3)", "-1 <= q - k <= 3"),
    "by place, then by name": ("attend: window(3, right = 1)", "-1 <= q - k <= 3"),
    "a definition of an integer": ('define: {"half(x)": x // 2}\nattend: half(q) == half(k)', "q // 2 == k // 2"),
    "a definition of a position": ("define: {x: q - k}\nattend: x in 0..3", "0 <= q - k < 3"),
    "positions are those where the definition stands": (
        "define: {x: q - k}\nattend: (x in 0..3) at (k, q)",
        "0 <= k - q < 3",
    ),
    "positions of an argument are replaced": (
        'define: {"f(R)": "R at (q // 2, k // 2)"}\nattend: f(q == k)',
        "q // 2 == k // 2",
    ),
    "positions of an integer argument are not": (
        'define: {"f(x)": "(k == 0) at (q, k - x)"}\nattend: f(q // 2)',
        "k == q // 2",
    ),
    "lengths of an argument are replaced": ("attend: blocks(3, k == N - 1)", "k // 3 == 3"),
    "a parameter keeps the whole length": ("params: {m: N}\nattend: blocks(3, k == m // 4)", "k // 3 == 3"),
    "a difference of unknown kind: predicates": (
        'define: {"less(A, B)": A - B}\nattend: less(window(3), q == k)',
        "abs(q - k) <= 3 and q != k",
    ),
    "a difference of unknown kind: integers": (
        'define: {"less(A, B)": A - B}\nattend: less(q, k) == 2',
        "q - k == 2",
    ),
    "a difference with a definition by name": (
        'define: {near: window(3), "ring(R)": near - R}\nattend: ring(q == k)',
        "abs(q - k) <= 3 and q != k",
    ),
    "a kind that only the caller tells": (
        'define: {"same_as(R)": R, "f(R)": "same_as(R) | none", "g(x)": "same_as(x) < 3"}\nattend: f(q == k) | g(q)',
        "q == k or q < 3",
    ),
    "an unused parameter takes anything": ('define: {"f(R)": q == k}\nattend: f(causal) | f(3)', "q == k"),
    "a parameter of a parameter": ("params: {w: 2, v: w * w, u: v - w}\nattend: window(u)", "abs(q - k) <= 2"),
    "an item of a list as a parameter": ("params: {d: [1, 4], w: 'd[1]'}\nattend: window(w)", "abs(q - k) <= 4"),
    "words for signs": ("attend: q < 4 and not k < 4 or q == k", "q < 4 and not k < 4 or q == k"),
    "chains": ("attend: 0 <= q - k < 4 != k", "0 <= q - k < 4 != k"),
    "ranges are half-open": ("attend: q - k in -2..3", "-2 <= q - k < 3"),
    "an empty range": ("attend: q in 5..5 | q in 7..3", "False"),
    "floors below zero": ("attend: (k - q) // 3 == -1 & (k - q) % 3 == 1", "(k - q) // 3 == -1 and (k - q) % 3 == 1"),
    "ceildiv rounds up": ("attend: ceildiv(q - 6, 4) == ceildiv(k, 4)", "-((6 - q) // 4) == -(-k // 4)"),
    "clamp with crossed bounds takes the lower one": ("attend: clamp(q, 5, 3) == k", "k == 5"),
    "transpose of a rectangle": ("attend: transpose(q == N - 1)", "k == N - 1"),
    "rescaled one by one": ("attend: (q == Nq - 1 & k == Nk - 1) at (q, k, Nq = 3, Nk = 4)", "q == 2 and k == 3"),
    "N rescales both": ("attend: (q == Nq - 1 & k == Nk - 1) at (q, k, N = N // 3)", "q == 3 and k == 3"),
    "N and one of its own": ("attend: (q == Nq - 1 & k == Nk - 1) at (q, k, N = N // 3, Nk = 5)", "q == 3 and k == 4"),
    "an inner frame within an outer": ("attend: blocks(2, blocks(3, k == N - 1))", "k // 6 == 1"),
    "an import with its defaults": ("import: {o: {params: {w: 2}, attend: window(w)}}\nattend: o", "abs(q - k) <= 2"),
    "an import with its parameter given": (
        "import: {o: {params: {w: 2}, attend: window(w)}}\nattend: o(w = 4)",
        "abs(q - k) <= 4",
    ),
    "an import's default sees a given parameter": (
        "import: {o: {params: {w: 2, v: 2 * w}, attend: window(v)}}\nattend: o(w = 3)",
        "abs(q - k) <= 6",
    ),
    "an import does not see the importing spec": (
        "params: {w: 9}\nimport: {o: {params: {w: 2}, attend: window(w)}}\nattend: o",
        "abs(q - k) <= 2",
    ),
    "an import's argument sees the importing spec": (
        "params: {v: 3}\nimport: {o: {params: {w: 2}, attend: window(w)}}\nattend: o(w = v)",
        "abs(q - k) <= 3",
    ),
    "an import's argument may be a position": (
        "import: {o: {params: {w: 2}, attend: k < w}}\nattend: o(w = q)",
        "k < q",
    ),
    "an import in blocks": ("import: {o: {attend: k == N - 1}}\nattend: blocks(3, o)", "k // 3 == 3"),
    "an import of an import": (
        "import: {o: {import: {i: {attend: causal}}, attend: i & window(2)}}\nattend: o",
        "0 <= q - k <= 2",
    ),
    "definitions of an import are its own": (
        "import: {o: {define: {f: q == k}, attend: f}}\ndefine: {f: causal}\nattend: o",
        "q == k",
    ),
}


@pytest.mark.parametrize(("text", "python"), MEANINGS.values(), ids=MEANINGS)
def test_meaning(text: str, python: str) -> None:
    assert kept(text)[0] == pairs(python)


@pytest.mark.parametrize("text", [row[0] for row in MEANINGS.values()], ids=MEANINGS)
def test_the_second_reading_agrees(text: str) -> None:
    """The helper that random specs are judged by, on the same rows."""
    mask = brute.keep(patterndsl.parse(text).spec, brute.lengths(N))[0]
    assert {(q, k) for q in range(N) for k in range(N) if mask[q, k]} == kept(text)[0]


def test_the_second_reading_knows_the_prelude() -> None:
    from patterndsl.sema.resolve import prelude_names

    assert {name for name, _ in brute.MACROS} == set(prelude_names())


PER_HEAD = {
    "a list": ("params: {d: [1, 2, 4]}\nattend: strided(d[head])", ["True", "(q - k) % 2 == 0", "(q - k) % 4 == 0"]),
    "a list modulo its length": (
        "params: {d: [1, 3]}\nattend: strided(d[head % 2])",
        ["True", "(q - k) % 3 == 0", "True"],
    ),
    "a list as an argument": (
        'params: {d: [2, 3]}\ndefine: {"f(l, i)": "strided(l[i % 2])"}\nattend: f(d, head)',
        ["(q - k) % 2 == 0", "(q - k) % 3 == 0", "(q - k) % 2 == 0"],
    ),
    "a list of an import": (
        "import: {o: {params: {d: [1, 2]}, attend: 'strided(d[head % 2])'}}\nattend: o",
        ["True", "(q - k) % 2 == 0", "True"],
    ),
    "a list given to an import": (
        "params: {e: [2, 3]}\nimport: {o: {params: {d: [1, 1]}, attend: 'strided(d[head % 2])'}}\nattend: o(d = e)",
        ["(q - k) % 2 == 0", "(q - k) % 3 == 0", "(q - k) % 2 == 0"],
    ),
    "the head itself": ("attend: q == k + head", ["q == k", "q == k + 1", "q == k + 2"]),
    "a minimum that every head keeps": (
        "import: {o: {params: {w: {default: 1, min: 1}}, attend: window(w)}}\nattend: o(w = head + 1)",
        ["abs(q - k) <= 1", "abs(q - k) <= 2", "abs(q - k) <= 3"],
    ),
}


@pytest.mark.parametrize(("text", "python"), PER_HEAD.values(), ids=PER_HEAD)
def test_meaning_per_head(text: str, python: list[str]) -> None:
    assert kept(text, heads=3) == [pairs(each) for each in python]


@pytest.mark.parametrize("layer", [0, 1, 5, 11])
def test_meaning_per_layer(layer: int) -> None:
    found = kept("causal & (recent(3) | layer % 6 == 5)", layer=layer)[0]
    assert found == pairs("k <= q" if layer % 6 == 5 else "0 <= q - k < 3")


GROUPS = {
    "all heads alike": ("window(3)", 4, [(0, 1, 2, 3)]),
    "head written, and without effect": ("head >= 0 | causal", 3, [(0, 1, 2)]),
    "two kinds": ("head % 2 == 0 | causal", 4, [(0, 2), (1, 3)]),
    "each its own": ("q == k + head", 3, [(0,), (1,), (2,)]),
    "drawn by head": ("random(1, seed = head % 2)", 3, [(0, 2), (1,)]),
}


@pytest.mark.parametrize(("text", "heads", "expected"), GROUPS.values(), ids=GROUPS)
def test_heads_that_agree_are_one_group(text: str, heads: int, expected: list[tuple[int, ...]]) -> None:
    assert [group.heads for group in patterndsl.parse(text).bind(8, heads=heads).groups] == expected


# ---- grids ------------------------------------------------------------------------------------------------------

GRID = "grid: {z: 2, y: 3, x: 2, zy: [z, y], xz: [x, z]}\nattend: "
COORDINATES = {
    "q.z == 1": "q // 6 == 1",
    "q.y == 1": "q // 2 % 3 == 1",
    "q.x == 1": "q % 2 == 1",
    "q.zy == k": "k == q // 6 * 3 + q // 2 % 3",
    "q.xz == k": "k == q % 2 * 2 + q // 6",
    "q.z.start == k": "k == q // 6 * 6",
    "q.y.start == k": "k == q // 2 * 2",
    "q.x.start == k": "k == q",
    "q.z.rank == k": "k == q",
    "q.y.rank == k": "k == sorted(range(N), key=lambda at: (at // 2 % 3, at)).index(q)",
    "q.x.rank == k": "k == sorted(range(N), key=lambda at: (at % 2, at)).index(q)",
    "same(y)": "q // 2 % 3 == k // 2 % 3",
    "along(x)": "q // 2 == k // 2",
    "along(zy)": "q % 2 == k % 2",
    "along(xz)": "q // 2 % 3 == k // 2 % 3",
}


@pytest.mark.parametrize(("text", "python"), COORDINATES.items(), ids=COORDINATES)
def test_grid(text: str, python: str) -> None:
    assert kept(GRID + text)[0] == pairs(python)


@pytest.mark.parametrize("size", [1, 2, 12])
def test_a_run_of_an_axis_of_one_is_everything(size: int) -> None:
    """An axis of size 1 never changes, so its one run starts at 0."""
    found = kept(f"grid: {{a: {N // size}, b: {size}}}\nattend: k == q.b.start")[0]
    assert found == pairs("k == 0" if size == 1 else "k == q")


# ---- what cannot be ---------------------------------------------------------------------------------------------

MISTAKES = {
    "a name of the importing spec in an import": (
        "params: {w: 2}\nimport: {o: {attend: window(w)}}\nattend: o",
        "E201",
    ),
    "a definition of an import": ("import: {o: {define: {f: causal}, attend: f}}\nattend: f", "E201"),
    "a parameter of a definition outside it": ('define: {"f(w)": window(w)}\nattend: window(w)', "E201"),
    "a parameter before its declaration": ("params: {a: b, b: 2}\nattend: window(a)", "E201"),
    "a parameter of itself": ("params: {a: a + 1}\nattend: window(a)", "E201"),
    "a mistake in an unused definition": ("define: {f: windw(3)}\nattend: causal", "E201"),
    "a mistake in an import in place": ("import: {o: {attend: windw(3)}}\nattend: o", "E201"),
    "recursion through an argument": ('define: {"f(R)": R, g: f(g)}\nattend: g', "E205"),
    "an import that recurs through a definition": ("import: {o: {define: {f: f}, attend: f}}\nattend: o", "E205"),
    "a composed axis without base axes": ("grid: {a: [b]}\nattend: causal", "E202"),
    "a composed axis of a composed axis": ("grid: {a: 3, b: 4, c: [a, b], d: [c]}\nattend: causal", "E202"),
    "an attribute as a number": ("inputs: {doc: 'int[N]'}\nattend: window(doc)", "E203"),
    "a table without an index": ("inputs: {t: 'int[]'}\nattend: t == 3", "E203"),
    "a list with a table's index": ("params: {d: [1]}\ninputs: {t: 'int[]'}\nattend: 'window(d[t[0]])'", "E207"),
    "random of a random count": ("random(q)", "E209"),
    "random under lengths of an input": (
        "inputs: {doc: 'int[N]'}\nattend: random(1) at (q, k, N = q.doc)",
        "E209",
    ),
}


@pytest.mark.parametrize(("text", "code"), MISTAKES.values(), ids=MISTAKES)
def test_mistake(text: str, code: str) -> None:
    with pytest.raises(PatternError) as caught:
        patterndsl.parse(text).bind(N)
    assert [found.code for found in caught.value.diagnostics] == [code]


def test_a_long_difference_is_read_once() -> None:
    """Sixty minus signs are sixty operations, not 2^60."""
    text = " - ".join(["q"] * 60) + " < 3"
    assert patterndsl.parse(text).bind(4).groups
