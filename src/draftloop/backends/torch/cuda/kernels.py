"""Triton kernels of one decoding step of a few tokens, of one sequence or of several.

Contract: every kernel treats each row by itself, in an order that does not depend on how many rows there
are: a token's bits are the same whether it comes alone or among others. So verifying gives the very logits
of decoding one token at a time. Where caches are and how full, kernels read from a table on the device
(`shapes.py`): one captured graph serves all caches. Must not know layers. Needs Triton, so it is imported on
a GPU only.

Letters: T rows, M of a tile, D hidden, N outputs, H query heads, G key/value heads, R = H / G, E head width,
S splits. A cache is [L, 2, G, max_tokens, E].
"""

from __future__ import annotations

import triton
import triton.language as tl

from draftloop.backends.torch.cuda.shapes import FIELDS, TILE_ROWS

_ROWS: tl.constexpr = tl.constexpr(TILE_ROWS)
_FIELDS: tl.constexpr = tl.constexpr(FIELDS)


@triton.jit
def _follow(chained: tl.constexpr):
    """Wait for what the kernel before wrote, and let the next one be set up meanwhile (Hopper and later)."""
    if chained:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def multiply(
    x,
    weight,
    y,
    rows,
    outputs,
    width: tl.constexpr,
    share: tl.constexpr,
    block_outputs: tl.constexpr,
    block_width: tl.constexpr,
    gated: tl.constexpr,
    chained: tl.constexpr,
):
    """Y [S, T, N] = x [T, D] · weight [N, D]ᵀ; split s multiplies `share` inputs from s · `share` on.

    Tiles of rows come first in the grid, so that one of them finds in the L2 cache what another has read.
    `gated`: weight is [2N, D], S is 1 and y = silu(first half) · second half.
    """
    _follow(chained)
    row = tl.program_id(0) * _ROWS + tl.arange(0, _ROWS)
    column = tl.program_id(1) * block_outputs + tl.arange(0, block_outputs)
    split = tl.program_id(2)
    step = split * share + tl.arange(0, block_width)
    known = row[:, None] < rows
    inside = column[None, :] < outputs
    whole: tl.constexpr = width % share == 0 and share % block_width == 0
    starts = weight + column[None, :].to(tl.int64) * width + step[:, None]
    later = starts + outputs.to(tl.int64) * width
    inputs = x + row[:, None] * width + step[None, :]
    total = tl.zeros((_ROWS, block_outputs), tl.float32)
    second = tl.zeros((_ROWS, block_outputs), tl.float32)
    for first in range(0, share, block_width):
        if whole:
            values = tl.load(inputs + first, mask=known, other=0.0)
            w = tl.load(starts + first, mask=inside, other=0.0)
            total = tl.dot(values, w, total, input_precision="ieee")
            if gated:
                w = tl.load(later + first, mask=inside, other=0.0)
                second = tl.dot(values, w, second, input_precision="ieee")
        else:
            held = first + step < width
            values = tl.load(inputs + first, mask=known & held[None, :], other=0.0)
            w = tl.load(starts + first, mask=inside & held[:, None], other=0.0)
            total = tl.dot(values, w, total, input_precision="ieee")
            if gated:
                w = tl.load(later + first, mask=inside & held[:, None], other=0.0)
                second = tl.dot(values, w, second, input_precision="ieee")
    if gated:
        total = total * tl.sigmoid(total) * second
    out = y + (split * rows + row)[:, None] * outputs + column[None, :]
    tl.store(out, total.to(y.dtype.element_ty), mask=known & inside)


@triton.jit
def normalize(
    x,
    parts,
    weight,
    y,
    rows,
    eps,
    width: tl.constexpr,
    block: tl.constexpr,
    splits: tl.constexpr,
    chained: tl.constexpr,
):
    """One row a program: x [T, D] float32 += the sum of parts [S, T, D]; y = RMSNorm(x)."""
    _follow(chained)
    row = tl.program_id(0)
    column = tl.arange(0, block)
    inside = column < width
    values = tl.load(x + row * width + column, mask=inside, other=0.0)
    for split in tl.static_range(splits):
        part = parts + (split * rows + row) * width + column
        values += tl.load(part, mask=inside, other=0.0).to(tl.float32)
    if splits > 0:
        tl.store(x + row * width + column, values, mask=inside)
    factor = tl.rsqrt(tl.sum(values * values, axis=0) / width + eps)
    values *= factor * tl.load(weight + column, mask=inside, other=0.0)
    tl.store(y + row * width + column, values.to(y.dtype.element_ty), mask=inside)


@triton.jit
def gate(x, y, width, block: tl.constexpr, chained: tl.constexpr):
    """X [T, 2F] -> y [T, F]: silu(first half) · second half."""
    _follow(chained)
    row = tl.program_id(0)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < width
    gates = tl.load(x + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    values = tl.load(x + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    gates *= tl.sigmoid(gates)
    tl.store(y + row * width + column, (gates * values).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _head_values(
    qkv,
    bias,
    row,
    head,
    e,
    known,
    rows,
    lines: tl.constexpr,
    width: tl.constexpr,
    splits: tl.constexpr,
    biased: tl.constexpr,
):
    """Columns e of each row's head, [M, E] float32: parts of qkv [S, T, H + 2G, E] summed, bias added."""
    at = (row * lines + head)[:, None] * width + e[None, :]
    total = tl.load(qkv + at, mask=known, other=0.0).to(tl.float32)
    for split in tl.static_range(1, splits):
        total += tl.load(qkv + split * rows * lines * width + at, mask=known, other=0.0).to(tl.float32)
    if biased:
        total += tl.load(bias + head[:, None] * width + e[None, :], mask=known, other=0.0).to(tl.float32)
    return total


@triton.jit
def _rotated(
    qkv,
    bias,
    norm,
    cos,
    sin,
    row,
    head,
    position,
    e,
    known,
    rows,
    eps,
    lines: tl.constexpr,
    width: tl.constexpr,
    splits: tl.constexpr,
    biased: tl.constexpr,
    normed: tl.constexpr,
):
    """Each row's head, normed (`normed`, Qwen3) and rotated to its position: [M, E] float32.

    cos, sin: [max_tokens, E], as `rope_tables` gives them.
    """
    other = tl.where(e < width // 2, e + width // 2, e - width // 2)
    values = _head_values(qkv, bias, row, head, e, known, rows, lines, width, splits, biased)
    partners = _head_values(qkv, bias, row, head, other, known, rows, lines, width, splits, biased)
    if normed:
        factor = tl.rsqrt(tl.sum(values * values, axis=1) / width + eps)[:, None]
        values *= factor * tl.load(norm + e, mask=e < width, other=0.0)[None, :]
        partners *= factor * tl.load(norm + other, mask=e < width, other=0.0)[None, :]
    angle = position[:, None] * width + e[None, :]
    c = tl.load(cos + angle, mask=known, other=0.0)
    s = tl.load(sin + angle, mask=known, other=0.0)
    return values * c + partners * s


@triton.jit
def _held(keys, values, s, e, position, width: tl.constexpr):
    """Keys and values [M, E] of the places s [M] that the cache held before this step; zeros for others."""
    at = s[:, None] * width + e[None, :]
    held = (s < position)[:, None] & (e < width)[None, :]
    # Memory behind the last token was never written: 0 · NaN would be NaN.
    return tl.load(keys + at, mask=held, other=0.0), tl.load(values + at, mask=held, other=0.0)


@triton.jit
def _with_new(
    k,
    v,
    qkv,
    bias,
    norm,
    cos,
    sin,
    keys,
    values,
    s,
    e,
    position,
    first,
    count,
    group,
    rows,
    eps,
    heads: tl.constexpr,
    groups: tl.constexpr,
    width: tl.constexpr,
    splits: tl.constexpr,
    biased: tl.constexpr,
    normed: tl.constexpr,
):
    """`_held` with the sequence's `count` new keys and values, from row `first` on, which go to the cache.

    Every program that comes by writes them, all the same bits, and reads only what it made itself.
    """
    if tl.max(s, axis=0) >= position:
        lines: tl.constexpr = heads + 2 * groups
        new = ((s >= position) & (s < position + count))[:, None] & (e < width)[None, :]
        row = first + s - position
        head = heads + group + tl.zeros_like(row)
        turned = _rotated(
            qkv, bias, norm, cos, sin, row, head, s, e, new, rows, eps, lines, width, splits, biased, normed
        ).to(k.dtype)
        fresh = _head_values(qkv, bias, row, head + groups, e, new, rows, lines, width, splits, biased).to(
            v.dtype
        )
        at = s[:, None] * width + e[None, :]
        tl.store(keys + at, turned, mask=new)
        tl.store(values + at, fresh, mask=new)
        k = tl.where(new, turned, k)
        v = tl.where(new, fresh, v)
    return k, v


@triton.jit
def _combined(peaks, sums, parts, line, e, known, busy, width: tl.constexpr, splits: tl.constexpr):
    """What the first `busy` splits of each line found, [M, E]: weighted by their shares, in their order."""
    split = tl.arange(0, splits)
    there = line[:, None] * splits + split[None, :]
    told = (tl.max(known.to(tl.int32), axis=1) > 0)[:, None] & (split < busy)[None, :]
    peak = tl.load(peaks + there, mask=told, other=float("-inf"), cache_modifier=".cg")
    share = tl.exp(peak - tl.max(peak, axis=1)[:, None])
    found = tl.load(sums + there, mask=told, other=0.0, cache_modifier=".cg")
    total = tl.sum(share * found, axis=1)
    mixed = tl.zeros(known.shape, tl.float32)
    for i in tl.static_range(splits):
        part = parts + (line * splits + i)[:, None] * width + e[None, :]
        weight = tl.sum(tl.where(split[None, :] == i, share, 0.0), axis=1)
        mixed += weight[:, None] * tl.load(part, mask=known & (i < busy), other=0.0, cache_modifier=".cg")
    return mixed / total[:, None]


@triton.jit
def attend(
    qkv, bias, q_norm, k_norm, cos, sin, table, peaks, sums, parts, counters, y, layer, rows, eps, scale,
    heads: tl.constexpr, groups: tl.constexpr, width: tl.constexpr, block_width: tl.constexpr,
    block_keys: tl.constexpr, qkv_splits: tl.constexpr, splits: tl.constexpr,
    biased: tl.constexpr, normed: tl.constexpr, chained: tl.constexpr,
):  # fmt: skip
    """Attention of 16 of a group's R·T queries to every S-th block of keys (Dao 2023, flash-decoding).

    The grid is groups by splits by the tiles of `table`. Rotates queries and new keys, and puts the latter
    into the cache with their values. The last of a tile's programs, by `counters` [G, tiles], adds up what
    all found: the largest score and the sum of exponentials, [T, H, S], and the weighted values [T, H, S, E],
    float32; y [T, H, E] is the result. Blocks belong to splits by their place in the text, whatever its
    length; splits that the text does not reach are left out. What earlier steps left is read before the wait.
    """
    repeats: tl.constexpr = heads // groups
    entry = table + tl.program_id(2) * _FIELDS
    position = tl.load(entry + 2).to(tl.int32)
    count = tl.load(entry + 4).to(tl.int32)
    m = tl.load(entry + 5).to(tl.int32) * _ROWS + tl.arange(0, _ROWS)
    busy = tl.minimum(splits, (position + count + block_keys - 1) // block_keys)
    if (tl.load(entry + 6) < 1) | (tl.program_id(1) >= busy):
        return
    group = tl.program_id(0)
    first = tl.load(entry + 3).to(tl.int32)
    row = first + m // repeats
    head = group * repeats + m % repeats
    line = row * heads + head
    e = tl.arange(0, block_width)
    known = (m < count * repeats)[:, None] & (e < width)[None, :]
    place = position + m // repeats
    capacity = tl.load(entry + 1)
    keys = tl.load(entry).to(tl.pointer_type(y.dtype.element_ty)) + (
        (layer * 2 * groups + group) * capacity * width
    )
    values = keys + groups * capacity * width
    s = tl.program_id(1) * block_keys + tl.arange(0, block_keys)
    k, v = _held(keys, values, s, e, position, width)
    _follow(chained)
    queries = _rotated(
        qkv, bias, q_norm, cos, sin, row, head, place, e, known, rows, eps,
        heads + 2 * groups, width, qkv_splits, biased, normed,
    ).to(y.dtype.element_ty)  # fmt: skip
    peak = tl.full((_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((_ROWS,), tl.float32)
    mixed = tl.zeros((_ROWS, block_width), tl.float32)
    for _ in range(tl.program_id(1) * block_keys, position + count, splits * block_keys):
        k, v = _with_new(
            k, v, qkv, bias, k_norm, cos, sin, keys, values, s, e, position, first, count, group,
            rows, eps, heads, groups, width, qkv_splits, biased, normed,
        )  # fmt: skip
        peak, total, mixed = _attended(queries, k, v, s[None, :] <= place[:, None], scale, peak, total, mixed)
        s += splits * block_keys
        k, v = _held(keys, values, s, e, position, width)
    out = line * splits + tl.program_id(1)
    tl.store(peaks + out, peak, mask=m < count * repeats)
    tl.store(sums + out, total, mask=m < count * repeats)
    tl.store(parts + out[:, None] * width + e[None, :], mixed, mask=known)
    if _is_last(counters + group * tl.num_programs(2) + tl.program_id(2), busy):
        mixed = _combined(peaks, sums, parts, line, e, known, busy, width, splits)
        tl.store(y + line[:, None] * width + e[None, :], mixed.to(y.dtype.element_ty), mask=known)


@triton.jit
def _attended(queries, k, v, seen, scale, peak, total, mixed):
    """One block of keys more (Milakov and Gimelshein 2018): the largest score, Σ exp, the weighted values."""
    scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, axis=1))
    finite = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp(scores - finite[:, None])
    fade = tl.exp(peak - finite)
    total = total * fade + tl.sum(weights, axis=1)
    mixed = tl.dot(weights.to(v.dtype), v, mixed * fade[:, None], input_precision="ieee")
    return higher, total, mixed


@triton.jit
def _is_last(counter, programs):
    """Whether the other programs of this tile have written what they found; the last one resets the count."""
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(counter, 0)
    return last
