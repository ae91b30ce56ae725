"""Answers under a JSON schema: the target alone, speculation, and speculation by a draft that is not masked.

Every way on the same prompts, interleaved, greedy: each prompt has one answer. Tells tokens
a second, acceptance, and what one row's mask takes, walking along an answer.

    python benchmarks/grammar.py [--config FILE] [--repeats N] [--max-tokens N] [--num-draft-tokens N]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from draftloop.config import load_config
from draftloop.engine import Engine, Request
from draftloop.loading import load_engine
from draftloop.models.grammar import Grammar, Grammars
from draftloop.models.messages import Message
from draftloop.speculation.experience import Experience
from draftloop.speculation.processors import Steering
from draftloop.speculation.suffix import SuffixIndex
from draftloop.types import Sampling

if TYPE_CHECKING:
    from collections.abc import Sequence

SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "year": {"type": "integer", "minimum": 0, "maximum": 2100},
        "genres": {"type": "array", "items": {"type": "string"}, "minItems": 2, "maxItems": 3},
        "rating": {"type": "string", "enum": ["good", "mixed", "poor"]},
        "cast": {
            "type": "array",
            "minItems": 2,
            "maxItems": 3,
            "items": {
                "type": "object",
                "properties": {"actor": {"type": "string"}, "role": {"type": "string"}},
                "required": ["actor", "role"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["title", "year", "genres", "rating", "cast"],
    "additionalProperties": False,
}
PROMPTS = (
    "Describe the film Casablanca as JSON: title, year, genres, rating and cast.",
    "Describe the film The Matrix.",
    "Invent a film about a lighthouse keeper, and describe it as one JSON object.",
    "Describe the film Alien in a few fields.",
)


class Unmasked:
    """A draft that knows of no processor."""

    def __init__(self, model):
        self._model = model

    def __getattr__(self, name):
        return getattr(self._model, name)

    def propose(self, batch):
        """As if nothing were added."""
        return self._model.propose([replace(job, rules=replace(job.rules, processor=None)) for job in batch])


def masks(grammar: Grammar, answer: Sequence[int], vocab_size: int) -> tuple[list[float], list[float]]:
    """Seconds of each row along an answer: the library's mask alone, and the whole row that is added."""
    state, walk_s = grammar.start(), []
    for place in range(len(answer)):
        began_s = time.perf_counter()
        state.allowed(answer[:place])
        walk_s.append(time.perf_counter() - began_s)
    processor, row_s = Steering(grammar=grammar).processor(vocab_size), []
    for place in range(len(answer)):
        began_s = time.perf_counter()
        processor.bias(answer[:place])
        row_s.append(time.perf_counter() - began_s)
    return walk_s, row_s


def run(engine: Engine, request: Request, draft) -> object:
    """One answer by this draft, at a constant K and without suffix matches."""
    engine.pair = replace(engine.pair, draft=draft)
    return engine.complete(request, experience=Experience(None, SuffixIndex(0)))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("configs/offline.yaml"))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=100)
    parser.add_argument("--num-draft-tokens", type=int, default=4)
    args = parser.parse_args()
    engine = load_engine(load_config([args.config], []).config)
    size = engine.pair.target.architecture.vocab_size
    began_s = time.perf_counter()
    grammars = Grammars(engine.tokenizer, size)
    grammar = grammars.json_schema(SCHEMA)
    print(f"V {size}; laying the tokens and compiling: {time.perf_counter() - began_s:.2f} s")
    began_s = time.perf_counter()
    Grammars.json_object(grammars)
    print(f"compiling another: {1e3 * (time.perf_counter() - began_s):.1f} ms")
    draft = engine.pair.draft
    ways = {
        "target": (0, draft, grammar),
        "masked": (args.num_draft_tokens, draft, grammar),
        "unmasked": (args.num_draft_tokens, Unmasked(draft), grammar),
        "no grammar, target": (0, draft, None),
        "no grammar, speculating": (args.num_draft_tokens, draft, None),
    }
    found = {name: [] for name in ways}
    for prompt in PROMPTS * args.repeats:
        for name, (k, drafts, chosen) in ways.items():
            tokens = engine.tokenizer.chat_tokens([Message("user", prompt)])
            request = Request(tokens, Sampling(), args.max_tokens, k, seed=0, grammar=chosen)
            found[name].append(run(engine, request, drafts))
        print(prompt, "->", found["masked"][-1].text)
    same = sum(a.token_ids == b.token_ids for a, b in zip(found["target"], found["masked"], strict=True))
    print(f"the target's own answer in {same} of {len(found['target'])}")
    for name, answers in found.items():
        drafted, kept = (
            sum(getattr(a.tally, f"{what}_tokens") for a in answers) for what in ("drafted", "accepted")
        )
        speeds = [a.tokens_per_s for a in answers]
        rate = f"{kept}/{drafted} = {kept / drafted:.3f}" if drafted else "-"
        print(f"{name:24} {median(speeds):6.2f} tokens/s  accepted {rate}")
    for name, base in (("masked", "target"), ("unmasked", "target"), ("target", "no grammar, target")):
        ratios = [a.tokens_per_s / b.tokens_per_s for a, b in zip(found[name], found[base], strict=True)]
        print(f"{name} / {base}: median {median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")
    walk_s, row_s = masks(grammar, found["target"][0].token_ids, size)
    for name, seconds in (("mask", walk_s), ("row", row_s)):
        print(f"{name}: median {1e3 * median(seconds):.2f} ms, highest {1e3 * max(seconds):.2f} ms")


if __name__ == "__main__":
    main()
