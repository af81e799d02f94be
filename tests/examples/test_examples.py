"""Is every example what its paper or released code describes? Index sets written out as loops, without the package."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

import patterndsl
from patterndsl.cli import main

FOLDER = Path(__file__).parents[2] / "examples"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))

SYSTEMS = {
    "axial",
    "bigbird",
    "bigbird-etc",
    "blockwise",
    "etc",
    "gemma",
    "image-transformer-1d",
    "image-transformer-2d",
    "longformer",
    "longformer-dilated",
    "longnet",
    "mistral",
    "neighborhood-2d",
    "packed-documents",
    "prefix-lm",
    "sparse-transformer-fixed",
    "sparse-transformer-fixed-by-head",
    "sparse-transformer-fixed-by-layer",
    "sparse-transformer-strided",
    "sparse-transformer-strided-by-head",
    "sparse-transformer-strided-by-layer",
    "streaming-sinks",
    "swin",
}
HYBRIDS = {"four-kinds-of-heads", "neighborhood-plus-axial", "packed-sinks-strided"}


def load(name: str) -> patterndsl.Pattern:
    return patterndsl.load(FOLDER / f"{name}.yaml")


def documents(*lengths: int) -> Tensor:
    """Document numbers of documents of these lengths, in an order that is not ascending."""
    return torch.repeat_interleave(
        torch.tensor([(7 * at + 3) % 10 for at in range(len(lengths))]), torch.tensor(lengths)
    )


# ---- the files --------------------------------------------------------------------------------------------


def test_the_examples_are_these():
    assert set(NAMES) == SYSTEMS | HYBRIDS


@pytest.mark.parametrize("name", NAMES)
def test_has_name_doc_and_cite(name):
    spec = load(name).spec
    assert spec.name == name
    assert spec.doc
    assert spec.cite
    assert all(param.doc for param in spec.params)


@pytest.mark.parametrize("name", NAMES)
def test_canonical_text_parses_back(name):
    pattern = load(name)
    assert patterndsl.parse(str(pattern)) == pattern


COMMANDS = [
    line.split("patterndsl ", 1)[1].strip()
    for name in NAMES
    for line in (FOLDER / f"{name}.yaml").read_text().splitlines()
    if re.match(r"# .*\bpatterndsl (show|run|report) ", line)
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_in_comments_run(command, capsys, monkeypatch):
    monkeypatch.chdir(FOLDER.parent)
    assert main(command.split()) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_says_how_to_override(name):
    commands = [command for command in COMMANDS if f"examples/{name}.yaml" in command]
    assert commands
    assert not load(name).spec.params or any("--set" in command for command in commands)


@pytest.mark.parametrize("n", [1000, 4096])
@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_arguments(name, n):
    program = load(name).compile(n=n, heads=4)
    doc = torch.arange(n) // 100
    inputs = {"doc": doc} if program.bound.inputs else None
    assert all(len(tiles.q_blks) for tiles in program.tiles(128, inputs=inputs)[0])


# their odd heads have nothing but columns, and the first of those lies at the end of a block
FIRST_ROWS_EMPTY = {"sparse-transformer-fixed-by-head"}


@pytest.mark.parametrize("name", sorted({*NAMES} - FIRST_ROWS_EMPTY))
def test_default_at_256_is_sparse_and_leaves_no_row_empty(name):
    program = load(name).compile(n=256, heads=4)
    keep = program.mask(inputs={"doc": documents(100, 56, 100)} if program.bound.inputs else None)
    assert keep.any(-1).all()
    assert keep.double().mean() < 0.6


# ---- index sets: attends(n, q, ...) is the set of keys of query q ------------------------------------------


def blockwise(n, q, *, b):
    block = [start for start in range(0, n, b) if start <= q][-1]
    return range(block, q + 1)


def image_1d(n, q, *, lq, lm):
    block = [start for start in range(0, n, lq) if start <= q][-1]
    return range(max(0, block - lm), q + 1)


def image_2d(n, q, *, th, tw, across, fh, fw):
    height, width = n // (across * tw), across * tw
    order = [
        (top + y, left + x)
        for top in range(0, height, th)
        for left in range(0, width, tw)
        for y in range(th)
        for x in range(tw)
    ]
    top, left = (order[q - q % (th * tw)][axis] for axis in (0, 1))
    memory = [pixel for place, pixel in enumerate(order) if q - q % (th * tw) <= place <= q]
    memory += [(row, col) for row in range(top - fh, top) for col in range(left - fw, left + tw + fw)]
    memory += [(row, col) for row in range(top, top + th) for col in range(left - fw, left)]
    keys = {order.index(pixel) for pixel in memory if pixel in order}
    assert max(keys) <= q, "generated later"
    return keys


def sparse_strided(n, q, *, l):  # noqa: E741
    return {*range(max(0, q - l + 1), q + 1), *range(q, -1, -l)}


def sparse_fixed(n, q, *, l, c):  # noqa: E741
    keys = set()
    for start in range(0, q + 1, l):
        block = list(range(start, start + l))
        keys |= {key for key in (block if q in block else block[l - c :]) if key <= q}
    return keys


def sparse_strided_part(n, q, *, l, w, number):  # noqa: E741
    """Even numbers, of a layer or a head, have the window, odd ones the stride."""
    if number % 2:
        return {key for key in range(q + 1) if any(key + steps * l == q for steps in range(n))}
    return {q - back for back in range(w) if back <= q}


def sparse_fixed_part(n, q, *, l, c, number):  # noqa: E741
    """Even numbers have the own block, odd ones the last c of every block, as far as they are over."""
    blocks = [range(start, start + l) for start in range(0, n, l)]
    own = next(block for block in blocks if q in block)
    keys = {key for block in blocks for key in block[l - c :]} if number % 2 else set(own)
    return {key for key in keys if key <= q}


def by_layer(part):
    def attends(n, q, *, layer, **params):
        return part(n, q, number=layer, **params)

    return attends


def by_head(part):
    def attends(n, q, *, head, **params):
        return part(n, q, number=head, **params)

    return attends


def axial(n, q, *, cols):
    rows = [list(range(start, start + cols)) for start in range(0, n, cols)]
    row, col = divmod(q, cols)
    return {*rows[row], *(line[col] for line in rows)}


def longformer(n, q, *, w, g):
    if q < g:
        return range(n)
    return {*range(g), *range(max(0, q - w), min(n, q + w + 1))}


def longformer_dilated(n, q, *, w, dilation, head):
    step = dilation[head % 4]
    return {q - steps * step for steps in range(w + 1) if q >= steps * step}


def etc(n, q, *, g, r):
    """Two sequences; the long one is numbered from 0 by itself."""
    global_keys = {("global", at) for at in range(g)}
    long_keys = {("long", at) for at in range(n - g)}
    if q < g:
        keys = global_keys | long_keys
    else:
        keys = global_keys | {("long", at) for _, at in long_keys if abs(at - (q - g)) <= r}
    return {at if kind == "global" else g + at for kind, at in keys}


def bigbird_etc(n, q, *, b, g, w):
    """Auxiliary tokens, and long ones in blocks that are numbered from 0 by themselves."""
    keys = set(range(g))
    for k in range(g, n):
        if q < g or abs((q - g) // b - (k - g) // b) <= w:
            keys.add(k)
    return keys


def mistral(n, q, *, w):
    return range(max(0, q - w + 1), q + 1)


def streaming_sinks(n, q, *, s, w):
    return {*range(min(s, q + 1)), *range(max(0, q - w + 1), q + 1)}


def gemma(n, q, *, w, period, layer):
    is_global = (layer + 1) % period == 0
    return range(q + 1) if is_global else range(max(0, q - w + 1), q + 1)


def longnet(n, q, *, w, head):
    keys = set()
    for length, step in ((w, 1), (2 * w, 2), (4 * w, 4)):
        for start in range(0, n, length):
            kept = [at for place, at in enumerate(range(start, start + length)) if place % step == head % step]
            keys |= {at for at in kept if at <= q} if q in kept else set()
    return keys


def nearest_places(x, size, kernel):
    """`kernel` places around x, moved inside one by one while they stick out."""
    places = [x - kernel // 2 + step for step in range(kernel)]
    while places[0] < 0:
        places = [*places[1:], places[-1] + 1]
    while places[-1] >= size and places[0] > 0:
        places = [places[0] - 1, *places[:-1]]
    return [place for place in places if place < size]


def neighborhood(n, q, *, kernel, cols):
    row, col = divmod(q, cols)
    return {
        near_row * cols + near_col
        for near_row in nearest_places(row, n // cols, kernel)
        for near_col in nearest_places(col, cols, kernel)
    }


def swin(n, q, *, m, cols, layer):
    """Windows cut at the shift; short ones at the borders."""
    shift = m // 2 if layer % 2 else 0

    def window(x, size):
        cuts = sorted({0, *range(shift, size, m), size})
        return next(range(start, stop) for start, stop in itertools.pairwise(cuts) if start <= x < stop)

    row, col = divmod(q, cols)
    return {y * cols + x for y in window(row, n // cols) for x in window(col, cols)}


def packed_documents(n, q, *, inputs):
    doc = inputs["doc"].tolist()
    return {k for k in range(q + 1) if doc[k] == doc[q]}


def prefix_lm(n, q, *, prefix):
    return {*range(min(prefix, n)), *range(q + 1)}


def neighborhood_plus_axial(n, q, *, kernel, cols):
    return neighborhood(n, q, kernel=kernel, cols=cols) | axial(n, q, cols=cols)


def packed_sinks_strided(n, q, *, s, w, step, inputs):
    doc = inputs["doc"].tolist()
    own = [k for k in range(n) if doc[k] == doc[q]]
    earlier = own[: own.index(q) + 1]
    return {*earlier[:s], *earlier[-w:], *earlier[::-1][::step]}


@dataclass(frozen=True)
class Case:
    """An example at a size; `attends` takes n, q, the parameters, and head, layer or inputs where it names them."""

    name: str
    attends: Callable[..., Iterable[int]]
    n: int
    params: Mapping[str, object]
    heads: int = 1
    layer: int = 0
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    def __str__(self) -> str:
        params = ",".join(f"{name}={value}".replace(" ", "") for name, value in self.params.items())
        return f"{self.name}-n={self.n}-{params}" + (f"-layer={self.layer}" if self.layer else "")


CASES = [
    *(Case("blockwise", blockwise, n, {"b": b}) for n, b in ((1, 4), (63, 16), (64, 16), (70, 1), (65, 100))),
    *(
        Case("image-transformer-1d", image_1d, n, {"lq": lq, "lm": lm})
        for n, lq, lm in ((64, 16, 16), (70, 16, 8), (70, 16, 40), (61, 7, 0), (5, 16, 16))
    ),
    *(
        Case("image-transformer-2d", image_2d, n, dict(zip(("th", "tw", "across", "fh", "fw"), sizes, strict=True)))
        for n, *sizes in ((72, 3, 4, 2, 2, 1), (64, 2, 4, 4, 1, 3), (60, 1, 5, 3, 3, 7), (64, 4, 2, 4, 0, 2))
    ),
    *(
        Case("sparse-transformer-strided", sparse_strided, n, {"l": stride})
        for n, stride in ((64, 8), (70, 8), (61, 7), (65, 1))
    ),
    *(
        Case("sparse-transformer-fixed", sparse_fixed, n, {"l": block, "c": c})
        for n, block, c in ((64, 8, 2), (64, 16, 4), (71, 9, 1), (63, 8, 8), (65, 8, 0))
    ),
    *(
        Case("sparse-transformer-strided-by-layer", by_layer(sparse_strided_part), n, {"l": size, "w": w}, layer=layer)
        for n, size, w in ((64, 8, 8), (70, 8, 9), (61, 7, 3), (65, 1, 2))
        for layer in (0, 1, 2, 3)
    ),
    *(
        Case("sparse-transformer-strided-by-head", by_head(sparse_strided_part), n, {"l": size, "w": w}, heads=5)
        for n, size, w in ((64, 8, 8), (70, 8, 9), (61, 7, 3), (65, 1, 2))
    ),
    *(
        Case("sparse-transformer-fixed-by-layer", by_layer(sparse_fixed_part), n, {"l": size, "c": c}, layer=layer)
        for n, size, c in ((64, 8, 2), (71, 9, 1), (63, 8, 8), (65, 8, 0), (1, 4, 1))
        for layer in (0, 1, 2, 3)
    ),
    *(
        Case("sparse-transformer-fixed-by-head", by_head(sparse_fixed_part), n, {"l": size, "c": c}, heads=5)
        for n, size, c in ((64, 8, 2), (71, 9, 1), (63, 8, 8), (65, 8, 0), (1, 4, 1))
    ),
    *(Case("axial", axial, n, {"cols": cols}) for n, cols in ((48, 8), (63, 7), (60, 60), (64, 1))),
    *(
        Case("longformer", longformer, n, {"w": w, "g": g})
        for n, w, g in ((64, 4, 2), (64, 4, 8), (65, 0, 0), (63, 5, 0), (61, 100, 1), (66, 3, 66))
    ),
    *(
        Case("longformer-dilated", longformer_dilated, n, {"w": w, "dilation": dilation}, heads)
        for n, w, dilation, heads in ((64, 4, [1, 1, 2, 4], 6), (61, 7, [1, 2, 3, 5], 4), (65, 3, [9, 1, 1, 70], 1))
    ),
    *(Case("etc", etc, n, {"g": g, "r": r}) for n, g, r in ((46, 6, 5), (64, 0, 3), (65, 9, 0), (63, 1, 100))),
    *(
        Case("bigbird-etc", bigbird_etc, n, {"b": b, "g": g, "w": w})
        for n, b, g, w in ((46, 4, 6, 1), (64, 8, 0, 1), (65, 7, 9, 2), (63, 1, 5, 0), (30, 40, 3, 1))
    ),
    *(Case("mistral", mistral, n, {"w": w}) for n, w in ((64, 16), (65, 1), (61, 7), (10, 100))),
    *(
        Case("streaming-sinks", streaming_sinks, n, {"s": s, "w": w})
        for n, s, w in ((64, 4, 16), (65, 0, 1), (61, 7, 5), (10, 4, 100))
    ),
    *(
        Case("gemma", gemma, 65, {"w": 9, "period": period}, layer=layer)
        for period, layer in ((6, 0), (6, 4), (6, 5), (6, 6), (6, 11), (2, 0), (2, 1), (1, 0))
    ),
    *(Case("longnet", longnet, n, {"w": w}, heads=5) for n, w in ((64, 16), (70, 8), (63, 5), (65, 1))),
    *(
        Case("neighborhood-2d", neighborhood, n, {"kernel": kernel, "cols": cols})
        for n, kernel, cols in ((64, 3, 8), (63, 4, 7), (60, 5, 12), (70, 7, 10), (72, 9, 6), (64, 1, 8), (64, 7, 1))
    ),
    *(
        Case("swin", swin, n, {"m": m, "cols": cols}, layer=layer)
        for n, m, cols in ((64, 4, 8), (63, 3, 7), (70, 4, 10), (64, 7, 8), (65, 20, 5))
        for layer in (0, 1, 2, 3)
    ),
    *(
        Case("packed-documents", packed_documents, sum(lengths), {}, inputs={"doc": documents(*lengths)})
        for lengths in ((64,), (20, 1, 30, 14), (1, 1, 1))
    ),
    *(Case("prefix-lm", prefix_lm, n, {"prefix": prefix}) for n, prefix in ((64, 16), (61, 0), (65, 1), (20, 30))),
    *(
        Case("neighborhood-plus-axial", neighborhood_plus_axial, n, {"kernel": kernel, "cols": cols})
        for n, kernel, cols in ((64, 3, 8), (63, 5, 9), (60, 4, 10))
    ),
    *(
        Case(
            "packed-sinks-strided",
            packed_sinks_strided,
            sum(lengths),
            {"s": s, "w": w, "step": step},
            inputs={"doc": documents(*lengths)},
        )
        for lengths, s, w, step in (((64,), 2, 5, 8), ((23, 9, 1, 30), 2, 3, 5), ((40, 25), 0, 1, 7))
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_written_out_index_set(case):
    program = load(case.name).with_params(**case.params).compile(n=case.n, heads=case.heads, layer=case.layer)
    keep = program.mask(inputs=case.inputs).expand(case.heads, case.n, case.n)
    named = case.attends.__code__.co_varnames[: case.attends.__code__.co_kwonlyargcount + 2]
    also = {"layer": case.layer, "inputs": case.inputs}
    for head in range(case.heads):
        given = {name: value for name, value in {**also, "head": head}.items() if name in named}
        expected = [sorted(case.attends(case.n, q, **case.params, **given)) for q in range(case.n)]
        assert [row.nonzero().flatten().tolist() for row in keep[head]] == expected


def test_bigbird_etc_has_as_many_pairs_as_its_paper_says():
    """Auxiliary rows and columns, and of n blocks (3 n - 2) pairs of neighbours."""
    for b, g, blocks in ((4, 6, 5), (8, 16, 9), (1, 3, 20)):
        n = g + b * blocks
        report = load("bigbird-etc").with_params(b=b, g=g).report(n)
        assert report.pairs is not None and report.pairs.value == n * g + (n - g) * g + (3 * blocks - 2) * b**2


def test_every_example_has_a_case():
    """BigBird and the mixed heads draw at random, and have tests of their own below."""
    assert {case.name for case in CASES} | {"bigbird", "four-kinds-of-heads"} == set(NAMES)


# ---- Sparse Transformer: its parts taking turns ------------------------------------------------------------


def test_the_windows_default_is_the_stride_and_the_papers_one_longer():
    """Also where the parameter is an expression of the other."""
    for name in ("sparse-transformer-strided-by-layer", "sparse-transformer-strided-by-head"):
        pattern = load(name)
        assert pattern.compile(n=256).mask()[0].equal(patterndsl.parse("recent(16)").compile(n=256).mask()[0])
        longer = pattern.with_params(w="l + 1").compile(n=256).mask()[0]
        assert longer.equal(patterndsl.parse("recent(17)").compile(n=256).mask()[0])


@pytest.mark.parametrize("kind", ["strided", "fixed"])
def test_parts_by_head_are_those_by_layer_and_merged_their_union(kind):
    merged, by_head, by_layer = (
        load(f"sparse-transformer-{kind}{way}").with_params(l=8) for way in ("", "-by-head", "-by-layer")
    )
    heads = by_head.compile(n=70, heads=2).mask()
    layers = torch.cat([by_layer.compile(n=70, layer=layer).mask() for layer in (0, 1)])
    assert heads.equal(layers)
    assert heads.any(0).equal(merged.compile(n=70).mask()[0])


@pytest.mark.parametrize("kind", ["strided", "fixed"])
def test_two_layers_that_take_turns_connect_everything(kind):
    reach = load(f"sparse-transformer-{kind}-by-layer").reach(256, layers=2)
    assert reach.layers_to_connect.value == 2
    assert reach.unreachable.value == 0


def test_columns_below_blocks_do_not_connect_everything():
    turned = patterndsl.parse("causal & (layer % 2 == 1 & block(16) | layer % 2 == 0 & columns(16, 2))")
    keep = [turned.compile(n=256, layer=layer).mask()[0] | torch.eye(256, dtype=torch.bool) for layer in (0, 1)]
    assert ((keep[1].float() @ keep[0].float()) > 0).sum() < 256 * 257 // 2
    right = load("sparse-transformer-fixed-by-layer").with_params(l=16, c=2)
    keep = [right.compile(n=256, layer=layer).mask()[0] | torch.eye(256, dtype=torch.bool) for layer in (0, 1)]
    assert ((keep[1].float() @ keep[0].float()) > 0).sum() == 256 * 257 // 2


@pytest.mark.parametrize(("l", "c"), [(16, 2), (9, 1), (8, 8), (8, 0)])
def test_columns_alone_leave_the_first_rows_empty(l, c):  # noqa: E741
    n = 70
    number_of_empty = l - c if c else n
    expected = [q < number_of_empty for q in range(n)]
    in_heads = load("sparse-transformer-fixed-by-head").with_params(l=l, c=c).compile(n=n, heads=2).mask()
    in_layer = load("sparse-transformer-fixed-by-layer").with_params(l=l, c=c).compile(n=n, layer=1).mask()
    assert (~in_heads.any(-1))[1].tolist() == (~in_layer.any(-1))[0].tolist() == expected
    assert in_heads[0].any(-1).all()


# ---- Swin a second way: as the released code does it -------------------------------------------------------


@pytest.mark.parametrize(("rows", "cols", "m"), [(8, 8, 4), (12, 8, 4), (14, 7, 7), (9, 6, 3)])
def test_swin_equals_roll_and_mask(rows, cols, m):
    shift = m // 2
    pixels = torch.arange(rows * cols).view(rows, cols)
    region = torch.zeros(rows, cols, dtype=torch.int64)
    cuts = (slice(0, -m), slice(-m, -shift), slice(-shift, None))
    for number, (down, right) in enumerate((down, right) for down in cuts for right in cuts):
        region[down, right] = number
    rolled = pixels.roll((-shift, -shift), (0, 1))
    expected = torch.zeros(rows * cols, rows * cols, dtype=torch.bool)
    for top in range(0, rows, m):
        for left in range(0, cols, m):
            window = rolled[top : top + m, left : left + m].flatten()
            kind = region[top : top + m, left : left + m].flatten()
            expected[window[:, None], window[None, :]] = kind[:, None] == kind[None, :]
    program = load("swin").with_params(m=m, cols=cols).compile(n=rows * cols, layer=1)
    assert program.mask()[0].equal(expected)


# ---- random parts -----------------------------------------------------------------------------------------


def block_rows(keep: Tensor, b: int) -> list[list[set[int]]]:
    """[head][query block]: the key blocks; asserts that blocks are attended whole."""
    heads, n, _ = keep.shape
    blocks = keep[:, ::b, ::b]
    whole = blocks.repeat_interleave(b, 1).repeat_interleave(b, 2)[:, :n, :n]
    assert keep.equal(whole)
    return [[set(row.nonzero().flatten().tolist()) for row in blocks[head]] for head in range(heads)]


BIGBIRD_SIZES = [(64, 4, 1, 3), (61, 4, 1, 3), (70, 5, 2, 1), (65, 8, 1, 3), (63, 3, 1, 0)]


@pytest.mark.parametrize(("n", "b", "w", "r"), BIGBIRD_SIZES)
def test_bigbird_is_window_ends_and_r_others(n, b, w, r):
    pattern = load("bigbird").with_params(b=b, w=w, r=r)
    count = -(-n // b)
    for layer in (0, 3):
        per_head = block_rows(pattern.compile(n=n, heads=3, layer=layer).mask().expand(3, n, n), b)
        for head in range(3):
            for block, keys in enumerate(per_head[head]):
                fixed = {0, count - 1, *range(max(0, block - w), min(count, block + w + 1))}
                if block in (0, count - 1):
                    assert keys == set(range(count))
                    continue
                assert fixed <= keys
                assert len(keys) == len(fixed) + min(r, count - len(fixed))


def test_bigbird_draws_by_seed_layer_and_head():
    pattern = load("bigbird").with_params(b=2)

    def draws(chosen=pattern, layer=0):
        return chosen.compile(n=64, heads=4, layer=layer).mask()

    assert draws().equal(draws())
    heads = draws()
    assert all(not heads[one].equal(heads[other]) for one in range(4) for other in range(one))
    assert not draws().equal(draws(layer=1))
    assert not draws().equal(draws(pattern.with_params(seed=1)))


def test_bigbird_draws_reach_every_block():
    """Over many heads block 15 of 32 draws each of the 27 blocks that are left, each about equally often."""
    keep = load("bigbird").with_params(b=1).compile(n=32, heads=900).mask()[:, 15]
    times = keep.sum(0).tolist()
    left = [at for at in range(32) if at not in (0, 14, 15, 16, 31)]
    # 900 x 3 / 27 = 100 is expected, with a standard deviation of 9.4; five of them are allowed
    assert all(53 <= times[at] <= 147 for at in left), times


@pytest.mark.parametrize(("n", "w", "c", "r"), [(64, 8, 2, 5), (61, 7, 1, 16)])
def test_four_kinds_of_heads(n, w, c, r):
    keep = load("four-kinds-of-heads").with_params(w=w, c=c, r=r).compile(n=n, heads=9).mask()
    for head in range(9):
        for q in range(n):
            keys = set(keep[head, q].nonzero().flatten().tolist())
            near = set(range(max(0, q - w + 1), q + 1))
            match head % 4:
                case 0:
                    assert keys == near
                case 1:
                    assert keys == near | set(range(q, -1, -w))
                case 2:
                    assert keys == near | {k for k in range(q) if (k + c) // w > k // w}
                case _:
                    assert near <= keys <= set(range(q + 1))
                    assert len(keys) == len(near) + min(r, q + 1 - len(near))
    assert keep[1].equal(keep[5])
    assert not keep[3].equal(keep[7])
