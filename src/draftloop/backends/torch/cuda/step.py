"""One decoding step of a few tokens as a fixed series of launches: what a CUDA graph can record.

Contract: `Step.logits` reads the tokens that `Step.place` put on the device, appends their keys and values to
the caches it named, and returns their logits; `Step.next_logits` reads one token more for each sequence.
Nothing in between depends on a number of the host but the shape. Plain layers, dense or 4-bit, use kernels
that round a row the same way whatever its neighbours (`products.py` for bfloat16, `kernels.py` for other
types); an adapted layer is called as it is. Must not know sampling.

Where both sides of a norm are `products.py`'s, it costs no launch: the product before leaves x · gain and the
sums of x², and the product behind applies the factor to its result.

Letters: T rows, S sequences, D hidden, H query heads, G key/value heads, E head width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from draftloop.backends.torch.cuda import kernels, products
from draftloop.backends.torch.cuda.packed import PackedInt4Linear
from draftloop.backends.torch.cuda.products import Matrix, Rows
from draftloop.backends.torch.cuda.shapes import (
    FIELDS,
    LARGEST,
    POSITION,
    STEPS,
    TILE_ROWS,
    first_rows,
    table,
    table_after,
)
from draftloop.backends.torch.cuda.tiles import tiles_of
from draftloop.backends.torch.decoder import rope_tables
from draftloop.backends.torch.linear import DenseLinear, Int4Linear

if TYPE_CHECKING:
    from collections.abc import Sequence

    from draftloop.backends.torch.cuda.shapes import Reading, Shape
    from draftloop.backends.torch.decoder import Decoder
    from draftloop.backends.torch.linear import Linear
    from draftloop.backends.torch.weights import Layer

_SPLITS = 16
_BLOCK_KEYS = 32
_GATE_BLOCK = 1024


class Step:
    """The launches of one step of `decoder`, and the device memory that tells them where they are.

    Attributes:
        tokens: what is read next, at most `shapes.MAX_ROWS`.
        first_rows: [S] of each sequence that was placed; 0 of others.
        last_rows: likewise.
    """

    def __init__(self, decoder: Decoder, max_tokens: int) -> None:
        device = decoder.weights.final_norm.device
        self._decoder = decoder
        self._cos, self._sin = rope_tables(decoder.architecture, max_tokens, device)
        shapes = decoder.architecture
        self._queries = shapes.num_heads // shapes.num_kv_heads
        tiles, tiles_after = LARGEST.tiles(self._queries), LARGEST.following.tiles(self._queries)
        self.tokens = torch.zeros(LARGEST.rows, dtype=torch.long, device=device)
        counts = (tiles * FIELDS, tiles_after * FIELDS, LARGEST.sequences, LARGEST.sequences)
        self._ends = np.cumsum(counts)
        self._placed = torch.zeros(sum(counts), dtype=torch.long)
        self._places = self._placed.to(device)
        self._device = _Places(*self._places.split(counts))
        self.first_rows, self.last_rows = self._device.first_rows, self._device.last_rows
        onwards = torch.zeros(FIELDS, dtype=torch.long)
        onwards[POSITION], onwards[STEPS] = 1, -1
        self._onwards = onwards.to(device)
        self._counters = torch.zeros(shapes.num_kv_heads * tiles, dtype=torch.int32, device=device)
        # A kernel may be set up while the one before it runs: from Hopper on.
        chained = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        self._chain: dict[str, Any] = {"chained": chained}
        if chained:
            self._chain["launch_pdl"] = True

    def place(self, readings: Sequence[Reading], tokens: torch.Tensor) -> None:
        """Say what is read next: `tokens` [T] of all `readings`."""
        firsts = first_rows(readings)
        lasts = [first + one.count - 1 for first, one in zip(firsts, readings, strict=True)]
        tables = [table(readings, self._queries), table_after(readings, self._queries)]
        placed = np.zeros(self._ends[-1], np.int64)
        for start, values in zip((0, *self._ends), (*tables, firsts, lasts), strict=False):
            placed[start : start + len(values)] = values
        self._placed = torch.from_numpy(placed)
        self.rewind()
        self.tokens[: len(tokens)].copy_(tokens, non_blocking=True)

    def rewind(self) -> None:
        """Everybody stands where they last were placed, for runs whose results nobody needs."""
        self._places.copy_(self._placed, non_blocking=True)

    def read(self, shape: Shape) -> None:
        """Launch the step of the tokens that were placed, for what it leaves in the caches."""
        self._states(shape, self._device.reading)

    def logits(self, shape: Shape) -> torch.Tensor:
        """Launch the step of the tokens that were placed: [T, V] float32."""
        return self._logits(shape, self._device.reading)

    def next_logits(self, shape: Shape) -> torch.Tensor:
        """Launch a step behind it, of a token for each sequence that goes on: [S, V] float32.

        shape: of the first step. The tokens are the first S of `tokens`; rows of those who do not go on are
        no one's.
        """
        following = shape.following
        logits = self._logits(following, self._device.following)
        self._device.following.view(-1, FIELDS)[: following.tiles(self._queries)].add_(self._onwards)
        return logits

    def _logits(self, shape: Shape, where: torch.Tensor) -> torch.Tensor:
        logits = self._product(self._decoder.weights.head, self._states(shape, where))
        return (logits[0] if len(logits) == 1 else logits.sum(dim=0)).float()

    def _states(self, shape: Shape, where: torch.Tensor) -> Rows:
        """What the head reads, [T, D]."""
        decoder = self._decoder
        last = decoder.architecture.vocab_size - 1
        x = decoder.weights.embedding(self.tokens[: shape.rows].clamp(max=last))
        layers = decoder.weights.layers
        gains = [*(layer.input_norm for layer in layers[1:]), decoder.weights.final_norm]
        inputs = Rows(self._normalized(x, None, layers[0].input_norm))
        for index, (layer, gain) in enumerate(zip(layers, gains, strict=True)):
            qkv, bias = self._qkv(layer.qkv, inputs)
            attended = self._attention(layer, index, qkv, bias, where[: shape.tiles(self._queries) * FIELDS])
            inputs = self._added(layer.output, Rows(attended), x, layer.post_norm)
            inputs = self._added(layer.down, Rows(self._gated(layer.gate_up, inputs)), x, gain)
        return inputs

    def _product(self, linear: Linear, inputs: Rows) -> torch.Tensor:
        """`linear` of [T, in] in parts whose sum it is, [splits, T, out]."""
        matrix = _matrix(linear)
        if matrix is not None:
            return products.plain(matrix, inputs)[None]
        if isinstance(linear, DenseLinear) and linear.bias is None:
            return self._multiply(linear.weight, inputs.normed(), gated=False)
        return linear(inputs.normed()).contiguous()[None]

    def _qkv(self, linear: Linear, inputs: Rows) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `_product`, and the bias, which `_attention` adds."""
        if isinstance(linear, DenseLinear | Int4Linear | PackedInt4Linear):
            return self._product(replace(linear, bias=None), inputs), linear.bias
        return self._product(linear, inputs), None

    def _added(self, linear: Linear, inputs: Rows, x: torch.Tensor, gain: torch.Tensor) -> Rows:
        """Add `linear` of [T, in] to x [T, D], in place; what the next product reads, normed by `gain`."""
        matrix = _matrix(linear)
        if matrix is not None:
            return products.added(matrix, inputs, x, gain, self._decoder.architecture.rms_norm_eps)
        return Rows(self._normalized(x, self._product(linear, inputs), gain))

    def _gated(self, linear: Linear, inputs: Rows) -> torch.Tensor:
        """The MLP's inner values [T, F] of [T, D]."""
        matrix = _matrix(linear)
        if matrix is not None and matrix.outputs % (2 * products.TILE) == 0:
            return products.gated(matrix, inputs)
        if isinstance(linear, DenseLinear) and linear.bias is None:
            return self._multiply(linear.weight, inputs.normed(), gated=True)[0]
        both = linear(inputs.normed()).contiguous()
        rows, width = len(both), both.shape[1] // 2
        y = both.new_empty(rows, width)
        kernels.gate[(rows, -(-width // _GATE_BLOCK))](both, y, width, _GATE_BLOCK, **self._chain)
        return y

    def _multiply(self, weight: torch.Tensor, x: torch.Tensor, *, gated: bool) -> torch.Tensor:
        outputs, width = weight.shape
        outputs = outputs // 2 if gated else outputs
        tiles = tiles_of(outputs, width, gated=gated)
        share = tiles.share(width)
        # Rounding may leave the last splits nothing to do.
        splits = -(-width // share)
        y = x.new_empty(splits, len(x), outputs, dtype=x.dtype if gated else torch.float32)
        kernels.multiply[(-(-len(x) // TILE_ROWS), -(-outputs // tiles.outputs), splits)](
            x,
            weight,
            y,
            len(x),
            outputs,
            width,
            share,
            tiles.outputs,
            tiles.width,
            gated,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            **self._chain,
        )
        return y

    def _normalized(self, x: torch.Tensor, parts: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
        """Add `parts` [splits, T, D] to x [T, D], in place, and norm it."""
        rows, width = x.shape
        y = torch.empty_like(x, dtype=self._decoder.dtype)
        kernels.normalize[(rows,)](
            x,
            x if parts is None else parts,
            weight,
            y,
            rows,
            self._decoder.architecture.rms_norm_eps,
            width,
            _power_of_two(width),
            0 if parts is None else len(parts),
            num_warps=8,
            **self._chain,
        )
        return y

    def _attention(
        self,
        layer: Layer,
        index: int,
        qkv: torch.Tensor,
        bias: torch.Tensor | None,
        where: torch.Tensor,
    ) -> torch.Tensor:
        """Qkv in parts [splits, T, (H + 2G)·E] -> [T, H·E]; keys and values go to the caches in `where`."""
        shapes, rows = self._decoder.architecture, qkv.shape[1]
        heads, groups, width = shapes.num_heads, shapes.num_kv_heads, shapes.head_dim
        normed = layer.q_norm is not None
        peaks, sums = qkv.new_empty(2, rows * heads, _SPLITS, dtype=torch.float32)
        parts = qkv.new_empty(rows * heads, _SPLITS, width, dtype=torch.float32)
        y = qkv.new_empty(rows, heads * width, dtype=self._decoder.dtype)
        kernels.attend[(groups, _SPLITS, len(where) // FIELDS)](
            qkv,
            y if bias is None else bias,
            layer.q_norm if normed else y,
            layer.k_norm if normed else y,
            self._cos,
            self._sin,
            where,
            peaks,
            sums,
            parts,
            self._counters,
            y,
            index,
            rows,
            shapes.rms_norm_eps,
            width**-0.5,
            heads,
            groups,
            width,
            max(16, _power_of_two(width)),
            _BLOCK_KEYS,
            len(qkv),
            _SPLITS,
            bias is not None,
            normed,
            num_warps=8,
            num_stages=1,
            **self._chain,
        )
        return y


@dataclass(frozen=True, slots=True)
class _Places:
    """The parts of what is placed: two tables of `shapes.py`, flat, and rows."""

    reading: torch.Tensor
    following: torch.Tensor
    first_rows: torch.Tensor
    last_rows: torch.Tensor


def _matrix(linear: Linear) -> Matrix | None:
    """What `products.py` can multiply: a plain layer without a bias, in shapes that it takes."""
    if isinstance(linear, PackedInt4Linear) and linear.bias is None:
        return linear.matrix
    if isinstance(linear, DenseLinear) and linear.bias is None and products.fits(linear.weight):
        return Matrix(linear.weight, None, 0, *linear.weight.shape)
    return None


def _power_of_two(number: int) -> int:
    """The next one that is no smaller."""
    return 1 << (number - 1).bit_length()
