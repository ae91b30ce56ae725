"""What is told of an answer: the JSON contract (design §7) and the line of statistics.

Contract: rounds for people, computes no metric (they are in `speculation/metrics.py`); a figure that is
undefined is null, never NaN. Must not know where it is written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from draftloop.config import Config
    from draftloop.engine import Completion
    from draftloop.speculation.metrics import Tally


def completion_figures(completion: Completion) -> dict[str, Any]:
    """The JSON object of one answer."""
    tally = completion.tally
    return {
        "text": completion.text,
        "finish_reason": completion.finish_reason.value,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": len(completion.token_ids),
        "tokens_per_s": rounded(completion.tokens_per_s, 2),
        "rounds": tally.rounds,
        "drafted_tokens": tally.drafted_tokens,
        "accepted_tokens": tally.accepted_tokens,
        **_shares(tally),
        "adapter": completion.adapter,
        "token_ids": list(completion.token_ids),
        "seed": completion.seed,
        "prompt_tokens_per_s": rounded(_prompt_speed(completion), 2),
        "cached_tokens": completion.cached_tokens,
        "suffix_rounds": tally.suffix_rounds,
        "suffix_drafted_tokens": tally.suffix_drafted_tokens,
        "suffix_accepted_tokens": tally.suffix_accepted_tokens,
    }


def summary_figures(completions: Sequence[Completion]) -> dict[str, Any]:
    """Speed and metrics over all answers, each token and each round counted once."""
    tally, speed = total(completions)
    return {"tokens_per_s": rounded(speed, 2), **_shares(tally)}


def total(completions: Sequence[Completion]) -> tuple[Tally, float | None]:
    """All rounds together, and tokens per second over all of them."""
    from draftloop.speculation.metrics import Tally, tokens_per_second

    tally = Tally()
    for completion in completions:
        tally.merge(completion.tally)
    tokens = sum(len(completion.token_ids) for completion in completions)
    return tally, tokens_per_second(tokens, sum(completion.decode_s for completion in completions))


def setup_figures(
    config: Config, backend: str | None, adapter: str | None, *, with_draft: bool = True
) -> dict[str, Any]:
    """Which models answered, with which adapter, and on what."""
    models = {
        "target": config.models.target.name,
        "draft": config.models.draft.name if with_draft else None,
    }
    return {"adapter": adapter, "models": models, "backend": backend}


def completion_line(completion: Completion, threshold: float | str) -> str:
    """One line for people: tokens, speed, tau, alpha, acceptance."""
    cached = f" ({completion.cached_tokens} cached)" if completion.cached_tokens else ""
    start = f"{completion.prompt_tokens} prompt tokens{cached} · {len(completion.token_ids)} tokens"
    return f"{start} · {speed_line(completion.tally, completion.tokens_per_s, threshold)}"


def speed_line(tally: Tally, tokens_per_s: float | None, threshold: float | str) -> str:
    """Speed and, where something was drafted, tau, alpha and acceptance.

    Args:
        tally: of one answer or of many.
        tokens_per_s: of the same.
        threshold: `speculative.acceptance_threshold`; a rate below a number is pointed out.
    """
    parts = [f"{shown(tokens_per_s, 1)} tok/s"]
    rate = tally.acceptance_rate
    if rate is not None or tally.suffix_rounds:
        parts.append(f"tau {shown(tally.tau, 2)}")
    if tally.suffix_rounds:
        kept = f"{tally.suffix_accepted_tokens} of {tally.suffix_drafted_tokens}"
        parts.append(f"suffix matches {kept} kept")
    if rate is not None:
        parts.append(f"alpha {shown(tally.alpha, 2)}")
        below = isinstance(threshold, float | int) and rate < threshold
        note = f", below speculative.acceptance_threshold = {threshold}" if below else ""
        parts.append(f"acceptance_rate {shown(rate, 2)}{note}")
    return " · ".join(parts)


def rounded(value: float | None, digits: int) -> float | None:
    """`value` with so many digits behind the point; None stays None."""
    return None if value is None else round(value, digits)


def shown(value: float | None, digits: int) -> str:
    """`value` for people; a dash where it is undefined."""
    return "-" if value is None else f"{value:.{digits}f}"


def _shares(tally: Tally) -> dict[str, float | None]:
    return {
        "acceptance_rate": rounded(tally.acceptance_rate, 4),
        "alpha": rounded(tally.alpha, 4),
        "tau": rounded(tally.tau, 4),
    }


def _prompt_speed(completion: Completion) -> float | None:
    """Prompt tokens that were really read (the last one belongs to the first round), a second."""
    from draftloop.speculation.metrics import tokens_per_second

    read = completion.prompt_tokens - 1 - completion.cached_tokens
    return tokens_per_second(read, completion.prompt_s) if read > 0 else None
