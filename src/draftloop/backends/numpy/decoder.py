"""The Llama skeleton in float32, or in float64 where its weights are, one sequence at a time.

Contract: `NumpyCache` holds one sequence's keys and values; `Decoder.forward` appends tokens to one and
gives their logits. Must not know sampling or proposals.

Shapes: T new tokens, C cached ones (C includes the T once they are read), D hidden, H query heads, G
key/value heads, W head width, V vocabulary. Sources: Touvron et al. 2023 (Llama), Su et al. 2021 (rotary
embedding), Zhang and Sennrich 2019 (RMSNorm), Shazeer 2020 (gated MLP), Ainslie et al. 2023 (grouped heads).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from draftloop.backends.architecture import rope_inverse_frequencies, tensor_shapes
from draftloop.backends.numpy.adapter import NO_ADAPTER, wear
from draftloop.errors import ModelUnreadable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from draftloop.backends.architecture import Architecture
    from draftloop.backends.lora import AdapterForm, Lora

    Floats = NDArray[np.floating]

_FIRST_CAPACITY_TOKENS = 64
_FLOAT32: np.dtype[np.floating] = np.dtype(np.float32)


class NumpyCache:
    """Keys and values of one sequence: two arrays [L, capacity, G, W], grown by doubling up to the cap."""

    def __init__(
        self, architecture: Architecture, max_tokens: int, dtype: np.dtype[np.floating] = _FLOAT32
    ) -> None:
        self._max_tokens = max_tokens
        self._position = 0
        shape = (architecture.num_layers, 0, architecture.num_kv_heads, architecture.head_dim)
        self._keys: Floats = np.zeros(shape, dtype)
        self._values: Floats = np.zeros(shape, dtype)

    @property
    def position(self) -> int:
        """How many tokens the cache holds."""
        return self._position

    @property
    def max_tokens(self) -> int:
        """How many tokens it can hold."""
        return self._max_tokens

    def trim(self, n: int) -> None:
        """Forget the last `n` tokens.

        Raises:
            ValueError: `n` is negative or more than there are.
        """
        if not 0 <= n <= self._position:
            raise ValueError(f"cannot trim {n} of {self._position} tokens")
        self._position -= n

    @property
    def bytes_per_token(self) -> int:
        """What one token takes."""
        layers, _, *rest = self._keys.shape
        return int(2 * layers * math.prod(rest) * self._keys.itemsize)

    def copy(self, n: int) -> tuple[Floats, Floats]:
        """Keys and values of the first `n` tokens, [L, n, G, W] each; see `Cache`."""
        if not 1 <= n <= self._position:
            raise ValueError(f"cannot copy {n} of {self._position} tokens")
        return self._keys[:, :n].copy(), self._values[:, :n].copy()

    def paste(self, copied: tuple[Floats, Floats], n: int) -> None:
        """Begin anew with the first `n` tokens of a copy; see `Cache`."""
        held = copied[0].shape[1]
        if not 1 <= n <= held:
            raise ValueError(f"the copy has {held} tokens, not {n}")
        self._position = 0
        self.extend(n)
        self._keys[:, :n], self._values[:, :n] = (part[:, :n] for part in copied)

    def extend(self, n: int) -> None:
        """Make room for `n` more tokens and count them.

        Raises:
            ValueError: they exceed `max_tokens`.
        """
        needed = self._position + n
        if needed > self._max_tokens:
            raise ValueError(f"the cache holds {self._position} of {self._max_tokens} tokens; {n} do not fit")
        capacity = self._keys.shape[1]
        if needed > capacity:
            grown = min(self._max_tokens, max(2 * capacity, needed, _FIRST_CAPACITY_TOKENS))
            missing = ((0, 0), (0, grown - capacity), (0, 0), (0, 0))
            self._keys = np.pad(self._keys, missing)
            self._values = np.pad(self._values, missing)
        self._position = needed

    def write(self, layer: int, keys: Floats, values: Floats) -> tuple[Floats, Floats]:
        """Store one layer's newest [T, G, W] and return all of its [C, G, W]."""
        end = self._position
        start = end - len(keys)
        self._keys[layer, start:end] = keys
        self._values[layer, start:end] = values
        return self._keys[layer, :end], self._values[layer, :end]


class Decoder:
    """A checkpoint's weights and the forward pass over them.

    Args:
        architecture: the shapes.
        weights: tensors by checkpoint name, all float32 or all float64, which is what it computes in;
            matrices are [out, in].

    Raises:
        ModelUnreadable: a tensor is missing or has another shape than the architecture says.
    """

    def __init__(self, architecture: Architecture, weights: dict[str, Floats]) -> None:
        self._architecture = architecture
        self._weights = weights
        self._adapter = NO_ADAPTER
        self._head = "model.embed_tokens" if architecture.tied_embeddings else "lm_head"
        # float64 until the angle is taken: a float32 angle of a far position loses digits.
        self._inverse_frequencies = np.array(rope_inverse_frequencies(architecture), np.float64)
        self._check_shapes()

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors, an adapter aside."""
        return sum(value.nbytes for value in self._weights.values())

    @property
    def dtype(self) -> np.dtype[np.floating]:
        """What it computes in; a cache must be of the same."""
        return self._weights["model.norm.weight"].dtype

    def set_adapter(self, lora: Lora | None, form: AdapterForm) -> None:
        """Compute with `lora` from now on; None goes back to the weights alone, bit for bit.

        Raises:
            ModelUnreadable: the adapter's modules or shapes are not this model's; the one before stays.
            ValueError: a form that is unknown here.
        """
        self._adapter = wear(self._architecture, self._weights, lora, form)

    def forward(self, cache: NumpyCache, tokens: Sequence[int]) -> Floats:
        """Append tokens [T] to the cache and return their logits [T, V].

        An id past the vocabulary (the other model's padding) reads as the last row.
        """
        a = self._architecture
        start = cache.position
        cache.extend(len(tokens))
        ids = np.minimum(np.asarray(tokens, np.int64), a.vocab_size - 1)
        angles = np.arange(start, start + len(ids))[:, None] * self._inverse_frequencies
        cos, sin = np.cos(angles).astype(self.dtype), np.sin(angles).astype(self.dtype)
        hidden = self._weights["model.embed_tokens.weight"][ids]
        for layer in range(a.num_layers):
            prefix = f"model.layers.{layer}"
            normed = self._norm(f"{prefix}.input_layernorm", hidden)
            hidden = hidden + self._attention(layer, normed, cache, cos, sin)
            normed = self._norm(f"{prefix}.post_attention_layernorm", hidden)
            gate = self._linear(f"{prefix}.mlp.gate_proj", normed)
            up = self._linear(f"{prefix}.mlp.up_proj", normed)
            hidden = hidden + self._linear(f"{prefix}.mlp.down_proj", _silu(gate) * up)
        return self._linear(self._head, self._norm("model.norm", hidden))

    def _attention(self, layer: int, hidden: Floats, cache: NumpyCache, cos: Floats, sin: Floats) -> Floats:
        """[T, D] → [T, D], causal over everything cached."""
        a = self._architecture
        prefix = f"model.layers.{layer}.self_attn"
        count = len(hidden)
        q = self._linear(f"{prefix}.q_proj", hidden).reshape(count, a.num_heads, a.head_dim)
        k = self._linear(f"{prefix}.k_proj", hidden).reshape(count, a.num_kv_heads, a.head_dim)
        v = self._linear(f"{prefix}.v_proj", hidden).reshape(count, a.num_kv_heads, a.head_dim)
        if a.qk_norm:
            q, k = self._norm(f"{prefix}.q_norm", q), self._norm(f"{prefix}.k_norm", k)
        keys, values = cache.write(layer, _rotate(k, cos, sin), v)
        # Query head h reads key/value head h // (H / G): [G, H/G, T, W] against [G, 1, C, W].
        grouped = _rotate(q, cos, sin).reshape(count, a.num_kv_heads, -1, a.head_dim).transpose(1, 2, 0, 3)
        scores = grouped @ keys.transpose(1, 2, 0)[:, None] / self.dtype.type(np.sqrt(a.head_dim))
        future = np.arange(len(keys))[None, :] > np.arange(len(keys) - count, len(keys))[:, None]
        scores = np.where(future, self.dtype.type(-np.inf), scores)
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        mixed = scores @ values.transpose(1, 0, 2)[:, None]
        return self._linear(f"{prefix}.o_proj", mixed.transpose(2, 0, 1, 3).reshape(count, -1))

    def _linear(self, name: str, values: Floats) -> Floats:
        fused = self._adapter.fused.get(name)
        out: Floats = values @ (self._weights[f"{name}.weight"] if fused is None else fused).T
        beside = self._adapter.beside.get(name)
        if beside is not None:
            a, b = beside
            out = out + values @ a.T @ b.T
        bias = self._weights.get(f"{name}.bias")
        return out if bias is None else out + bias

    def _norm(self, name: str, values: Floats) -> Floats:
        mean_square = np.square(values).mean(axis=-1, keepdims=True)
        eps = self.dtype.type(self._architecture.rms_norm_eps)
        normed: Floats = values / np.sqrt(mean_square + eps) * self._weights[f"{name}.weight"]
        return normed

    def _check_shapes(self) -> None:
        for name, shape in tensor_shapes(self._architecture).items():
            found = self._weights.get(name)
            if found is None:
                raise ModelUnreadable(f"tensor {name} is missing", remedy="Pull the model again.")
            if found.shape != shape:
                raise ModelUnreadable(
                    f"tensor {name} is {list(found.shape)}, config.json says {list(shape)}",
                    remedy="Pull the model again.",
                )


def _silu(values: Floats) -> Floats:
    # Far below zero the exponential is infinite and the quotient 0, as it should be.
    with np.errstate(over="ignore"):
        out: Floats = values / (1 + np.exp(-values))
    return out


def _rotate(heads: Floats, cos: Floats, sin: Floats) -> Floats:
    """Turn the pairs (i, i + W/2) of [T, heads, W] by the angles [T, W/2]."""
    first, second = np.split(heads, 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
