"""transformers' assisted generation, to be measured against: its modules on the weights of our folders.

Contract: token ids in, the time of each round out; nothing of ours is in the loop. Must not know benchmarks.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from draftloop.backends.architecture import read_architecture, tensor_shapes
from draftloop.backends.torch.linear import dequantize
from draftloop.backends.torch.weights import TensorFolder
from draftloop.errors import ModelUnreadable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from draftloop.types import Sampling


class AssistedGeneration:
    """A pair as modules of transformers, in bfloat16; 4-bit weights are unpacked at load.

    Args:
        target, draft: folders; without a draft the target decodes alone.
        num_draft_tokens: K, kept constant; transformers still stops a draft early at its own confidence
            threshold.
        eos_token_ids: any of them ends an answer.
        threads: of the processor.
        device: `auto` (a GPU where there is one), `cpu` or `gpu`.
    """

    def __init__(
        self,
        target: Path,
        draft: Path | None,
        *,
        num_draft_tokens: int,
        eos_token_ids: Sequence[int],
        threads: int,
        device: str,
    ) -> None:
        torch.set_num_threads(threads)
        self.device = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
        self._model = load_dense(target, self.device)
        self._eos_token_ids = sorted(eos_token_ids)
        self._assistant = None if draft is None else load_dense(draft, self.device)
        if self._assistant is not None:
            self._assistant.generation_config.num_assistant_tokens = num_draft_tokens
            self._assistant.generation_config.num_assistant_tokens_schedule = "constant"

    def bursts(
        self, prompt_tokens: Sequence[int], max_tokens: int, sampling: Sampling, seed: int
    ) -> list[tuple[float, int]]:
        """When each round was over, in seconds, and how many tokens it gave."""
        torch.manual_seed(seed)
        clock = _Clock()
        prompt = torch.tensor([list(prompt_tokens)], device=self.device)
        self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=self._settings(max_tokens, sampling),
            assistant_model=self._assistant,
            streamer=clock,
        )
        return clock.bursts

    def _settings(self, max_tokens: int, sampling: Sampling) -> GenerationConfig:
        drawing: dict[str, Any] = {"do_sample": False}
        if not sampling.greedy:
            drawing = {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "min_p": sampling.min_p or None,
            }
        return GenerationConfig(
            max_new_tokens=max_tokens,
            eos_token_id=self._eos_token_ids,
            pad_token_id=self._eos_token_ids[0],
            **drawing,
        )


class _Clock(BaseStreamer):
    """Notes when tokens come. transformers hands over the prompt first, then each round's tokens."""

    def __init__(self) -> None:
        self.bursts: list[tuple[float, int]] = []
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Note one round."""
        if self._prompt_seen:
            self.bursts.append((time.perf_counter(), value.numel()))
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is left to be noted."""


def load_dense(folder: Path, device: str) -> Any:
    """The folder's model as transformers' module in bfloat16.

    Raises:
        ModelUnreadable: transformers knows other tensors for it than the folder holds.
    """
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # An affine checkpoint's own entries: what is loaded here is dense.
    for key in ("quantization", "quantization_config"):
        values.pop(key, None)
    config = AutoConfig.for_model(**values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    missing, unknown = model.load_state_dict(dense_tensors(folder), strict=False, assign=True)
    model.tie_weights()
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    if unknown or missing != tied:
        raise ModelUnreadable(
            f"transformers knows other tensors than {folder} holds: {[*missing, *unknown][:3]}",
            remedy="Leave transformers out of the modes.",
        )
    return model.to(device).eval()


def dense_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the folder in bfloat16."""
    architecture = read_architecture(folder)
    tensors, quantization = TensorFolder(folder, architecture), architecture.quantization
    dense = {}
    for name, shape in tensor_shapes(architecture).items():
        if quantization is not None and len(shape) == 2:
            weight = tensors.affine(name.removesuffix(".weight"), quantization)
            dense[name] = dequantize(weight, torch.bfloat16)
        else:
            dense[name] = tensors.dense(name).to(torch.bfloat16)
    return dense
