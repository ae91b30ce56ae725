"""From a request's fields to what the engine is asked.

Contract: fields that were not given have the settings' values. Tokenizing and grammars take their time: this
runs in a thread of its own, never on the event loop. Must not know streams or tickets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from draftloop.answers import Request
from draftloop.learning.recorder import Provenance, domain_of
from draftloop.loading import sampling_of, suffix_tokens
from draftloop.server.openai.errors import ApiError
from draftloop.speculation.stream import check_fits
from draftloop.types import Sampling

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.requests import Request as HttpRequest

    from draftloop.models.grammar import Grammar
    from draftloop.server.openai.fields import AnswerFields
    from draftloop.server.service import Service

SOURCE = "serve"
"""Where requests come from, as it is stored beside an answer."""

ALIAS = "draftloop"
"""A model name that every server of ours answers to."""

SEED_RANGE = 2**64


@dataclass(frozen=True, slots=True)
class Subject:
    """What a request is about, as it is stored beside its answer.

    Attributes:
        system: the system message; "" where there is none.
        conversation: turns of one conversation share it; None for a request that stands alone.
    """

    system: str = ""
    conversation: str | None = None


def check_model(service: Service, name: str) -> None:
    """Refuse a model that is not served."""
    if name not in (service.model, ALIAS):
        raise ApiError(
            f"There is no model {name!r} here. Ask for {service.model!r} or {ALIAS!r}.",
            param="model",
            code="model_not_found",
            status=404,
        )


def client_of(request: HttpRequest, fields: AnswerFields) -> str:
    """Who asks: clients take turns."""
    host = "" if request.client is None else request.client.host
    return f"{host} {fields.user or ''}"


def request_of(
    service: Service,
    fields: AnswerFields,
    prompt_tokens: Sequence[int],
    *,
    max_tokens: int | None,
    subject: Subject,
    grammar: Grammar | None = None,
    stop: Sequence[str] = (),
    trace: bool = False,
) -> Request:
    """What the engine is asked.

    Args:
        service: its settings stand in for fields that were not given.
        fields: what was asked.
        prompt_tokens: framed as the model wants it.
        max_tokens: the most that the answer may have; None as the settings have it.
        subject: what it is about.
        grammar: what the answer must look like.
        stop: strings that end it, beside those of the fields.
        trace: whether log-probabilities are wanted.

    Raises:
        ContextFull: the prompt leaves no room for an answer.
        ApiError: fields contradict each other or the settings.
    """
    check_fits(len(prompt_tokens), service.max_context_tokens)
    config = service.config
    longest = max_tokens or config.generation.max_tokens
    num_draft_tokens = _num_draft_tokens(service, fields)
    return Request(
        prompt_tokens=prompt_tokens,
        sampling=_sampling(service, fields),
        max_tokens=longest,
        min_tokens=_min_tokens(service, fields, longest, constrained=grammar is not None),
        num_draft_tokens=num_draft_tokens,
        num_suffix_tokens=suffix_tokens(config) if num_draft_tokens else 0,
        stop=(*fields.stops, *stop),
        seed=None if fields.seed is None else fields.seed % SEED_RANGE,
        trace=trace,
        provenance=_provenance(service, fields, subject, constrained=grammar is not None),
        logit_bias=_logit_bias(service, fields),
        presence_penalty=fields.presence_penalty or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        grammar=grammar,
    )


def _sampling(service: Service, fields: AnswerFields) -> Sampling:
    default = sampling_of(service.config)
    return Sampling(
        temperature=default.temperature if fields.temperature is None else fields.temperature,
        top_p=default.top_p if fields.top_p is None else fields.top_p,
        top_k=default.top_k if fields.top_k is None else fields.top_k,
        min_p=default.min_p if fields.min_p is None else fields.min_p,
    )


def _min_tokens(service: Service, fields: AnswerFields, longest: int, *, constrained: bool) -> int:
    if fields.min_tokens is None:
        return min(service.config.generation.min_tokens, longest)
    if fields.min_tokens > longest:
        raise ApiError(
            f"min_tokens is {fields.min_tokens} and the answer has {longest} tokens at most.",
            param="min_tokens",
            code="invalid_value",
        )
    if constrained:
        raise ApiError(
            "min_tokens: a JSON format or a forced tool call decides alone when the answer ends.",
            param="min_tokens",
            code="invalid_value",
        )
    return fields.min_tokens


def _num_draft_tokens(service: Service, fields: AnswerFields) -> int:
    """The most that the draft proposes in a round; 0 where nobody proposes anything."""
    most = service.config.speculative.num_draft_tokens if service.with_draft else 0
    wanted = fields.num_draft_tokens
    if wanted is not None and wanted > most:
        raise ApiError(
            f"num_draft_tokens is {wanted}. This server drafts at most {most} a round.",
            param="num_draft_tokens",
            code="invalid_value",
        )
    return most if wanted is None else wanted


def _logit_bias(service: Service, fields: AnswerFields) -> dict[int, float]:
    bias = {int(token): value for token, value in (fields.logit_bias or {}).items()}
    check_tokens(service, list(bias), "logit_bias")
    return bias


def check_tokens(service: Service, token_ids: Sequence[int], param: str) -> None:
    """Refuse ids beyond the vocabulary."""
    unknown = [token for token in token_ids if token >= service.vocab_size]
    if unknown:
        raise ApiError(
            f"{param}: there is no token {unknown[0]}. They go from 0 to {service.vocab_size - 1}.",
            param=param,
            code="invalid_value",
        )


def _provenance(
    service: Service, fields: AnswerFields, subject: Subject, *, constrained: bool
) -> Provenance | None:
    """What is stored beside the answer; None where nothing is.

    Alpha under a grammar, a bias or penalties is another one than alpha without, so those are domains of
    their own: requests are compared within one.
    """
    if fields.store is False or not service.config.storage.collect:
        return None
    kinds = {
        "grammar": constrained,
        "bias": any((fields.logit_bias or {}).values()),
        "penalties": bool(fields.presence_penalty or fields.frequency_penalty),
    }
    domain = " + ".join([domain_of(subject.system), *(kind for kind, is_so in kinds.items() if is_so)])
    return Provenance(domain, SOURCE, conversation=subject.conversation)
