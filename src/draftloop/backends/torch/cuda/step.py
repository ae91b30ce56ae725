"""One decoding step of a few tokens as a fixed series of launches: what a CUDA graph can record.

Contract: `Step.logits` reads the tokens that `Step.place` put on the device, appends their keys and values to
the cache it named, and returns their logits. Nothing in between depends on a number of the host but the
count of rows. Dense layers use kernels that round a row the same way whatever its neighbours (`kernels.py`);
other layers (4-bit, adapted) are called as they are. Must not know sampling.

Letters: T rows, D hidden, H query heads, G key/value heads, E head width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from draftloop.backends.torch.cuda import kernels
from draftloop.backends.torch.cuda.tiles import tiles_of
from draftloop.backends.torch.decoder import rope_tables
from draftloop.backends.torch.linear import DenseLinear, Int4Linear

if TYPE_CHECKING:
    from draftloop.backends.torch.decoder import Decoder, TorchCache
    from draftloop.backends.torch.linear import Linear
    from draftloop.backends.torch.weights import Layer

MAX_ROWS = kernels.TILE_ROWS

_SPLITS = 16
_BLOCK_KEYS = 64
_GATE_BLOCK = 1024


class Step:
    """The launches of one step of `decoder`, and the device memory that tells them where they are."""

    def __init__(self, decoder: Decoder, max_tokens: int) -> None:
        device = decoder.weights.final_norm.device
        self._decoder = decoder
        self._cos, self._sin = rope_tables(decoder.architecture, max_tokens, device)
        self.tokens = torch.zeros(MAX_ROWS, dtype=torch.long, device=device)
        self._state = torch.zeros(3, dtype=torch.long, device=device)
        self._placed = (0, 0)
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
        self._state[1].fill_(cache.position)
        self.tokens[: len(tokens)].copy_(tokens, non_blocking=True)

    def logits(self, rows: int) -> torch.Tensor:
        """Launch the step of the first `rows` tokens that were placed: [rows, V] float32."""
        decoder = self._decoder
        last = decoder.architecture.vocab_size - 1
        x = decoder.weights.embedding(self.tokens[:rows].clamp(max=last))
        parts = None
        for index, layer in enumerate(decoder.weights.layers):
            qkv, bias = self._qkv(layer.qkv, self._normalized(x, parts, layer.input_norm))
            parts = self._product(layer.output, self._attention(layer, index, qkv, bias))
            inner = self._gated(layer.gate_up, self._normalized(x, parts, layer.post_norm))
            parts = self._product(layer.down, inner)
        hidden = self._normalized(x, parts, decoder.weights.final_norm)
        logits = self._product(decoder.weights.head, hidden)
        return (logits[0] if len(logits) == 1 else logits.sum(dim=0)).float()

    def _product(self, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        """`linear` of x [T, in] in parts whose sum it is, [S, T, out]; one part where S may not be more."""
        if isinstance(linear, DenseLinear) and linear.bias is None:
            return self._multiply(linear.weight, x, gated=False)
        return linear(x).contiguous()[None]

    def _qkv(self, linear: Linear, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `_product`, and the bias, which `_attention` adds."""
        if isinstance(linear, DenseLinear | Int4Linear):
            return self._product(replace(linear, bias=None), x), linear.bias
        return self._product(linear, x), None

    def _gated(self, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        """The MLP's inner values [T, F] of x [T, D]."""
        if isinstance(linear, DenseLinear) and linear.bias is None:
            return self._multiply(linear.weight, x, gated=True)[0]
        both = linear(x).contiguous()
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
        q = qkv.new_empty(rows, heads * width, dtype=self._decoder.dtype)
        kernels.place[(rows, heads + 2 * groups)](
            qkv,
            q if bias is None else bias,
            layer.q_norm if normed else q,
            layer.k_norm if normed else q,
            self._cos,
            self._sin,
            self._state,
            q,
            index,
            rows,
            shapes.rms_norm_eps,
            heads,
            groups,
            width // 2,
            _power_of_two(width // 2),
            len(qkv),
            bias is not None,
            normed,
            num_warps=1,
            **self._chain,
        )
        return self._attended(q, index)

    def _attended(self, q: torch.Tensor, index: int) -> torch.Tensor:
        """Queries [T, H·E] over the cache of layer `index` -> [T, H·E]."""
        shapes, rows = self._decoder.architecture, len(q)
        heads, groups, width = shapes.num_heads, shapes.num_kv_heads, shapes.head_dim
        peaks, sums = q.new_empty(2, rows * heads, _SPLITS, dtype=torch.float32)
        parts = q.new_empty(rows * heads, _SPLITS, width, dtype=torch.float32)
        block_width = max(16, _power_of_two(width))
        tiles = -(-rows * (heads // groups) // kernels.TILE_ROWS)
        kernels.attend[(groups, _SPLITS, tiles)](
            q,
            self._state,
            peaks,
            sums,
            parts,
            index,
            rows,
            width**-0.5,
            heads,
            groups,
            width,
            block_width,
            _BLOCK_KEYS,
            _SPLITS,
            num_warps=4,
            num_stages=1,
            **self._chain,
        )
        y = torch.empty_like(q)
        kernels.combine[(rows * heads,)](
            peaks, sums, parts, y, width, block_width, _SPLITS, num_warps=1, **self._chain
        )
        return y


def _power_of_two(number: int) -> int:
    """The next one that is no smaller."""
    return 1 << (number - 1).bit_length()
