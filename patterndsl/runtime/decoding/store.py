"""What does a device hold of the keys of some heads? Pages of keys and values, and where the host put what.

The host decides, and a device is told in one copy for each step, which it need not wait for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from patterndsl.analysis.holding import Holding
from patterndsl.runtime.decoding.pages import Integers, Pages


class Store:
    """The keys and values of key heads that hold the same.

    keys: [num_pages, heads, page, D], values: [num_pages, heads, page, Dv]; what no token was written to is anything.
    table: int32 [batch, width], the page of each page-long stretch of a row's places. lengths, older: int64 [batch];
    lasting: int32, see `Pages`. heads: int32, the key heads.
    """

    def __init__(
        self,
        kv_heads: Sequence[int],
        holding: Holding,
        batch: int,
        max_queries: int,
        page: int,
        like: tuple[Tensor, Tensor],
    ) -> None:
        """like: empty tensors [.., D] and [.., Dv] of the dtype and on the device of keys and values."""
        self.kv_heads = tuple(kv_heads)
        self.pages = Pages(holding, batch, max_queries, page)
        self.keys, self.values = (x.new_empty(0, len(self.kv_heads), page, x.shape[-1]) for x in like)
        self.device = like[0].device
        self.heads = torch.tensor(self.kv_heads, dtype=torch.int32, device=self.device)
        self.table = self._told(self.pages.table.astype(np.int32))
        self.lasting = torch.zeros(0, dtype=torch.int32, device=self.device)
        self._told_of = self.pages.version, 0
        self._tell(np.zeros(0, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.keys, self.values, self.table, self.lasting))

    def append(self, key: Tensor, value: Tensor, counts: Integers) -> None:
        """key: [B, heads, T, D], value: [B, heads, T, Dv]: the first counts[row] tokens of each row are stored."""
        batch, _, num_tokens, _ = key.shape
        writes = self.pages.append(counts, num_tokens)
        self._grow()
        num = len(writes.token)
        token, page, inside = self._tell(np.concatenate(writes)).view(3, num)
        if not num:
            return
        is_each = num == batch * num_tokens and bool((writes.token == np.arange(num)).all())
        for pool, new in ((self.keys, key), (self.values, value)):
            rows = new.transpose(1, 2).reshape(batch * num_tokens, *new.shape[1:4:2])
            pool[page, :, inside] = rows if is_each else rows[token]

    def reset(self, rows: Iterable[int]) -> None:
        """These rows are empty again."""
        self.pages.reset(rows)
        self._tell(np.zeros(0, dtype=np.int64))

    def _grow(self) -> None:
        """As many pages as are taken; by half more where their number grows on and on, so that few are copied."""
        have, wanted = self.keys.shape[0], self.pages.num_pages
        if wanted <= have:
            return
        num_pages = max(wanted, have + have // 2) if self.pages.holding.kind == "growing" else wanted
        self.keys, self.values = (
            torch.cat([x, x.new_empty(num_pages - have, *x.shape[1:])]) for x in (self.keys, self.values)
        )

    def _tell(self, more: Integers) -> Tensor:
        """Lengths and whatever else is new in one copy; returns `more` on the device."""
        pages = self.pages
        batch = pages.batch
        told = self._told(np.concatenate([pages.lengths, pages.older, more]))
        self.lengths, self.older = told[:batch], told[batch : 2 * batch]
        version, known = self._told_of
        if version != pages.version:
            self.table = self._told(pages.table)
        if known != len(pages.lasting):
            self.lasting = self._told(pages.lasting.astype(np.int32))
        self._told_of = pages.version, len(pages.lasting)
        return told[2 * batch :]

    def _told(self, numbers: np.ndarray) -> Tensor:
        """On the device; from pinned memory, so that the host goes on."""
        found = torch.from_numpy(np.ascontiguousarray(numbers))
        if self.device.type != "cuda":
            return found.clone()
        return found.pin_memory().to(self.device, non_blocking=True)
