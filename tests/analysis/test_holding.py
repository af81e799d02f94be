"""What a decoder holds, against the last query of every key by brute force."""

from __future__ import annotations

import numpy as np
import pytest

import patterndsl
from patterndsl import PatternError
from patterndsl.analysis.holding import bound_for_decoding, holding

N = 300

HELD = {
    "recent(40) | causal & first(4)": (40, [0, 1, 2, 3]),
    "recent(100000)": (100_000, []),
    "causal & (recent(17) | k == 100)": (17, [100]),
    "causal & block(16)": (16, []),
    "causal & blocks(16, window(1))": (32, []),
    "causal & (block(16) | columns(16, 3))": (16, [k for k in range(N) if k % 16 >= 13]),
    "causal": (0, list(range(N))),
    "causal & (recent(20) | strided(16))": (0, list(range(N))),
    "causal & q > 20 & k < 10": (0, list(range(10))),
    "none": (0, []),
}


@pytest.mark.parametrize("text", HELD)
def test_ring_and_lasting_keys(text: str) -> None:
    found = holding([patterndsl.parse(text).bind(1 << 30).relation], None)
    newest, lasting = HELD[text]
    assert found.newest == newest
    assert found.lasting(0, N).tolist() == lasting
    assert found.lasting(7, 20).tolist() == [k for k in lasting if 7 <= k < 20]
    assert found.kind == ("growing" if len(lasting) > 20 else "bounded")


@pytest.mark.parametrize("text", [*HELD, "causal & (q - k) % 7 < 3 & q - k < 50", "q == k | q == 2 * k"])
def test_no_key_is_missing(text: str) -> None:
    """What a query attends is among the newest keys or lasts."""
    pattern = patterndsl.parse(text)
    found = holding([pattern.bind(1 << 30).relation], None)
    q, k = np.nonzero(pattern.compile(N).mask()[0].numpy())
    assert np.isin(k[q - k >= found.newest], found.lasting(0, N)).all()


def test_heads_that_share_keys() -> None:
    bound = patterndsl.parse("head < 1 & recent(9) | head >= 1 & (recent(5) | causal & first(3))").bind(
        1 << 30, heads=2
    )
    found = holding([group.relation for group in bound.groups], None)
    assert (found.newest, found.lasting(0, N).tolist()) == (9, [0, 1, 2])


def test_without_a_policy_all_last() -> None:
    pattern = patterndsl.parse("causal & q % 3 == 1 & k % 7 == 2")
    assert "formula" in type(pattern.cache_policy()).__name__.lower()
    found = holding([pattern.bind(1 << 30).relation], None)
    assert (found.kind, found.newest, len(found.lasting(0, N))) == ("growing", 0, N)


def test_a_length_bounds_what_lasts() -> None:
    """Nothing is needed behind the last query."""
    pattern = patterndsl.parse("recent(isqrt(N))")
    bound = bound_for_decoding(pattern.resolved, 100, 1, 0)
    assert holding([bound.relation], 100).newest == 10


@pytest.mark.parametrize(
    ("spec", "code"),
    [
        ("window(3)", "E505"),
        ("causal | k < 64", "E505"),
        ("merge: multiset\nattend: causal\n", "E505"),
        ("fallback: q == k\nattend: causal & k % 2 == 0\n", "E505"),
        ("labels: {b: lsh(buckets = 4)}\nattend: causal & same(b)\n", "E505"),
        ("select:\n  top: topk(2, of = blocks(4), among = k <= q)\nattend: causal & top\n", "E505"),
        ("inputs: {s: 'int[]'}\nattend: causal & k < s[q]\n", "E505"),
        ("inputs: {doc: 'int[N]'}\nattend: causal & q.doc.rank < 4\n", "E505"),
        ("inputs: {doc: 'int[N]'}\nattend: causal & (same(doc) at (q, k + 1))\n", "E505"),
        ("keys: 4\nattend: causal\n", "E505"),
        ("causal & random(5)", "E406"),
        ("params: {w: isqrt(N)}\nattend: recent(w)\n", "E406"),
        ("params: {w: [3, N]}\nattend: recent(w[head % 2])\n", "E406"),
        ("grid: {row: N // 4, col: 4}\nattend: causal & q.col == k.col\n", "E406"),
    ],
)
def test_what_is_refused(spec: str, code: str) -> None:
    with pytest.raises(PatternError) as caught:
        bound_for_decoding(patterndsl.parse(spec).resolved, None, 2, 0)
    assert caught.value.diagnostics[0].code == code
    assert caught.value.diagnostics[0].help
