"""Triton kernels of one decoding step of up to `TILE_ROWS` tokens.

Contract: every kernel treats each row by itself, in an order that does not depend on how many rows there
are: a token's bits are the same whether it comes alone or among others. So verifying gives the very logits
of decoding one token at a time. Where the cache is and how full, kernels read from `state`, on the device:
one captured graph serves every cache. Must not know layers. Needs Triton, so it is imported on a GPU only.

Letters: T rows, D hidden, N outputs, H query heads, G key/value heads, R = H / G, E head width, S splits.
`state` is [3] int64: the address of a cache [L, 2, G, max_tokens, E], the tokens that it holds, max_tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

TILE_ROWS = 16
"""Rows of one tensor-core tile: fewer cost the same."""

_ROWS: tl.constexpr = tl.constexpr(TILE_ROWS)


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

    `gated`: weight is [2N, D], S is 1 and y = silu(first half) · second half.
    """
    _follow(chained)
    column = tl.program_id(0) * block_outputs + tl.arange(0, block_outputs)
    split = tl.program_id(1)
    row = tl.arange(0, _ROWS)
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
def place(
    qkv,
    bias,
    q_norm,
    k_norm,
    cos,
    sin,
    state,
    q,
    layer,
    rows,
    eps,
    heads: tl.constexpr,
    groups: tl.constexpr,
    half: tl.constexpr,
    block: tl.constexpr,
    splits: tl.constexpr,
    biased: tl.constexpr,
    normed: tl.constexpr,
    chained: tl.constexpr,
):
    """One head of one row: sum its parts, norm it (`normed`, Qwen3), rotate it, put it in its place.

    qkv: [S, T, H + 2G, E]; bias: [H + 2G, E]; cos, sin: [max_tokens, E], as `rope_tables` gives them;
    q: [T, H, E]; half = E / 2. Keys and values go to the cache.
    """
    _follow(chained)
    row = tl.program_id(0)
    head = tl.program_id(1)
    i = tl.arange(0, block)
    inside = i < half
    low = tl.zeros((block,), tl.float32)
    high = tl.zeros((block,), tl.float32)
    for split in tl.static_range(splits):
        start = qkv + ((split * rows + row) * (heads + 2 * groups) + head) * 2 * half + i
        low += tl.load(start, mask=inside, other=0.0).to(tl.float32)
        high += tl.load(start + half, mask=inside, other=0.0).to(tl.float32)
    if biased:
        low += tl.load(bias + head * 2 * half + i, mask=inside, other=0.0).to(tl.float32)
        high += tl.load(bias + head * 2 * half + half + i, mask=inside, other=0.0).to(tl.float32)
    position = tl.load(state + 1) + row
    if head < heads + groups:
        if normed:
            factor = tl.rsqrt((tl.sum(low * low, axis=0) + tl.sum(high * high, axis=0)) / (2 * half) + eps)
            weight = q_norm + i
            if head >= heads:
                weight = k_norm + i
            low *= factor * tl.load(weight, mask=inside, other=0.0)
            high *= factor * tl.load(weight + half, mask=inside, other=0.0)
        c = tl.load(cos + position * 2 * half + i, mask=inside, other=0.0)
        s = tl.load(sin + position * 2 * half + half + i, mask=inside, other=0.0)
        turned = low * c - high * s
        high = high * c + low * s
        low = turned
    if head < heads:
        target = q + (row * heads + head) * 2 * half
    else:
        cache = tl.load(state).to(tl.pointer_type(q.dtype.element_ty))
        line = layer * 2 * groups + head - heads
        target = cache + (line * tl.load(state + 2) + position) * 2 * half
    tl.store(target + i, low.to(q.dtype.element_ty), mask=inside)
    tl.store(target + half + i, high.to(q.dtype.element_ty), mask=inside)


@triton.jit
def attend(
    q,
    state,
    peaks,
    sums,
    parts,
    layer,
    rows,
    scale,
    heads: tl.constexpr,
    groups: tl.constexpr,
    width: tl.constexpr,
    block_width: tl.constexpr,
    block_keys: tl.constexpr,
    splits: tl.constexpr,
    chained: tl.constexpr,
):
    """Attention of 16 of a group's R·T queries to every S-th block of keys (Dao 2023, flash-decoding).

    Writes what `combine` takes: the largest score and the sum of exponentials, [T, H, S], and the weighted
    values [T, H, S, E], float32. Blocks belong to splits by their place in the text, whatever its length.
    """
    _follow(chained)
    repeats: tl.constexpr = heads // groups
    group = tl.program_id(0)
    split = tl.program_id(1)
    m = tl.program_id(2) * _ROWS + tl.arange(0, _ROWS)
    row = m // repeats
    line = row * heads + group * repeats + m % repeats
    e = tl.arange(0, block_width)
    known = (m < rows * repeats)[:, None] & (e < width)[None, :]
    queries = tl.load(q + line[:, None] * width + e[None, :], mask=known, other=0.0)
    position = tl.load(state + 1).to(tl.int32)
    capacity = tl.load(state + 2)
    cache = tl.load(state).to(tl.pointer_type(q.dtype.element_ty))
    keys = cache + (layer * 2 * groups + group) * capacity * width
    values = keys + groups * capacity * width
    end = position + rows
    peak = tl.full((_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((_ROWS,), tl.float32)
    mixed = tl.zeros((_ROWS, block_width), tl.float32)
    for start in range(split * block_keys, end, splits * block_keys):
        s = start + tl.arange(0, block_keys)
        # Memory behind the last token was never written: 0 · NaN would be NaN.
        k = tl.load(
            keys + s[None, :] * width + e[:, None], mask=(s < end)[None, :] & (e < width)[:, None], other=0.0
        )
        scores = tl.dot(queries, k, input_precision="ieee") * scale
        scores = tl.where(s[None, :] <= (position + row)[:, None], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - finite[:, None])
        fade = tl.exp(peak - finite)
        total = total * fade + tl.sum(weights, axis=1)
        v = tl.load(
            values + s[:, None] * width + e[None, :],
            mask=(s < end)[:, None] & (e < width)[None, :],
            other=0.0,
        )
        mixed = tl.dot(weights.to(v.dtype), v, mixed * fade[:, None], input_precision="ieee")
        peak = higher
    out = line * splits + split
    tl.store(peaks + out, peak, mask=m < rows * repeats)
    tl.store(sums + out, total, mask=m < rows * repeats)
    tl.store(parts + out[:, None] * width + e[None, :], mixed, mask=known)


@triton.jit
def combine(
    peaks,
    sums,
    parts,
    y,
    width: tl.constexpr,
    block_width: tl.constexpr,
    splits: tl.constexpr,
    chained: tl.constexpr,
):
    """The splits of one head of one row, which `attend` wrote, become its output: y [T, H, E]."""
    _follow(chained)
    line = tl.program_id(0)
    split = tl.arange(0, splits)
    e = tl.arange(0, block_width)
    peak = tl.load(peaks + line * splits + split)
    share = tl.exp(peak - tl.max(peak, axis=0))
    total = tl.sum(share * tl.load(sums + line * splits + split), axis=0)
    place_of = parts + (line * splits + split)[:, None] * width + e[None, :]
    values = tl.load(place_of, mask=(e < width)[None, :], other=0.0)
    mixed = tl.sum(values * share[:, None], axis=0) / total
    tl.store(y + line * width + e, mixed.to(y.dtype.element_ty), mask=e < width)
