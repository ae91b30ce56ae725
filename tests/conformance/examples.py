"""What the tests of learning are made of: adapters, texts of toy targets as examples, the reference's loss.

Contract: what is expected comes from the NumPy reference, in float64 where derivatives are taken. Knows
other backends only by the seam.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from draftloop.backends.architecture import read_architecture
from draftloop.backends.lora import AdapterForm, Lora, LoraModule, LoraSpec, new_lora
from draftloop.backends.numpy.acceptance import draw, warp
from draftloop.backends.numpy.decoder import Decoder, NumpyCache
from draftloop.backends.numpy.objectives import logit_gradients, loss_rows
from draftloop.backends.numpy.weights import read_weights
from draftloop.backends.training import Example
from draftloop.errors import BackendUnavailable
from draftloop.speculation.round import decode
from draftloop.speculation.stream import Conversation, DecodeSettings, Pair, Stream, read_prompt
from draftloop.types import TRACE_TOP_TOKENS, Rules, Sampling

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from draftloop.backends.architecture import Architecture
    from draftloop.backends.base import Backend, Model
    from draftloop.backends.training import Objective, Trainer, TrainerSettings
    from draftloop.speculation.round import Round

ALL_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SPEC = LoraSpec(rank=4, alpha=8.0, target_modules=ALL_MODULES)

GREEDY = Rules(Sampling())
PLAIN = Rules(Sampling(temperature=1.0))
NUCLEUS = Rules(Sampling(temperature=0.7, top_p=0.9))
MASKED = Rules(
    Sampling(temperature=0.9, top_k=25, min_p=0.01), masked_ids=tuple(range(0, 272, 3)), masked_rows=5
)
MASKED_GREEDY = Rules(Sampling(), masked_ids=tuple(range(0, 272, 3)), masked_rows=5)
RULES = {
    "greedy": GREEDY,
    "plain": PLAIN,
    "nucleus": NUCLEUS,
    "masked": MASKED,
    "masked greedy": MASKED_GREEDY,
}

STEP = 1e-6
"""Of central differences in float64: rounding and the third derivative both stay below 1e-8."""


def random_lora(architecture: Architecture, spec: LoraSpec = SPEC, seed: int = 0, gain: float = 0.5) -> Lora:
    """An adapter that changes something: B is normal too, `gain` times as large as would keep x's size."""
    random = np.random.default_rng(seed)
    fresh = new_lora(architecture, spec, seed)
    return Lora(
        spec,
        {
            name: LoraModule(
                module.a,
                (random.standard_normal(module.b.shape) * gain / np.sqrt(spec.rank)).astype(np.float32),
            )
            for name, module in fresh.modules.items()
        },
    )


def rounds_of(pair: Pair, prompt: Sequence[int], settings: DecodeSettings) -> list[Round]:
    """All rounds of one answer in a fresh conversation."""
    conversation = Conversation(pair)
    for _ in read_prompt(pair, conversation, prompt):
        pass
    return list(decode(pair, Stream(conversation, settings)))


def tokens_of(rounds: Sequence[Round]) -> tuple[int, ...]:
    """What the rounds emitted."""
    return tuple(token for outcome in rounds for token in outcome.tokens)


def random_prompt(seed: int, length: int, vocab_size: int = 256) -> tuple[int, ...]:
    """Some ids."""
    return tuple(np.random.default_rng(seed).integers(0, vocab_size, length).tolist())


def written_by(target: Model, prompt: Sequence[int], rules: Rules, max_tokens: int, seed: int = 0) -> Example:
    """An example of the target's own answer to `prompt`, with its p at every row."""
    cache, random, tokens = target.new_cache(), np.random.default_rng(seed), list(prompt)
    for row in range(max_tokens):
        logits = target.logits(cache, tokens[cache.position :])[-1:]
        p = warp(logits, rules.sampling, rules.masked_ids, rules.masked_rows - row)[0]
        tokens.append(draw(p, random.random()))
    return example_of(target, tokens, len(prompt), rules)


def example_of(target: Model, tokens: Sequence[int], num_prompt_tokens: int, rules: Rules) -> Example:
    """What the target says of a text, teacher-forced: its 32 likeliest tokens at every response row."""
    logits = target.logits(target.new_cache(), tokens[:-1])[num_prompt_tokens - 1 :]
    sampling = Sampling(temperature=1.0) if rules.sampling.greedy else rules.sampling
    p = warp(logits, sampling, rules.masked_ids, rules.masked_rows)
    ids = np.argsort(-p, axis=1, kind="stable")[:, :TRACE_TOP_TOKENS]
    return _example(tokens, num_prompt_tokens, ids, np.take_along_axis(p, ids, axis=1), rules)


def example_of_traces(prompt: Sequence[int], rounds: Sequence[Round], settings: DecodeSettings) -> Example:
    """What was measured while decoding, as an example: p at temperature 1, warped here as it was served.

    Only where 32 tokens tell the warped p exactly: greedy (which keeps temperature 1), temperature 1
    without a filter, or a top-k that is well inside the 32.
    """
    sampling = settings.sampling
    plain = sampling.greedy or sampling == Sampling(temperature=1.0)
    assert plain or 0 < sampling.top_k <= TRACE_TOP_TOKENS // 2
    rules = Rules(sampling, tuple(sorted(settings.eos_token_ids)), settings.min_tokens - 1)
    traces = [outcome.trace for outcome in rounds if outcome.trace is not None]
    ids = np.concatenate([trace.top_ids for trace in traces])
    scores = np.concatenate([trace.top_logprobs for trace in traces]).astype(np.float64)
    tail = np.log(np.maximum(np.concatenate([trace.tail_mass for trace in traces]), 1e-30))
    scores[: rules.masked_rows][np.isin(ids[: rules.masked_rows], rules.masked_ids)] = -np.inf
    scores = np.concatenate([scores, tail[:, None] if plain else np.full((len(tail), 1), -np.inf)], axis=1)
    p = warp(scores.astype(np.float32), Sampling(temperature=1.0) if plain else sampling)
    return _example((*prompt, *tokens_of(rounds)), len(prompt), ids, p[:, :-1], rules)


def _example(
    tokens: Sequence[int], num_prompt_tokens: int, ids: NDArray[Any], probs: NDArray[Any], rules: Rules
) -> Example:
    top_probs = probs.astype(np.float32)
    return Example(
        tokens=np.array(tokens, np.int32),
        num_prompt_tokens=num_prompt_tokens,
        top_ids=ids.astype(np.int32),
        top_probs=top_probs,
        tail_probs=np.maximum(1 - top_probs.sum(axis=1, dtype=np.float64), 0).astype(np.float32),
        rules=rules,
    )


def one_of_each(target: Model) -> list[Example]:
    """Five texts of a target, one for each of `RULES`, of different lengths."""
    return [
        written_by(target, random_prompt(i, 3 + 4 * i), rules, 14 - 2 * i, seed=i)
        for i, rules in enumerate(RULES.values())
    ]


def random_example(
    rules: Rules,
    *,
    num_prompt_tokens: int,
    num_rows: int,
    vocab_size: int,
    num_top: int = TRACE_TOP_TOKENS,
    seed: int = 0,
) -> Example:
    """A text and a p that no model ever gave: for shapes that would be slow to write with one."""
    random = np.random.default_rng(seed)
    p = random.dirichlet(np.full(num_top + 1, 0.5), num_rows)
    ids = [random.choice(vocab_size, num_top, replace=False) for _ in range(num_rows)]
    tokens = random.integers(0, vocab_size, num_prompt_tokens + num_rows)
    return _example(
        tokens.tolist(), num_prompt_tokens, np.reshape(ids, (num_rows, num_top)), p[:, :-1], rules
    )


def shuffled(example: Example, seed: int) -> Example:
    """The same text with what the target said of one row put beside another."""
    order = np.random.default_rng(seed).permutation(example.num_rows)
    return replace(
        example,
        top_ids=example.top_ids[order],
        top_probs=example.top_probs[order],
        tail_probs=example.tail_probs[order],
    )


@dataclass(frozen=True, slots=True)
class ReferenceDraft:
    """A folder's model in float64, to take derivatives of."""

    decoder: Decoder
    architecture: Architecture

    @classmethod
    def of(cls, folder: Path) -> ReferenceDraft:
        """Read a folder; quantized weights are unpacked."""
        architecture = read_architecture(folder)
        weights = read_weights(folder, architecture.quantization)
        wide = {name: value.astype(np.float64) for name, value in weights.items()}
        return cls(Decoder(architecture, wide), architecture)

    def logits(self, lora: Lora, example: Example) -> NDArray[np.float64]:
        """[R, V] of the response rows."""
        self.decoder.set_adapter(lora, AdapterForm.UNFUSED)
        cache = NumpyCache(self.architecture, len(example.tokens), self.decoder.dtype)
        return self.decoder.forward(cache, example.tokens[:-1].tolist())[example.num_prompt_tokens - 1 :]

    def loss(self, lora: Lora, objective: Objective, examples: Sequence[Example]) -> float:
        """Mean over all rows."""
        rows = [loss_rows(objective, self.logits(lora, one), one) for one in examples]
        return float(np.concatenate(rows).mean())

    def slopes_of_logits(
        self, lora: Lora, name: str, part: str, direction: NDArray[np.float64], examples: Sequence[Example]
    ) -> list[NDArray[np.float64]]:
        """How the logits of each example change as one matrix goes along `direction`: [R, V] each."""
        ahead, behind = (_moved(lora, name, part, sign * STEP * direction) for sign in (1, -1))
        return [(self.logits(ahead, one) - self.logits(behind, one)) / (2 * STEP) for one in examples]

    def slope_of_loss(
        self,
        lora: Lora,
        objective: Objective,
        examples: Sequence[Example],
        slopes: Sequence[NDArray[np.float64]],
    ) -> float:
        """The chain rule: the mean loss's slope where the logits have `slopes`."""
        total = sum(
            float((logit_gradients(objective, self.logits(lora, one), one) * slope).sum())
            for one, slope in zip(examples, slopes, strict=True)
        )
        return total / sum(one.num_rows for one in examples)


def open_trainer(backend: Backend, folder: Path, lora: Lora, plan: TrainerSettings) -> Trainer:
    """A trainer; skips the test where the backend says that it does not train."""
    try:
        return backend.new_trainer(folder, lora, plan)
    except BackendUnavailable as unavailable:
        pytest.skip(unavailable.what)


def gradients_of(moments: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float64]]:
    """By tensor, `<module>.a` and `<module>.b`: after one step m is (1 - beta 1) times the gradient."""
    return {
        name.removesuffix(".m"): 10 * moment.astype(np.float64)
        for name, moment in moments.items()
        if name.endswith(".m")
    }


def assert_slopes(
    draft: ReferenceDraft,
    lora: Lora,
    objective: Objective,
    examples: Sequence[Example],
    gradients: Mapping[str, NDArray[np.float64]],
    tolerance: float,
) -> None:
    """Along two random directions of each tensor the gradient rises as the reference's loss does.

    A gradient that is off by a vector d misses by about |d| along a random direction, so no error hides
    from both for long; `tolerance` is over the gradient's own length.
    """
    random = np.random.default_rng(0)
    for key, gradient in gradients.items():
        name, _, part = key.rpartition(".")
        length = np.linalg.norm(gradient)
        assert length > 0, key
        for _ in range(2):
            direction = random.standard_normal(gradient.shape)
            slopes = draft.slopes_of_logits(lora, name, part, direction, examples)
            expected = draft.slope_of_loss(lora, objective, examples, slopes)
            found = float((gradient * direction).sum())
            assert abs(found - expected) <= 3 * tolerance * length, key


def _moved(lora: Lora, name: str, part: str, by: NDArray[np.float64]) -> Lora:
    module = lora.modules[name]
    parts: dict[str, Any] = {"a": module.a, "b": module.b}
    parts[part] = parts[part].astype(np.float64) + by
    return Lora(lora.spec, {**lora.modules, name: LoraModule(**parts)})
