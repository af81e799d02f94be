"""On a CUDA device: plans, FlexAttention and the gathered backend against the oracle, outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import patterndsl

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

N = 1000
PATTERNS = {
    "band and sinks": patterndsl.parse("causal & (recent(100) | first(4))"),
    "random blocks per head": patterndsl.parse("blocks(32, random(2, seed = head) | window(1))"),
    "dilation per head": patterndsl.parse("causal & dilated(8, d[head % 2])", params={"d": [1, 2]}),
    "documents per row": patterndsl.parse("causal & within(doc, recent(200))", inputs={"doc": "int[N]"}),
    "empty rows": patterndsl.parse("q >= 600 & k < 20"),
    "global rows": patterndsl.parse("window(16) | global(3)"),
    "window and stride": patterndsl.parse("causal & (recent(64) | strided(40))"),
    "hot columns": patterndsl.parse("recent(40) | causal & block(50) | k < 9"),
    "window and stride by head": patterndsl.parse("causal & (head < 2 & recent(64) | head >= 2 & strided(40))"),
    "rows and columns": patterndsl.parse("grid: {row: 25, col: 40}\nattend: q.row == k.row | q.col == k.col\n"),
    "chunks by label and a window": patterndsl.parse(
        "labels: {doc: given}\nattend: causal & (chunks(doc, 16, 1) | recent(20)) | k < 3"
    ),
    "diagonal": patterndsl.parse("q == k | k == 0"),
}
HALF = (torch.bfloat16, torch.float16)


def loss(output: Tensor, lse: Tensor) -> Tensor:
    return (output.double() ** 2).sum() + lse.double().masked_fill(lse == -torch.inf, 0).sum()


DTYPES = (torch.float32, *HALF)


def runs(name: str) -> list[tuple[str, torch.dtype]]:
    """Backends and dtypes for a pattern: plans are for half precision and no inputs, `masked` is for inputs."""
    own = ("masked", DTYPES) if PATTERNS[name].resolved.inputs else ("planned", HALF)
    return [(backend, dtype) for backend, dtypes in (own, ("flex", DTYPES), ("gathered", DTYPES)) for dtype in dtypes]


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(("name", "backend", "dtype"), [(name, *run) for name in PATTERNS for run in runs(name)])
def test_equals_the_oracle(name: str, backend: str, dtype: torch.dtype, kv_heads: int) -> None:
    pattern = PATTERNS[name]
    torch.manual_seed(0)
    shapes = ((2, 4, N, 64), (2, kv_heads, N, 64), (2, kv_heads, N, 64))
    tensors = [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]
    doc = torch.stack([torch.arange(N) // 130, torch.arange(N) // 77]).cuda()
    inputs = {"doc": doc} if pattern.resolved.inputs else None
    results = {}
    for name in (backend, "oracle"):
        program = pattern.compile(N, heads=4, device="cuda", backend=name)
        query, key, value = tensors
        output, lse = program(query, key, value, inputs=inputs, return_lse=True)
        results[name] = (output, lse, *torch.autograd.grad(loss(output, lse), tensors))
    tolerance = 3e-2 if dtype in HALF else 2e-3  # TF32 is not on; flex still reorders its sums
    for ours, truth in zip(results[backend], results["oracle"], strict=True):
        finite = truth.isfinite()
        assert torch.equal(ours.isfinite(), finite)
        scale = truth[finite].abs().max().clamp_min(1.0)
        assert (ours - truth)[finite].abs().max() <= tolerance * scale


@pytest.mark.parametrize("choice", [0, 1, 2])
@pytest.mark.parametrize("name", ["window and stride", "hot columns", "rows and columns", "global rows"])
def test_every_plan_in_inference_and_training(name: str, choice: int) -> None:
    """Forced plans; in inference FlexAttention runs on finer tiles and results are merged into where they lie."""
    torch.manual_seed(0)
    pattern = PATTERNS[name]
    program = pattern.compile(N, heads=4, device="cuda", backend="planned", plan=choice)
    query, key, value = (torch.randn(2, 4, N, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    truth, truth_lse = pattern.compile(N, heads=4, device="cuda", backend="oracle")(query, key, value, return_lse=True)
    trained = program(query.clone().requires_grad_(), key, value, return_lse=True)
    for output, lse in (program(query, key, value, return_lse=True), trained):
        assert (output - truth).abs().max() <= 2e-2 * truth.abs().max()
        torch.testing.assert_close(lse, truth_lse.float(), rtol=1e-3, atol=1e-2)


def test_what_auto_takes() -> None:
    assert patterndsl.parse("causal").compile(64, device="cuda").backend == "planned"
    documents = patterndsl.parse("same(doc)", inputs={"doc": "int[N]"})
    assert documents.compile(64, device="cuda").backend == "masked"
    assert documents.compile(32_768, device="cuda").backend == "masked"


@pytest.mark.parametrize("rounds", [1, 2])
def test_labels_of_each_head(rounds: int) -> None:
    """Hashed by the program itself, with a multiset and a fallback, and the same again from the labels it returns."""
    torch.manual_seed(0)
    text = f"""
labels: {{bucket: "lsh(buckets = 16, rounds = {rounds})"}}
merge: multiset
fallback: q == k
attend: causal & (chunks(bucket, 32, 1) | recent(8)) & q != k
"""
    pattern = patterndsl.parse(text)
    tensors = [torch.randn(2, 4, N, 64, device="cuda", requires_grad=True) for _ in range(3)]
    query, key, value = tensors
    fast = pattern.compile(N, heads=4, device="cuda")
    output, lse, labels = fast(query, key, value, return_lse=True, return_labels=True)
    truth, truth_lse = pattern.compile(N, heads=4, device="cuda", backend="oracle")(
        query, key, value, inputs=labels, return_lse=True
    )
    grads = [torch.autograd.grad(loss(*found), tensors) for found in ((output, lse), (truth, truth_lse))]
    for ours, other in zip((output, lse, *grads[0]), (truth, truth_lse, *grads[1]), strict=True):
        assert (ours - other).abs().max() <= 2e-3 * other.abs().max().clamp_min(1.0)


def test_tiles_of_inputs_stay_on_the_device() -> None:
    pattern = patterndsl.parse("causal & same(doc)", inputs={"doc": "int[N]"})
    program = pattern.compile(4096, device="cuda")
    doc = torch.arange(4096, device="cuda") // 300
    assert program.block_mask(128, inputs={"doc": doc}).kv_indices.device.type == "cuda"
    assert program.tiles(128, inputs={"doc": doc})[0][0].q_blks.device.type == "cuda"


SELECTED = {
    "blocks for blocks": "topk(3, of = blocks(64), per = blocks(64), among = k < q, always = k == q)",
    "blocks for queries": "topk(3, of = blocks(64), among = k < q // 64, always = k == q // 64, by = max)",
    "keys for queries": "topk(20, among = causal, heads = all)",
    "odd blocks": "topk(3, of = blocks(48), per = blocks(96), always = k == 0, heads = group)",
}


@pytest.mark.parametrize("beside", ["", " | recent(5) | first(2)", " | recent(40) & same(doc)"])
@pytest.mark.parametrize("selector", SELECTED.values(), ids=SELECTED)
def test_selections(selector: str, beside: str) -> None:
    """Lists alone and beside static terms and terms with inputs, in training and in inference."""
    torch.manual_seed(0)
    inputs = 'inputs: {doc: "int[N]"}\n' if "doc" in beside else ""
    pattern = patterndsl.parse(f"{inputs}select:\n  top: {selector}\nattend: causal & (top{beside})\n")
    tensors = [torch.randn(2, heads, N, 64, device="cuda", requires_grad=True) for heads in (4, 2, 2)]
    query, key, value = tensors
    given = {"doc": torch.stack([torch.arange(N) // 130, torch.arange(N) // 77]).cuda()} if inputs else {}
    fast, truth = (pattern.compile(N, heads=4, device="cuda", backend=name) for name in ("auto", "oracle"))
    output, lse, found = fast(query, key, value, inputs=given, return_lse=True, return_labels=True)
    expected = truth(query, key, value, inputs={**given, **found}, return_lse=True)
    grads = [torch.autograd.grad(loss(*results), tensors) for results in ((output, lse), expected)]
    with torch.no_grad():
        inferred = fast(query, key, value, inputs={**given, **found})
    everything = zip((output, inferred, *grads[0]), (expected[0], expected[0], *grads[1]), strict=True)
    for ours, other in everything:
        assert (ours - other).abs().max() <= 2e-3 * other.abs().max().clamp_min(1.0)


@pytest.mark.parametrize("merge", ["set", "multiset", "mean"])
def test_routes(merge: str) -> None:
    torch.manual_seed(0)
    pattern = patterndsl.parse(f"""
labels: {{c: kmeans(clusters = 4)}}
select: {{route: "members(c, top = 96)"}}
merge: {merge}
attend: causal & (route | recent(3))
""")
    lists = torch.rand(2, 4, 4, N).topk(96).indices.cuda()
    tensors = [torch.randn(2, 4, N, 64, device="cuda", requires_grad=True) for _ in range(3)]
    results = [
        pattern.compile(N, heads=4, device="cuda", backend=name)(*tensors, inputs={"route": lists})
        for name in ("auto", "oracle")
    ]
    grads = [torch.autograd.grad(out.square().sum(), tensors) for out in results]
    for ours, other in zip((results[0], *grads[0]), (results[1], *grads[1]), strict=True):
        assert (ours - other).abs().max() <= 2e-3 * other.abs().max().clamp_min(1.0)


@pytest.mark.parametrize("backend", ["planned", "triton"])
@pytest.mark.parametrize("name", ["window and stride", "window and stride by head", "global rows", "rows and columns"])
def test_calls_are_captured_in_a_graph(name: str, backend: str) -> None:
    """Forward and backward: replayed on other numbers, a captured call gives the bits that a new one gives."""
    torch.manual_seed(0)
    program = PATTERNS[name].compile(N, heads=4, device="cuda", backend=backend)
    shape = (3, 2, 4, N, 64)
    tensors = [torch.randn(shape[1:], device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    upstream = torch.randn(shape[1:], device="cuda", dtype=torch.bfloat16)

    def step() -> list[Tensor]:
        output = program(*tensors)
        return [output.detach(), *torch.autograd.grad(output, tensors, upstream)]

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step()  # kernels are compiled, and lists found
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    others = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    for tensor, other in zip(tensors, others, strict=True):
        tensor.detach().copy_(other)
    graph.replay()
    for replayed, new in zip(captured, step(), strict=True):
        assert torch.equal(replayed, new)
