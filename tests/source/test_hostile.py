"""What a hostile user does to sources, branches and scores: it is told in words, or it works."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import patterndsl
from patterndsl import InputError, PatternError
from patterndsl.nn import Attention

DIM, HEADS = 8, 2
RECALL = "sources: {past: recall(3)}\nattend: {self: causal, past: causal}"


def layer_of(text: str) -> Attention:
    torch.manual_seed(0)
    return Attention(patterndsl.parse(text), DIM, HEADS)


def tokens(n: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, n, DIM, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("score: elu(0.9, 3)\nattend: causal", "E204"),
        ("tables: {r: scalars(4)}\nattend: causal & r[q - k] == 1", "E201"),
        ("sources: {m: memory(3)}\nbias: m\nattend: {self: causal, m: all}", "E201"),
    ],
)
def test_specs_that_mean_nothing_are_told_so(text: str, code: str) -> None:
    with pytest.raises(PatternError, match=code):
        patterndsl.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "branches: {a: causal, b: all}",
        "score: elu\nattend: causal",
        "bias: k - q\nattend: causal",
        "softcap: 5.0\nattend: causal",
        RECALL,
    ],
)
def test_what_a_relation_cannot_hold_is_not_imported(tmp_path: Path, text: str) -> None:
    (tmp_path / "part.yaml").write_text(f"name: part\n{text}\n")
    (tmp_path / "whole.yaml").write_text("name: whole\nimport: {part: part.yaml}\nattend: part\n")
    with pytest.raises(PatternError, match="E304"):
        patterndsl.load(tmp_path / "whole.yaml")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("score: elu\nattend: causal", "score: relu\nattend: causal"),
        ("branches: {a: causal, b: all}\ncombine: sum", "branches: {a: causal, b: all}\ncombine: mean"),
        ("sources: {p: memory(4)}\nattend: {p: all}", "sources: {p: memory(5)}\nattend: {p: all}"),
        ("sources: {p: 'pool(4, by = max)'}\nattend: {p: all}", "sources: {p: pool(4)}\nattend: {p: all}"),
        ("bias: k - q\nattend: causal", "bias: q - k\nattend: causal"),
        ("causal", "sources: {p: memory(4)}\nattend: {self: causal, p: all}"),
        ("sources: {p: memory(4)}\nattend: {self: causal, p: all}", "causal"),
    ],
)
@pytest.mark.parametrize("claim", ["equals", "within"])
def test_patterns_that_differ_elsewhere_are_not_proven_equal(claim: str, one: str, other: str) -> None:
    with pytest.raises(InputError, match="E506"):
        patterndsl.parse(one).prove(claim, patterndsl.parse(other))


def test_a_proof_fixes_no_unknown_parameter() -> None:
    with pytest.raises(PatternError, match="E401"):
        patterndsl.parse(RECALL).prove("causal", params={"foo": 3})


def test_unknown_inputs_are_told() -> None:
    x = torch.randn(1, 2, 6, 4)
    with pytest.raises(InputError, match="E501"):
        patterndsl.attention(x, x, x, "branches: {a: causal, b: all}", inputs={"doc": torch.zeros(6)})


@pytest.mark.parametrize("sources", ["", "sources: {p: pool(2)}\n"])
def test_a_bias_reads_documents_of_each_batch_row(sources: str) -> None:
    attend = "{self: causal, p: causal}" if sources else "causal"
    layer = layer_of(f"inputs:\n  doc: int[N]\n{sources}bias: -abs(doc[q] - doc[k])\nattend: {attend}").eval()
    x, doc = tokens(6), torch.tensor([[0, 0, 1, 1, 2, 2], [0, 3, 3, 3, 5, 5]])
    together = layer(x, inputs={"doc": doc})
    for row in range(2):
        torch.testing.assert_close(together[row], layer(x[row : row + 1], inputs={"doc": doc[row]})[0])


def test_a_bias_reads_other_documents_than_the_pattern() -> None:
    """Rows of one pattern are run together, and differ in their biases."""
    text = "inputs:\n  doc: int[N]\n  far: int[N]\nbias: -abs(far[q] - far[k])\nattend: causal & doc[q] == doc[k]"
    layer = layer_of(text).eval()
    x, doc, far = (
        tokens(4, 3),
        torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]]),
        torch.arange(12).view(3, 4) ** 2,
    )
    together = layer(x, inputs={"doc": doc, "far": far})
    for row in range(3):
        alone = layer(x[row : row + 1], inputs={"doc": doc[row], "far": far[row]})[0]
        torch.testing.assert_close(together[row], alone)


@pytest.mark.parametrize(
    "score", ["random", "factored_random", "factored_random, product", "random, dense", "factored_dense"]
)
def test_made_scores_of_queries_that_continue_a_sequence(score: str) -> None:
    layer, x = layer_of(f"score: 'synthesize({score}, length = 16)'\nattend: causal"), tokens(10)
    torch.testing.assert_close(layer(x)[:, 6:], layer(x[:, 6:], x, q_start=6))


def test_calls_before_one_backward_pass_may_draw_directions_anew() -> None:
    layer, x = layer_of("score: 'favor(8, redraw = 2)'\nattend: causal"), tokens(6)
    (layer(x).sum() + layer(x).sum() + layer(x).sum()).backward()


def test_a_layer_is_copied_after_a_step() -> None:
    layer = layer_of("sources: {past: recall(2), old: 'compress(past, 2, 4)'}\nattend: {self: causal, old: causal}")
    state = layer.init_state(2)
    for _ in range(2):
        _, state = layer(tokens(6), state)
    assert layer.losses
    assert not copy.deepcopy(layer).losses


@pytest.mark.parametrize("by", ["mean", "max", "conv"])
def test_an_empty_batch(by: str) -> None:
    layer = layer_of(f"sources: {{p: 'pool(2, by = {by}, of = keys)'}}\nattend: {{self: causal, p: causal}}")
    assert layer(tokens(6, 0)).shape == (0, 6, DIM)


@pytest.mark.parametrize("name", ["keys", "items", "type", "half"])
def test_names_of_sources_and_tables_may_be_those_of_methods(name: str) -> None:
    text = f"sources: {{{name}: memory(2)}}\nattend: {{self: causal, {name}: all}}"
    assert layer_of(text)(tokens(6)).shape == (2, 6, DIM)
    layer = layer_of(f"tables: {{{name}: scalars(8)}}\nbias: {name}[q - k]\nattend: causal")
    assert layer.train().half().float()(tokens(6)).shape == (2, 6, DIM)


@pytest.mark.parametrize("sees", ["sequence", "prefix"])
def test_padding_takes_no_part_in_sorted_blocks(sees: str) -> None:
    layer = layer_of(f"sources: {{s: 'sort(2, 8, sees = {sees})'}}\nattend: {{self: causal, s: block(2)}}").eval()
    x, present = tokens(8), torch.arange(8).expand(2, 8) < 5
    gone = x.masked_fill(~present[..., None], torch.nan)
    torch.testing.assert_close(layer(x, present=present)[:, :5], layer(gone, present=present)[:, :5])


def test_who_is_present_is_a_mask_of_all_tokens() -> None:
    layer = layer_of("sources: {s: 'sort(2, 8)'}\nattend: {self: causal, s: block(2)}")
    for wrong in (torch.ones(2, 7, dtype=torch.bool), torch.ones(2, 8), torch.ones(8, dtype=torch.bool), [True]):
        with pytest.raises(InputError, match="E503"):
            layer(tokens(8), present=wrong)


def other_states() -> list[Any]:
    return [
        layer_of(RECALL).init_state(3),
        layer_of(RECALL).init_state(2, dtype=torch.float64),
        layer_of("score: elu\nattend: causal")(tokens(4), layer_of("score: elu\nattend: causal").init_state(2))[1],
        Attention(patterndsl.parse(RECALL), 2 * DIM, HEADS).init_state(2),
        3,
    ]


@pytest.mark.parametrize("number", range(5))
def test_states_of_another_layer_or_batch(number: int) -> None:
    with pytest.raises(InputError, match="E503"):
        layer_of(RECALL)(tokens(6), state=other_states()[number])


def test_a_layer_without_a_state_takes_none() -> None:
    state = layer_of(RECALL).init_state(2)
    for text in ("causal", "sources: {m: memory(2)}\nattend: {self: causal, m: all}"):
        with pytest.raises(InputError, match="E505"):
            layer_of(text)(tokens(6), state)


def test_other_sequences_are_states() -> None:
    layer = layer_of("sources: {enc: cross}\nattend: {self: causal, enc: all}")
    x = tokens(6)
    for wrong in (x[..., :4], x[0], x.long(), x.double(), (x, x), 3):
        with pytest.raises(InputError, match="E503"):
            layer(x, sources={"enc": wrong})
    with pytest.raises(InputError, match="E304"):
        layer(x, sources=[x])


@pytest.mark.parametrize("name", ["wanted", "role", "training", "keys"])
def test_names_of_roles_may_be_those_of_methods(name: str) -> None:
    layer = layer_of(f"roles: {{{name}: q < 2}}\nattend: causal")
    plain = layer_of("causal")
    plain.load_state_dict({key: x for key, x in layer.state_dict().items() if not key.startswith("roles")})
    torch.testing.assert_close(layer(tokens(5)), plain(tokens(5)))


@pytest.mark.parametrize("roles", [{1: {}}, {"a": {1: torch.zeros(1), "query": torch.zeros(1, 1, 3, 4)}}])
def test_names_that_are_no_text_are_told(roles: Any) -> None:
    program: Any = patterndsl.parse("roles: {a: {at: q < 2, own: query}}\nattend: causal").compile(3)
    x = torch.zeros(1, 1, 3, 4)
    with pytest.raises(InputError, match="E501"):
        program(x, x, x, roles=roles)


@pytest.mark.parametrize(("layer", "parts"), [(0, ("near", "all")), (1, ("all",)), (2, ("near", "all"))])
def test_a_mean_is_of_the_branches_that_take_part_in_a_layer(layer: int, parts: tuple[str, ...]) -> None:
    text = "combine: mean\nbranches: {near: recent(2) & layer % 2 == 0, all: causal}"
    query, key, value = (torch.randn(1, HEADS, 6, 4, dtype=torch.float64) for _ in range(3))
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    keep = {"near": causal.triu(-1), "all": causal}
    outputs = [torch.nn.functional.scaled_dot_product_attention(query, key, value, keep[name]) for name in parts]
    found = patterndsl.parse(text).compile(6, heads=HEADS, layer=layer)(query, key, value)
    torch.testing.assert_close(found, sum(outputs[1:], outputs[0]) / len(outputs), rtol=0, atol=1e-9)


def test_sources_of_a_program_are_pairs_and_terms_have_names() -> None:
    program: Any = patterndsl.parse("sources: {m: memory(2)}\nattend: {self: causal, m: all}").compile(6, heads=HEADS)
    x = torch.zeros(1, HEADS, 6, 4)
    for wrong in (None, x, (x,), (x, None), (x[0], x[0])):
        with pytest.raises(InputError, match="E503"):
            program(x, x, x, sources={"m": wrong})
    for kind in ("sources", "gates", "tables", "scores"):
        with pytest.raises(InputError, match=f"E501.*{kind} is int"):
            program(x, x, x, **{"sources": {"m": (x, x)}, kind: 3})
    with pytest.raises(InputError, match=r"E505.*\n.*self, m"):
        program.program("n", 2)
    for head_dim in (0, "64"):
        with pytest.raises(InputError, match="E406"):
            program.explain(head_dim=head_dim)
    with pytest.raises(InputError, match="E406"):
        patterndsl.parse("causal").compile(6).explain(head_dim=0)


@pytest.mark.parametrize("maker", ["pool(0)", "pool(4, stride = 0)", "memory(0)", "'project(0, 8)'"])
def test_settings_that_are_too_small_are_told_and_not_what_they_divide(maker: str) -> None:
    with pytest.raises(patterndsl.PatternError, match=r"E402.* is 0, and must be at least 1"):
        patterndsl.parse(f"sources:\n  m: {maker}\nattend: {{self: all, m: all}}")
