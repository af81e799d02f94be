"""How do sets attend? The blocks of the Set Transformer (Lee et al. 2019, arXiv 1810.00825): MAB, SAB, ISAB and PMA.

Every query attends every key that is there, so that no block knows an order: SAB and ISAB permute what they return with
what they are given, PMA returns the same for every order. There is no causal form: an element has no position, hence
nothing before it. Sets of several sizes are padded to one and told apart by `present`: what stands at the padding is
never attended, and what comes out there means nothing. A set without elements is an empty row: it attends to 0, which
the output projection turns into its bias.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from patterndsl.diagnostics import input_error
from patterndsl.functional import attention
from patterndsl.loading import parse
from patterndsl.runtime.arguments import is_autocast_on
from patterndsl.sema.parameters import MAX_HEADS, MAX_SIZE, counted

ALL = parse("all")
PRESENT = parse("k.present", inputs={"present": "bool[Nk]"})


class MAB(nn.Module):
    """Multi-head attention block: LN(H + rFF(H)) of H = LN(X + MHA(X, Y, Y)).

    dim: width of X, Y and the output. heads: must divide it. norm: the two layer norms LN. hidden: width of rFF between
    its two linear maps and their ReLU; dim by default.

    released: as the paper's code computes it, which differs: the residual is the projected query and not X, scores are
    divided by the root of dim and not of dim // heads, there is no output projection, rFF is one linear map with a ReLU
    behind it, and there are no norms unless norm=True.
    """

    def __init__(
        self, dim: int, heads: int, *, norm: bool | None = None, hidden: int | None = None, released: bool = False
    ) -> None:
        super().__init__()
        self.dim, self.heads = counted("dim", dim, 1, MAX_SIZE), counted("heads", heads, 1, MAX_HEADS)
        if dim % heads:
            raise input_error("E503", f"dim {dim} is not a multiple of {heads} heads", "let heads divide dim")
        self.released = released
        self.norm = not released if norm is None else norm
        self.query_projection, self.key_projection, self.value_projection = (nn.Linear(dim, dim) for _ in range(3))
        self.output_projection = nn.Identity() if released else nn.Linear(dim, dim)
        self.attention_norm, self.output_norm = (nn.LayerNorm(dim) if self.norm else nn.Identity() for _ in range(2))
        self.feed = _feed_forward(dim, hidden, released)

    def forward(self, x: Tensor, context: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x: [B, Tq, dim] attends to context: [B, Tk, dim]. Returns [B, Tq, dim].

        present: bool [B, Tk], or [Tk] for all, False where context is padding. Where no key is there, H is LN(X + bias
        of the output projection). Work: O(B Tq Tk dim). Raises InputError (E502, E503) for tensors that do not fit.
        """
        _check("x", x, self.query_projection.weight)
        _check("context", context, self.query_projection.weight)
        query = self.query_projection(x)
        attended = attention(
            self._by_head(query),
            self._by_head(self.key_projection(context)),
            self._by_head(self.value_projection(context)),
            ALL if present is None else PRESENT,
            inputs=None if present is None else {"present": present},
            scale=self.dim**-0.5 if self.released else None,
        )
        residual = query if self.released else x
        mixed = self.attention_norm(residual + self.output_projection(attended.transpose(1, 2).flatten(2)))
        output: Tensor = self.output_norm(mixed + self.feed(mixed))
        return output

    def _by_head(self, x: Tensor) -> Tensor:
        """[B, T, dim] to [B, heads, T, dim // heads]."""
        return x.view(*x.shape[:2], self.heads, self.dim // self.heads).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.heads}, norm={self.norm}, released={self.released}"


class SAB(nn.Module):
    """Set attention block: MAB(X, X). Arguments as those of MAB."""

    def __init__(
        self, dim: int, heads: int, *, norm: bool | None = None, hidden: int | None = None, released: bool = False
    ) -> None:
        super().__init__()
        self.block = MAB(dim, heads, norm=norm, hidden=hidden, released=released)

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x: [B, T, dim], present: bool [B, T]. Returns [B, T, dim], permuted as x is. Work: O(B T² dim)."""
        output: Tensor = self.block(x, x, present=present)
        return output


class ISAB(nn.Module):
    """Induced set attention block: MAB(X, H) of H = MAB(I, X), with num_inducing learned vectors I [num_inducing, dim].

    The other arguments are those of MAB, for both.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        num_inducing: int,
        *,
        norm: bool | None = None,
        hidden: int | None = None,
        released: bool = False,
    ) -> None:
        super().__init__()
        self.gather = MAB(dim, heads, norm=norm, hidden=hidden, released=released)
        self.spread = MAB(dim, heads, norm=norm, hidden=hidden, released=released)
        self.inducing = _learned("num_inducing", num_inducing, dim)

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x: [B, T, dim], present: bool [B, T]. Returns [B, T, dim], permuted as x is.

        Only MAB(I, X) needs `present`: the keys of MAB(X, H) are all there. Work: O(B T num_inducing dim), as each head
        computes 2 T num_inducing pairs.
        """
        _check("x", x, self.inducing)
        summary = self.gather(self.inducing.expand(len(x), -1, -1), x, present=present)
        output: Tensor = self.spread(x, summary)
        return output


class PMA(nn.Module):
    """Pooling by multi-head attention: MAB(S, rFF(Z)), with num_seeds learned vectors S [num_seeds, dim].

    The other arguments are those of MAB; as released there is no rFF before it.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        num_seeds: int,
        *,
        norm: bool | None = None,
        hidden: int | None = None,
        released: bool = False,
    ) -> None:
        super().__init__()
        self.block = MAB(dim, heads, norm=norm, hidden=hidden, released=released)
        self.feed = nn.Identity() if released else _feed_forward(dim, hidden, released)
        self.seeds = _learned("num_seeds", num_seeds, dim)

    def forward(self, x: Tensor, *, present: Tensor | None = None) -> Tensor:
        """x: [B, T, dim], present: bool [B, T]. Returns [B, num_seeds, dim], the same for every order of elements.

        Work: O(B T (num_seeds + hidden) dim); each head computes num_seeds T pairs.
        """
        _check("x", x, self.seeds)
        output: Tensor = self.block(self.seeds.expand(len(x), -1, -1), self.feed(x), present=present)
        return output


def _feed_forward(dim: int, hidden: int | None, released: bool) -> nn.Sequential:
    """rFF, of each element by itself: [..., dim] to [..., dim]."""
    if not released:
        width = dim if hidden is None else counted("hidden", hidden, 1, MAX_SIZE)
        return nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, dim))
    if hidden is not None:
        raise input_error("E503", f"hidden is {hidden}, and the released rFF is one linear map", "leave hidden out")
    return nn.Sequential(nn.Linear(dim, dim), nn.ReLU())


def _learned(name: str, count: int, dim: int) -> nn.Parameter:
    """Learned elements [1, count, dim], drawn by Xavier's bounds for that shape, as the paper's code draws them."""
    vectors = nn.Parameter(torch.empty(1, counted(name, count, 1, MAX_SIZE), dim))
    nn.init.xavier_uniform_(vectors)
    return vectors


def _check(name: str, x: object, weight: Tensor) -> None:
    """Raises InputError (E503) where x is no set of elements of the width and dtype that weight [..., dim] takes."""
    help = f"give {name}: [B, T, {weight.shape[-1]}]"
    if not isinstance(x, Tensor):
        raise input_error("E503", f"{name} is {type(x).__name__}, not a tensor", help)
    if x.dim() != 3 or x.shape[2] != weight.shape[-1]:
        raise input_error("E503", f"{name} is {list(x.shape)}", help)
    if not x.is_floating_point() or (x.dtype != weight.dtype and not is_autocast_on(x.device.type)):
        raise input_error(
            "E503", f"{name} is {x.dtype}, the block {weight.dtype}", f"cast it: {name}.to({weight.dtype})"
        )
