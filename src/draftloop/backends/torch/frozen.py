"""Base weights of a training run: they stay as the checkpoint has them, and are made dense where needed.

Contract: `FrozenLinear.dense()` gives a linear layer's weight in the activation dtype, in a workspace that
the next layer of the same kind overwrites; so at most one layer is dense at a time, and no gradient is kept
for any. Must not know adapters.

On a CPU the 4-bit rows stay in the mapped file. Without kernels of our own, making a byte's two codes
bfloat16 is one look-up in a table of 256 entries, cheaper than shifting and masking.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from draftloop.backends.torch.linear import AffineWeight, dequantize
from draftloop.backends.torch.native.library import load_library
from draftloop.backends.torch.native.linear import native_unpack
from draftloop.backends.torch.weights import AffineEmbedding, DenseEmbedding, layer_groups

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from draftloop.backends.torch.weights import Embedding, WeightLoader

_HEAD_ROWS = 8192
"""Rows of the output head that are dense at a time."""


class Workspace:
    """Dense weights, one buffer for each kind of layer, and what each one holds now."""

    def __init__(self, dtype: torch.dtype, device: torch.device, pause: Callable[[], None]) -> None:
        codes = torch.arange(256, device=device)
        pairs = torch.stack((codes & 15, codes >> 4), dim=-1).to(torch.bfloat16)
        self.dtype = dtype
        self.pause = pause
        self._library = load_library(torch.get_num_threads()) if device.type == "cpu" else None
        self._pairs = pairs.view(torch.int32).flatten()
        self._codes = torch.empty(0, dtype=torch.int32, device=device)
        self._buffers: dict[str, torch.Tensor] = {}
        self._holds: dict[str, Sequence[AffineWeight]] = {}

    def dense(self, kind: str, parts: Sequence[AffineWeight]) -> torch.Tensor:
        """The rows of `parts`, stacked, [out, in]. Good until the next call for `kind` with other parts."""
        rows, width = sum(len(part.weight) for part in parts), parts[0].weight.shape[1] * 8
        buffer = self._buffers.get(kind)
        if buffer is None or len(buffer) < rows:
            buffer = torch.empty(rows, width, dtype=self.dtype, device=self._pairs.device)
            self._buffers[kind] = buffer
            self._holds.pop(kind, None)
        if self._holds.get(kind) is not parts:
            self._holds[kind] = parts
            first = 0
            for part in parts:
                self._fill(part, buffer[first : first + len(part.weight)])
                first += len(part.weight)
        return buffer[:rows]

    def _fill(self, part: AffineWeight, rows: torch.Tensor) -> None:
        if self.dtype is not torch.bfloat16:
            rows.copy_(dequantize(part, self.dtype))
            return
        if self._library is not None:
            native_unpack(self._library, part, rows)
            return
        packed = part.weight.contiguous().view(torch.uint8).flatten()
        # Kept between calls: fresh pages would cost as much as the look-up.
        if len(self._codes) < len(packed):
            self._codes = self._codes.new_empty(len(packed))
        codes = self._codes[: len(packed)].copy_(packed)
        torch.index_select(self._pairs, 0, codes, out=rows.view(torch.int32).flatten())
        scales, biases = (values.to(self.dtype).unsqueeze(-1) for values in (part.scales, part.biases))
        rows.view(len(rows), scales.shape[1], -1).mul_(scales).add_(biases)


@dataclass(frozen=True, slots=True, eq=False)
class FrozenLinear:
    """Modules that read the same input, their rows stacked.

    Attributes:
        kind: which of the workspace's buffers it uses.
        weight: a dense checkpoint's rows [out, in], or the 4-bit rows of each module.
        bias: [out] in the activation dtype, or None.
        workspace: where it becomes dense.
    """

    kind: str
    weight: torch.Tensor | tuple[AffineWeight, ...]
    bias: torch.Tensor | None
    workspace: Workspace

    def dense(self) -> torch.Tensor:
        """[out, in] in the activation dtype; see `Workspace.dense` for how long it is good.

        Every large product, forth and back, begins with it: here is where training pauses.
        """
        self.workspace.pause()
        if isinstance(self.weight, torch.Tensor):
            return self.weight
        return self.workspace.dense(self.kind, self.weight)


@dataclass(frozen=True, slots=True, eq=False)
class FrozenHead:
    """The output head, dense by blocks of rows.

    Attributes:
        blocks: (first row, layer) of each block, in order.
        vocab_size: V, rows of all.
    """

    blocks: tuple[tuple[int, FrozenLinear], ...]
    vocab_size: int

    def logits(self, hidden: torch.Tensor, columns: int) -> torch.Tensor:
        """[r, D] -> [r, columns] in hidden's dtype; columns past V hold -inf."""
        logits = hidden.new_full((len(hidden), columns), -torch.inf)
        for first, block in self.blocks:
            product = torch.nn.functional.linear(hidden, block.dense())
            logits[:, first : first + product.shape[1]] = product
        return logits

    def backward(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of the logits, [r, >= V] -> that of the hidden states, [r, D] float32."""
        total: torch.Tensor | None = None
        for first, block in self.blocks:
            weight = block.dense()
            product = (gradient[:, first : first + len(weight)] @ weight).float()
            total = product if total is None else total.add_(product)
        if total is None:
            raise ValueError("an output head without rows")
        return total


@dataclass(frozen=True, slots=True, eq=False)
class FrozenLayer:
    """One decoder layer. Norm weights are float32; linears go by the names of `layer_groups`."""

    input_norm: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    post_norm: torch.Tensor
    linears: dict[str, FrozenLinear]


@dataclass(frozen=True, slots=True, eq=False)
class FrozenModel:
    """Everything of the base that training reads."""

    embedding: Embedding
    layers: tuple[FrozenLayer, ...]
    final_norm: torch.Tensor
    head: FrozenHead


def load_frozen(loader: WeightLoader, pause: Callable[[], None]) -> FrozenModel:
    """Open the loader's folder. `pause` is called before each product with it.

    Raises:
        ModelUnreadable: a tensor is missing or has another shape.
    """
    workspace = Workspace(loader.dtype, loader.device, pause)
    prefixes = [f"model.layers.{i}" for i in range(loader.architecture.num_layers)]
    embedding = loader.embedding()
    return FrozenModel(
        embedding=embedding,
        layers=tuple(_layer(loader, prefix, workspace) for prefix in prefixes),
        final_norm=loader.norm("model.norm"),
        head=_head(loader, embedding, workspace),
    )


def _layer(loader: WeightLoader, prefix: str, workspace: Workspace) -> FrozenLayer:
    qk_norm = loader.architecture.qk_norm
    return FrozenLayer(
        input_norm=loader.norm(f"{prefix}.input_layernorm"),
        q_norm=loader.norm(f"{prefix}.self_attn.q_norm") if qk_norm else None,
        k_norm=loader.norm(f"{prefix}.self_attn.k_norm") if qk_norm else None,
        post_norm=loader.norm(f"{prefix}.post_attention_layernorm"),
        linears={
            kind: FrozenLinear(kind, _weight(loader, modules), loader.bias(modules), workspace)
            for kind, modules in layer_groups(prefix).items()
        },
    )


def _weight(loader: WeightLoader, modules: Sequence[str]) -> torch.Tensor | tuple[AffineWeight, ...]:
    if loader.architecture.quantization is None:
        return loader.dense(modules)
    return tuple(loader.affine(module) for module in modules)


def _head(
    loader: WeightLoader, embedding: DenseEmbedding | AffineEmbedding, workspace: Workspace
) -> FrozenHead:
    weight: torch.Tensor | AffineWeight
    if not loader.architecture.tied_embeddings:
        stored = _weight(loader, (loader.head_module,))
        weight = stored if isinstance(stored, torch.Tensor) else stored[0]
    else:
        # One table in memory for both.
        weight = embedding.weight if isinstance(embedding, DenseEmbedding) else embedding.table
    vocab_size = loader.architecture.vocab_size
    blocks = []
    for first in range(0, vocab_size, _HEAD_ROWS):
        rows = slice(first, first + _HEAD_ROWS)
        if isinstance(weight, AffineWeight):
            part = AffineWeight(weight.weight[rows], weight.scales[rows], weight.biases[rows])
            blocks.append((first, FrozenLinear("head", (part,), None, workspace)))
        else:
            blocks.append((first, FrozenLinear("head", weight[rows], None, workspace)))
    return FrozenHead(tuple(blocks), vocab_size)
