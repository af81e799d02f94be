"""Who stands where? The places of queries and keys in the lists of kernels: their own, or those of an order."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from patterndsl.runtime.kernels.asked import Orders
from patterndsl.runtime.kernels.work import Work


class Side(NamedTuple):
    """The places of queries or of keys. order: who stands there, or any integers where rows themselves do; strides: of
    its batch rows and heads; is_full: whether no place is empty."""

    order: Tensor
    strides: tuple[int, int]
    number: int
    is_full: bool

    def is_whole(self, block: int) -> bool:
        """Whether there is a row at every place of every block."""
        return self.is_full and self.number % block == 0


class Sides(NamedTuple):
    """Both sides. ordered: whether they stand in an order."""

    query: Side
    key: Side
    ordered: bool

    @property
    def orders(self) -> tuple[Tensor, Tensor]:
        """Of queries and of keys."""
        return self.query.order, self.key.order

    @property
    def strides(self) -> tuple[int, int, int, int]:
        """Of batch rows and heads of the order of queries, then of that of keys."""
        return *self.query.strides, *self.key.strides

    @property
    def numbers(self) -> tuple[int, int]:
        """How many places queries have, and keys."""
        return self.query.number, self.key.number


def sides_of(orders: Orders | None, work: Work, q_len: int, kv_len: int) -> Sides:
    """Those of lists; work: any of them."""
    if orders is None:
        query, key = (Side(work.pieces, (0, 0), length, True) for length in (q_len, kv_len))
        return Sides(query, key, False)
    query = _side(orders.query, orders.is_full)
    return Sides(query, query if orders.key is orders.query else _side(orders.key, orders.is_full), True)


def _side(order: Tensor, is_full: bool) -> Side:
    (num_rows, num_heads, number), (row, head, _) = order.shape, order.stride()
    return Side(order, (row if num_rows > 1 else 0, head if num_heads > 1 else 0), number, is_full)
