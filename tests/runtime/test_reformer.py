"""Against transformers' Reformer: its own buckets as labels, its wrapped chunks in the words of the language."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import patterndsl

transformers = pytest.importorskip("transformers")

N, HEADS, DIM, CHUNK, BUCKETS = 48, 2, 8, 4, 6


def layer(rounds: int, causal: bool) -> Any:
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    torch.manual_seed(0)
    config = ReformerConfig(
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        attention_head_size=DIM,
        lsh_attn_chunk_length=CHUNK,
        lsh_num_chunks_before=1,
        lsh_num_chunks_after=0,
        num_hashes=rounds,
        num_buckets=BUCKETS,
        is_decoder=causal,
        lsh_attention_probs_dropout_prob=0.0,
        hash_seed=7,
    )
    return LSHSelfAttention(config).double().eval()


def spec(rounds: int, causal: bool) -> str:
    """A chunk and the one before it; before the first is the last chunk of the round before, as rounds lie one behind
    the other there. It hashes neither a query with itself, unless that is all it has."""
    terms = []
    for at in range(rounds):
        before = (at - 1) % rounds
        last = f"k.b{before}.rank // m == N // m - 1"
        terms += [f"chunks(b{at}, m, 1)", f"q.b{at}.rank // m == 0 & {last}"]
    labels = "\n".join(f"  b{at}: given" for at in range(rounds))
    union = " | ".join(f"({term})" for term in terms)
    return f"""
params: {{m: {CHUNK}}}
labels:
{labels}
merge: multiset
fallback: q == k
attend: {"causal & " if causal else ""}q != k & ({union})
"""


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rounds", [1, 4])
def test_equals_its_hashed_attention(rounds: int, causal: bool) -> None:
    theirs = layer(rounds, causal)
    x = torch.randn(2, N, HEADS * DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = theirs(x)
    labels = found.buckets.view(2, HEADS, rounds, N) % BUCKETS
    query, value = (
        projection(x).view(2, N, HEADS, DIM).transpose(1, 2) for projection in (theirs.query_key, theirs.value)
    )
    key = torch.nn.functional.rms_norm(query, (DIM,), eps=1e-6) / DIM**0.5
    program = patterndsl.parse(spec(rounds, causal)).compile(N, heads=HEADS)
    out = program(query, key, value, inputs={f"b{at}": labels[:, :, at] for at in range(rounds)}, scale=1.0)
    torch.testing.assert_close(out.transpose(1, 2).flatten(2), found.hidden_states, rtol=0, atol=1e-9)
