"""One decoding step of a few tokens as a fixed series of launches: what a CUDA graph can record.

Contract: `Step.logits` reads the tokens that `Step.place` put on the device, appends their keys and values to
the cache it named, and returns their logits. Nothing in between depends on a number of the host but the
count of rows. Plain layers, dense or 4-bit, use kernels that round a row the same way whatever its neighbours
(`products.py` for bfloat16, `kernels.py` for other types); an adapted layer is called as it is. Must not know
sampling.

Where both sides of a norm are `products.py`'s, it costs no launch: the product before leaves x · gain and the
sums of x², and the product behind applies the factor to its result.

Letters: T rows, D hidden, H query heads, G key/value heads, E head width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from draftloop.backends.torch.cuda import kernels, products
from draftloop.backends.torch.cuda.packed import PackedInt4Linear
from draftloop.backends.torch.cuda.products import Matrix, Rows
from draftloop.backends.torch.cuda.tiles import tiles_of
from draftloop.backends.torch.decoder import rope_tables
from draftloop.backends.torch.linear import DenseLinear, Int4Linear

if TYPE_CHECKING:
    from draftloop.backends.torch.decoder import Decoder, TorchCache
    from draftloop.backends.torch.linear import Linear
    from draftloop.backends.torch.weights import Layer

MAX_ROWS = kernels.TILE_ROWS

_SPLITS = 16
_BLOCK_KEYS = 32
_GATE_BLOCK = 1024


class Step:
    """The launches of one step of `decoder`, and the device memory that tells them where they are."""

    def __init__(self, decoder: Decoder, max_tokens: int) -> None:
        device = decoder.weights.final_norm.device
        self._decoder = decoder
        self._cos, self._sin = rope_tables(decoder.architecture, max_tokens, device)
        self.tokens = torch.zeros(MAX_ROWS, dtype=torch.long, device=device)
        self._state = torch.zeros(3, dtype=torch.long, device=device)
        shapes = decoder.architecture
        most_tiles = -(-MAX_ROWS * (shapes.num_heads // shapes.num_kv_heads) // kernels.TILE_ROWS)
        self._counters = torch.zeros(shapes.num_kv_heads * most_tiles, dtype=torch.int32, device=device)
        self._placed = (0, 0)
        self._position = 0
        # A kernel may be set up while the one before it runs: from Hopper on.
        chained = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        self._chain: dict[str, Any] = {"chained": chained}
        if chained:
            self._chain["launch_pdl"] = True

    def place(self, cache: TorchCache, tokens: torch.Tensor) -> None:
        """Say what `logits` reads next: `tokens` [T], at most `MAX_ROWS`, behind what `cache` holds."""
        where = cache.values.data_ptr(), cache.max_tokens
        if where != self._placed:
            self._state.copy_(torch.tensor((where[0], 0, where[1])))
            self._placed = where
        self._position = cache.position
        self.rewind()
        self.tokens[: len(tokens)].copy_(tokens, non_blocking=True)

    def follow(self, tokens: torch.Tensor, num_read: int) -> None:
        """Launch: what `logits` reads next is `tokens` [T], behind the `num_read` that it read last."""
        self._state[1:2].add_(num_read)
        self.tokens[: len(tokens)].copy_(tokens)

    def rewind(self) -> None:
        """What is read next stands where it last was placed, for runs whose results nobody needs."""
        self._state[1].fill_(self._position)

    def logits(self, rows: int) -> torch.Tensor:
        """Launch the step of the first `rows` tokens that were placed: [rows, V] float32."""
        decoder = self._decoder
        last = decoder.architecture.vocab_size - 1
        x = decoder.weights.embedding(self.tokens[:rows].clamp(max=last))
        layers = decoder.weights.layers
        gains = [*(layer.input_norm for layer in layers[1:]), decoder.weights.final_norm]
        inputs = Rows(self._normalized(x, None, layers[0].input_norm))
        for index, (layer, gain) in enumerate(zip(layers, gains, strict=True)):
            qkv, bias = self._qkv(layer.qkv, inputs)
            inputs = self._added(
                layer.output, Rows(self._attention(layer, index, qkv, bias)), x, layer.post_norm
            )
            inputs = self._added(layer.down, Rows(self._gated(layer.gate_up, inputs)), x, gain)
        logits = self._product(decoder.weights.head, inputs)
        return (logits[0] if len(logits) == 1 else logits.sum(dim=0)).float()

    def _product(self, linear: Linear, inputs: Rows) -> torch.Tensor:
        """`linear` of [T, in] in parts whose sum it is, [S, T, out]; one part where S may not be more."""
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
        kernels.multiply[(-(-outputs // tiles.outputs), splits)](
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
        """Add `parts` [S, T, D] to x [T, D], in place, and norm it."""
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
        self, layer: Layer, index: int, qkv: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Qkv in parts [S, T, (H + 2G)·E] -> [T, H·E]; keys and values go to the cache."""
        shapes, rows = self._decoder.architecture, qkv.shape[1]
        heads, groups, width = shapes.num_heads, shapes.num_kv_heads, shapes.head_dim
        normed = layer.q_norm is not None
        peaks, sums = qkv.new_empty(2, rows * heads, _SPLITS, dtype=torch.float32)
        parts = qkv.new_empty(rows * heads, _SPLITS, width, dtype=torch.float32)
        y = qkv.new_empty(rows, heads * width, dtype=self._decoder.dtype)
        tiles = -(-rows * (heads // groups) // kernels.TILE_ROWS)
        kernels.attend[(groups, _SPLITS, tiles)](
            qkv,
            y if bias is None else bias,
            layer.q_norm if normed else y,
            layer.k_norm if normed else y,
            self._cos,
            self._sin,
            self._state,
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
