"""Pairs with projections of their own: outputs and gradients as loops over positions say, and what is known of them.

Which role a pair has is found here by asking the roles one by one for each pair, never through the package.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import patterndsl
from patterndsl import PatternError, Proven, Refuted
from patterndsl.nn import Attention
from patterndsl.runtime.projected import wanted_of
from tests.strategies import many

FOLDER = Path(__file__).parents[2] / "examples" / "roles"
PROJECTIONS = ("query", "key", "value")
BATCH, HEADS, KV_HEADS, D = 2, 4, 2, 3
DIM = HEADS * D

Holds = Callable[[int, int], bool]
PAIRS: dict[str, Holds] = {
    "q < 2": lambda q, k: q < 2,
    "k < 2": lambda q, k: k < 2,
    "q < 3 & k >= 3": lambda q, k: q < 3 <= k,
    "q >= 2 & k < 2": lambda q, k: q >= 2 and k < 2,
    "(q + k) % 2 == 0": lambda q, k: (q + k) % 2 == 0,
    "causal - recent(2)": lambda q, k: q - k >= 2,
    "0 < q <= 4": lambda q, k: 0 < q <= 4,
    "~(q % 3 == 1 | k == 0)": lambda q, k: not (q % 3 == 1 or k == 0),
    "all": lambda q, k: True,
    "none": lambda q, k: False,
}
ATTENDED: dict[str, Holds] = {
    "window(3) | global(2)": lambda q, k: abs(q - k) <= 3 or q < 2 or k < 2,
    "causal": lambda q, k: k <= q,
    "strided(3) & q != k": lambda q, k: (q - k) % 3 == 0 and q != k,
}


@dataclass(frozen=True)
class Spec:
    """A pattern with roles: name, pairs and what is owned of each."""

    attend: str
    roles: tuple[tuple[str, str, tuple[str, ...]], ...]

    @property
    def text(self) -> str:
        roles = [f"  {name}: {{at: '{at}', own: [{', '.join(own)}]}}" for name, at, own in self.roles]
        return "\n".join(["roles:", *roles, f"attend: {self.attend}"])

    def role_of(self, what: str, q: int, k: int) -> str | None:
        """The first role that has the pair and the projection."""
        return next((name for name, at, own in self.roles if what in own and PAIRS[at](q, k)), None)


@st.composite
def specs(draw: Any) -> Spec:
    names = [f"r{at}" for at in range(draw(st.integers(1, 3)))]
    owned = st.lists(st.sampled_from(PROJECTIONS), min_size=1, unique=True)
    roles = tuple((name, draw(st.sampled_from(sorted(PAIRS))), tuple(draw(owned))) for name in names)
    return Spec(draw(st.sampled_from(sorted(ATTENDED))), roles)


def tensor(heads: int, n: int) -> Tensor:
    return torch.randn(BATCH, heads, n, D, dtype=torch.float64, requires_grad=True)


def attended(row: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """The softmax of one row, each pair with a query, key and value [B, D] of its own."""
    scores = torch.stack([(query * key).sum(-1) / math.sqrt(D) for query, key, _ in row])
    return (scores.softmax(0)[..., None] * torch.stack([value for _, _, value in row])).sum(0)


def by_loops(n: int, keep: Holds, own: Callable[[str, int, int], Tensor]) -> Tensor:
    """[B, H, n, D]. own: query, key or value [B, heads, n, D] as the pair of two positions has it."""
    rows = []
    for head, q in itertools.product(range(HEADS), range(n)):
        at = head // (HEADS // KV_HEADS)
        row = [
            (own("query", q, k)[:, head, q], own("key", q, k)[:, at, k], own("value", q, k)[:, at, k])
            for k in range(n)
            if keep(q, k)
        ]
        rows.append(attended(row) if row else torch.zeros(BATCH, D, dtype=torch.float64))
    return torch.stack(rows, 1).view(BATCH, HEADS, n, D) if n else torch.zeros(BATCH, HEADS, 0, D).double()


def same(ours: Tensor, theirs: Tensor, leaves: list[Tensor]) -> None:
    """Outputs, and gradients of leaves, zero where there is none."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    if not ours.requires_grad or not theirs.requires_grad:
        return
    weights = torch.randn_like(ours)
    found = [
        torch.autograd.grad((x * weights).sum(), leaves, allow_unused=True, retain_graph=True) for x in (ours, theirs)
    ]
    for leaf, mine, wanted in zip(leaves, *found, strict=True):
        mine, wanted = (torch.zeros_like(leaf) if grad is None else grad for grad in (mine, wanted))
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-9)


def sizes(what: str) -> int:
    return HEADS if what == "query" else KV_HEADS


# ---- outputs and gradients ------------------------------------------------------------------------------------


@many(0.2)
@given(specs(), st.sampled_from([0, 1, 2, 5, 7, 9]))
def test_a_program_by_loops(spec: Spec, n: int) -> None:
    torch.manual_seed(n)
    pattern = patterndsl.parse(spec.text)
    assert patterndsl.parse(str(pattern)) == pattern
    program: Any = pattern.compile(n, heads=HEADS)
    usual = {what: tensor(sizes(what), n) for what in PROJECTIONS}
    own = {name: {what: tensor(sizes(what), n) for what in owned} for name, _, owned in spec.roles}
    wanted = wanted_of(program.pattern)
    given = {name: {what: own[name][what] for what in names} for name, names in wanted.items()}
    ours, lse = program(*usual.values(), roles=given, return_lse=True)

    def of(what: str, q: int, k: int) -> Tensor:
        role = spec.role_of(what, q, k)
        return usual[what] if role is None else own[role][what]

    keep = ATTENDED[spec.attend]
    leaves = [*usual.values(), *(x for tensors in own.values() for x in tensors.values())]
    same(ours, by_loops(n, keep, of), leaves)
    empty = torch.tensor([not any(keep(q, k) for k in range(n)) for q in range(n)], dtype=torch.bool)
    assert torch.equal(lse.isneginf(), empty.expand_as(lse))


@many(0.2)
@given(specs())
def test_pairs_are_counted_once(spec: Spec) -> None:
    """Terms divide what is attended, for every length at which it is asked."""
    pattern: Any = patterndsl.parse(spec.text)
    plain = patterndsl.parse(spec.attend)
    for n in (1, 6, 9):
        masks = pattern.compile(n).masks()
        assert torch.equal(torch.stack(list(masks.values())).sum(0), plain.compile(n).mask().long())
        assert torch.equal(pattern.compile(n).mask(), plain.compile(n).mask())


def test_pairs_of_a_report() -> None:
    counted = patterndsl.load(FOLDER / "etc-projections.yaml").report(1024).pairs
    alone = patterndsl.load(FOLDER.parent / "etc.yaml").report(1024).pairs
    assert counted is not None
    assert alone is not None
    assert (counted.value, counted.certainty) == (alone.value, "Exact")


def layer_of(pattern: patterndsl.Pattern, **options: Any) -> Attention:
    torch.manual_seed(0)
    layer = Attention(pattern, DIM, HEADS, kv_heads=KV_HEADS, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():  # copies differ from now on
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def states(n: int) -> Tensor:
    torch.manual_seed(n)
    return torch.randn(BATCH, n, DIM, dtype=torch.float64, requires_grad=True)


def projected(layer: Any, role: str | None, what: str, x: Tensor) -> Tensor:
    """[B, heads, T, D] by the definition of a linear map."""
    module = getattr(layer if role is None else layer.roles[role], f"{what}_projection")
    return (x @ module.weight.T + module.bias).view(*x.shape[:2], sizes(what), D).transpose(1, 2)


def out_of(layer: Attention, attended: Tensor) -> Tensor:
    output = layer.output_projection
    return attended.transpose(1, 2).flatten(2) @ output.weight.T + output.bias


@pytest.mark.parametrize("n", [1, 2, 7, 16])
def test_longformer(n: int) -> None:
    """Rows of global tokens never see a projection of the others, and their columns are keys of the others' kind."""
    w, g = 2, 3
    layer = layer_of(patterndsl.load(FOLDER / "longformer-projections.yaml").with_params(w=w, g=g))
    x = states(n)

    def own(what: str, q: int, k: int) -> Tensor:
        return projected(layer, "globals" if q < g else None, what, x)

    theirs = by_loops(n, lambda q, k: abs(q - k) <= w or q < g or k < g, own)
    same(layer(x), out_of(layer, theirs), [x, *layer.parameters()])


@pytest.mark.parametrize("n", [1, 5, 13])
def test_etc(n: int) -> None:
    """Queries by the kind of the query, keys and values by the piece."""
    g, r = 4, 2
    layer = layer_of(patterndsl.load(FOLDER / "etc-projections.yaml").with_params(g=g, r=r))
    x = states(n)

    def own(what: str, q: int, k: int) -> Tensor:
        piece = {(True, True): "g2g", (True, False): "g2l", (False, True): "l2g", (False, False): None}[q < g, k < g]
        return projected(layer, ("global" if q < g else None) if what == "query" else piece, what, x)

    theirs = by_loops(n, lambda q, k: abs(q - k) <= r or q < g or k < g, own)
    same(layer(x), out_of(layer, theirs), [x, *layer.parameters()])


def test_chosen_tokens_documents_and_padding() -> None:
    """Globals that an input chooses in each row of a batch, within documents, with keys that are padding."""
    text = """
inputs: {chosen: "bool[N]", doc: "int[N]", there: "bool[Nk]"}
roles: {globals: q.chosen}
attend: (window(2) | q.chosen | k.chosen) & same(doc) & k.there
"""
    n = 11
    layer, x = layer_of(patterndsl.parse(text)), states(n)
    chosen = torch.zeros(BATCH, n, dtype=torch.bool)
    chosen[0, 3], chosen[1, 0], chosen[1, 8] = True, True, True
    doc = torch.tensor([0] * 6 + [1] * 5).expand(BATCH, n)
    there = patterndsl.present(torch.tensor([9, 11]), n)
    ours = layer(x, inputs={"chosen": chosen, "doc": doc, "there": there})
    rows = []
    for row in range(BATCH):

        def keep(q: int, k: int, row: int = row) -> bool:
            is_near = abs(q - k) <= 2 or bool(chosen[row, q]) or bool(chosen[row, k])
            return is_near and int(doc[row, q]) == int(doc[row, k]) and bool(there[row, k])

        def own(what: str, q: int, k: int, row: int = row) -> Tensor:
            return projected(layer, "globals" if bool(chosen[row, q]) else None, what, x)

        rows.append(by_loops(n, keep, own)[row])
    same(ours, out_of(layer, torch.stack(rows)), [x, *layer.parameters()])


@pytest.mark.parametrize("of", ["states", "keys"])
def test_keys_of_sources_are_projected_by_the_role_too(of: str) -> None:
    """A global row asks memory and pooled keys by its own query, and reads them by its own projections."""
    text = f"""
sources:
  rows: memory(2)
  past: pool(2, of = {of})
roles:
  globals: {{at: q < 3, own: [query, key]}}
attend:
  self: window(1)
  rows: all
  past: causal
"""
    n = 7
    layer, x = layer_of(patterndsl.parse(text)), states(n)
    sources: Any = layer.sources
    rows = sources["rows"].rows.expand(BATCH, -1, -1) if hasattr(sources["rows"], "rows") else None
    assert rows is not None
    outputs = []
    for q in range(n):
        role = "globals" if q < 3 else None
        query = projected(layer, role, "query", x)[:, :, q]
        key, value = projected(layer, role, "key", x), projected(layer, None, "value", x)
        kept = [(key[:, :, k], value[:, :, k]) for k in range(n) if abs(q - k) <= 1]
        kept += [
            (projected(layer, role, "key", rows)[:, :, k], projected(layer, None, "value", rows)[:, :, k])
            for k in (0, 1)
        ]
        # linear maps and means change places, so that both kinds of pools are this
        kept += [(key[:, :, k - 1 : k + 1].mean(2), value[:, :, k - 1 : k + 1].mean(2)) for k in range(1, q + 1, 2)]
        heads = []
        for head in range(HEADS):
            at = head // (HEADS // KV_HEADS)
            heads.append(attended([(query[:, head], key[:, at], value[:, at]) for key, value in kept]))
        outputs.append(torch.stack(heads, 1))
    same(layer(x), out_of(layer, torch.stack(outputs, 2)), [x, *layer.parameters()])


def test_a_bias_and_a_cap() -> None:
    pattern = patterndsl.parse("roles: {globals: q < 2}\nbias: -0.5 * abs(q - k)\nsoftcap: 2.0\nattend: causal")
    layer, x, n = layer_of(pattern), states(9), 9
    role = torch.arange(n)[:, None] < 2
    both = {
        what: [projected(layer, of, what, x).repeat_interleave(HEADS // sizes(what), 1) for of in (None, "globals")]
        for what in PROJECTIONS
    }
    scores = [q @ k.transpose(-1, -2) / math.sqrt(D) for q, k in zip(both["query"], both["key"], strict=True)]
    place = torch.arange(n)
    capped = 2 * (torch.where(role, scores[1], scores[0]) / 2).tanh() - 0.5 * (place[:, None] - place).abs()
    weights = capped.masked_fill(place[:, None] < place, -math.inf).softmax(-1)
    theirs = torch.where(role, weights @ both["value"][1], weights @ both["value"][0])
    same(layer(x), out_of(layer, theirs), [x, *layer.parameters()])


def test_branches_have_the_roles_each() -> None:
    text = "roles: {globals: q < 2}\nbranches: {near: window(2), far: strided(3)}\ncombine: sum"
    layer, x = layer_of(patterndsl.parse(text)), states(8)

    def own(what: str, q: int, k: int) -> Tensor:
        return projected(layer, "globals" if q < 2 else None, what, x)

    near, far = by_loops(8, lambda q, k: abs(q - k) <= 2, own), by_loops(8, lambda q, k: (q - k) % 3 == 0, own)
    same(layer(x), out_of(layer, near + far), [x, *layer.parameters()])


@pytest.mark.parametrize(
    "found",
    [
        'labels: {bucket: "lsh(buckets = 4)"}\nattend: same(bucket) | q == k',
        "select: {top: topk(3)}\nattend: top | q == k",
    ],
    ids=["labels", "selections"],
)
def test_what_calls_find_is_found_of_the_usual_tensors(found: str) -> None:
    """Whether two tokens share a bucket, or which keys score best, is the same question for all roles."""
    torch.manual_seed(1)
    n = 9
    alone: Any = patterndsl.parse(found).compile(n, heads=HEADS)
    program: Any = patterndsl.parse(f"roles: {{globals: q < 3}}\n{found}").compile(n, heads=HEADS)
    query, key, value, *own = (tensor(HEADS, n)[:1] for _ in range(6))
    _, labels = alone(query, key, value, return_labels=True)
    mask = alone.mask(labels)
    assert not mask.all()
    ours = program(query, key, value, roles={"globals": dict(zip(PROJECTIONS, own, strict=True))})
    rows = [scaled_dot_product_attention(q, k, v, attn_mask=mask) for q, k, v in ((query, key, value), own)]
    same(ours, torch.where(torch.arange(n)[:, None] < 3, rows[1], rows[0]), [query, key, value, *own])


def test_recalled_states_with_a_projection_of_their_own() -> None:
    """What stands before the sequence is a role as well, carried from one segment to the next."""
    text = """
sources: {past: recall(8)}
roles: {old: {at: k < 0, own: [key]}}
attend: {self: causal, past: all}
"""
    layer, x, n = layer_of(patterndsl.parse(text)), states(8), 4
    state = layer.init_state(BATCH)
    _, state = layer(x[:, :n], state)
    ours, _ = layer(x[:, n:], state)
    past, now = x[:, :n].detach(), x[:, n:]
    key = torch.cat([projected(layer, "old", "key", past), projected(layer, None, "key", now)], 2)
    value = projected(layer, None, "value", torch.cat([past, now], 1))
    query = projected(layer, None, "query", now)
    keep = torch.ones(n, 2 * n, dtype=torch.bool).tril(n)
    theirs = scaled_dot_product_attention(query, key, value, attn_mask=keep, enable_gqa=True)
    same(ours, out_of(layer, theirs), [x, *layer.parameters()])


def test_queries_that_continue_a_sequence() -> None:
    layer = layer_of(
        patterndsl.parse(
            "roles: {early: {at: q < 4, own: query}, first: {at: k == 0, own: [key, value]}}\nattend: causal"
        )
    )
    x = states(9)
    whole = layer(x)
    for start in (2, 5):
        assert torch.allclose(layer(x[:, start:], x, q_start=start), whole[:, start:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("backend", ["gathered", "oracle"])
def test_every_backend(backend: str) -> None:
    pattern = patterndsl.load(FOLDER / "etc-projections.yaml").with_params(g=3, r=2)
    layer, other = layer_of(pattern), layer_of(pattern, backend=backend)
    other.load_state_dict(layer.state_dict())
    x = states(13)
    same(other(x), layer(x), [x])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["longformer-projections", "etc-projections"])
def test_on_a_gpu(name: str) -> None:
    torch.manual_seed(0)
    layer = Attention(patterndsl.load(FOLDER / f"{name}.yaml"), 64, 4, kv_heads=2)
    x = torch.randn(2, 300, 64)
    expected = layer.double()(x.double())
    assert isinstance(expected, Tensor)
    ours = layer.float().cuda()(x.cuda())
    assert isinstance(ours, Tensor)
    torch.testing.assert_close(ours.double().cpu(), expected, rtol=0, atol=2e-3)
    ours.sum().backward()
    grads = [parameter.grad for parameter in layer.roles.parameters()]
    assert all(grad is not None and bool(grad.isfinite().all()) for grad in grads)


def test_inside_torch_compile() -> None:
    layer = layer_of(patterndsl.load(FOLDER / "longformer-projections.yaml").with_params(w=2, g=2))
    x = states(7)
    same(torch.compile(layer, backend="eager")(x), layer(x), [x])


# ---- the layer ------------------------------------------------------------------------------------------------


def test_a_new_layer_computes_what_the_layer_without_roles_does() -> None:
    """Longformer's own start: the projections of global rows are copies of the local ones."""
    plain = Attention("window(2) | global(2)", DIM, HEADS).double()
    layer = Attention(patterndsl.parse("roles: {globals: q < 2}\nattend: window(2) | global(2)"), DIM, HEADS).double()
    missing = layer.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing == [f"roles.globals.{what}_projection.{part}" for what in PROJECTIONS for part in ("weight", "bias")]
    x = states(9)
    assert not torch.allclose(layer(x), plain(x), atol=1e-3)
    layer.copy_projections()
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=1e-12)
    layer.roles.role("globals").projection("query").weight.data.zero_()
    assert layer.query_projection.weight.abs().sum() > 0  # a copy


@pytest.mark.parametrize(
    ("role", "what", "start", "stop"),
    [
        ("global", "query", 0, 4),
        ("g2g", "key", 0, 4),
        ("g2l", "value", 4, 17),
        ("l2g", "key", 0, 4),
    ],
)
def test_positions_without_the_role_are_not_projected(role: str, what: str, start: int, stop: int) -> None:
    layer = layer_of(patterndsl.load(FOLDER / "etc-projections.yaml").with_params(g=4, r=2))
    x = states(17)
    module: Any = layer.roles[role]
    seen: list[Tensor] = []
    module.projection(what).register_forward_hook(lambda _, given, out: seen.append(given[0]))
    layer(x)
    assert len(seen) == 1
    assert torch.equal(seen[0], x[:, start:stop])


# ---- what is known --------------------------------------------------------------------------------------------


def test_pieces_are_written_without_what_is_said_already() -> None:
    pattern: Any = patterndsl.load(FOLDER / "etc-projections.yaml").with_params(g=8, r=3)
    assert {term.name: term.pattern.text.partition("attend: ")[2].strip() for term in pattern.terms} == {
        "self": "(window(r) | global(g)) & q >= g & ~(q >= g & k < g)",
        "self.l2g": "(window(r) | global(g)) & q >= g & k < g",
        "self.global+g2l": "(window(r) | global(g)) & q < g & k >= g",
        "self.global+g2g": "(window(r) | global(g)) & q < g & k < g",
    }


def test_what_arithmetic_leaves_empty_is_no_term() -> None:
    """Seen by proof, not by form: no query is before 2 and in the second block."""
    pattern: Any = patterndsl.parse(
        "roles: {a: {at: q < 2, own: query}, b: {at: q // 4 == 1, own: key}}\nattend: causal"
    )
    assert [term.name for term in pattern.terms] == ["self", "self.b", "self.a"]


@pytest.mark.parametrize("attend", ["none", "q < 2 & q >= 2"])
def test_a_branch_in_which_nothing_is_attended(attend: str) -> None:
    text = f"roles: {{a: q < 2, b: {{at: k < 3, own: key}}}}\nbranches: {{near: causal, nothing: '{attend}'}}"
    alone = "roles: {a: q < 2, b: {at: k < 3, own: key}}\nattend: causal"
    layer, other, x = layer_of(patterndsl.parse(text)), layer_of(patterndsl.parse(alone)), states(5)
    same(layer(x), other(x), [x])


def test_proofs_are_of_the_whole() -> None:
    """A row that has no key in one piece has one in another; a piece is causal where the whole is."""
    local = "roles: {even: {at: k % 2 == 0, own: [key, value]}}\nattend: causal & recent(3)"
    assert isinstance(patterndsl.parse(local).prove("causal"), Proven)
    assert isinstance(patterndsl.parse(local).prove("rows_nonempty"), Proven)
    ahead = patterndsl.load(FOLDER / "longformer-projections.yaml").prove("causal")
    assert isinstance(ahead, Refuted)
    witness: Any = ahead.witness
    assert witness.k > witness.q
    assert isinstance(patterndsl.parse("roles: {a: q < 4}\nattend: k < q").prove("rows_nonempty"), Refuted)


def test_reach_and_symmetry_are_those_of_the_pairs() -> None:
    plain, pattern = (
        patterndsl.load(FOLDER / name).with_params(w=3, g=1)
        for name in ("../longformer.yaml", "longformer-projections.yaml")
    )
    assert pattern.reach(64, layers=2).to_dict() == plain.reach(64, layers=2).to_dict() | {"name": pattern.name}
    assert isinstance(pattern.prove("symmetric"), Proven)
    with pytest.raises(PatternError, match="E505"):
        patterndsl.parse("branches: {near: recent(3), far: causal}").reach(64)


def test_equal_are_patterns_with_the_same_roles() -> None:
    ours, theirs = (patterndsl.parse(f"roles: {{globals: {at}}}\nattend: causal") for at in ("q < 4", "~(q >= 4)"))
    assert isinstance(ours.prove("equals", theirs), Proven)
    fewer = patterndsl.parse("roles: {globals: q < 3}\nattend: causal")
    assert isinstance(ours.prove("equals", fewer), Refuted)
    other = patterndsl.parse("roles: {globals: {at: q < 4, own: query}}\nattend: causal")
    with pytest.raises(PatternError, match="the same sources, branches, scores and roles"):
        ours.prove("equals", other)


def test_canonical_text() -> None:
    text = "roles: {b: {own: [value, query], at: q<2}, a: {at: k<2, own: [key, query, value]}}\nattend: causal"
    expected = """\
roles:
  b:
    at: q < 2
    own: [query, value]
  a: k < 2
attend:
  self: causal
"""
    assert str(patterndsl.parse(text)) == expected
    assert str(patterndsl.parse(expected)) == expected


def test_a_role_without_pairs_is_told() -> None:
    text = "roles: {a: q < 4, b: {at: q < 2, own: query}}\nattend: causal"
    assert [(item.code, item.message) for item in patterndsl.parse(text).lint()] == [
        ("W202", "role `b` is of no pair that is attended, or roles before it have them all")
    ]


# ---- mistakes of calls ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (None, "`query` of role `globals` is missing"),
        ({"global": {}}, "the pattern has no role `global`"),
        ({"globals": {"query": 1, "kay": 2}}, "role `globals` reads no `kay`"),
        ({"globals": {"query": 1, "key": 2, "value": 3}}, "role `globals` reads no `value`"),
        ({"globals": {"query": "usual"}}, "`key` of role `globals` is missing"),
        ({"globals": {"query": "usual", "key": "short"}}, r"key of role `globals` is \[2, 2, 8, 3\]"),
        ({"globals": {"query": 1.0, "key": "usual"}}, "query of role `globals` is float"),
        ({"globals": 3}, "role `globals` is given int"),
        ([1], "roles is list"),
    ],
)
def test_wrong_tensors(roles: Any, message: str) -> None:
    pattern = patterndsl.parse("roles: {globals: {at: q < 2, own: [query, key]}}\nattend: causal")
    query, key, value = tensor(HEADS, 9), tensor(KV_HEADS, 9), tensor(KV_HEADS, 9)
    words = {("query", "usual"): query, ("key", "usual"): key, ("key", "short"): key[:, :, :8]}
    if isinstance(roles, dict) and isinstance(roles.get("globals"), dict):
        roles = {"globals": {what: words.get((what, x), x) for what, x in roles["globals"].items()}}
    with pytest.raises(PatternError, match=message):
        patterndsl.attention(query, key, value, pattern, roles=roles)
    program: Any = pattern.compile(9, heads=HEADS)
    with pytest.raises(PatternError, match=message):
        program(query, key, value, roles=roles)


def test_roles_are_of_patterns_that_declare_some() -> None:
    query = tensor(2, 5)
    with pytest.raises(PatternError, match="the pattern has no roles"):
        patterndsl.attention(query, query, query, "causal", roles={"globals": {"query": query}})


def test_what_is_most_used_is_of_one_softmax() -> None:
    text = """
sources: {past: recall(4), old: "compress(past, 2, size = 4, by = most_used)"}
roles: {globals: q < 2}
attend: {self: causal, past: all, old: all}
"""
    with pytest.raises(PatternError, match="branches or roles"):
        Attention(patterndsl.parse(text), DIM, HEADS)
