"""The two-level Axial Transformer of the script: causal in raster order as a whole, its layers loops over axes."""

from __future__ import annotations

import importlib.util
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from patterndsl.nn import Attention

SCRIPT = Path(__file__).parents[2] / "examples" / "axial_images.py"
DIM, HEADS = 12, 2
Place = tuple[int, int]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("axial_images", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(script: ModuleType) -> Any:
    """Random, in float64, with more layers than the script trains."""
    torch.manual_seed(0)
    model = script.AxialTransformer(DIM, HEADS, num_outer=2, num_inner=2).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def changed(script: ModuleType, model: Any) -> Tensor:
    """[pixel, pixel]: whether changing the first, in raster order, changes what is said of the second."""
    torch.manual_seed(1)
    num = script.HEIGHT * script.WIDTH
    pixels = torch.randint(0, script.LEVELS, (1, num))
    others = (pixels + torch.eye(num, dtype=torch.int64)) % script.LEVELS
    with torch.inference_mode():
        logits = [
            model(images.view(-1, script.HEIGHT, script.WIDTH)).view(-1, num, script.LEVELS)
            for images in (pixels, others)
        ]
    return (logits[1] - logits[0]).abs().amax(-1) > 1e-11


def test_the_whole_model_is_causal_in_raster_order(script: ModuleType, model: Any) -> None:
    """Each pixel changes what is said of every later one, and nothing of itself or an earlier one."""
    num = script.HEIGHT * script.WIDTH
    assert changed(script, model).equal(torch.ones(num, num, dtype=torch.bool).triu(1))


@pytest.mark.parametrize("shift", ["shift_down", "shift_right"])
def test_without_either_shift_it_is_not(
    script: ModuleType, model: Any, shift: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, shift, lambda x: x)
    assert changed(script, model).tril().any()


def test_rows_then_columns_see_all_of_the_own_row(script: ModuleType) -> None:
    """Two layers of the outer decoder see all rows as far as the own one, which the shift then takes away."""
    num = script.HEIGHT * script.WIDTH
    rows, columns = (pattern.compile(n=num).mask()[0].double() for pattern in (script.ROWS, script.MASKED_COLUMNS))
    height = torch.arange(num) // script.WIDTH
    assert (columns @ rows > 0).equal(height[:, None] >= height[None, :])


AXES: dict[str, Callable[[Place, Place], bool]] = {
    "ROWS": lambda q, k: q[0] == k[0],
    "MASKED_ROWS": lambda q, k: q[0] == k[0] and k[1] <= q[1],
    "MASKED_COLUMNS": lambda q, k: q[1] == k[1] and k[0] <= q[0],
}


@pytest.mark.parametrize("name", AXES)
def test_layers_equal_loops(script: ModuleType, name: str) -> None:
    """Outputs and gradients, over an image of fewer rows than the script's."""
    torch.manual_seed(2)
    layer = Attention(getattr(script, name), DIM, HEADS).double()
    places = [(y, x) for y in range(3) for x in range(script.WIDTH)]
    x = torch.randn(2, len(places), DIM, dtype=torch.float64, requires_grad=True)
    size = DIM // HEADS
    images = []
    for image in x:
        query, key, value = (
            projection(image).view(len(places), HEADS, size)
            for projection in (layer.query_projection, layer.key_projection, layer.value_projection)
        )
        rows = []
        for at, place in enumerate(places):
            seen = [number for number, other in enumerate(places) if AXES[name](place, other)]
            heads = []
            for head in range(HEADS):
                weights = [((query[at, head] * key[k, head]).sum() / math.sqrt(size)).exp() for k in seen]
                parts = [weight * value[k, head] for weight, k in zip(weights, seen, strict=True)]
                heads.append(torch.stack(parts).sum(0) / torch.stack(weights).sum())
            rows.append(torch.cat(heads))
        images.append(layer.output_projection(torch.stack(rows)))
    loops, ours = torch.stack(images), layer(x)
    assert isinstance(ours, Tensor)
    torch.testing.assert_close(ours, loops, atol=1e-9, rtol=1e-9)
    weight = torch.randn_like(ours)
    leaves = [x, *layer.parameters()]
    for mine, theirs in zip(
        torch.autograd.grad((ours * weight).sum(), leaves),
        torch.autograd.grad((loops * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-9)


def test_one_row_alone_says_what_the_image_says(script: ModuleType, model: Any) -> None:
    """So that generating takes the outer decoder once for each row, and the inner one of that row only."""
    pixels = script.stripes(2, torch.Generator().manual_seed(3))
    logits, context = model(pixels), model.context(pixels)
    for y in range(script.HEIGHT):
        torch.testing.assert_close(model.logits(pixels[:, y : y + 1], context[:, y : y + 1])[:, 0], logits[:, y])


def test_what_is_continued_is_the_likeliest(script: ModuleType, model: Any) -> None:
    pixels = script.stripes(2, torch.Generator().manual_seed(4))
    first = script.HEIGHT - 2
    found = script.continued(model, pixels, first)
    assert found[:, :first].equal(pixels[:, :first])
    assert found[:, first:].equal(model(found).argmax(-1)[:, first:])


def test_it_learns() -> None:
    """As a user runs it, with fewer steps."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--steps", "40"], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    before, after = (float(value) for value in re.findall(r"(\d+\.\d+) bits a pixel", done.stdout))
    assert after < 0.7 * before
    assert "step 40 of 40" in done.stderr
