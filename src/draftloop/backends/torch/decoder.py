"""The Llama skeleton's forward pass over a static KV cache (Llama, SmolLM2, Mistral, Qwen2, Qwen3).

Contract: `forward` appends T tokens of one sequence to its cache and returns hidden states; `head` turns
rows into logits. The residual stream is float32, the matrix products run in the checkpoint's dtype. Must
not know sampling.

Letters: T new tokens, S cached tokens with the new ones, D hidden, H query heads, G key/value heads,
R = H / G, E head width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from draftloop.backends.architecture import rope_inverse_frequencies

if TYPE_CHECKING:
    from draftloop.backends.architecture import Architecture
    from draftloop.backends.torch.weights import Layer, Weights


_ROW_BY_ROW_TOKENS = 8
"""On a CPU so few tokens attend one by one, as they would if they came alone. PyTorch's fused kernel rounds
differently for several rows; with this, verifying gives the very bits of decoding one token at a time, and
greedy speculation the target's own text. It costs one small kernel call a row and layer."""


class TorchCache:
    """Keys and values of one sequence: [L, 2, G, max_tokens, E], allocated once, touched as it fills."""

    def __init__(
        self, architecture: Architecture, max_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (architecture.num_layers, 2, architecture.num_kv_heads, max_tokens, architecture.head_dim)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self._position = 0

    @property
    def position(self) -> int:
        """How many tokens it holds."""
        return self._position

    @property
    def max_tokens(self) -> int:
        """How many it can hold."""
        return self.values.shape[3]

    def advance(self, n: int) -> None:
        """Count `n` tokens that the forward pass has written.

        Raises:
            ValueError: they do not fit.
        """
        if self._position + n > self.max_tokens:
            raise ValueError(f"{self._position} + {n} tokens exceed the cache's {self.max_tokens}")
        self._position += n

    def trim(self, n: int) -> None:
        """Forget the last `n` tokens.

        Raises:
            ValueError: fewer are held.
        """
        if not 0 <= n <= self._position:
            raise ValueError(f"cannot trim {n} of {self._position} tokens")
        self._position -= n


@dataclass(frozen=True, slots=True)
class Span:
    """Where the new tokens stand: cos and sin [T, 1, E]; mask [R·T, S] bool, None for a single token."""

    start: int
    end: int
    cos: torch.Tensor
    sin: torch.Tensor
    mask: torch.Tensor | None


class Decoder:
    """One model's forward pass."""

    def __init__(self, architecture: Architecture, weights: Weights, dtype: torch.dtype, max_tokens: int):
        self.architecture = architecture
        self.weights = weights
        self.dtype = dtype
        self._cos, self._sin = rope_tables(architecture, max_tokens, weights.final_norm.device)

    def reach(self, tokens: int) -> None:
        """Prepare for texts of so many tokens, where they are longer than what it was built for."""
        if tokens > len(self._cos):
            self._cos, self._sin = rope_tables(self.architecture, tokens, self._cos.device)

    def forward(self, cache: TorchCache, tokens: torch.Tensor) -> torch.Tensor:
        """Read `tokens` [T]; the last norm's output, [T, D] in the activation dtype."""
        span = self._span(cache.position, len(tokens), tokens.device)
        cache.advance(len(tokens))
        # The draft may propose an id of its own padding; the target then reads its last row and rejects it.
        x = self.weights.embedding(tokens.clamp(max=self.architecture.vocab_size - 1))
        for layer, values in zip(self.weights.layers, cache.values, strict=True):
            x += self._attention(layer, values, self._norm(x, layer.input_norm), span)
            gate, up = layer.gate_up(self._norm(x, layer.post_norm)).chunk(2, dim=-1)
            x += layer.down(silu(gate).mul_(up))
        return self._norm(x, self.weights.final_norm)

    def hidden_rows(self, tokens: torch.Tensor, first: int, chunk_tokens: int) -> torch.Tensor:
        """Read a whole text [T] by chunks, in a cache of its own; states [T - first, D] from `first` on."""
        self.reach(len(tokens))
        cache = TorchCache(self.architecture, len(tokens), self.dtype, tokens.device)
        parts = []
        for chunk in tokens.split(chunk_tokens):
            start = cache.position
            parts.append(self.forward(cache, chunk)[max(0, first - start) :])
        return torch.cat(parts)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, D] -> logits [T, V] float32."""
        return self.weights.head(hidden).float()

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, weight.shape, weight, self.architecture.rms_norm_eps).to(self.dtype)

    def _span(self, start: int, count: int, device: torch.device) -> Span:
        mask, end = None, start + count
        if count > 1:
            # Each new token sees the cache and the new ones up to itself; a group's queries share the rows.
            seen = torch.ones(count, end, dtype=torch.bool, device=device).tril(start)
            mask = seen.repeat(self.architecture.num_heads // self.architecture.num_kv_heads, 1)
        return Span(start, end, self._cos[start:end], self._sin[start:end], mask)

    def _attention(self, layer: Layer, values: torch.Tensor, x: torch.Tensor, span: Span) -> torch.Tensor:
        """Grouped-query attention (Ainslie et al. 2023): the R queries of a group are rows of one product."""
        heads, groups = self.architecture.num_heads, self.architecture.num_kv_heads
        width, count = self.architecture.head_dim, len(x)
        qkv = layer.qkv(x).view(count, heads + 2 * groups, width)
        qk, v = qkv.split((heads + groups, groups), dim=1)
        qk = rotate(self._head_norms(layer, qk.float()), span.cos, span.sin).to(self.dtype)
        q, k = qk.split((heads, groups), dim=1)
        values[0, :, span.start : span.end] = k.transpose(0, 1)
        values[1, :, span.start : span.end] = v.transpose(0, 1)
        # Head h = group·R + r.
        q = q.reshape(count, groups, -1, width)
        if count <= _ROW_BY_ROW_TOKENS and not x.is_cuda:
            ends = range(span.start + 1, span.end + 1)
            attended = torch.cat([_attend(row[None], values, end) for row, end in zip(q, ends, strict=True)])
        else:
            attended = _attend(q, values, span.end, span.mask)
        return layer.output(attended.reshape(count, heads * width))

    def _head_norms(self, layer: Layer, qk: torch.Tensor) -> torch.Tensor:
        if layer.q_norm is None or layer.k_norm is None:
            return qk
        heads, eps = self.architecture.num_heads, self.architecture.rms_norm_eps
        q = rms_norm(qk[:, :heads], layer.q_norm.shape, layer.q_norm, eps)
        k = rms_norm(qk[:, heads:], layer.k_norm.shape, layer.k_norm, eps)
        return torch.cat((q, k), dim=1)


def rope_tables(
    architecture: Architecture, max_tokens: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `rotate` takes, [max_tokens, 1, E] float32; sin carries the sign of the rotated half."""
    frequencies = torch.tensor(rope_inverse_frequencies(architecture), dtype=torch.float64)
    angles = torch.outer(torch.arange(max_tokens, dtype=torch.float64), frequencies)
    cos = torch.cat((angles.cos(), angles.cos()), dim=1)
    sin = torch.cat((-angles.sin(), angles.sin()), dim=1)
    return cos.float().unsqueeze(1).to(device), sin.float().unsqueeze(1).to(device)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, half-split (Su et al. 2021): x [T, heads, E], cos and sin [T, 1, E]."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _attend(
    q: torch.Tensor, values: torch.Tensor, end: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Queries [T, G, R, E] over the first `end` keys and values [2, G, max_tokens, E] -> [T, G, R, E]."""
    count, groups, _, width = q.shape
    rows = q.permute(1, 2, 0, 3).reshape(groups, -1, width)
    attended = scaled_dot_product_attention(
        rows[None], values[None, 0, :, :end], values[None, 1, :, :end], attn_mask=mask
    )
    return attended.view(groups, -1, count, width).permute(2, 0, 1, 3)
