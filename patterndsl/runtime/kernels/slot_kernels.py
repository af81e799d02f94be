"""The kernels of slots: who stands in them, which work there is over them, and what becomes of their results.

A slot is a place where a query stands, and one may stand at several: once in each of its routes, or once for each block
of keys that it lists. `slot_tables` and `slot_passes` say how these are launched. A list is that of a batch row and
head; [lists, ..] tables have them one after the other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from patterndsl.runtime.kernels.rows import (
    LN2,
    LOG2E,
    head_offset,
    load_numbers,
    load_tile,
    store_numbers,
    store_tile,
)

# ---- routes


@triton.jit(do_not_specialize=["length", "kv_len", "heads"])
def narrow_kernel(table, members, tb, th, heads, length, kv_len, block: tl.constexpr):
    """members int32 [lists, length]: those of a table of any integers, -1 for what is no key. Grid: (blocks, lists)."""
    row, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    at = tl.program_id(0) * block + tl.arange(0, block)
    found = tl.load(table + head_offset(tb, th, row, head) + at, mask=at < length, other=-1).to(tl.int64)
    found = tl.where((found >= 0) & (found < kv_len), found, -1)
    into = members + tl.program_id(1).to(tl.int64) * length + at
    tl.store(into, found.to(tl.int32), mask=at < length)


@triton.jit(do_not_specialize=["heads", "routes", "width", "kv_len"])
def sort_kernel(
    table, members, tb, th, heads, routes, width, kv_len, at_once: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """The same, those of each route in ascending order. Grid: (some routes at once, lists)."""
    row, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    route = tl.program_id(0) * at_once + tl.arange(0, at_once)[:, None]
    inside = tl.arange(0, padded)[None, :]
    at = route * width + inside
    there = (route < routes) & (inside < width)
    found = tl.load(table + head_offset(tb, th, row, head) + at, mask=there, other=kv_len).to(tl.int64)
    found = tl.where(there & ((found < 0) | (found >= kv_len)), -1, found)
    found = tl.sort(found.to(tl.int32), 1)  # what is behind the last member stays there
    tl.store(members + tl.program_id(1).to(tl.int64) * (routes * width) + at, found, mask=there)


@triton.jit(do_not_specialize=["length", "width", "kv_len", "q_start", "q_len"])
def stand_kernel(
    members, keys, queries, counts, turns, length, width, kv_len, q_start, q_len,
    apart: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Which key stands at each place, and which query: members of routes, ascending, each once in a route. apart:
    whether queries are counted from another position than keys. Grid: (blocks, lists).

    counts: int32 [lists, keys], behind a number of nothing: at how many places each key stands. turns: how many of
    these were counted before a place, in an order that may vary from run to run.
    """
    at = tl.program_id(0) * block + tl.arange(0, block)
    mine = tl.program_id(1).to(tl.int64)
    first = mine * length
    key = tl.load(members + first + at, mask=at < length, other=-1)
    before = tl.load(members + first + at - 1, mask=(at < length) & (at % width > 0), other=-1)
    key = tl.where(key == before, -1, key)
    tl.store(keys + first + at, key, mask=at < length)
    if apart:
        query = key - q_start
        there = (key >= 0) & (query >= 0) & (query < q_len)
        tl.store(queries + first + at, tl.where(there, query, -1), mask=at < length)
    turn = tl.atomic_add(counts + 1 + mine * kv_len + key, at * 0 + 1, mask=key >= 0)
    tl.store(turns + first + at, turn, mask=key >= 0)


@triton.jit(do_not_specialize=["length", "kv_len"])
def fill_kernel(keys, turns, begins, loose, length, kv_len, block: tl.constexpr):
    """The places of each key, one after the other, in the order of their turns. begins: int32 [lists, keys], and one
    more, where those of a key begin. Grid: (blocks, lists)."""
    at = tl.program_id(0) * block + tl.arange(0, block)
    mine = tl.program_id(1).to(tl.int64)
    key = tl.load(keys + mine * length + at, mask=at < length, other=-1)
    begin = tl.load(begins + mine * kv_len + key, mask=key >= 0, other=0)
    turn = tl.load(turns + mine * length + at, mask=key >= 0, other=0)
    tl.store(loose + begin + turn, at, mask=key >= 0)


@triton.jit(do_not_specialize=["length", "kv_len"])
def settle_kernel(keys, begins, loose, places, length, kv_len, block: tl.constexpr):
    """The same in ascending order: each place counts those before it. Grid: (blocks, lists)."""
    at = tl.program_id(0) * block + tl.arange(0, block)
    mine = tl.program_id(1).to(tl.int64)
    key = tl.load(keys + mine * length + at, mask=at < length, other=-1)
    begin = tl.load(begins + mine * kv_len + key, mask=key >= 0, other=0)
    number = tl.load(begins + mine * kv_len + key + 1, mask=key >= 0, other=0) - begin
    rank = at * 0
    for turn in range(tl.max(number, 0)):
        other = tl.load(loose + begin + turn, mask=turn < number, other=2147483647)
        rank += (other < at).to(tl.int32)
    tl.store(places + begin + rank, at, mask=key >= 0)


@triton.jit(do_not_specialize=["length", "width", "kv_len", "words"])
def route_kernel(keys, bits, length, width, kv_len, words, block: tl.constexpr):
    """Adds to bits [lists, keys, words] in which routes a key is: bit r % 32 of word r // 32. Grid: (blocks, lists)."""
    at = tl.program_id(0) * block + tl.arange(0, block)
    key = tl.load(keys + tl.program_id(1).to(tl.int64) * length + at, mask=at < length, other=-1)
    route = at // width
    into = bits + (tl.program_id(1).to(tl.int64) * kv_len + key) * words + route // 32
    tl.atomic_or(into, (at * 0 + 1) << (route % 32), mask=key >= 0)  # of integers, in any order


# ---- lists for each query


@triton.jit(do_not_specialize=["heads", "items", "width", "per", "q_start", "first_row", "num_blocks"])
def item_kernel(
    table, blocks, slots, tb, th, heads, items, width, per, q_start, first_row, num_blocks, block: tl.constexpr,
):  # fmt: skip
    """Which block of keys each item lists, num_blocks for none and for one that its query has listed before; slots: -1.

    Item i is turn i % width of the list of query i // width, whose row of the table is that of its `per` queries. Grid:
    (blocks of items, lists).
    """
    row, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    item = tl.program_id(0) * block + tl.arange(0, block)
    there = item < items
    turn = item % width
    at = table + head_offset(tb, th, row, head) + ((item // width + q_start) // per - first_row) * width
    found = tl.load(at + turn, mask=there, other=-1).to(tl.int64)
    is_none = (found < 0) | (found >= num_blocks)
    for other in range(width - 1):
        earlier = tl.load(at + other, mask=there & (other < turn), other=-1).to(tl.int64)
        is_none |= earlier == found
    into = tl.program_id(1).to(tl.int64) * items + item
    tl.store(blocks + into, tl.where(is_none, num_blocks, found).to(blocks.dtype.element_ty), mask=there)
    tl.store(slots + into, item * 0 - 1, mask=there)


@triton.jit
def _number_below(ascending, length, value, steps):
    """How many of so many ascending numbers are less than each value. steps: halvings of the length."""
    low = value * 0
    high = low + length
    for _ in range(steps):
        middle = (low + high) // 2
        is_open = low < high
        is_less = tl.load(ascending + middle, mask=is_open, other=0).to(tl.int32) < value
        low = tl.where(is_open & is_less, middle + 1, low)
        high = tl.where(is_open & (is_less == 0), middle, high)
    return low


@triton.jit(do_not_specialize=["length", "number", "steps"])
def begin_kernel(ascending, begins, length, number, steps, block: tl.constexpr):
    """begins int32 [lists, number]: how many of the numbers of a list are less than 0, 1, ... Grid: (blocks, lists)."""
    value = tl.program_id(0) * block + tl.arange(0, block)
    found = _number_below(ascending + tl.program_id(1).to(tl.int64) * length, length, value, steps)
    tl.store(begins + tl.program_id(1).to(tl.int64) * number + value, found, mask=value < number)


@triton.jit(do_not_specialize=["num_blocks"])
def range_kernel(begins, tiles, list_stride, stride, num_blocks, tile: tl.constexpr, chunk: tl.constexpr):
    """tiles int32 [lists, num_blocks + 1]: how many tiles blocks before have; begins: how many items. Grid: (lists)."""
    first_item = begins + tl.program_id(0).to(tl.int64) * list_stride
    into = tiles + tl.program_id(0).to(tl.int64) * (num_blocks + 1)
    before = tl.full([], 0, tl.int32)
    for first in range(0, num_blocks + 1, chunk):
        value = first + tl.arange(0, chunk)
        begin = tl.load(first_item + value * stride, mask=value < num_blocks, other=0)
        stop = tl.load(first_item + (value + 1) * stride, mask=value < num_blocks, other=0)
        number = (stop - begin + tile - 1) // tile
        tl.store(into + value, before + tl.cumsum(number, 0) - number, mask=value <= num_blocks)
        before += tl.sum(number, 0)


@triton.jit(
    do_not_specialize=[
        "items", "num_tiles", "width", "q_start", "num_blocks", "of", "per_block", "num_kv", "kv_len", "heads",
    ]
)  # fmt: skip
def tile_kernel(
    sorted_items, begins, tiles, order, slots, states, pieces, list_stride, stride, items, num_tiles, width, q_start,
    num_blocks, of, per_block, num_kv, kv_len, heads,
    sure: tl.constexpr, tile: tl.constexpr, chunk: tl.constexpr, some: tl.constexpr,
):  # fmt: skip
    """Which query stands in each slot of a tile, and which slot each item has. Grid: (tiles, lists).

    states int32 [lists, tiles]: 2 * (listed block) + (1 where it is masked), -1 for a tile of nobody. pieces: of every
    query head, whose entries are 2 * (block of keys), and behind them the same, masked; see `forward`. A listed block
    is per_block blocks of keys. sure: where all pairs count, "never", "always", or where queries are "behind" the keys.
    some: query heads that have their list in common.
    """
    number, mine = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = mine * (num_blocks + 1)
    found = tl.full([], 0, tl.int32)
    for start in range(0, num_blocks, chunk):
        value = start + tl.arange(0, chunk)
        stop = tl.load(tiles + first + value + 1, mask=value < num_blocks, other=num_tiles)
        found += tl.sum((stop <= number).to(tl.int32), 0)
    is_tile = found < num_blocks
    block = tl.minimum(found, num_blocks - 1)
    at = begins + mine * list_stride + block * stride
    begin = tl.load(at) + (number - tl.load(tiles + first + block)) * tile
    inside = tl.arange(0, tile)
    there = begin + inside < tl.where(is_tile, tl.load(at + stride), begin)
    item = tl.load(sorted_items + mine * items + begin + inside, mask=there, other=0).to(tl.int32)
    query = item // width
    slot = number * tile + inside
    tl.store(order + mine * num_tiles * tile + slot, tl.where(there, query, -1))
    tl.store(slots + mine * items + item, slot, mask=there)
    masked = tl.where((block + 1) * of <= kv_len, 0, 1)
    if sure == "behind":  # queries of a tile ascend
        lowest = tl.min(tl.where(there, query, 2147483647), 0)
        masked = tl.where(lowest >= (block + 1) * of - 1 - q_start, masked, 1)
    if sure == "never":
        masked = masked * 0 + 1
    tl.store(states + mine * num_tiles + number, tl.where(is_tile, 2 * block + masked, -1))
    entry = block * per_block + masked * num_kv
    length = tl.where(is_tile, tl.minimum(per_block, num_kv - block * per_block), 0)
    row, head = tl.program_id(1) // (heads // some), tl.program_id(1) % (heads // some)
    for turn in range(some):
        at = pieces + ((row * heads + head * some + turn).to(tl.int64) * num_tiles + number) * 6
        tl.store(at, row)
        tl.store(at + 1, head * some + turn)
        tl.store(at + 2, number)
        tl.store(at + 3, entry)
        tl.store(at + 4, entry + length)
        tl.store(at + 5, -1)


@triton.jit
def _list_of(row, kv_head, turn, heads, some, kv_group: tl.constexpr):
    """The list of one of the query heads that share a head of keys."""
    return (row * (heads // some) + (kv_head * kv_group + turn) // some).to(tl.int64)


@triton.jit(do_not_specialize=["num_tiles", "num_blocks", "heads", "num_kv", "owners", "num_slots", "num_joints"])
def entry_kernel(
    states, tiles, entries, pieces, joints, used, num_tiles, num_blocks, heads, num_kv, owners, num_slots, num_joints,
    split: tl.constexpr, some: tl.constexpr, kv_group: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """The tiles of each listed block, through the query heads of a head of keys. Grid: (blocks of tiles, query heads of
    all rows).

    entries int32 [heads of keys of all rows, kv_group * tiles * split]: 2 * (block of queries) + (1 where it is
    masked); a tile is `split` blocks of queries. What there is no use for yet is also written: pieces behind those of
    `owners`, and joints, of no block, and the counts of `column_kernel`.
    """
    row, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    kv_head, turn = head // kv_group, head % kv_group
    number = tl.program_id(0) * block + tl.arange(0, block)
    mine = _list_of(row, kv_head, turn, heads, some, kv_group)
    state = tl.load(states + mine * num_tiles + number, mask=number < num_tiles, other=-1)
    there = state >= 0
    listed = tl.maximum(state >> 1, 0)
    place = number - tl.load(tiles + mine * (num_blocks + 1) + listed, mask=there, other=0)
    for other in range(kv_group):
        first = tiles + _list_of(row, kv_head, other, heads, some, kv_group) * (num_blocks + 1) + listed
        before = tl.load(first, mask=there, other=0)
        place += before + tl.where(other < turn, tl.load(first + 1, mask=there, other=0) - before, 0)
    of_keys = (row * (heads // kv_group) + kv_head).to(tl.int64) * (kv_group * num_tiles * split)
    for part in tl.static_range(split):
        entry = 2 * ((turn * num_tiles + number) * split + part) + (state & 1)
        tl.store(entries + of_keys + place * split + part, entry, mask=there)
    step = tl.num_programs(0) * tl.num_programs(1) * block
    for start in range(0, num_slots, step):
        spare = start + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * block + tl.arange(0, block)
        none = spare * 0
        _piece(pieces, owners + spare, spare < num_slots, none, none, none + num_kv, none, none, none - 1)
        _joint(joints, spare, spare < num_joints, none, none, none + num_kv, none, none)
        tl.store(used + spare, none, mask=spare < 2)


@triton.jit
def _piece(pieces, at, live, row, head, block, start, stop, slot):
    into = pieces + at.to(tl.int64) * 6
    tl.store(into, row, mask=live)
    tl.store(into + 1, head, mask=live)
    tl.store(into + 2, block, mask=live)
    tl.store(into + 3, start, mask=live)
    tl.store(into + 4, stop, mask=live)
    tl.store(into + 5, slot, mask=live)


@triton.jit
def _joint(joints, at, live, row, head, block, first, number):
    into = joints + at.to(tl.int64) * 5
    tl.store(into, row, mask=live)
    tl.store(into + 1, head, mask=live)
    tl.store(into + 2, block, mask=live)
    tl.store(into + 3, first, mask=live)
    tl.store(into + 4, number, mask=live)


@triton.jit(do_not_specialize=["num_tiles", "num_blocks", "heads", "per_block", "num_kv", "owners", "longest"])
def column_kernel(
    tiles, pieces, joints, used, num_tiles, num_blocks, heads, per_block, num_kv, owners, longest,
    split: tl.constexpr, some: tl.constexpr, kv_group: tl.constexpr, is_cut: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """The pieces of blocks of keys, over the entries of `entry_kernel`. Grid: (some of them, key heads of all rows).

    Lists of more than twice `longest` entries are cut. Their parts take the next pieces behind those of `owners` and
    the next places for sums, which are counted in `used`: whose they are may vary from run to run, what they hold and
    the order in which they are added do not.
    """
    kv_heads = heads // kv_group
    row, kv_head = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    kv_block = tl.program_id(0) * block + tl.arange(0, block)
    there = kv_block < num_kv
    none = kv_block * 0
    begin = tl.program_id(1) * (kv_group * num_tiles * split) + none
    stop = begin
    for turn in range(kv_group):
        first = tiles + _list_of(row, kv_head, turn, heads, some, kv_group) * (num_blocks + 1) + kv_block // per_block
        begin += tl.load(first, mask=there, other=0) * split
        stop += tl.load(first + 1, mask=there, other=0) * split
    owner = tl.program_id(1) * num_kv + kv_block
    if is_cut:
        number = stop - begin
        parts = tl.where(number > 2 * longest, (number + longest - 1) // longest, 0)
        has = parts > 0
        place = tl.atomic_add(used + none, parts, mask=has)
        joint = tl.atomic_add(used + 1 + none, none + 1, mask=has)
        _joint(joints, joint, has, none + row, none + kv_head, kv_block, place, parts)
        of = tl.maximum(parts, 1)
        for turn in range(1, tl.max(parts, 0)):
            start = begin + number * turn // of
            ends = begin + number * (turn + 1) // of
            live = turn < parts
            _piece(pieces, owners + place + turn, live, none + row, none + kv_head, kv_block, start, ends, place + turn)
        stop = begin + number // of
        _piece(pieces, owner, there, none + row, none + kv_head, kv_block, begin, stop, tl.where(has, place, -1))
    else:
        _piece(pieces, owner, there, none + row, none + kv_head, kv_block, begin, stop, none - 1)


# ---- results


@triton.jit
def _slots_of(begins, bb, bh, row, head, rows, first, width: tl.constexpr):
    """Where the slots of some rows begin in a table, and how many there are; none for rows of -1."""
    there = rows >= 0
    if width > 0:
        begin = rows * width
        number = tl.where(there, width, 0)
    else:
        at = begins + head_offset(bb, bh, row, head) + first + rows
        begin = tl.load(at, mask=there, other=0)
        number = tl.load(at + 1, mask=there, other=0) - begin
    return begin, number


@triton.jit(do_not_specialize=["first", "length"])
def join_kernel(
    slot_out, slot_lse, slots, begins, out, lse, sb, sh, sl, tb, th, ib, ih, bb, bh, ob, oh, ol, lb, lh, ll,
    first, length, width: tl.constexpr, mean: tl.constexpr, goes_on: tl.constexpr,
    value_dim: tl.constexpr, value_padded: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Output and lse of rows from those of their slots, in the order of these. Grid: (blocks of rows, heads, batch
    rows).

    slots: of row r those from begins[first + r] on up to those of the next; of `width` slots each where that is not 0,
    -1 for none. mean: whether each slot that has keys counts once, and lse is the log of how many have; goes_on:
    whether out and lse hold the results of others.
    """
    row, head = tl.program_id(2), tl.program_id(1)
    rows = tl.program_id(0) * block + tl.arange(0, block)
    rows = tl.where(rows < length, rows, -1)
    begin, number = _slots_of(begins, bb, bh, row, head, rows, first, width)
    top = tl.full([block], -float("inf"), tl.float32)
    total = tl.zeros([block], tl.float32)
    acc = tl.zeros([block, value_padded], tl.float32)
    if goes_on:
        top = load_numbers(lse, lb, lh, ll, row, head, rows, -float("inf"), False) * LOG2E
        total = tl.where(top == -float("inf"), 0.0, 1.0)
        known = load_tile(out, ob, oh, ol, row, head, 0, rows, block, value_dim, value_padded, False, False)
        acc = known.to(tl.float32)
    for turn in range(tl.max(number, 0)):
        slot = tl.load(slots + head_offset(ib, ih, row, head) + begin + turn, mask=turn < number, other=-1)
        mine = load_numbers(slot_lse, tb, th, 1, row, head, slot, -float("inf"), False) * LOG2E
        if mean:
            mine = tl.where(mine == -float("inf"), mine, 0.0)
        part = load_tile(slot_out, sb, sh, sl, row, head, 0, slot, block, value_dim, value_padded, False, False)
        higher = tl.maximum(top, mine)
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        share = tl.exp2(mine - shift)
        shrink = tl.exp2(top - shift)
        acc = acc * shrink[:, None] + part.to(tl.float32) * share[:, None]
        total = total * shrink + share
        top = higher
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    store_tile(out, ob, oh, ol, row, head, rows, acc, value_dim, value_padded)
    found = tl.where(empty, -float("inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * LN2)
    store_numbers(lse, lb, lh, ll, row, head, rows, found)


@triton.jit(do_not_specialize=["length"])
def share_kernel(slot_lse, lse, order, norm, tb, th, lb, lh, ll, qb, qh, length, block: tl.constexpr):
    """The lse of each slot and the log of how many its query is averaged over. Grid: (blocks of slots, heads, rows)."""
    row, head = tl.program_id(2), tl.program_id(1)
    at = tl.program_id(0) * block + tl.arange(0, block)
    at = tl.where(at < length, at, -1)
    rows = load_numbers(order, qb, qh, 1, row, head, at, -1, False)
    found = load_numbers(slot_lse, tb, th, 1, row, head, tl.where(rows >= 0, at, -1), -float("inf"), False)
    found += tl.maximum(load_numbers(lse, lb, lh, ll, row, head, rows, 0.0, False), 0.0)
    store_numbers(norm, tb, th, 1, row, head, at, found)


@triton.jit(do_not_specialize=["first", "length", "group"])
def add_kernel(
    part, slots, begins, into, pb, ph, pl, ib, ih, bb, bh, nb, nh, nl, first, length, group,
    width: tl.constexpr, adds: tl.constexpr, dim: tl.constexpr, padded: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Sums of what the slots of rows have, through a group of query heads, in their order; see `join_kernel`. adds:
    whether to what is there. Grid: (blocks of rows, heads of the result, batch rows)."""
    row, head = tl.program_id(2), tl.program_id(1)
    rows = tl.program_id(0) * block + tl.arange(0, block)
    rows = tl.where(rows < length, rows, -1)
    acc = tl.zeros([block, padded], tl.float32)
    if adds:
        acc += load_tile(into, nb, nh, nl, row, head, 0, rows, block, dim, padded, False, False)
    for of in range(group):
        q_head = head * group + of
        begin, number = _slots_of(begins, bb, bh, row, q_head, rows, first, width)
        for turn in range(tl.max(number, 0)):
            at = slots + head_offset(ib, ih, row, q_head) + begin + turn
            slot = tl.load(at, mask=turn < number, other=-1)
            acc += load_tile(part, pb, ph, pl, row, q_head, 0, slot, block, dim, padded, False, False)
    store_tile(into, nb, nh, nl, row, head, rows, acc, dim, padded)
