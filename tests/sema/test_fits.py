"""Is what is wrong at every length told from what another length would mend?"""

from __future__ import annotations

import pytest

import patterndsl
from patterndsl.sema.fits import fitting, listed_heads, misfit


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("params: {w: {default: 3, min: 5}}\nattend: recent(w)", "E402"),
        ("params: {b: 0}\nattend: causal & block(b)", "E403"),
        ("params: {w: [1, 2]}\nattend: causal & recent(w[head])", "E405"),
        ("params: {w: 4}\nattend: causal & k < isqrt(w - 9)", "E407"),
        ("params: {w: 4}\nattend: recent(w)", None),
        ("params: {b: N // 8192}\nattend: block(b)", None),  # right where N is large
        ("grid: {row: 7, col: 9}\nattend: q.row == k.row", None),
        ("grid: {row: N // 64, col: 64}\nattend: q.row == k.row", None),
        ("inputs: {doc: 'int[N]'}\nattend: same(doc)", None),
        ("k // (Nk - Nq) == 0", None),  # not meant for a self-attention
    ],
)
def test_what_fits_no_length(text: str, code: str | None) -> None:
    wrong = misfit(patterndsl.parse(text).resolved, 8)
    assert (wrong and wrong.diagnostics[0].code) == code
    assert wrong is None or wrong.diagnostics[0].where is not None


def test_a_length_that_fits_a_grid() -> None:
    resolved = patterndsl.parse("grid: {row: N // 64, col: 64}\nattend: q.row == k.row").resolved
    assert (fitting(resolved, 4096), fitting(resolved, 4100), fitting(resolved, 4100, 4000)) == (4096, 4096, None)
    assert fitting(patterndsl.parse("grid: {row: 7, col: 9}\nattend: q.row == k.row").resolved, 4096) == 63


@pytest.mark.parametrize(
    ("text", "heads"),
    [
        ("params: {w: [1, 2, 4, 8]}\nattend: causal & recent(w[head])", 4),
        ("params: {w: [1, 2, 4, 8], d: [1, 2]}\nattend: causal & dilated(w[head], d[head])", 2),
        ("params: {w: [1, 2, 4, 8]}\nattend: causal\nfallback: recent(w[head])", 4),
        ("params: {w: [1, 2]}\nattend: causal & recent(w[head % 2])", None),
        ("params: {w: [1, 2]}\nattend: causal & recent(w[layer])", None),
        ("causal", None),
    ],
)
def test_how_many_heads_lists_have_items_for(text: str, heads: int | None) -> None:
    assert listed_heads(patterndsl.parse(text).resolved) == heads
