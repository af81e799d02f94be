"""Images pixel by pixel: the two-level Axial Transformer (Ho et al. 2019, arXiv 1912.12180), trained on stripes.

    python examples/axial_images.py

Attention runs along one axis at a time: along the rows, along the columns, or along either as far as the pixel itself.
Rows without a mask look ahead, and under a mask a pixel sees itself; the model does neither, by two shifts:

    outer decoder  rows without a mask, then columns with one, so that a pixel knows all rows as far as its own.
                   Shifted down by a row, it knows all rows above.
    inner decoder  pixels shifted right by one, and beside them what the outer one says; then rows with a mask, so that
                   a pixel knows the rows above and what is left of it.

Every image is stripes of a random slope and phase in four grey levels. Two pixels of the first row and one of the
second tell which, and a model that looks left and up can know all others: 6 bits of 64 pixels, 0.09 bits for each.
"""

from __future__ import annotations

import argparse
import math
import sys

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

import patterndsl

HEIGHT, WIDTH, LEVELS = 8, 8, 4
SHADES = " .+#"

GRID: dict[str, int | str] = {"row": f"N // {WIDTH}", "col": WIDTH}  # any number of rows: position = row * WIDTH + col
ROWS = patterndsl.parse("same(row)", grid=GRID)
MASKED_ROWS = patterndsl.parse("same(row) & causal", grid=GRID)
MASKED_COLUMNS = patterndsl.parse("same(col) & causal", grid=GRID)


class Block(nn.Module):
    """A transformer's layer, norms first: attention by a pattern, then two linear maps of each pixel."""

    def __init__(self, pattern: patterndsl.Pattern, dim: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.feed_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = patterndsl.nn.Attention(pattern, dim, heads)
        self.feed = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, rows, WIDTH, dim]; returns the same shape."""
        flat = x.flatten(1, 2)
        flat = flat + self.attention(self.attention_norm(flat))
        return (flat + self.feed(self.feed_norm(flat))).view_as(x)


class AxialTransformer(nn.Module):
    """What each pixel of an image may be, given those before it in raster order. Work: O(pixels x (rows + columns))."""

    def __init__(self, dim: int = 32, heads: int = 4, num_outer: int = 1, num_inner: int = 1) -> None:
        super().__init__()
        self.outer_embedding, self.inner_embedding = nn.Embedding(LEVELS, dim), nn.Embedding(LEVELS, dim)
        self.row_position = nn.Parameter(0.1 * torch.randn(HEIGHT, 1, dim))
        self.column_position = nn.Parameter(0.1 * torch.randn(WIDTH, dim))
        patterns = [ROWS, MASKED_COLUMNS] * num_outer
        self.outer = nn.Sequential(*(Block(pattern, dim, heads) for pattern in patterns))
        self.inner = nn.Sequential(*(Block(MASKED_ROWS, dim, heads) for _ in range(num_inner)))
        self.output = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, LEVELS))

    def context(self, pixels: Tensor) -> Tensor:
        """What is known of the rows above each pixel, and its place. pixels: int64 [B, HEIGHT, WIDTH]; returns
        [B, HEIGHT, WIDTH, dim]."""
        position = self.row_position + self.column_position
        above = self.outer(self.outer_embedding(pixels) + position)
        return shift_down(above) + position

    def logits(self, rows: Tensor, context: Tensor) -> Tensor:
        """[B, any rows, WIDTH, LEVELS] of rows and the context of each: rows do not see each other here."""
        return self.output(self.inner(shift_right(self.inner_embedding(rows)) + context))

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: int64 [B, HEIGHT, WIDTH]. Returns logits [B, HEIGHT, WIDTH, LEVELS], each of the pixels before."""
        return self.logits(pixels, self.context(pixels))


def shift_down(x: Tensor) -> Tensor:
    """Each row of [B, rows, columns, dim] one further down; zeros come in."""
    return pad(x[:, :-1], (0, 0, 0, 0, 1, 0))


def shift_right(x: Tensor) -> Tensor:
    """Each column of [B, rows, columns, dim] one further right; zeros come in."""
    return pad(x[:, :, :-1], (0, 0, 1, 0))


def stripes(num: int, generator: torch.Generator) -> Tensor:
    """int64 [num, HEIGHT, WIDTH]: the level goes up by one number from row to row, and by another along the row."""
    down, right, phase = torch.randint(0, LEVELS, (3, num, 1, 1), generator=generator)
    row, column = torch.arange(HEIGHT)[:, None], torch.arange(WIDTH)
    return (down * row + right * column + phase) % LEVELS


def bits(model: nn.Module, pixels: Tensor) -> Tensor:
    """Mean bits to say a pixel, 2 for one of four levels that is not foreseen at all."""
    return cross_entropy(model(pixels).flatten(0, 2), pixels.flatten()) / math.log(2)


@torch.no_grad()
def continued(model: AxialTransformer, pixels: Tensor, first_row: int) -> Tensor:
    """The likeliest pixels from first_row on, in raster order: the outer decoder runs for each row, the inner one, of a
    single row, for each pixel."""
    pixels = pixels.clone()
    for y in range(first_row, HEIGHT):
        context = model.context(pixels)[:, y : y + 1]
        for x in range(WIDTH):
            pixels[:, y, x] = model.logits(pixels[:, y : y + 1], context)[:, 0, x].argmax(-1)
    return pixels


def drawn(pixels: Tensor) -> list[str]:
    """An image [HEIGHT, WIDTH] as text, one line a row."""
    return ["".join(SHADES[level] for level in row) for row in pixels.tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="training steps (default: 150)")
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    shown = stripes(32, generator)
    model = AxialTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with torch.inference_mode():
        print(f"before: {bits(model, shown):.3f} bits a pixel")
    for step in range(steps):
        loss = bits(model, stripes(16, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 10 == 0:
            print(f"\rstep {step + 1} of {steps}: {loss.item():.3f}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    with torch.inference_mode():
        print(f"after:  {bits(model, shown):.3f} bits a pixel")
    found = continued(model, shown[:1], first_row=HEIGHT // 2)[0]
    print("an image, and how its upper half is continued:")
    for left, right in zip(drawn(shown[0]), drawn(found), strict=True):
        print(f"  |{left}|  |{right}|")


if __name__ == "__main__":
    main()
