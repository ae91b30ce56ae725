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

    from draftloop.backends.architecture import Architecture, Quantization


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
        self._shards: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with self._open(path) as shard:
                self._shards.update(dict.fromkeys(shard.keys(), path))

    def __contains__(self, name: str) -> bool:
        return name in self._shards

    def __getitem__(self, name: str) -> torch.Tensor:
        path = self._shards.get(name)
        if path is None:
            raise ModelUnreadable(f"{self.folder} lacks the tensor {name}", remedy="Pull the model again.")
        # A mapping for each tensor: it goes with the tensor, and so do the pages of the file that it touched.
        with self._open(path) as shard:
            tensor: torch.Tensor = shard.get_tensor(name)
        return tensor

    @staticmethod
    def _open(path: Path) -> Any:
        try:
            return safe_open(str(path), framework="pt")
        except (SafetensorError, OSError) as error:
            raise ModelUnreadable(
                f"{path} cannot be read: {error}", remedy="Pull the model again."
            ) from error

    def shaped(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor that must have this shape."""
        tensor = self[name]
        if tuple(tensor.shape) != shape:
            raise ModelUnreadable(
                f"{self.folder}: {name} is {list(tensor.shape)}, config.json needs {list(shape)}",
                remedy="Pull the model again.",
            )
        return tensor

    def affine(self, module: str, shape: tuple[int, int], quantization: Quantization) -> AffineWeight:
        """A quantized [out, in] module's three tensors, its words viewed as int32."""
        out, groups = shape[0], shape[1] // quantization.group_size
        words = self.shaped(f"{module}.weight", (out, shape[1] * quantization.bits // 32))
        scales, biases = (self.shaped(f"{module}.{part}", (out, groups)) for part in ("scales", "biases"))
        return AffineWeight(words.view(torch.int32), scales, biases)


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
        tied = self.architecture.tied_embeddings
        head = self._linear(["model.embed_tokens" if tied else "lm_head"])
        embedding = self._embedding()
        linears = [m for layer in layers for m in (layer.qkv, layer.output, layer.gate_up, layer.down)]
        table = embedding.weight.nbytes if isinstance(embedding, DenseEmbedding) and not tied else 0
        return Weights(
            embedding=embedding,
            layers=layers,
            final_norm=self._norm("model.norm", self.architecture.hidden_size),
            head=head,
            num_bytes=sum(m.num_bytes for m in (*linears, head)) + table,
        )

    def _embedding(self) -> Embedding:
        name, shape = "model.embed_tokens", self._shape("model.embed_tokens")
        if self.architecture.quantization is None:
            weight = self.tensors.shaped(f"{name}.weight", shape)
            return DenseEmbedding(weight.to(self.device, self.dtype))
        # On a CPU the table stays in the mapped file and takes memory only for the rows looked up.
        table = self.tensors.affine(name, shape, self.architecture.quantization)
        if self.device.type != "cpu":
            table = AffineWeight(*(t.to(self.device) for t in (table.weight, table.scales, table.biases)))
        return AffineEmbedding(table)

    def _layer(self, index: int) -> Layer:
        prefix = f"model.layers.{index}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        hidden, width = self.architecture.hidden_size, self.architecture.head_dim
        qk_norm = self.architecture.qk_norm
        return Layer(
            input_norm=self._norm(f"{prefix}.input_layernorm", hidden),
            qkv=self._linear([f"{attention}.{name}_proj" for name in "qkv"]),
            q_norm=self._norm(f"{attention}.q_norm", width) if qk_norm else None,
            k_norm=self._norm(f"{attention}.k_norm", width) if qk_norm else None,
            output=self._linear([f"{attention}.o_proj"]),
            post_norm=self._norm(f"{prefix}.post_attention_layernorm", hidden),
            gate_up=self._linear([f"{mlp}.gate_proj", f"{mlp}.up_proj"]),
            down=self._linear([f"{mlp}.down_proj"]),
        )

    def _shape(self, module: str) -> tuple[int, int]:
        """[out, in] of a linear module, by the last part of its name; the embedding's is [V, D]."""
        table = (self.architecture.vocab_size, self.architecture.hidden_size)
        return self.architecture.linear_shapes.get(module.rpartition(".")[2], table)

    def _norm(self, module: str, width: int) -> torch.Tensor:
        return self.tensors.shaped(f"{module}.weight", (width,)).to(self.device, torch.float32)

    def _linear(self, modules: Sequence[str]) -> Linear:
        shapes = [self._shape(module) for module in modules]
        bias = None
        if f"{modules[0]}.bias" in self.tensors:
            biases = [
                self.tensors.shaped(f"{m}.bias", shape[:1]) for m, shape in zip(modules, shapes, strict=True)
            ]
            bias = torch.cat(biases).to(self.device, self.dtype)
        quantization = self.architecture.quantization
        if quantization is not None:
            parts = [
                self.tensors.affine(m, shape, quantization) for m, shape in zip(modules, shapes, strict=True)
            ]
            return int4_linear(parts, bias, quantization.group_size, self.dtype, self.device)
        rows = [
            self.tensors.shaped(f"{m}.weight", shape).to(self.device, self.dtype)
            for m, shape in zip(modules, shapes, strict=True)
        ]
        return DenseLinear(torch.cat(rows) if len(rows) > 1 else rows[0], bias)
