"""A folder of safetensors -> the weights of one decoder on one device.

Contract: reads dense checkpoints (bf16, fp16, fp32) and MLX affine 4-bit ones; q/k/v and gate/up are
fused at load. Must not know how a forward pass goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from draftloop.backends.architecture import tensor_shapes
from draftloop.backends.torch.linear import AffineWeight, DenseLinear, Linear, dequantize, int4_linear
from draftloop.errors import ModelUnreadable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from draftloop.backends.architecture import Architecture, Quantization
    from draftloop.backends.vocabulary import CutVocabulary


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
    """The tensors of every shard of a folder, by name, read when asked for and held to their shapes.

    Raises:
        ModelUnreadable: a shard that does not parse, a tensor that is missing or has another shape.
    """

    def __init__(self, folder: Path, architecture: Architecture) -> None:
        self.folder = folder
        self._shapes = tensor_shapes(architecture)
        self._shards: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with self._open(path) as shard:
                self._shards.update(dict.fromkeys(shard.keys(), path))

    def dense(self, name: str) -> torch.Tensor:
        """A tensor as it is."""
        return self._read(name, self._shapes[name])

    def has(self, name: str) -> bool:
        """Whether the architecture has this tensor."""
        return name in self._shapes

    def affine(self, module: str, quantization: Quantization) -> AffineWeight:
        """A quantized module's three tensors, its words viewed as int32."""
        out, width = self._shapes[f"{module}.weight"]
        words = self._read(f"{module}.weight", (out, width * quantization.bits // 32))
        groups = (out, width // quantization.group_size)
        scales, biases = (self._read(f"{module}.{part}", groups) for part in ("scales", "biases"))
        return AffineWeight(words.view(torch.int32), scales, biases)

    def _read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        path = self._shards.get(name)
        if path is None:
            raise ModelUnreadable(f"{self.folder} lacks the tensor {name}", remedy="Pull the model again.")
        # A mapping for each tensor: it goes with the tensor, and so do the pages of the file that it touched.
        with self._open(path) as shard:
            tensor: torch.Tensor = shard.get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise ModelUnreadable(
                f"{path}: {name} is {list(tensor.shape)}, config.json needs {list(shape)}",
                remedy="Pull the model again.",
            )
        return tensor

    @staticmethod
    def _open(path: Path) -> Any:
        try:
            return safe_open(str(path), framework="pt")
        except (SafetensorError, OSError) as error:
            raise ModelUnreadable(
                f"{path} cannot be read: {error}", remedy="Pull the model again."
            ) from error


def layer_groups(prefix: str) -> dict[str, tuple[str, ...]]:
    """The linear modules of the layer at `prefix`, by the field of `Layer` that stacks their rows."""
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    return {
        "qkv": tuple(f"{attention}.{name}_proj" for name in "qkv"),
        "output": (f"{attention}.o_proj",),
        "gate_up": (f"{mlp}.gate_proj", f"{mlp}.up_proj"),
        "down": (f"{mlp}.down_proj",),
    }


class WeightLoader:
    """Builds `Weights` from a folder."""

    def __init__(
        self, folder: Path, architecture: Architecture, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.architecture = architecture
        self.dtype = dtype
        self.device = device
        self.tensors = TensorFolder(folder, architecture)

    def load(self, vocabulary: CutVocabulary | None = None) -> Weights:
        """Read and pack every layer, and of the head the rows of `vocabulary`, or all."""
        layers = tuple(self._layer(f"model.layers.{i}") for i in range(self.architecture.num_layers))
        linears = [m for layer in layers for m in (layer.qkv, layer.output, layer.gate_up, layer.down)]
        embedding = self.embedding()
        shared = self.architecture.tied_embeddings and vocabulary is None
        if isinstance(embedding, DenseEmbedding) and shared:
            head: Linear = DenseLinear(embedding.weight, None)
        elif vocabulary is not None:
            head = self.head_rows(vocabulary.ids)
        else:
            head = self._linear(self.head_module)
        apart = embedding.weight.nbytes if isinstance(embedding, DenseEmbedding) and not shared else 0
        return Weights(
            embedding=embedding,
            layers=layers,
            final_norm=self.norm("model.norm"),
            head=head,
            num_bytes=sum(m.num_bytes for m in (*linears, head)) + apart,
        )

    def embedding(self) -> DenseEmbedding | AffineEmbedding:
        """The embedding. On a CPU a quantized table stays in the mapped file, but for the rows looked up."""
        name = "model.embed_tokens"
        if self.architecture.quantization is None:
            return DenseEmbedding(self.dense((name,)))
        return AffineEmbedding(self.affine(name))

    @property
    def head_module(self) -> str:
        """Whose weight the output head multiplies with."""
        return "model.embed_tokens" if self.architecture.tied_embeddings else "lm_head"

    def dense(self, modules: Sequence[str]) -> torch.Tensor:
        """Rows of a dense checkpoint's modules, stacked, in the activation dtype."""
        rows = [self.tensors.dense(f"{module}.weight").to(self.device, self.dtype) for module in modules]
        return torch.cat(rows) if len(rows) > 1 else rows[0]

    def affine(self, module: str) -> AffineWeight:
        """A quantized module's three tensors, on the device.

        Raises:
            ValueError: the checkpoint is dense.
        """
        if self.architecture.quantization is None:
            raise ValueError(f"{module} is not quantized")
        raw = self.tensors.affine(module, self.architecture.quantization)
        return AffineWeight(*(t.to(self.device) for t in (raw.weight, raw.scales, raw.biases)))

    def bias(self, modules: Sequence[str]) -> torch.Tensor | None:
        """The modules' biases in one row, in the activation dtype; None where they have none."""
        if not self.tensors.has(f"{modules[0]}.bias"):
            return None
        biases = [self.tensors.dense(f"{module}.bias") for module in modules]
        return torch.cat(biases).to(self.device, self.dtype)

    def norm(self, module: str) -> torch.Tensor:
        """A norm's weight, float32."""
        return self.tensors.dense(f"{module}.weight").to(self.device, torch.float32)

    def head_rows(self, ids: NDArray[np.int32]) -> Linear:
        """The head's rows of these ids, in their order: a copy, also where the embedding is the head."""
        rows = torch.tensor(ids, dtype=torch.long)
        quantization = self.architecture.quantization
        if quantization is None:
            weight = self.tensors.dense(f"{self.head_module}.weight")[rows]
            return DenseLinear(weight.to(self.device, self.dtype), None)
        whole = self.tensors.affine(self.head_module, quantization)
        part = AffineWeight(whole.weight[rows], whole.scales[rows], whole.biases[rows])
        return int4_linear([part], None, quantization.group_size, self.dtype, self.device)

    def _layer(self, prefix: str) -> Layer:
        attention, qk_norm = f"{prefix}.self_attn", self.architecture.qk_norm
        linears = {field: self._linear(*modules) for field, modules in layer_groups(prefix).items()}
        return Layer(
            input_norm=self.norm(f"{prefix}.input_layernorm"),
            q_norm=self.norm(f"{attention}.q_norm") if qk_norm else None,
            k_norm=self.norm(f"{attention}.k_norm") if qk_norm else None,
            post_norm=self.norm(f"{prefix}.post_attention_layernorm"),
            **linears,
        )

    def _linear(self, *modules: str) -> Linear:
        """Modules that read the same input, their rows stacked."""
        bias = self.bias(modules)
        quantization = self.architecture.quantization
        if quantization is not None:
            parts = [self.tensors.affine(module, quantization) for module in modules]
            return int4_linear(parts, bias, quantization.group_size, self.dtype, self.device)
        return DenseLinear(self.dense(modules), bias)
