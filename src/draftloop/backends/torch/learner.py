"""A decoder whose base is frozen and whose adapters learn: its teacher-forced forward pass.

Contract: the logits of `decoder.py` with the adapter beside its modules, but for rounding; whole texts, no
cache. The texts of a batch are packed one behind the other, so nothing is computed for padding, and what
several begin with alike (a system prompt) is there once. Must not know losses or Adam.

Letters: N tokens of all texts, D hidden, H query heads, G key/value heads, E head width.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from draftloop.backends.torch.attention import causal_attention
from draftloop.backends.torch.decoder import rope_tables
from draftloop.backends.torch.gradients import AdaptedGroup, AdaptedSpan, ResidualBlock, gated, normed
from draftloop.backends.torch.operations import rotate
from draftloop.backends.torch.packing import pack_texts
from draftloop.backends.torch.weights import layer_groups

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from draftloop.backends.architecture import Architecture
    from draftloop.backends.torch.frozen import FrozenLayer, FrozenModel
    from draftloop.backends.torch.packing import PackedTexts
    from draftloop.backends.training import Example


class Learner:
    """The forward pass.

    Args:
        architecture: the shapes.
        base: the frozen weights.
        parameters: a [r, in] and b [out, r] float32 of each adapted module, leaves of autograd, by name.
        scale: alpha / r.
    """

    def __init__(
        self,
        architecture: Architecture,
        base: FrozenModel,
        parameters: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
        scale: float,
    ) -> None:
        self._architecture = architecture
        self._base = base
        self._device = base.final_norm.device
        self._dtype = base.head.blocks[0][1].workspace.dtype
        self._groups = [
            {
                kind: AdaptedGroup(layer.linears[kind], self._spans(modules, parameters), scale)
                for kind, modules in layer_groups(f"model.layers.{i}").items()
            }
            for i, layer in enumerate(base.layers)
        ]
        self._cos, self._sin = rope_tables(architecture, 0, self._device)

    def pack(self, batch: Sequence[Example]) -> PackedTexts:
        """Put the examples' tokens on the device."""
        longest = max(len(example.tokens) for example in batch)
        if longest > len(self._cos):
            self._cos, self._sin = rope_tables(self._architecture, longest, self._device)
        return pack_texts(batch, self._architecture.vocab_size, self._cos, self._sin)

    def hidden(self, texts: PackedTexts, *, checkpointed: bool) -> torch.Tensor:
        """The last norm's output at the texts' response rows, [R, D] in the activation dtype."""
        x = self._base.embedding(texts.ids)
        for layer, groups in zip(self._base.layers, self._groups, strict=True):
            attention = partial(self._attention, layer, groups["qkv"], texts)
            x = ResidualBlock(attention, groups["qkv"], groups["output"])(x, checkpointed=checkpointed)
            mlp = partial(self._mlp, layer, groups["gate_up"])
            x = ResidualBlock(mlp, groups["gate_up"], groups["down"])(x, checkpointed=checkpointed)
        return self._norm(x.index_select(0, texts.rows), self._base.final_norm)

    def _spans(
        self, modules: Sequence[str], parameters: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[AdaptedSpan, ...]:
        spans, first = [], 0
        for module in modules:
            rows = self._architecture.linear_shapes[module.rpartition(".")[2]][0]
            if module in parameters:
                spans.append(AdaptedSpan(*parameters[module], slice(first, first + rows)))
            first += rows
        return tuple(spans)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return normed(x, weight, self._architecture.rms_norm_eps, self._dtype)

    def _mlp(self, layer: FrozenLayer, gate_up: AdaptedGroup, x: torch.Tensor) -> torch.Tensor:
        return gated(gate_up(self._norm(x, layer.post_norm)))

    def _attention(
        self, layer: FrozenLayer, qkv: AdaptedGroup, texts: PackedTexts, x: torch.Tensor
    ) -> torch.Tensor:
        """Each text attends to itself and to what it shares: [N, D] -> [N, H·E]."""
        a = self._architecture
        heads, groups = a.num_heads, a.num_kv_heads
        rows = qkv(self._norm(x, layer.input_norm)).view(len(x), heads + 2 * groups, a.head_dim)
        qk, v = rows.split((heads + groups, groups), dim=1)
        qk = rotate(self._head_norms(layer, qk.float()), texts.cos, texts.sin).to(self._dtype)
        q, k = qk.split((heads, groups), dim=1)
        attended = []
        for part in texts.parts:
            keys, values = k[part.own], v[part.own]
            if part.shared is not None:
                keys, values = torch.cat((k[part.shared], keys)), torch.cat((v[part.shared], values))
            attended.append(causal_attention(q[part.own], keys, values))
        return torch.cat(attended)

    def _head_norms(self, layer: FrozenLayer, qk: torch.Tensor) -> torch.Tensor:
        """RMSNorm of each head of q and k (Qwen3): [N, H + G, E] float32."""
        if layer.q_norm is None or layer.k_norm is None:
            return qk
        heads, eps = self._architecture.num_heads, self._architecture.rms_norm_eps
        q = normed(qk[:, :heads], layer.q_norm, eps, torch.float32)
        k = normed(qk[:, heads:], layer.k_norm, eps, torch.float32)
        return torch.cat((q, k), dim=1)
