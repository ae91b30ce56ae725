"""A folder of safetensors -> the weights of one decoder on one device.

Contract: reads dense checkpoints (bf16, fp16, fp32) and MLX affine 4-bit ones; q/k/v and gate/up are
fused at load. Must not know how a forward pass goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from draftloop.backends.torch.linear import AffineWeight, DenseLinear, Linear, dequantize, int4_linear
from draftloop.errors import ModelUnreadable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from draftloop.backends.architecture import Architecture


class Embedding(Protocol):
    """Token ids [T] -> [T, D] float32."""

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Look the rows up."""
        ...


@dataclass(frozen=True, slots=True)
class DenseEmbedding:
    """weight: [V, D]."""

    weight: torch.Tensor

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `Embedding`."""
        return self.weight[tokens].float()


@dataclass(frozen=True, slots=True)
class AffineEmbedding:
    """Rows stay packed; only those looked up are unpacked. On a CPU they stay in the mapped file."""

    table: AffineWeight

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `Embedding`."""
        rows = AffineWeight(self.table.weight[tokens], self.table.scales[tokens], self.table.biases[tokens])
        return dequantize(rows, torch.float32)


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer. Norm weights are float32."""

    input_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    output: Linear
    post_norm: torch.Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Weights:
    """Everything a decoder multiplies with."""

    embedding: Embedding
    layers: tuple[Layer, ...]
    final_norm: torch.Tensor
    head: Linear
    num_bytes: int


class TensorFolder:
    """The tensors of every shard of a folder, by name, read when asked for.

    Raises:
        ModelUnreadable: a shard that does not parse, or a tensor that is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                shard = safe_open(str(path), framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelUnreadable(
                    f"{path} cannot be read: {error}", remedy="Pull the model again."
                ) from error
            self._shards.update(dict.fromkeys(shard.keys(), shard))

    def __contains__(self, name: str) -> bool:
        return name in self._shards

    def __getitem__(self, name: str) -> torch.Tensor:
        shard = self._shards.get(name)
        if shard is None:
            raise ModelUnreadable(f"{self.folder} lacks the tensor {name}", remedy="Pull the model again.")
        tensor: torch.Tensor = shard.get_tensor(name)
        return tensor

    def affine(self, module: str) -> AffineWeight:
        """A quantized module's three tensors, its words viewed as int32."""
        words = self[f"{module}.weight"]
        return AffineWeight(words.view(torch.int32), self[f"{module}.scales"], self[f"{module}.biases"])


class WeightLoader:
    """Builds `Weights` from a folder."""

    def __init__(
        self, folder: Path, architecture: Architecture, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.folder = folder
        self.architecture = architecture
        self.dtype = dtype
        self.device = device
        self.tensors = TensorFolder(folder)

    def load(self) -> Weights:
        """Read and pack every layer."""
        layers = tuple(self._layer(index) for index in range(self.architecture.num_layers))
        tied = self.architecture.tied_embeddings and "lm_head.weight" not in self.tensors
        head = self._linear(["model.embed_tokens" if tied else "lm_head"])
        embedding = self._embedding()
        linears = [m for layer in layers for m in (layer.qkv, layer.output, layer.gate_up, layer.down)]
        table = embedding.weight.nbytes if isinstance(embedding, DenseEmbedding) and not tied else 0
        return Weights(
            embedding=embedding,
            layers=layers,
            final_norm=self._norm("model.norm"),
            head=head,
            num_bytes=sum(m.num_bytes for m in (*linears, head)) + table,
        )

    def _embedding(self) -> Embedding:
        if self.architecture.quantization is None:
            return DenseEmbedding(self.tensors["model.embed_tokens.weight"].to(self.device, self.dtype))
        # A mapping of its own: the loader's is dropped with the pages it touched, this one grows by
        # the rows that are looked up.
        table = TensorFolder(self.folder).affine("model.embed_tokens")
        if self.device.type != "cpu":
            table = AffineWeight(*(t.to(self.device) for t in (table.weight, table.scales, table.biases)))
        return AffineEmbedding(table)

    def _layer(self, index: int) -> Layer:
        prefix = f"model.layers.{index}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        qk_norm = self.architecture.qk_norm
        return Layer(
            input_norm=self._norm(f"{prefix}.input_layernorm"),
            qkv=self._linear([f"{attention}.{name}_proj" for name in "qkv"]),
            q_norm=self._norm(f"{attention}.q_norm") if qk_norm else None,
            k_norm=self._norm(f"{attention}.k_norm") if qk_norm else None,
            output=self._linear([f"{attention}.o_proj"]),
            post_norm=self._norm(f"{prefix}.post_attention_layernorm"),
            gate_up=self._linear([f"{mlp}.gate_proj", f"{mlp}.up_proj"]),
            down=self._linear([f"{mlp}.down_proj"]),
        )

    def _norm(self, module: str) -> torch.Tensor:
        return self.tensors[f"{module}.weight"].to(self.device, torch.float32)

    def _linear(self, modules: Sequence[str]) -> Linear:
        bias = None
        if f"{modules[0]}.bias" in self.tensors:
            bias = torch.cat([self.tensors[f"{m}.bias"] for m in modules]).to(self.device, self.dtype)
        quantization = self.architecture.quantization
        if quantization is None:
            rows = [self.tensors[f"{m}.weight"].to(self.device, self.dtype) for m in modules]
            return DenseLinear(torch.cat(rows) if len(rows) > 1 else rows[0], bias)
        parts = [self.tensors.affine(m) for m in modules]
        return int4_linear(parts, bias, quantization.group_size, self.dtype, self.device)
