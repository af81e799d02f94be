"""What explain says is so: pairs, totals, what runs and what was rejected, and by which rule something else runs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import get_args

import pytest
import torch

import patterndsl
from patterndsl.analysis.explain import Explanation, Way
from patterndsl.analysis.pass_pairs import MAX_COUNTED
from patterndsl.lower.devices import CPU, CUDA
from patterndsl.lower.fallback import MANY_GROUPS, RULES, Backend, Call, leaves, usual_backend

PATTERNS = [
    "causal",
    "causal & (recent(16) | strided(16))",
    "window(20) | global(5)",
    "causal & dilated(15, 4)",
    "causal & (block(16) | columns(16, 2))",
    "blocks(8, window(1) | global(1) | random(2))",
    "causal & (head % 2 == 0 & recent(20) | head % 2 == 1 & strided(16))",
    "none",
]


def kept(way: Way) -> int:
    total = 0
    for item in way.passes:
        assert item.kept is not None and item.computed >= item.kept
        total += item.sign * item.kept
    return total


@pytest.mark.parametrize("device", ["cpu", "h100"])
@pytest.mark.parametrize("n", [1, 127, 300])
@pytest.mark.parametrize("text", PATTERNS)
def test_every_way_keeps_the_pairs_of_the_pattern(text: str, n: int, device: str) -> None:
    pattern = patterndsl.parse(text)
    mask = pattern.compile(n, heads=4).mask().expand(4, n, n)
    found = pattern.explain(n, heads=4, device=device)
    for group in found.groups:
        pairs = int(mask[list(group.heads)].sum())
        assert [kept(way) for way in group.ways] == [pairs] * len(group.ways)
        assert all(way.excess is None or way.excess >= 1 for way in group.ways)


def test_kept_pairs_are_left_out_where_they_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_COUNTED > 1000
    monkeypatch.setattr("patterndsl.analysis.pass_pairs.MAX_COUNTED", 1000)
    found = patterndsl.parse("recent(99)").explain(1000, device="h100")
    (item,) = found.groups[0].chosen(False).passes
    assert item.kept is None and "not counted" in str(found)


def test_totals_are_those_of_the_plan() -> None:
    program = patterndsl.parse("causal & (recent(64) | strided(64))").compile(4096, heads=4)
    found = program.explain()
    assert found.cost.forward == pytest.approx(program.plan.cost.forward)
    assert found.cost.backward == pytest.approx(program.plan.cost.backward)
    passes = found.groups[0].chosen(False).passes
    assert [item.text for item in passes] == [item.text for item in program.plan.passes]
    rows, channels = 4096, 4 * 64 * 4
    assert found.moved.forward == sum(item.moved.forward for item in passes) > 4 * rows * channels


def test_training_and_inference_are_told_apart() -> None:
    text = "window(100) | global(5)"
    for train in (False, True):
        found = patterndsl.parse(text).explain(8192, heads=4, train=train)
        (group,) = found.groups
        best = min(group.ways, key=lambda way: way.cost.of(train))
        assert group.chosen(train).cost == best.cost
        costs = [way.cost.of(train) for way in group.rejected(train)]
        assert costs == sorted(costs) and len(costs) == len(group.ways) - 1


def test_a_plan_that_was_asked_for_is_shown_as_chosen() -> None:
    program = patterndsl.parse("causal & (recent(64) | strided(64))").compile(2048, plan=1)
    (group,) = program.explain().groups
    assert group.chosen(False).number == group.chosen(True).number == 1
    assert 0 in [way.number for way in group.rejected(False)]


def test_program_and_pattern_say_the_same() -> None:
    pattern = patterndsl.parse("causal & strided(8)")
    assert pattern.compile(256, heads=2).explain(train=True) == pattern.explain(256, heads=2, train=True)
    named = patterndsl.parse("name: mine\nparams: {w: 3}\nattend: causal & recent(w)\n")
    assert str(named.compile(64).explain()).startswith("causal & recent(w): N = 64, 1 head of 64\n")
    assert str(named.explain(64)).startswith("mine: N = 64, 1 head of 64\n")


def test_other_heads_are_priced_and_that_is_said() -> None:
    pattern = patterndsl.parse("causal")
    usual, wide = (pattern.explain(4096, head_dim=head_dim) for head_dim in (64, 128))
    assert wide.moved.forward == 2 * usual.moved.forward and wide.cost.forward > 1.5 * usual.cost.forward
    assert any("heads of 128" in rule for rule in wide.rules)
    assert not any("plans are chosen for heads" in rule for rule in usual.rules)


def test_sizes_that_differ() -> None:
    found = patterndsl.parse("causal").explain(q_len=10, kv_len=100, q_start=90)
    assert "10 queries from 90 on, 100 keys" in str(found)


def test_it_is_all_data() -> None:
    found = patterndsl.parse(PATTERNS[6]).explain(500, heads=4).to_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["purpose"] == "inference" and found["machine"] == "cpu-2-core"


def test_progress_goes_from_group_to_group() -> None:
    seen: list[tuple[str, int, int]] = []
    pattern = patterndsl.parse(PATTERNS[6])
    pattern.explain(500, heads=4, on_event=lambda what, done, total: seen.append((what, done, total)))
    done = [at for _, at, _ in seen]
    assert done == sorted(done) and {total for *_, total in seen} == {200}
    assert done[0] > 0 and done[-1] <= 200


def test_it_needs_no_pytorch() -> None:
    code = (
        "import sys, patterndsl; str(patterndsl.parse('causal & strided(8)').explain(256, device='h100'));"
        "str(patterndsl.parse('causal').explain(256)); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- what runs


def said(found: Explanation) -> str:
    return "\n".join([found.runs, *found.rules])


def test_a_pattern_with_inputs_has_no_plan_and_says_what_runs() -> None:
    pattern = patterndsl.parse("causal & q.doc < k.doc", inputs={"doc": "int[N]"})
    found = pattern.explain(8192)
    assert found.groups == () and "`doc`" in (found.no_plan or "") and found.backend == "gathered"
    assert pattern.explain(100, device="h100").backend == "masked"
    assert pattern.explain(65_536, device="h100").backend == "masked"
    assert pattern.compile(100, backend="planned").explain().runs.startswith("nothing")


def test_tiles_that_a_call_tells_have_no_plan() -> None:
    found = patterndsl.parse("causal & same(doc)", inputs={"doc": "int[N]"}).explain(65_536, device="h100")
    assert "generated kernels on tiles that each call tells" in found.runs
    assert not found.groups
    assert found.no_plan is not None and "`doc`" in found.no_plan


def test_kernels_run_in_the_orders_of_inputs() -> None:
    pattern = patterndsl.parse("labels: {b: given}\nattend: causal & chunks(b, 64, 1)")
    found = pattern.explain(65_536, device="h100")
    assert found.backend == "masked" and "generated kernels" in found.runs
    assert any("Triton is missing" in rule for rule in found.rules)
    assert "by `b`" in str(found) and "FlexAttention" not in found.runs
    assert "generated kernels" not in pattern.explain(65_536).runs


@pytest.mark.parametrize("backend", sorted({*get_args(Backend)} - {"triton"}))
def test_a_backend_that_was_asked_for_does_not_fall_back(backend: str) -> None:
    found = patterndsl.parse("causal").compile(100, backend=backend).explain()
    assert "as asked for" in found.runs and "nothing falls back" in said(found)
    assert "instead" not in said(found)


def test_nan_is_spoken_of_where_keys_are_masked() -> None:
    assert "NaN" in said(patterndsl.parse("causal").explain(100))
    assert "NaN" not in said(patterndsl.parse("block(10)").explain(100))
    assert "must be finite" in said(patterndsl.parse("causal").explain(100, device="h100"))


def test_every_rule_is_said() -> None:
    for device, kind in (("cpu", "cpu"), ("h100", "cuda")):
        found = said(patterndsl.parse("causal").explain(100, device=device))
        backend = usual_backend(kind, has_inputs=False, num_groups=1, has_hulls=False)
        rules = [rule for rule in RULES if backend in rule.backends and kind in rule.device_types]
        assert rules and all(f"{rule.to} instead for {rule.when}" in found for rule in rules)


@pytest.mark.parametrize(
    ("backend", "device_type", "call", "leaves_it"),
    [
        ("planned", "cpu", Call("float32", 64, 64, False), False),
        ("planned", "cpu", Call("float64", 7, 7, False), False),
        ("planned", "cpu", Call("float32", 64, 32, False), True),
        ("planned", "cpu", Call("float32", 64, 64, True), True),
        ("planned", "cuda", Call("bfloat16", 64, 64, False), False),
        ("planned", "cuda", Call("float32", 64, 64, False), True),
        ("planned", "cuda", Call("float64", 64, 64, False), True),
        ("planned", "cuda", Call("bfloat16", 60, 60, False), True),
        ("planned", "cuda", Call("bfloat16", 264, 264, False), True),
        ("flex", "cuda", Call("float32", 64, 64, False), False),
        ("flex", "cuda", Call("float64", 64, 64, False), True),
        ("flex", "cuda", Call("float32", 64, 64, True), True),
        ("gathered", "cuda", Call("float64", 60, 3, True), False),
        ("oracle", "cpu", Call("float64", 60, 3, True), False),
    ],
)
def test_rules(backend: str, device_type: str, call: Call, leaves_it: bool) -> None:
    assert (leaves(backend, device_type, call) is not None) == leaves_it


def test_the_runtime_follows_the_rules() -> None:
    program = patterndsl.parse("causal & recent(9)").compile(20)
    x = torch.randn(1, 1, 20, 8)
    assert program.who(x, x, x) == "planned"
    assert program.who(x, x, x[..., :4]) == "gathered"
    assert program.who(x[:0], x[:0], x[:0]) == "gathered"
    assert program.who(x, x, torch.full_like(x, torch.nan)) == "gathered"


# ---- whose constants


def test_a_machine_can_be_given() -> None:
    slow = replace(CPU, name="slow", dense_call=1.0, sparse_call=1.0)
    pattern = patterndsl.parse("causal & (recent(64) | strided(64))")
    found = pattern.compile(4096, machine=slow).explain()
    assert found.machine == "slow" and found.cost.forward > 1.0
    assert pattern.compile(4096, machine="cpu-2-core").explain().machine == "cpu-2-core"
    with pytest.raises(patterndsl.PatternError, match="E505"):
        pattern.compile(4096, machine=CUDA)


def test_many_kinds_of_heads_are_one_launch_on_a_gpu() -> None:
    """Each kind has passes of its own, and a GPU would wait for the host that launches them."""
    assert usual_backend("cuda", has_inputs=False, num_groups=MANY_GROUPS, has_hulls=False) == "planned"
    assert usual_backend("cuda", has_inputs=False, num_groups=MANY_GROUPS + 1, has_hulls=False) == "triton"
    assert usual_backend("cpu", has_inputs=False, num_groups=MANY_GROUPS + 1, has_hulls=False) == "planned"
    pattern = patterndsl.parse("causal & blocks(16, random(2, seed = head))")
    assert "for more than 8 kinds of heads" in str(pattern.explain(256, heads=9, device="cuda"))


def test_hulls_are_shown_with_the_order_that_they_are_in() -> None:
    text = "causal & (chunks(bucket, 64, 1) | recent(128))"
    found = patterndsl.parse(text, inputs={"bucket": "int[N]"}).explain(4096)
    assert found.backend == "masked" and found.no_plan is None
    assert "by `bucket`, a band of 128 keys" in str(found) and "not counted" in str(found)


def test_runs_are_shown_without_figures() -> None:
    found = patterndsl.parse("causal & same(doc)", inputs={"doc": "int[N]"}).explain(4096)
    assert "runs of equal `doc`, causal" in str(found) and "nothing runs" not in str(found)


def test_tiles_that_a_call_tells_beside_lists_are_shown_without_figures() -> None:
    found = patterndsl.load("examples/selected/selected-documents.yaml").explain(4096, heads=4, device="h100")
    assert len(found.groups) == 2 and all(group.ways[0].runs for group in found.groups)
    assert "tiles of which a call's inputs tell" in str(found) and "nothing runs" not in str(found)
    assert "all heads, but what is not predicted: " in str(found)


def test_masked_says_what_it_refuses() -> None:
    pattern = patterndsl.parse("causal & q.doc < k.doc", inputs={"doc": "int[N]"})
    found = pattern.compile(8192, backend="masked").explain()
    assert found.runs.startswith("nothing: ") and "most pairs" in found.runs and found.groups == ()
