"""The gate on the package pair: it replays what serving counted, and refuses a draft that was destroyed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from draftloop.cli.traffic import SYSTEM, quartermaster_prompts
from draftloop.config import Config, load_config
from draftloop.engine import Request
from draftloop.learning.circle import learn
from draftloop.learning.recorder import Provenance
from draftloop.learning.selection import select
from draftloop.loading import load_prepared, open_school, open_storage, pair_of, prepare, prepare_draft
from draftloop.models.messages import Message
from draftloop.speculation.metrics import tokens_per_round
from draftloop.types import Sampling
from pupils import Watched

pytestmark = [pytest.mark.real, pytest.mark.timeout(1500)]

OFFLINE = Path(__file__).parents[2] / "configs" / "offline.yaml"
NUM_DRAFT_TOKENS, MAX_TOKENS, REQUESTS = 4, 20, 40


def settings(directory: Path) -> Config:
    """All requests are failures, and one epoch over them goes a hundred times too fast."""
    overrides = [
        f"storage.directory={directory}",
        "speculative.schedule=fixed",
        f"speculative.num_draft_tokens={NUM_DRAFT_TOKENS}",
        "speculative.acceptance_threshold=1",
        "training.min_failure_cases=8",
        "training.lora.target_modules=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]",
        "training.learning_rate=1e-2",
        "training.warmup_steps=0",
        "training.num_epochs=1",
        "training.batch_size=4",
        "training.gradient_accumulation_steps=1",
        "memory.gradient_checkpointing=false",
    ]
    return load_config([OFFLINE], overrides).config


def collect(config: Config) -> None:
    """Answer the requests, greedily, and store them."""
    with open_storage(config) as store:
        engine = load_prepared(config, prepare(config), store)
        conversation = engine.open_conversation()
        request = Request(
            prompt_tokens=[],
            sampling=Sampling(temperature=0.0),
            max_tokens=MAX_TOKENS,
            num_draft_tokens=NUM_DRAFT_TOKENS,
            seed=0,
            provenance=Provenance("ship", "collect"),
        )
        for prompt in quartermaster_prompts(REQUESTS):
            tokens = engine.tokenizer.chat_tokens([Message("system", SYSTEM), Message("user", prompt)])
            engine.complete(replace(request, prompt_tokens=tokens), conversation)


def test_a_draft_that_training_destroyed_is_refused(tmp_path: Path) -> None:
    config, watched = settings(tmp_path), Watched()
    collect(config)
    with open_storage(config) as store:
        pair = pair_of(config)
        summaries = {one.id: one for one in store.requests.list(pair)}
        served = [summaries[one] for one in select(store, pair, config).gate]
        outcome = learn(open_school(config, prepare_draft(config), store), watched, lambda: False)
        assert store.adapters.active(pair) is None
    # The negative control of the refusal: this training did harm.
    assert watched.alphas[-1] < watched.alphas[0] - 0.1
    assert outcome.status == "rejected"
    # Teacher-forced, the bare draft needs the very rounds that it needed while serving.
    tokens, rounds = (sum(getattr(one, name) for one in served) for name in ("num_answer_tokens", "rounds"))
    assert outcome.tau_before == pytest.approx(tokens_per_round(tokens, rounds), rel=0.02)
