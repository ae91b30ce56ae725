"""The Llama skeleton's forward pass over a static KV cache (Llama, SmolLM2, Mistral, Qwen2, Qwen3).

Contract: `forward` appends T tokens of one sequence to its cache and returns hidden states, `forward_batch`
those of several sequences; `head` turns rows into logits. The residual stream is float32, the matrix products
run in the checkpoint's dtype. Must not know sampling.

Letters: T new tokens, N those of all sequences, S cached tokens with the new ones, D hidden, H query heads,
G key/value heads, R = H / G, E head width, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from draftloop.backends.architecture import rope_inverse_frequencies
from draftloop.backends.torch.memory import memory_errors
from draftloop.backends.torch.operations import Span, operations_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from draftloop.backends.architecture import Architecture
    from draftloop.backends.torch.weights import Weights


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

    @property
    def bytes_per_token(self) -> int:
        """What one token takes."""
        return self.values.numel() // self.max_tokens * self.values.element_size()

    def copy(self, n: int) -> torch.Tensor:
        """The first `n` tokens, [L, 2, G, n, E]; see `Cache`."""
        if not 1 <= n <= self._position:
            raise ValueError(f"cannot copy {n} of {self._position} tokens")
        with memory_errors("keeping a text's beginning", "Lower memory.prefix_cache_megabytes."):
            return self.values[:, :, :, :n].clone(memory_format=torch.contiguous_format)

    def paste(self, copied: torch.Tensor, n: int) -> None:
        """Begin anew with the first `n` tokens of a copy; see `Cache`."""
        if not 1 <= n <= copied.shape[3]:
            raise ValueError(f"the copy has {copied.shape[3]} tokens, not {n}")
        self.values[:, :, :, :n] = copied[:, :, :, :n]
        self._position = n


class Decoder:
    """One model's forward pass."""

    def __init__(self, architecture: Architecture, weights: Weights, dtype: torch.dtype, max_tokens: int):
        self.architecture = architecture
        self.weights = weights
        self.dtype = dtype
        device = weights.final_norm.device
        self.operations = operations_for(architecture, dtype, device)
        self._cos, self._sin = rope_tables(architecture, max_tokens, device)

    def reach(self, tokens: int) -> None:
        """Prepare for texts of so many tokens, where they are longer than what it was built for."""
        if tokens > len(self._cos):
            self._cos, self._sin = rope_tables(self.architecture, tokens, self._cos.device)

    def forward(self, cache: TorchCache, tokens: torch.Tensor) -> torch.Tensor:
        """Read `tokens` [T]; the last norm's output, [T, D] in the activation dtype."""
        return self.forward_batch([cache], [tokens])

    def forward_batch(self, caches: Sequence[TorchCache], tokens: Sequence[torch.Tensor]) -> torch.Tensor:
        """Read each sequence's tokens [T] into its own cache; the states of all, [N, D], one behind another.

        Norms and products see one matrix, so the weights are read once for all sequences. Only attention is
        each one's own.
        """
        counts = [len(part) for part in tokens]
        spans = [self._span(cache, count) for cache, count in zip(caches, counts, strict=True)]
        for cache, count in zip(caches, counts, strict=True):
            cache.advance(count)
        ids = tokens[0] if len(tokens) == 1 else torch.cat(tuple(tokens))
        # The draft may propose an id of its own padding; the target then reads its last row and rejects it.
        x = self.weights.embedding(ids.clamp(max=self.architecture.vocab_size - 1))
        steps, added = self.operations, None
        for index, layer in enumerate(self.weights.layers):
            qkv = layer.qkv(steps.norm(x, added, layer.input_norm)).split(counts)
            attended = [
                steps.attend(layer, rows, cache.values[index], span)
                for rows, cache, span in zip(qkv, caches, spans, strict=True)
            ]
            added = layer.output(attended[0] if len(attended) == 1 else torch.cat(attended))
            gate_up = layer.gate_up(steps.norm(x, added, layer.post_norm))
            added = layer.down(steps.gate(gate_up))
        return steps.norm(x, added, self.weights.final_norm)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, D] -> logits [T, V] float32."""
        return self.weights.head(hidden).float()

    def _span(self, cache: TorchCache, count: int) -> Span:
        mask, start, end = None, cache.position, cache.position + count
        if count > 1 and self.operations.needs_mask:
            # Each new token sees the cache and the new ones up to itself; a group's queries share the rows.
            seen = torch.ones(count, end, dtype=torch.bool, device=cache.values.device).tril(start)
            mask = seen.repeat(self.architecture.num_heads // self.architecture.num_kv_heads, 1)
        return Span(start, end, self._cos[start:end], self._sin[start:end], mask)


def rope_tables(
    architecture: Architecture, max_tokens: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `rotate` takes, [max_tokens, 1, E] float32; sin carries the sign of the rotated half."""
    frequencies = torch.tensor(rope_inverse_frequencies(architecture), dtype=torch.float64)
    angles = torch.outer(torch.arange(max_tokens, dtype=torch.float64), frequencies)
    cos = torch.cat((angles.cos(), angles.cos()), dim=1)
    sin = torch.cat((-angles.sin(), angles.sin()), dim=1)
    return cos.float().unsqueeze(1).to(device), sin.float().unsqueeze(1).to(device)
