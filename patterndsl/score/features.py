"""Which features of a query and a key have the weight of that pair as their inner product?

Elementwise features are returned as they are. Those of FAVOR+ are returned as logarithms: how they are kept from
overflow is for `linear`, which knows what each row sees.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, assert_never

import torch
from torch import Tensor

from patterndsl.diagnostics import input_error

Elementwise: TypeAlias = Literal["linear", "elu", "relu"]
"""Features of one channel each; linear are the channels themselves."""

RELU_FLOOR = 1e-3
"""What Performer's generalised attention adds, so that no weight is 0."""


def elu_features(x: Tensor) -> Tensor:
    """elu(x) + 1, of the shape and dtype of x: above 0 while exp(x) is.

    For negative x it is computed as exp(x), which loses no digits to the sum. Source: Katharopoulos et al. 2020,
    arXiv 2006.16236, equation 7. Work: O(x).
    """
    return x.clamp(max=0).exp() + x.relu()


def relu_features(x: Tensor) -> Tensor:
    """relu(x) + 0.001, of the shape and dtype of x.

    Source: Choromanski et al. 2020, arXiv 2009.14794, generalised attention with f = relu. Work: O(x).
    """
    return x.relu() + RELU_FLOOR


def elementwise(kind: Elementwise, x: Tensor) -> Tensor:
    """The features of that name, of the shape and dtype of x. Work: O(x)."""
    match kind:
        case "linear":
            return x
        case "elu":
            return elu_features(x)
        case "relu":
            return relu_features(x)
        case _:
            assert_never(kind)


def directions(
    num_features: int,
    head_dim: int,
    *,
    orthogonal: bool,
    seed: int,
    regularized: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """[M, D] on the CPU: random directions w, the same ones on each device and in each run.

    orthogonal: each block of D rows is orthogonal and uniform over all such blocks, its rows as long as Gaussian ones,
    chi(D); the last block is cut to the rows that are asked for. Otherwise all rows are independent and Gaussian.
    regularized: all rows are sqrt(D) long, which lessens the variance and makes the estimate slightly biased.
    Raises InputError (E406) unless M and D are at least 1. Source: Choromanski et al. 2020, arXiv 2009.14794, section
    2.4. Work: O(M D^2).
    """
    if num_features < 1 or head_dim < 1:
        message = f"{num_features} random features of {head_dim} dimensions"
        raise input_error("E406", message, "ask for at least 1 feature of at least 1 dimension")
    generator = torch.Generator("cpu").manual_seed(seed)
    gaussian = torch.randn(num_features, head_dim, generator=generator, dtype=torch.float64)
    lengths = gaussian.norm(dim=-1, keepdim=True)
    if regularized:
        lengths = torch.full_like(lengths, math.sqrt(head_dim))
    if not orthogonal:
        units = gaussian / gaussian.norm(dim=-1, keepdim=True)
        independent: Tensor = units * lengths if regularized else gaussian
        return independent.to(dtype)
    blocks = [_orthogonal_block(head_dim, generator) for _ in range(-(-num_features // head_dim))]
    rows: Tensor = torch.cat(blocks)[:num_features] * lengths
    return rows.to(dtype)


def _orthogonal_block(size: int, generator: torch.Generator) -> Tensor:
    """[size, size], uniform over the orthogonal matrices.

    The Q of a Gaussian matrix is not: LAPACK fixes no sign of R, hence the estimate would be biased. With diag R > 0
    the factorisation is unique, and Q as uniform as the matrix was (Mezzadri 2006, arXiv math-ph/0609050).
    """
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    corrected: Tensor = q * r.diagonal().sign()
    return corrected


def favor_exponents(x: Tensor, directions: Tensor, hyperbolic: bool) -> Tensor:
    """[..., T, M]: logarithms of FAVOR+ features of queries or keys x [..., T, D], for directions w [M, D].

    With y = x / D^(1/4), log phi = w.y - |y|^2 / 2 - log(M) / 2: then phi(q).phi(k) is exp(q.k / sqrt(D)) in the mean
    over directions. hyperbolic: both signs of each direction, [..., T, 2 M], of less variance. No stabiliser is taken
    off. float32 at least: the exponent of a half-precision number has too few digits. Raises InputError (E503) where x
    and the directions have not the same D. Source: Choromanski et al. 2020, arXiv 2009.14794, lemma 1. Work: O(T M D).
    """
    if x.shape[-1] != directions.shape[-1]:
        message = f"directions of {directions.shape[-1]} dimensions for heads of {x.shape[-1]}"
        raise input_error("E503", message, f"draw directions for head_dim={x.shape[-1]}")
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        scaled = x.to(dtype) * x.shape[-1] ** -0.25
        along = scaled @ directions.to(scaled).mT
        if hyperbolic:
            along = torch.cat([along, -along], dim=-1)
        exponents: Tensor = along - scaled.square().sum(-1, keepdim=True) / 2 - math.log(along.shape[-1]) / 2
    return exponents
