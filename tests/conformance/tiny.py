"""A pair whose 40 tokens make distributions cheap to draw from, and rules that are wrong on purpose."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from draftloop.backends.numpy.acceptance import draw, warp

VOCABULARY = 40
TINY = {
    "vocab_size": VOCABULARY,
    "num_layers": 1,
    "hidden_size": 32,
    "num_heads": 2,
    "num_kv_heads": 1,
    "intermediate_size": 32,
    "noise": 0.25,
}
PROMPT = (3, 11, 19, 16, 16, 1)


class AcceptsAlways:
    """A wrong rule: every guess is kept that has any probability. The output follows q."""

    def __init__(self, model):
        self._model = model

    def __getattr__(self, name):
        return getattr(self._model, name)

    def verify(self, batch):
        return self._model.verify(
            [replace(j, accept_uniforms=np.zeros_like(j.accept_uniforms)) for j in batch]
        )


class RecoversFromP(AcceptsAlways):
    """A wrong rule: after a rejection the token is drawn from p, not from norm(max(p - q, 0))."""

    def verify(self, batch):
        return [self._one(job) for job in batch]

    def _one(self, job):
        verdict = self._model.verify([job])[0]
        kept, k = verdict.accepted_tokens, len(verdict.drafted_tokens)
        if kept == k:
            return verdict
        job.cache.trim(k + 1)
        logits = self._model.logits(job.cache, (job.last, *verdict.drafted_tokens))
        p = warp(logits, job.rules.sampling, job.rules.masked_ids, job.rules.masked_rows)
        return replace(verdict, extra_token=draw(p[kept], float(job.extra_uniforms[kept])))


class WithAnotherQ:
    """A draft whose tokens are drawn as they should be, and whose q is then misread."""

    def __init__(self, model):
        self._model = model

    def __getattr__(self, name):
        return getattr(self._model, name)

    def propose(self, batch):
        proposals = self._model.propose(batch)
        return [replace(one, q=self.misread(one.q, job)) for one, job in zip(proposals, batch, strict=True)]


class ForgetsTheMap(WithAnotherQ):
    """Wrong: the columns of the cut head are taken for the ids 0 to n."""

    def misread(self, q, job):
        # [0, 2, 4, …, 1, 3, …]: what was kept stands at the front.
        return q.reshape(-1, VOCABULARY // 2, 2).swapaxes(1, 2).reshape(-1, VOCABULARY)


class TakesQForUncut(WithAnotherQ):
    """Wrong: q is that of the whole head, from which the tokens were not drawn."""

    def __init__(self, model, whole):
        super().__init__(model)
        self._whole = whole

    def misread(self, q, job):
        cache = self._whole.new_cache()
        (proposal,) = self._whole.propose([replace(job, cache=cache, unread=PROMPT)])
        return proposal.q


def second_tokens(target, sampling):
    """p of the first token [V], and of the second one [V], after PROMPT."""
    cache = target.new_cache()
    first = warp(target.logits(cache, PROMPT)[-1:], sampling)[0]
    second = np.zeros_like(first)
    for token in np.flatnonzero(first):
        second += first[token] * warp(target.logits(cache, (int(token),)), sampling)[0]
        cache.trim(1)
    return first, second
